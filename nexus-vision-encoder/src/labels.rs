//! What a vision encoder is trained to tell of every token: embeddings -> classes of known labels.
//!
//! An embedding that tells by a plain linear map what is there can be looked up by one attention head. The head that
//! reads them is thrown away afterwards.

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor, activation::log_softmax},
};
use nexus_core::nn::{Linear, index_tensor};

/// Reads several labels of tokens from their embeddings.
#[derive(Module, Debug)]
pub struct LabelHead {
    /// `[sum of classes, hidden]`: the scores of one label after those of another.
    pub scores: Linear,
    #[module(skip)]
    classes: Vec<usize>,
}

impl LabelHead {
    /// A lazily initialised head for embeddings of width `hidden` and labels with these numbers of classes.
    pub fn new(hidden: usize, classes: &[usize], device: &Device) -> Self {
        Self { scores: Linear::new(hidden, classes.iter().sum(), device), classes: classes.to_vec() }
    }

    /// Cross entropy of the labels of some tokens in f32, the mean over labels and tokens; gradients reach the head and
    /// the embeddings.
    ///
    /// # Shapes
    /// - `embeds`: `[tokens, hidden]`
    /// - `labels`: one class per token and label, token by token
    /// - returns: `[1]`
    ///
    /// # Panics
    /// If there is no token, if `labels` has another length, or if a class is none of its label's.
    pub fn loss(&self, embeds: Tensor<2>, labels: &[u8]) -> Tensor<1> {
        let [tokens, _] = embeds.dims();
        let fields = self.classes.len();
        assert!(tokens > 0 && labels.len() == tokens * fields, "one class per token and label");
        let device = embeds.device();
        let scores = self.scores.forward(embeds).cast(DType::F32);
        let mut start = 0;
        let losses = self.classes.iter().enumerate().map(|(field, &classes)| {
            let ids = labels.iter().skip(field).step_by(fields).map(|&class| usize::from(class));
            assert!(ids.clone().all(|id| id < classes), "label {field} has {classes} classes");
            let ids = index_tensor(ids, [tokens, 1], &device);
            start += classes;
            log_softmax(scores.clone().narrow(1, start - classes, classes), 1).gather(1, ids).mean().neg()
        });
        Tensor::cat(losses.collect(), 0).mean()
    }
}

#[cfg(test)]
mod tests {
    use nexus_core::{
        checkpoint::WeightNames,
        testing::{assert_close, cpu, ramp},
        train::GradientSum,
    };

    use super::*;

    #[test]
    fn the_loss_is_the_mean_of_the_cross_entropies() {
        let head = LabelHead::new(4, &[2, 3], &cpu());
        let embeds = ramp([3, 4], 1);
        let scores: Vec<f32> = head.scores.forward(embeds.clone()).into_data().try_into_vec_as().unwrap();
        let labels = [0, 2, 1, 1, 1, 0];
        let cross_entropy = |scores: &[f32], class: u8| {
            scores.iter().map(|score| score.exp()).sum::<f32>().ln() - scores[usize::from(class)]
        };
        let expected: f32 = (0..3)
            .map(|token| {
                let scores = &scores[5 * token..][..5];
                cross_entropy(&scores[..2], labels[2 * token]) + cross_entropy(&scores[2..], labels[2 * token + 1])
            })
            .sum();
        assert_close(&head.loss(embeds, &labels), &[expected / 6.0], 1e-6);
    }

    #[test]
    fn gradients_reach_the_head() {
        let head = LabelHead::new(4, &[2, 3], &cpu().autodiff());
        let loss = head.loss(Tensor::from_inner(ramp([3, 4], 1)), &[0, 2, 1, 1, 1, 0]);
        let mut sum = GradientSum::new();
        sum.add(loss.backward(), &head, &WeightNames::default());
        assert_eq!(sum.len(), 2);
        assert!(sum.norm().unwrap() > 0.0);
    }

    #[test]
    #[should_panic(expected = "label 1 has 3 classes")]
    fn a_class_out_of_range_is_refused() {
        LabelHead::new(4, &[2, 3], &cpu()).loss(ramp([1, 4], 1), &[0, 3]);
    }
}
