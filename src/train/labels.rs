//! What is known of pictures, as losses: what their tokens show, and which tokens an answer is about.

use burn::tensor::{Int, Tensor};
use nexus_ar::AnswerEmbeds;
use nexus_core::GridThw;
use nexus_data::{
    TrainingInput,
    world::{LABEL_CLASSES, Place, Scene, token_places},
};
use nexus_vision_encoder::LabelHead;

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

/// Where the answers of a conversation are about: for the token before the first of each answer, the tokens of those
/// places of the image before it.
pub(super) fn attended_tokens(
    TrainingInput { token_ids, labels, grids, .. }: &TrainingInput,
    places: &[Vec<Place>],
    image_token: u32,
) -> Vec<(usize, Vec<usize>)> {
    let (mut grids, mut answers, mut latest) = (grids.iter(), places.iter(), None);
    let mut found = Vec::new();
    for index in 1..token_ids.len() {
        if token_ids[index] == image_token && token_ids[index - 1] != image_token {
            latest = grids.next().map(|grid| (index, grid));
        }
        if labels[index - 1].is_some() || labels[index].is_none() {
            continue;
        }
        if let (Some(places), Some((start, grid))) = (answers.next(), latest) {
            let tokens = token_places(grid.merged_h(), grid.merged_w()).into_iter().enumerate();
            let tokens: Vec<usize> =
                tokens.filter(|(_, place)| places.contains(place)).map(|(token, _)| start + token).collect();
            found.extend((!tokens.is_empty()).then_some((index - 1, tokens)));
        }
    }
    found
}

/// Images in order, with the truth of each where it is known.
#[derive(Debug, Clone, Default)]
pub(super) struct Shown {
    pub(super) grids: Vec<GridThw>,
    pub(super) scenes: Vec<Option<Scene>>,
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
        let both = Self { grids: self.grids.repeat(2), scenes };
        both.label_loss(head, Tensor::cat(vec![predicted, Tensor::from_inner(truth)], 0))
    }

    fn loss(&self, head: &LabelHead, x: Tensor<2>, last: impl Fn(Place) -> Option<u8>) -> Option<Tensor<1>> {
        let (mut rows, mut labels, mut start) = (Vec::new(), Vec::new(), 0);
        for (grid, scene) in self.grids.iter().zip(&self.scenes) {
            let end = start + grid.num_merged_tokens() as i64;
            if let Some(scene) = scene {
                rows.extend(start..end);
                let (height, width) = (grid.merged_h(), grid.merged_w());
                for (token, place) in scene.token_labels(height, width).into_iter().zip(token_places(height, width)) {
                    labels.extend(token);
                    labels.extend(last(place));
                }
            }
            start = end;
        }
        if rows.is_empty() {
            return None;
        }
        let rows = Tensor::<1, Int>::from_data(rows.as_slice(), &x.device());
        Some(head.loss(x.select(0, rows), &labels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: u32 = 9;

    #[test]
    fn answers_look_at_the_latest_image() {
        let question = |answer: &[u32]| (vec![1, 2], answer.to_vec());
        let grid = GridThw::new(1, 6, 6).unwrap();
        let picture = [&[7][..], &[IMAGE; 9], &[8]].concat();
        // A picture, two answers, an answer that is a picture, and a question about that.
        let turns =
            [([&picture[..], &[1]].concat(), vec![3, 4]), question(&[3]), question(&picture), question(&[5, 6])];
        let (mut token_ids, mut labels) = (vec![0], vec![None]);
        let mut starts = vec![];
        for (prompt, answer) in &turns {
            token_ids.extend(prompt);
            labels.resize(token_ids.len(), None);
            starts.push(token_ids.len() - 1);
            token_ids.extend(answer);
            labels.extend(answer.iter().copied().map(Some));
        }
        let input = TrainingInput {
            text: String::new(),
            token_ids,
            labels,
            input_images: vec![],
            answer_images: vec![],
            grids: vec![grid, grid],
        };
        let places = [vec![Place(0), Place(5)], vec![], vec![Place(8)], vec![Place(2)]];
        let drawn = starts[2] + 2;
        let expected = vec![(starts[0], vec![2, 7]), (starts[2], vec![10]), (starts[3], vec![drawn + 2])];
        assert_eq!(attended_tokens(&input, &places, IMAGE), expected);
        assert!(attended_tokens(&input, &[], IMAGE).is_empty());
    }
}
