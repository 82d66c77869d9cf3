//! What is known of pictures, as losses: what their tokens show.

use burn::tensor::Tensor;
use nexus_ar::AnswerEmbeds;
use nexus_core::GridThw;
use nexus_data::world::{LABEL_CLASSES, Place, Scene, token_places, unseen_labels};
use nexus_kernels::index_tensor;
use nexus_vision_encoder::{ExcludedClass, LabelHead};

/// Numbers of classes of the labels of hidden states: those of [`LABEL_CLASSES`], and the place.
pub(super) const STATE_CLASSES: [usize; LABEL_CLASSES.len() + 1] = {
    let mut classes = [Place::ALL.len(); LABEL_CLASSES.len() + 1];
    let mut index = 0;
    while index < LABEL_CLASSES.len() {
        classes[index] = LABEL_CLASSES[index];
        index += 1;
    }
    classes
};

/// Images in order, with the truth of each where it is known.
#[derive(Debug, Clone, Default)]
pub(super) struct Shown {
    pub(super) grids: Vec<GridThw>,
    pub(super) scenes: Vec<Option<Scene>>,
    /// Whether classes that training never shows together stay out of the losses.
    pub(super) exclude_unseen: bool,
}

impl Shown {
    /// The truth of all images of a sample, if every one is known.
    pub(super) fn scenes_of(scenes: Vec<Scene>, images: usize) -> Vec<Option<Scene>> {
        match scenes.len() == images {
            true => scenes.into_iter().map(Some).collect(),
            false => vec![None; images],
        }
    }

    pub(super) fn push(&mut self, grid: GridThw, scene: Option<Scene>) {
        self.grids.push(grid);
        self.scenes.push(scene);
    }

    /// Cross entropy of what the tokens of known scenes show; `None` if there is nothing to learn it from.
    ///
    /// # Shapes
    /// - `x`: `[tokens, width]` of all images
    pub(super) fn label_loss(&self, head: &LabelHead, x: Tensor<2>) -> Option<Tensor<1>> {
        self.loss(head, x, |_| None)
    }

    /// As [`Shown::label_loss`], with the place of every token for a last label.
    pub(super) fn label_and_place_loss(&self, head: &LabelHead, x: Tensor<2>) -> Option<Tensor<1>> {
        self.loss(head, x, |place| Some(place.0))
    }

    /// As [`Shown::label_loss`] of predicted embeddings of answers.
    ///
    /// The head learns from the true ones too, so that it asks the predicted ones for nothing else.
    pub(super) fn answer_label_loss(&self, head: &LabelHead, answers: AnswerEmbeds) -> Option<Tensor<1>> {
        let AnswerEmbeds { predicted, truth } = answers;
        let scenes = [&self.scenes[..], &self.scenes[..]].concat();
        let both = Self { grids: self.grids.repeat(2), scenes, exclude_unseen: self.exclude_unseen };
        both.label_loss(head, Tensor::cat(vec![predicted, Tensor::from_inner(truth)], 0))
    }

    fn loss(&self, head: &LabelHead, x: Tensor<2>, last: impl Fn(Place) -> Option<u8>) -> Option<Tensor<1>> {
        let (mut rows, mut labels, mut excluded, mut start) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for (grid, scene) in self.grids.iter().zip(&self.scenes) {
            let end = start + grid.num_merged_tokens();
            if let Some(scene) = scene {
                let (first, height, width) = (rows.len(), grid.merged_h(), grid.merged_w());
                rows.extend(start..end);
                let known = scene.token_labels(height, width).into_iter().zip(token_places(height, width));
                for (token, (known, place)) in known.enumerate() {
                    if self.exclude_unseen {
                        excluded.extend(unseen_labels(&known).into_iter().map(|(label, class)| ExcludedClass {
                            token: first + token,
                            label,
                            class: usize::from(class),
                        }));
                    }
                    labels.extend(known);
                    labels.extend(last(place));
                }
            }
            start = end;
        }
        if rows.is_empty() {
            return None;
        }
        let count = rows.len();
        let rows = index_tensor(rows, [count], &x.device());
        Some(head.loss(x.select(0, rows), &labels, &excluded))
    }
}
