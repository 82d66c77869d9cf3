//! What a vision encoder is trained to tell of every token: embeddings -> classes of known labels.
//!
//! An embedding that tells by a plain linear map what is there can be looked up by one attention head. The head that
//! reads them is thrown away afterwards.

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor, activation::log_softmax},
};
use nexus_core::nn::Linear;
use nexus_kernels::{index_tensor, without_scores};

/// A class that does not compete for a label of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExcludedClass {
    /// Index of the token.
    pub token: usize,
    /// Index of the label.
    pub label: usize,
    /// The class.
    pub class: usize,
}

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
    /// The classes in `excluded` do not compete with the right one: their scores get no gradient.
    ///
    /// # Shapes
    /// - `embeds`: `[tokens, hidden]`
    /// - `labels`: one class per token and label, token by token
    /// - returns: `[1]`
    ///
    /// # Panics
    /// If there is no token, if `labels` has another length, if a class is none of its label's, or if the right one is
    /// excluded.
    pub fn loss(&self, embeds: Tensor<2>, labels: &[u8], excluded: &[ExcludedClass]) -> Tensor<1> {
        let [tokens, _] = embeds.dims();
        let fields = self.classes.len();
        assert!(tokens > 0 && labels.len() == tokens * fields, "one class per token and label");
        let device = embeds.device();
        let mut scores = self.scores.forward(embeds).cast(DType::F32);
        if !excluded.is_empty() {
            let columns = excluded.iter().map(|&ExcludedClass { token, label, class }| {
                assert!(class < self.classes[label] && usize::from(labels[token * fields + label]) != class, "{class}");
                (token, self.classes[..label].iter().sum::<usize>() + class)
            });
            scores = without_scores(scores, columns);
        }
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
    use nexus_checkpoint::WeightNames;
    use nexus_core::testing::{assert_close, cpu, gradients_by_name, norm, ramp};

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
        assert_close(&head.loss(embeds, &labels, &[]), &[expected / 6.0], 1e-6);
    }

    #[test]
    fn what_is_excluded_does_not_compete() {
        let device = cpu().autodiff();
        let head = LabelHead::new(4, &[2, 3], &device);
        let embeds = Tensor::from_inner(ramp([2, 4], 1));
        let scores: Vec<f32> = head.scores.forward(embeds.clone()).into_data().try_into_vec_as().unwrap();
        let excluded = ExcludedClass { token: 1, label: 1, class: 2 };
        let sum = |scores: &[f32]| scores.iter().map(|score| score.exp()).sum::<f32>().ln();
        // Labels 0 and 2 of the first token, 1 and 0 of the second, which has but two classes left.
        let expected = [
            sum(&scores[..2]) - scores[0],
            sum(&scores[2..5]) - scores[4],
            sum(&scores[5..7]) - scores[6],
            sum(&scores[7..9]) - scores[7],
        ];
        let expected = expected.iter().sum::<f32>() / 4.0;
        assert_close(&head.loss(embeds, &[0, 2, 1, 0], &[excluded]).inner(), &[expected], 1e-6);

        let excluded = [0, 1].map(|token| ExcludedClass { token, label: 1, class: 1 });
        let loss = head.loss(Tensor::from_inner(ramp([2, 4], 1)), &[0, 2, 1, 0], &excluded);
        let gradients = gradients_by_name(loss.backward(), &head, &WeightNames::default());
        let bias: Vec<f32> = gradients["scores.bias"].to_data().try_into_vec_as().unwrap();
        assert!(bias[3] == 0.0 && bias.iter().filter(|&&gradient| gradient != 0.0).count() == 4, "{bias:?}");
    }

    #[test]
    fn gradients_reach_the_head() {
        let head = LabelHead::new(4, &[2, 3], &cpu().autodiff());
        let loss = head.loss(Tensor::from_inner(ramp([3, 4], 1)), &[0, 2, 1, 1, 1, 0], &[]);
        let gradients = gradients_by_name(loss.backward(), &head, &WeightNames::default());
        assert_eq!(gradients.len(), 2);
        assert!(norm(&gradients) > 0.0);
    }

    #[test]
    #[should_panic(expected = "label 1 has 3 classes")]
    fn a_class_out_of_range_is_refused() {
        LabelHead::new(4, &[2, 3], &cpu()).loss(ramp([1, 4], 1), &[0, 3], &[]);
    }
}
