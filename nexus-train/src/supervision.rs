//! What is known of a conversation, in its tokens: what they show, where they should look, what must not be ruled out.

use std::ops::Range;

use burn::tensor::Tensor;
use nexus_ar::AnswerEmbeds;
use nexus_core::GridThw;
use nexus_kernels::index_tensor;
use nexus_vision_encoder::{ExcludedClass, LabelHead};

/// What is known of a conversation; nothing by default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Supervision {
    /// What the tokens of each image show, those that are given before those that are answers; `None`, or no images at all,
    /// where that is not known.
    pub images: Vec<Option<TokenLabels>>,
    /// Where tokens should look in the layer that finds what is meant.
    pub attended: Vec<TokenLooks>,
    /// Where tokens should look in the layer after it, which uses what was found.
    pub selected: Vec<TokenLooks>,
    /// Tokens that do not compete with labels.
    pub possible: Vec<PossibleToken>,
}

/// What every token of an image shows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenLabels {
    /// One class per token and label, token by token, with the labels of [`LabelClasses`](crate::LabelClasses) in order.
    pub classes: Vec<u8>,
    /// Classes that do not compete with a label.
    pub possible: Vec<PossibleClass>,
}

/// Tokens and where each of them should look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenLooks {
    /// The tokens that look.
    pub queries: Vec<usize>,
    /// The tokens before them where they should look.
    pub tokens: Vec<usize>,
}

/// A token that could stand in the place of a label as well: a model that learned that it cannot be would be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PossibleToken {
    /// Index of the label.
    pub index: usize,
    /// The token's id.
    pub id: u32,
}

/// A class that a token could show as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PossibleClass {
    /// Index of the token in its image.
    pub token: usize,
    /// Index of the label.
    pub label: usize,
    /// The class.
    pub class: u8,
}

/// Images in order, with what their tokens show where it is known.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shown {
    images: Vec<(GridThw, Option<TokenLabels>)>,
    /// Whether classes that are possible stay out of the losses.
    spares_possible: bool,
}

impl Shown {
    /// No images yet.
    pub(crate) fn new(spares_possible: bool) -> Self {
        Self { images: Vec::new(), spares_possible }
    }

    pub(crate) fn push(&mut self, grid: GridThw, labels: Option<TokenLabels>) {
        self.images.push((grid, labels));
    }

    pub(crate) fn grids(&self) -> Vec<GridThw> {
        self.images.iter().map(|(grid, _)| *grid).collect()
    }

    /// Cross entropy of the first `count` labels of every token of which they are known; `None` if there is nothing to
    /// learn it from.
    ///
    /// # Shapes
    /// - `x`: `[tokens, width]` of all images
    pub(crate) fn label_loss(&self, head: &LabelHead, count: usize, x: Tensor<2>) -> Option<Tensor<1>> {
        let (mut rows, mut labels, mut excluded, mut start) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for (grid, known) in &self.images {
            let image: Range<usize> = start..start + grid.num_merged_tokens();
            start = image.end;
            let Some(TokenLabels { classes, possible }) = known else { continue };
            let first = rows.len();
            let per_token = classes.len() / image.len();
            assert!(per_token >= count && classes.len() == per_token * image.len(), "one class per token and label");
            if self.spares_possible {
                let asked = possible.iter().filter(|possible| possible.label < count);
                excluded.extend(asked.map(|&PossibleClass { token, label, class }| ExcludedClass {
                    token: first + token,
                    label,
                    class: usize::from(class),
                }));
            }
            labels.extend(classes.chunks(per_token).flat_map(|of_token| &of_token[..count]));
            rows.extend(image);
        }
        if rows.is_empty() {
            return None;
        }
        let rows = index_tensor(rows.iter().copied(), [rows.len()], &x.device());
        Some(head.loss(x.select(0, rows), &labels, &excluded))
    }

    /// As [`Shown::label_loss`] of predicted embeddings of answers.
    ///
    /// The head learns from the true ones too, so that it asks the predicted ones for nothing else.
    pub(crate) fn answer_label_loss(&self, head: &LabelHead, count: usize, answers: AnswerEmbeds) -> Option<Tensor<1>> {
        let AnswerEmbeds { predicted, truth } = answers;
        let both =
            Self { images: [&self.images[..], &self.images[..]].concat(), spares_possible: self.spares_possible };
        both.label_loss(head, count, Tensor::cat(vec![predicted, Tensor::from_inner(truth)], 0))
    }
}
