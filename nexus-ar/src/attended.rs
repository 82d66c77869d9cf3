//! A loss that says where the model should look: hidden states -> how little attention goes to the right tokens.

use burn::tensor::{DType, Tensor, TensorData};
use nexus_kernels::RotaryTable;

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
            let weights = layer.log_attention(x, &rotary, &heads, &queries).exp();
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

#[cfg(test)]
mod tests {
    use burn::tensor::FloatDType;
    use nexus_core::{
        nn::Recomputation,
        testing::{assert_close, cpu},
    };

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
