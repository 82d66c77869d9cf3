//! A loss that says where the model should look: hidden states -> how little attention goes to the right tokens.

use burn::tensor::{Bool, DType, Tensor, TensorData, activation::log_softmax};
use nexus_core::nn::{DecoderLayer, SelfAttention};
use nexus_kernels::{RotaryTable, index_tensor, matmul, rotate_half};

use crate::{ArModel, TrainingBatch};

/// Tokens of a sample and those before them that each of them should attend to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attended {
    /// Number of the sample within the batch.
    pub sample: usize,
    /// The tokens that look, within the sample.
    pub queries: Vec<usize>,
    /// Where they should look, within the sample.
    pub tokens: Vec<usize>,
}

impl ArModel {
    /// Cross entropy of looking at the right tokens: the mean of `-log` of the attention that goes to them, over what
    /// `attended` lists, over the queries of each and over the first query head of every key head of a layer; `None` if
    /// it lists nothing.
    ///
    /// # Shapes
    /// - `states`: `[rows, hidden]` of the batch, what goes into the layer
    /// - returns: f32 `[1]`
    ///
    /// # Panics
    /// If there is no such layer, sample or token, or if the states are not those of the batch.
    pub fn attention_loss(
        &self,
        states: &Tensor<2>,
        batch: &TrainingBatch,
        layer: usize,
        attended: &[Attended],
    ) -> Option<Tensor<1>> {
        let config = self.config();
        let heads_per_key = config.num_attention_heads / config.num_key_value_heads;
        let head_dim = config.hidden_size / config.num_attention_heads;
        let heads: Vec<usize> = (0..config.num_attention_heads).step_by(heads_per_key).collect();
        let layer = &self.model.layers[layer];
        let (mut losses, mut shares) = (Vec::new(), Vec::new());
        for (sample, (start, tokens)) in batch.sample_rows().enumerate() {
            let here = attended.iter().filter(|attended| attended.sample == sample);
            let here: Vec<(usize, &Attended)> =
                here.flat_map(|attended| attended.queries.iter().map(move |&query| (query, attended))).collect();
            if here.is_empty() {
                continue;
            }
            let x: Tensor<3> = states.clone().narrow(0, start, tokens).unsqueeze();
            let rotary: RotaryTable = self.rotary_table(&batch.positions[start..start + tokens], &x);
            let queries: Vec<usize> = here.iter().map(|(query, _)| *query).collect();
            let mut right = vec![0f32; here.len() * tokens];
            for (row, (_, attended)) in right.chunks_mut(tokens).zip(&here) {
                attended.tokens.iter().for_each(|&token| row[token] = 1.0);
            }
            let right = TensorData::new(right, [here.len(), tokens]);
            let right = Tensor::<2>::from_data(right, (&states.device(), DType::F32));
            let weights = log_attention(layer, x, &rotary, head_dim, &heads, &queries).exp();
            losses.push((weights * right.unsqueeze::<3>()).sum_dim(2).reshape([-1]));
            let share = |(_, attended): &(usize, &Attended)| 1.0 / attended.queries.len() as f32;
            let of_sample: Vec<f32> = here.iter().map(share).collect();
            shares.extend(of_sample.repeat(heads.len()));
        }
        (!losses.is_empty()).then(|| {
            let total: f32 = shares.iter().sum();
            let shares = Tensor::<1>::from_data(shares.as_slice(), (&states.device(), DType::F32));
            ((Tensor::cat(losses, 0) + 1e-9).log() * shares).sum().neg() / total
        })
    }
}

/// Logarithms of the weights with which some tokens of one sequence attend, causally, in some query heads of a layer.
///
/// # Shapes
/// - `x`: `[1, tokens, hidden]`, what goes into the layer
/// - `rotary`: the table for these tokens
/// - returns: f32 `[heads.len(), queries.len(), tokens]`
///
/// # Panics
/// If there is no such head or token.
fn log_attention(
    layer: &DecoderLayer,
    x: Tensor<3>,
    rotary: &RotaryTable,
    head_dim: usize,
    heads: &[usize],
    queries: &[usize],
) -> Tensor<3> {
    let SelfAttention { q_proj, k_proj, .. } = &layer.self_attn;
    let [_, tokens, hidden] = x.dims();
    let device = x.device();
    let indices = |values: &[usize]| index_tensor(values.iter().copied(), [values.len()], &device);
    let in_heads = |x: Tensor<3>| {
        let [batch, tokens, width] = x.dims();
        x.reshape([batch, tokens, width / head_dim, head_dim])
    };
    let normed = layer.input_layernorm.forward(x);
    let keys = rotate_half(in_heads(k_proj.forward(normed.clone())), rotary);
    let rows = indices(queries);
    let at_rows = |table: &Tensor<3>| table.clone().select(1, rows.clone());
    let table = RotaryTable { cos: at_rows(&rotary.cos), sin: at_rows(&rotary.sin) };
    let q = rotate_half(in_heads(q_proj.forward(normed.select(1, rows.clone()))), &table);
    let [_, _, key_heads, _] = keys.dims();
    let key_of: Vec<usize> = heads.iter().map(|head| head * key_heads / (hidden / head_dim)).collect();
    let chosen = |x: Tensor<4>, heads: &[usize]| {
        x.squeeze_dim::<3>(0).select(1, indices(heads)).swap_dims(0, 1).cast(DType::F32)
    };
    let scores = matmul(chosen(q, heads), chosen(keys, &key_of).swap_dims(1, 2)) / (head_dim as f64).sqrt();
    let hidden_from = |query: &usize| (0..tokens).map(|token| token > *query).collect::<Vec<_>>();
    let mask: Vec<bool> = queries.iter().flat_map(hidden_from).collect();
    let mask = Tensor::<2, Bool>::from_data(TensorData::new(mask, [queries.len(), tokens]), &device);
    let mask = mask.unsqueeze::<3>().expand([heads.len(), queries.len(), tokens]);
    log_softmax(scores.mask_fill(mask, -1e9), 2)
}

#[cfg(test)]
mod tests {
    use burn::tensor::FloatDType;
    use nexus_core::{
        nn::{DecoderLayerConfig, MultimodalRotary, Recomputation},
        testing::{assert_close, assert_close_tensors, cpu, ramp},
    };
    use nexus_kernels::Visibility;

    use super::*;
    use crate::{
        ArObjective,
        training_batch::tests::{editing, tiny, words},
    };

    fn model() -> ArModel {
        ArModel::new(&tiny(), &cpu().autodiff()).unwrap()
    }

    fn states(model: &ArModel, batch: &TrainingBatch) -> Tensor<2> {
        ArObjective::default()
            .output(model, batch, FloatDType::F32, 1..2, &mut Recomputation::none())
            .unwrap()
            .states
            .remove(0)
    }

    fn loss(model: &ArModel, batch: &TrainingBatch, attended: &[Attended]) -> f32 {
        let loss = model.attention_loss(&states(model, batch), batch, 1, attended).unwrap();
        loss.into_data().try_into_vec_as::<f32>().unwrap()[0]
    }

    #[test]
    fn attention_is_shared_out_among_what_comes_before() {
        let model = model();
        let both = TrainingBatch::new(vec![words(), editing()], &tiny()).unwrap();
        let at =
            |sample, tokens: std::ops::Range<usize>| Attended { sample, queries: vec![10], tokens: tokens.collect() };
        assert!(loss(&model, &both, &[at(1, 0..11)]).abs() < 1e-5);
        assert!((loss(&model, &both, &[at(1, 11..20)]) + 1e-9f32.ln()).abs() < 1e-3);
        let parts = [0..4, 4..11].map(|tokens| loss(&model, &both, &[at(1, tokens)]));
        assert!((parts.iter().map(|loss| (-loss).exp()).sum::<f32>() - 1.0).abs() < 1e-5, "{parts:?}");
        assert!(parts.iter().all(|&loss| loss > 0.05), "{parts:?}");
        // Queries share what counts as one.
        let several = Attended { sample: 1, queries: vec![10, 9, 10], tokens: (0..4).collect() };
        let other = Attended { sample: 1, queries: vec![9], tokens: (0..4).collect() };
        let expected = (2.0 * parts[0] + loss(&model, &both, &[other])) / 3.0;
        assert!((loss(&model, &both, std::slice::from_ref(&several)) - expected).abs() < 1e-5);
        let with_one = loss(&model, &both, &[several, at(1, 4..11)]);
        assert!((with_one - (expected + parts[1]) / 2.0).abs() < 1e-5);
        // The mean over what is listed, and the same in a batch of its own.
        let mean = (parts[0] + parts[1]) / 2.0;
        assert!((loss(&model, &both, &[at(1, 0..4), at(1, 4..11)]) - mean).abs() < 1e-5);
        let alone = TrainingBatch::new(vec![editing()], &tiny()).unwrap();
        let states = states(&model, &alone);
        let found = model.attention_loss(&states, &alone, 1, &[at(0, 0..4)]).unwrap();
        assert_close(&found, &[parts[0]], 1e-5);
        assert!(model.attention_loss(&states, &alone, 1, &[]).is_none());
    }

    #[test]
    fn values_weighted_by_the_attention_are_what_the_layer_attends_to() {
        let config = DecoderLayerConfig {
            hidden_size: 32,
            intermediate_size: 40,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            rms_norm_eps: 1e-6,
        };
        let layer = config.init(&cpu());
        let table = MultimodalRotary::new(8, 1e6, [2, 1, 1]).table(&[0.0, 1.0, 2.0, 3.0, 4.0].map(|p| [p; 3]), &cpu());
        let x = ramp([1, 5, 32], 4) * 3.0;
        let normed = layer.input_layernorm.forward(x.clone());
        let expected = layer.self_attn.forward(normed.clone(), &table, Visibility::Causal, None);
        let values: Tensor<4> = layer.self_attn.v_proj.forward(normed).reshape([1, 5, 2, 8]);
        let queries = [4, 0, 2];
        let weights = log_attention(&layer, x, &table, 8, &[0, 1, 2, 3], &queries).exp();
        let heads = (0..4).map(|head| {
            let weights = weights.clone().narrow(0, head, 1).squeeze_dim::<2>(0);
            weights.matmul(values.clone().narrow(2, head / 2, 1).reshape([5, 8]))
        });
        let found = layer.self_attn.o_proj.forward(Tensor::cat(heads.collect(), 1).unsqueeze::<3>());
        for (row, query) in queries.into_iter().enumerate() {
            assert_close_tensors(&found.clone().narrow(1, row, 1), &expected.clone().narrow(1, query, 1), 1e-5);
        }
    }

    #[test]
    fn gradients_reach_queries_and_keys_of_the_layer() {
        let (model, batch) = (model(), TrainingBatch::new(vec![editing()], &tiny()).unwrap());
        let attended = [Attended { sample: 0, queries: vec![10], tokens: vec![3, 4] }];
        let gradients = model.attention_loss(&states(&model, &batch), &batch, 1, &attended).unwrap().backward();
        let attention = &model.model.layers[1].self_attn;
        for projection in [&attention.q_proj, &attention.k_proj] {
            let gradient = projection.weight.val().grad(&gradients).unwrap();
            assert!(gradient.abs().max().into_data().try_into_vec_as::<f32>().unwrap()[0] > 0.0);
        }
        assert!(attention.v_proj.weight.val().grad(&gradients).is_none());
    }
}
