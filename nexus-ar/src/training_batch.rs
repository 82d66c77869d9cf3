//! Training samples: token ids, labels and image embeddings -> a checked, padded batch with the places of everything.

use std::collections::BTreeMap;

use nexus_core::{GridThw, ImageEmbeds};

use crate::{ArConfig, ArError, NUM_IMAGE_TOKENS, position_ids};

/// One conversation to learn from.
#[derive(Debug, Clone)]
pub struct TrainingSample {
    /// Ids of prompt and reply, image tokens expanded.
    pub token_ids: Vec<u32>,
    /// The token itself where it is to be learned, `None` elsewhere (the original's -100); one per token, not shifted.
    ///
    /// An image whose tokens have labels is an answer: its embeddings are learned.
    pub labels: Vec<Option<u32>>,
    /// Embeddings of the images that are not answers, in order, each of batch 1.
    pub inputs: Vec<ImageEmbeds>,
    /// Embeddings of the answers, in order, each of batch 1 and 81 tokens.
    pub targets: Vec<ImageEmbeds>,
}

/// A sample before its images are encoded.
#[derive(Debug, Clone, Copy)]
pub struct SampleOutline<'a> {
    /// As in [`TrainingSample`].
    pub token_ids: &'a [u32],
    /// As in [`TrainingSample`].
    pub labels: &'a [Option<u32>],
    /// Sizes of the images that are not answers, in order.
    pub inputs: &'a [GridThw],
    /// Sizes of the answers, in order.
    pub targets: &'a [GridThw],
}

/// A token that does not compete for a label: its score at that place is not a part of the cross entropy.
///
/// For what training never shows and the model should not learn to rule out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExcludedToken {
    /// Index of the sample in its batch.
    pub sample: usize,
    /// Index of the label in the sample.
    pub index: usize,
    /// The token that does not compete, another one than the label.
    pub id: u32,
}

/// Samples in groups of about the same length, padded on the right.
///
/// Neighbours share a group, so samples that are given in the order of their lengths need the least padding. Attention
/// is causal, so that no token sees the padding, and the padding has no labels: it changes no loss.
#[derive(Debug, Clone)]
pub struct TrainingBatch {
    pub(crate) groups: Vec<Group>,
    /// Ids whose embeddings are looked up, each once.
    pub(crate) vocabulary: Vec<u32>,
    /// `[rows]`, of one group after the other.
    pub(crate) row_sources: Vec<RowSource>,
    /// `[rows]`.
    pub(crate) positions: Vec<[i64; 3]>,
    pub(crate) inputs: Vec<ImageEmbeds>,
    pub(crate) targets: Vec<ImageEmbeds>,
    /// Rows whose next token is learned, and that token.
    pub(crate) text_labels: Vec<(usize, u32)>,
    /// Indices into `text_labels`, and tokens that do not compete there.
    pub(crate) excluded: Vec<(usize, u32)>,
    /// Rows whose next token is an embedding of an answer, in the order of `targets`.
    pub(crate) image_labels: Vec<usize>,
}

/// Neighbouring samples that are padded to the same length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) samples: usize,
    pub(crate) tokens: usize,
}

/// Part of a sample's length that may be padding.
const PADDING_SHARE: usize = 8;

/// What stands at a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowSource {
    /// Token of this index into the batch's vocabulary.
    Token(usize),
    /// Embedding of an input image, counted over the batch.
    Input(usize),
    /// Embedding of an answer, counted over the batch.
    Answer(usize),
}

impl TrainingBatch {
    /// Checks samples and lays them out for a model of these sizes.
    ///
    /// # Errors
    /// [`ArError::EmptyBatch`]; [`ArError::Sample`] naming the sample, with one of [`ArError::EmptyPrompt`],
    /// [`ArError::PromptTooLong`], [`ArError::LabelCount`], [`ArError::Label`], [`ArError::NoLabels`],
    /// [`ArError::TokenOutOfVocabulary`], [`ArError::EmbedWidth`], [`ArError::EmbedBatch`], [`ArError::ImageCount`],
    /// [`ArError::ImageTokens`], [`ArError::AnswerImages`], [`ArError::AnswerTokens`].
    pub fn new(samples: Vec<TrainingSample>, config: &ArConfig) -> Result<Self, ArError> {
        let lengths: Vec<usize> = samples.iter().map(|sample| sample.token_ids.len()).collect();
        if lengths.is_empty() {
            return Err(ArError::EmptyBatch);
        }
        let groups = groups(&lengths);
        let padded: Vec<usize> =
            groups.iter().flat_map(|group| std::iter::repeat_n(group.tokens, group.samples)).collect();
        let mut batch = Self {
            groups,
            vocabulary: vec![],
            row_sources: vec![],
            positions: vec![],
            inputs: vec![],
            targets: vec![],
            text_labels: vec![],
            excluded: vec![],
            image_labels: vec![],
        };
        let mut rows = RowCounter::default();
        for (index, (sample, tokens)) in samples.into_iter().zip(padded).enumerate() {
            batch
                .push(sample, tokens, config, &mut rows)
                .map_err(|source| ArError::Sample { index, source: Box::new(source) })?;
        }
        Ok(batch)
    }

    /// Takes tokens out of the competition for some labels.
    ///
    /// # Errors
    /// [`ArError::ExcludedToken`] if there is no label of text there, or if it is that token itself.
    pub fn exclude(&mut self, excluded: &[ExcludedToken]) -> Result<(), ArError> {
        let starts: Vec<usize> = self.sample_rows().map(|(start, _)| start).collect();
        for &ExcludedToken { sample, index, id } in excluded {
            let row = starts.get(sample).zip(index.checked_sub(1)).map(|(start, before)| start + before);
            let label = row.and_then(|row| self.text_labels.binary_search_by_key(&row, |&(row, _)| row).ok());
            match label.filter(|&label| self.text_labels[label].1 != id) {
                Some(label) => self.excluded.push((label, id)),
                None => return Err(ArError::ExcludedToken { sample, index, id }),
            }
        }
        Ok(())
    }

    fn push(
        &mut self,
        sample: TrainingSample,
        padded: usize,
        config: &ArConfig,
        rows: &mut RowCounter,
    ) -> Result<(), ArError> {
        let TrainingSample { token_ids, labels, inputs, targets } = sample;
        check_images(inputs.iter().chain(&targets), config)?;
        let [input_grids, target_grids] =
            [&inputs, &targets].map(|images| images.iter().map(|image| image.grid).collect::<Vec<_>>());
        let outline =
            SampleOutline { token_ids: &token_ids, labels: &labels, inputs: &input_grids, targets: &target_grids };
        let positions = outline.positions(config)?;
        let image = config.token_ids.image_token_id;
        let start = self.row_sources.len();
        for (&id, label) in token_ids.iter().zip(&labels) {
            self.row_sources.push(match (id == image, label) {
                (false, _) => RowSource::Token(rows.of_token(id, &mut self.vocabulary)),
                (true, None) => RowSource::Input(rows.next_input()),
                (true, Some(_)) => RowSource::Answer(rows.next_answer()),
            });
        }
        for (index, label) in labels.iter().enumerate().skip(1) {
            match label {
                Some(id) if *id == image => self.image_labels.push(start + index - 1),
                Some(id) => self.text_labels.push((start + index - 1, *id)),
                None => {}
            }
        }
        self.positions.extend(positions);
        let end = start + padded;
        // Anything may stand there; the row of a token that is looked up anyway costs nothing.
        self.row_sources.resize(end, RowSource::Token(0));
        self.positions.resize(end, [1; 3]);
        self.inputs.extend(inputs);
        self.targets.extend(targets);
        Ok(())
    }

    /// Checks that a model has the ids and the width of the batch.
    pub(crate) fn check_fits(&self, config: &ArConfig) -> Result<(), ArError> {
        check_vocabulary(&self.vocabulary, config)?;
        check_vocabulary(&self.excluded.iter().map(|&(_, id)| id).collect::<Vec<_>>(), config)?;
        check_images(self.inputs.iter().chain(&self.targets), config)
    }

    /// Number of samples.
    pub fn num_samples(&self) -> usize {
        self.groups.iter().map(|group| group.samples).sum()
    }

    /// Number of tokens of all samples, padding included.
    pub fn num_rows(&self) -> usize {
        self.row_sources.len()
    }

    /// Number of text tokens that are learned, over which the cross entropy is a mean.
    pub fn num_text_labels(&self) -> usize {
        self.text_labels.len()
    }

    /// Number of embeddings that are learned, 81 per answer, over which the image loss is a mean.
    pub fn num_image_labels(&self) -> usize {
        self.image_labels.len()
    }
}

/// Neighbours whose lengths differ by little.
fn groups(lengths: &[usize]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut shortest = 0;
    for &length in lengths {
        if let Some(group) = groups.last_mut() {
            let (least, most) = (length.min(shortest), length.max(group.tokens));
            if most - least <= most / PADDING_SHARE {
                *group = Group { samples: group.samples + 1, tokens: most };
                shortest = least;
                continue;
            }
        }
        groups.push(Group { samples: 1, tokens: length });
        shortest = length;
    }
    groups
}

/// Counts over the samples of a batch.
#[derive(Default)]
struct RowCounter {
    tokens: BTreeMap<u32, usize>,
    inputs: usize,
    answers: usize,
}

impl RowCounter {
    fn of_token(&mut self, id: u32, vocabulary: &mut Vec<u32>) -> usize {
        *self.tokens.entry(id).or_insert_with(|| {
            vocabulary.push(id);
            vocabulary.len() - 1
        })
    }

    fn next_input(&mut self) -> usize {
        self.inputs += 1;
        self.inputs - 1
    }

    fn next_answer(&mut self) -> usize {
        self.answers += 1;
        self.answers - 1
    }
}

impl SampleOutline<'_> {
    /// Checks a sample, so that a bad one can be set aside before any image of it is encoded.
    ///
    /// # Errors
    /// As [`TrainingBatch::new`] for this sample alone.
    pub fn check(&self, config: &ArConfig) -> Result<(), ArError> {
        self.positions(config).map(|_| ())
    }

    /// Positions of all tokens of a sample that has no fault.
    fn positions(&self, config: &ArConfig) -> Result<Vec<[i64; 3]>, ArError> {
        let Self { token_ids, labels, targets, .. } = *self;
        let tokens = token_ids.len();
        if tokens == 0 {
            return Err(ArError::EmptyPrompt);
        }
        if tokens > config.max_position_embeddings {
            return Err(ArError::PromptTooLong { tokens, limit: config.max_position_embeddings });
        }
        if labels.len() != tokens {
            return Err(ArError::LabelCount { labels: labels.len(), tokens });
        }
        check_vocabulary(token_ids, config)?;
        for (index, (&id, label)) in token_ids.iter().zip(labels).enumerate() {
            if let Some(label) = label.filter(|&label| label != id) {
                return Err(ArError::Label { index, label, id });
            }
        }
        if labels.iter().skip(1).all(Option::is_none) {
            return Err(ArError::NoLabels);
        }
        if let Some(tokens) = targets.iter().map(GridThw::num_merged_tokens).find(|&tokens| tokens != NUM_IMAGE_TOKENS)
        {
            return Err(ArError::AnswerTokens { tokens, expected: NUM_IMAGE_TOKENS });
        }
        let grids = self.grids_in_order(config)?;
        Ok(position_ids(token_ids, &grids, &config.token_ids)?.axes)
    }

    /// Grids of all images in the order of the text: of answers where image tokens have labels.
    fn grids_in_order(&self, config: &ArConfig) -> Result<Vec<GridThw>, ArError> {
        let Self { token_ids, labels, inputs, targets } = *self;
        let image = config.token_ids.image_token_id;
        let count = |is_answer: bool| {
            let of_kind = |(id, label): &(&u32, &Option<u32>)| **id == image && label.is_some() == is_answer;
            token_ids.iter().zip(labels).filter(of_kind).count()
        };
        let held = |grids: &[GridThw]| grids.iter().map(GridThw::num_merged_tokens).sum::<usize>();
        let (answers, learned) = (held(targets), count(true));
        if answers != learned {
            return Err(ArError::AnswerImages { labels: learned, embeddings: answers });
        }
        let (seen, positions) = (held(inputs), count(false));
        if seen != positions {
            return Err(ArError::ImageTokens { positions, embeddings: seen });
        }
        let (mut inputs, mut targets) = (inputs.iter(), targets.iter());
        let mut grids = vec![];
        for (index, pair) in token_ids.windows(2).enumerate() {
            if pair[0] != config.token_ids.vision_start_token_id || pair[1] != image {
                continue;
            }
            let first = index + 1;
            let of_kind = if labels[first].is_some() { &mut targets } else { &mut inputs };
            // Too few or too many images are reported with the positions.
            let Some(grid) = of_kind.next() else { continue };
            let run = labels[first..].iter().take(grid.num_merged_tokens());
            if run.clone().any(|label| label.is_some() != labels[first].is_some()) {
                let learned = run.flatten().count();
                return Err(ArError::AnswerImages { labels: learned, embeddings: grid.num_merged_tokens() });
            }
            grids.push(*grid);
        }
        Ok(grids)
    }
}

fn check_vocabulary(ids: &[u32], config: &ArConfig) -> Result<(), ArError> {
    let vocab_size = config.vocab_size;
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(&id) => Err(ArError::TokenOutOfVocabulary { id, vocab_size }),
        None => Ok(()),
    }
}

fn check_images<'a>(images: impl Iterator<Item = &'a ImageEmbeds>, config: &ArConfig) -> Result<(), ArError> {
    for image in images {
        let [batch, _, found] = image.values.dims();
        if found != config.hidden_size {
            return Err(ArError::EmbedWidth { found, expected: config.hidden_size });
        }
        if batch != 1 {
            return Err(ArError::EmbedBatch { batch });
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use nexus_core::testing::ramp;

    use super::*;
    use crate::{RopeScaling, TokenIds};

    pub(crate) const BOI: u32 = 11;
    pub(crate) const EOI: u32 = 12;
    pub(crate) const IMG: u32 = 13;

    pub(crate) fn tiny() -> ArConfig {
        ArConfig {
            hidden_size: 16,
            intermediate_size: 24,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            vocab_size: 16,
            rope_scaling: RopeScaling { mrope_section: [2, 1, 1] },
            max_position_embeddings: 200,
            token_ids: TokenIds {
                vision_start_token_id: BOI,
                vision_end_token_id: EOI,
                image_token_id: IMG,
                eos_token_id: 14,
                bos_token_id: 15,
            },
            ..ArConfig::released()
        }
    }

    pub(crate) fn image(h: usize, w: usize, seed: usize) -> ImageEmbeds {
        let grid = GridThw::new(1, h, w).unwrap();
        ImageEmbeds::new(ramp([1, grid.num_merged_tokens(), 16], seed), grid).unwrap()
    }

    /// A prompt with a picture of 2x3 tokens, and a reply with a word, a drawn picture and the end of the turn.
    pub(crate) fn editing() -> TrainingSample {
        let prompt = [&[1, 2, BOI][..], &[IMG; 6], &[EOI, 3]].concat();
        let reply = [&[4, BOI][..], &[IMG; 81], &[EOI, 14]].concat();
        TrainingSample {
            labels: [vec![None; prompt.len()], reply.iter().copied().map(Some).collect()].concat(),
            token_ids: [prompt, reply].concat(),
            inputs: vec![image(4, 6, 1)],
            targets: vec![image(18, 18, 2)],
        }
    }

    /// Three words, of which the last two are learned.
    pub(crate) fn words() -> TrainingSample {
        TrainingSample {
            token_ids: vec![2, 5, 14],
            labels: vec![None, Some(5), Some(14)],
            inputs: vec![],
            targets: vec![],
        }
    }

    #[test]
    fn every_place_and_label_is_found() {
        let batch = TrainingBatch::new(vec![words(), editing()], &tiny()).unwrap();
        let length = editing().token_ids.len();
        assert_eq!(batch.groups, [Group { samples: 1, tokens: 3 }, Group { samples: 1, tokens: length }]);
        assert_eq!((batch.num_samples(), batch.num_rows()), (2, 3 + length));
        assert_eq!((batch.num_text_labels(), batch.num_image_labels()), (2 + 4, 81));
        assert_eq!(batch.vocabulary, [2, 5, 14, 1, BOI, EOI, 3, 4]);
        let second = &batch.row_sources[3..];
        assert_eq!(second[1..5], [RowSource::Token(0), RowSource::Token(4), RowSource::Input(0), RowSource::Input(1)]);
        assert_eq!(second[12..15], [RowSource::Token(4), RowSource::Answer(0), RowSource::Answer(1)]);
        // The token that begins the picture predicts its first embedding.
        assert_eq!(batch.image_labels[..2], [3 + 12, 3 + 13]);
        assert_eq!(batch.text_labels[..3], [(0, 5), (1, 14), (3 + 10, 4)]);
        // Text 0..3, a picture of 2x3, text 6..10, a picture of 9x9.
        assert_eq!(batch.positions[3 + 8], [3, 4, 5]);
        assert_eq!(batch.positions[3 + 13 + 80], [10, 18, 18]);
        assert_eq!(batch.positions[3 + 13 + 81], [19; 3]);
    }

    #[test]
    fn neighbours_of_about_the_same_length_are_padded_together() {
        let group = |samples, tokens| Group { samples, tokens };
        assert_eq!(groups(&[70, 75, 80, 81]), [group(3, 80), group(1, 81)]);
        assert_eq!(groups(&[80, 70, 160, 8, 8]), [group(2, 80), group(1, 160), group(2, 8)]);
        let mut longer = words();
        longer.token_ids.extend([1; 15]);
        longer.labels.extend([Some(1); 15]);
        let shorter = TrainingSample {
            token_ids: longer.token_ids[..16].to_vec(),
            labels: longer.labels[..16].to_vec(),
            ..words()
        };
        let batch = TrainingBatch::new(vec![shorter, longer], &tiny()).unwrap();
        assert_eq!(batch.groups, [group(2, 18)]);
        assert_eq!(batch.positions[16..18], [[1; 3]; 2]);
        assert_eq!(batch.text_labels[15..17], [(18, 5), (19, 14)]);
    }

    #[test]
    fn excluded_tokens_belong_to_labels_of_text() {
        let mut batch = TrainingBatch::new(vec![words(), editing()], &tiny()).unwrap();
        let excluded = |sample, index, id| ExcludedToken { sample, index, id };
        batch.exclude(&[excluded(0, 2, 5), excluded(1, 11, 9)]).unwrap();
        assert_eq!(batch.excluded, [(1, 5), (2, 9)]);
        // A token without a label, the label itself, an embedding of an answer, the first token, and no sample at all.
        for wrong in [excluded(1, 10, 9), excluded(0, 1, 5), excluded(1, 20, 9), excluded(1, 0, 9), excluded(2, 1, 9)] {
            let error = batch.exclude(&[wrong]).unwrap_err();
            let ExcludedToken { sample, index, id } = wrong;
            let found = matches!(error, ArError::ExcludedToken { sample: s, index: i, id: t } if [s, i] == [sample, index] && t == id);
            assert!(found, "{error}");
        }
        batch.exclude(&[excluded(0, 2, 16)]).unwrap();
        assert!(matches!(batch.check_fits(&tiny()), Err(ArError::TokenOutOfVocabulary { id: 16, .. })));
    }

    #[test]
    fn bad_samples_are_refused() {
        type Change = fn(&mut TrainingSample);
        type Expected = fn(&ArError) -> bool;
        let refused = |change: Change| {
            let mut sample = editing();
            change(&mut sample);
            match TrainingBatch::new(vec![words(), sample], &tiny()).unwrap_err() {
                ArError::Sample { index: 1, source } => *source,
                other => panic!("{other}"),
            }
        };
        let cases: [(Change, Expected); 12] = [
            (|s| s.labels.truncate(95), |e| matches!(e, ArError::LabelCount { labels: 95, tokens: 96 })),
            (|s| s.labels.fill(None), |e| matches!(e, ArError::NoLabels)),
            (|s| s.labels[11] = Some(5), |e| matches!(e, ArError::Label { index: 11, label: 5, id: 4 })),
            (|s| s.token_ids[0] = 16, |e| matches!(e, ArError::TokenOutOfVocabulary { id: 16, vocab_size: 16 })),
            (|s| s.targets.clear(), |e| matches!(e, ArError::AnswerImages { labels: 81, embeddings: 0 })),
            (|s| s.targets.push(image(18, 18, 3)), |e| matches!(e, ArError::AnswerImages { labels: 81, .. })),
            (|s| s.targets[0] = image(18, 20, 3), |e| matches!(e, ArError::AnswerTokens { tokens: 90, expected: 81 })),
            (|s| s.inputs.clear(), |e| matches!(e, ArError::ImageTokens { positions: 6, embeddings: 0 })),
            (|s| s.labels[3] = Some(IMG), |e| matches!(e, ArError::AnswerImages { labels: 82, embeddings: 81 })),
            (|s| s.token_ids.clear(), |e| matches!(e, ArError::EmptyPrompt)),
            (
                |s| s.inputs[0].values = ramp([1, 6, 8], 1),
                |e| matches!(e, ArError::EmbedWidth { found: 8, expected: 16 }),
            ),
            (
                |s| {
                    s.token_ids.resize(201, 1);
                    s.labels.resize(201, None);
                },
                |e| matches!(e, ArError::PromptTooLong { tokens: 201, limit: 200 }),
            ),
        ];
        for (index, (change, expected)) in cases.into_iter().enumerate() {
            let error = refused(change);
            assert!(expected(&error), "case {index}: {error}");
        }
        assert!(matches!(TrainingBatch::new(vec![], &tiny()), Err(ArError::EmptyBatch)));
    }

    #[test]
    fn a_sample_is_checked_before_its_images_are_encoded() {
        let TrainingSample { mut token_ids, mut labels, .. } = editing();
        let [inputs, targets] = [[GridThw::new(1, 4, 6).unwrap()], [GridThw::new(1, 18, 18).unwrap()]];
        let check = |token_ids: &[u32], labels: &[Option<u32>], inputs: &[GridThw]| {
            SampleOutline { token_ids, labels, inputs, targets: &targets }.check(&tiny())
        };
        check(&token_ids, &labels, &inputs).unwrap();
        let missing = check(&token_ids, &labels, &[]).unwrap_err();
        assert!(matches!(missing, ArError::ImageTokens { positions: 6, embeddings: 0 }), "{missing}");
        token_ids.resize(201, 1);
        labels.resize(201, None);
        let long = check(&token_ids, &labels, &inputs).unwrap_err();
        assert!(matches!(long, ArError::PromptTooLong { tokens: 201, limit: 200 }), "{long}");
    }
}
