//! A loss that says where the model should look: hidden states -> how little attention goes to the right tokens.

use burn::tensor::{DType, Tensor, TensorData};
use nexus_core::nn::RotaryTable;

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
    /// Whether they should look at all of these alike, or at any.
    pub evenly: bool,
}

impl ArModel {
    /// How far the attention is from the right tokens: `-log` of what goes to them, or, if they are to be looked at evenly, the
    /// divergence of the attention from an even share for each of them, `mean(-log a) - log(count)`. It is the mean over
    /// what `attended` lists, over the queries of each and over the first query head of every key head of a layer; `None`
    /// if it lists nothing.
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
            let per_row = |values: Vec<f32>| {
                let data = TensorData::new(values, [1, here.len(), 1]);
                Tensor::<3>::from_data(data, (&states.device(), DType::F32))
            };
            let counts = per_row(here.iter().map(|(_, attended)| attended.tokens.len() as f32).collect());
            let evenly = per_row(here.iter().map(|(_, attended)| f32::from(u8::from(attended.evenly))).collect());
            let right = TensorData::new(right, [1, here.len(), tokens]);
            let right = Tensor::<3>::from_data(right, (&states.device(), DType::F32));
            let logs = layer.log_attention(x, &rotary, &heads, &queries);
            let any = ((logs.clone().exp() * right.clone()).sum_dim(2) + 1e-9).log();
            let all = (logs * right).sum_dim(2) / counts.clone() + counts.log();
            let looked: Tensor<3> = all * evenly.clone() + any * (evenly.neg() + 1.0);
            losses.push(looked.reshape([-1]));
            let share = |(_, attended): &(usize, &Attended)| 1.0 / attended.queries.len() as f32;
            let of_sample: Vec<f32> = here.iter().map(share).collect();
            shares.extend(of_sample.repeat(heads.len()));
        }
        (!losses.is_empty()).then(|| {
            let total: f32 = shares.iter().sum();
            let shares = Tensor::<1>::from_data(shares.as_slice(), (&states.device(), DType::F32));
            (Tensor::cat(losses, 0) * shares).sum().neg() / total
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::FloatDType;
    use nexus_core::testing::{assert_close, cpu};

    use super::*;
    use crate::{
        ArObjective,
        training_batch::tests::{editing, tiny, words},
    };

    fn model() -> ArModel {
        ArModel::new(&tiny(), &cpu().autodiff()).unwrap()
    }

    fn states(model: &ArModel, batch: &TrainingBatch) -> Tensor<2> {
        ArObjective::default().output(model, batch, FloatDType::F32, 1..2).unwrap().states.remove(0)
    }

    fn loss(model: &ArModel, batch: &TrainingBatch, attended: &[Attended]) -> f32 {
        let loss = model.attention_loss(&states(model, batch), batch, 1, attended).unwrap();
        loss.into_data().try_into_vec_as::<f32>().unwrap()[0]
    }

    #[test]
    fn attention_is_shared_out_among_what_comes_before() {
        let model = model();
        let both = TrainingBatch::new(vec![words(), editing()], &tiny()).unwrap();
        let at = |sample, tokens: std::ops::Range<usize>| Attended {
            sample,
            queries: vec![10],
            tokens: tokens.collect(),
            evenly: false,
        };
        assert!(loss(&model, &both, &[at(1, 0..11)]).abs() < 1e-5);
        assert!((loss(&model, &both, &[at(1, 11..20)]) + 1e-9f32.ln()).abs() < 1e-3);
        let parts = [0..4, 4..11].map(|tokens| loss(&model, &both, &[at(1, tokens)]));
        assert!((parts.iter().map(|loss| (-loss).exp()).sum::<f32>() - 1.0).abs() < 1e-5, "{parts:?}");
        assert!(parts.iter().all(|&loss| loss > 0.05), "{parts:?}");
        // Queries share what counts as one.
        let several = Attended { sample: 1, queries: vec![10, 9, 10], tokens: (0..4).collect(), evenly: false };
        let other = Attended { sample: 1, queries: vec![9], tokens: (0..4).collect(), evenly: false };
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
    fn an_even_look_costs_what_it_is_apart_from_even_shares() {
        let (model, batch) = (model(), TrainingBatch::new(vec![editing()], &tiny()).unwrap());
        let at = |tokens: &[usize], evenly| Attended { sample: 0, queries: vec![10], tokens: tokens.to_vec(), evenly };
        let single = |token| loss(&model, &batch, &[at(&[token], false)]);
        assert!((loss(&model, &batch, &[at(&[3], true)]) - single(3)).abs() < 1e-5, "one token is any of one");
        let expected = (2..6).map(single).sum::<f32>() / 4.0 - 4f32.ln();
        let evenly = loss(&model, &batch, &[at(&[2, 3, 4, 5], true)]);
        assert!((evenly - expected).abs() < 1e-5, "{evenly} {expected}");
        let any = loss(&model, &batch, &[at(&[2, 3, 4, 5], false)]);
        assert!(evenly > any, "{evenly} {any}");
        let both = loss(&model, &batch, &[at(&[2, 3, 4, 5], true), at(&[2, 3, 4, 5], false)]);
        assert!((both - (evenly + any) / 2.0).abs() < 1e-5);
    }

    #[test]
    fn gradients_reach_queries_and_keys_of_the_layer() {
        let (model, batch) = (model(), TrainingBatch::new(vec![editing()], &tiny()).unwrap());
        let attended = [Attended { sample: 0, queries: vec![10], tokens: vec![3, 4], evenly: true }];
        let gradients = model.attention_loss(&states(&model, &batch), &batch, 1, &attended).unwrap().backward();
        let attention = &model.model.layers[1].self_attn;
        for projection in [&attention.q_proj, &attention.k_proj] {
            let gradient = projection.weight.val().grad(&gradients).unwrap();
            assert!(gradient.abs().max().into_data().try_into_vec_as::<f32>().unwrap()[0] > 0.0);
        }
        assert!(attention.v_proj.weight.val().grad(&gradients).is_none());
    }
}
