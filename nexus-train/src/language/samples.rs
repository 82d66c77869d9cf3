//! Samples for the language model: conversations -> tokens and embeddings of their images, with what is known of them.

use std::collections::HashMap;

use burn::tensor::Tensor;
use nexus_ar::{Attended, ExcludedToken, TrainingSample};
use nexus_core::{ImageEmbeds, nn::Recomputation};
use nexus_data::{Patches, TrainingInput};
use nexus_vision_encoder::VisionEncoder;

use super::{LanguageTraining, losses::LanguageSettings};
use crate::{
    Phase, PossibleToken, Sample, Supervision, TokenLabels, TokenLooks, TrainError, Truth, feed::usable_input,
    supervision::Shown, training::MicroBatch,
};

/// A sample and what is known of it.
#[derive(Debug, Clone)]
pub(super) struct KnownSample {
    pub(super) sample: TrainingSample,
    known: Supervision,
}

/// A conversation as tokens and pixels, and what is known of it.
pub(super) struct KnownInput {
    input: TrainingInput,
    truth: Option<Box<dyn Truth>>,
}

/// Images of a micro-batch as the encoder that is trained sees them.
pub(super) struct Seen {
    /// `[1, tokens, hidden]` of all images.
    pub(super) embeds: Tensor<3>,
    /// `[patches, 1176]` of all images.
    pub(super) pixels: Tensor<2>,
    pub(super) shown: Shown,
}

impl Seen {
    /// Embeddings of each image.
    fn images(&self) -> Result<Vec<ImageEmbeds>, TrainError> {
        let mut start = 0;
        let grids = self.shown.grids().into_iter();
        let images = grids.map(|grid| {
            let tokens = grid.num_merged_tokens();
            start += tokens;
            Ok(ImageEmbeds::new(self.embeds.clone().narrow(1, start - tokens, tokens), grid)?)
        });
        images.collect()
    }
}

impl<S: LanguageSettings> LanguageTraining<S> {
    /// One sample of a micro-batch; `None` if it cannot be used.
    pub(super) fn input(&self, batch: &mut MicroBatch<'_, S>, number: u64) -> Result<Option<KnownInput>, TrainError> {
        let Some(Sample { messages, truth }) = batch.feed.sample(number)? else { return Ok(None) };
        match usable_input(&self.processor, &messages, self.module.ar.config()) {
            Ok(input) => Ok(Some(KnownInput { input, truth })),
            Err(reason) => batch.feed.reject(number, &reason).map(|()| None),
        }
    }

    /// What is known of a sample, as far as a phase asks for it; its images are all known or none.
    fn known(&self, phase: &Phase<S>, KnownInput { input, truth }: &KnownInput) -> Result<Supervision, TrainError> {
        let num_images = input.input_images.len() + input.answer_images.len();
        let mut known = match truth {
            Some(truth) if self.asks_for_supervision => truth.supervision(input, self.processor.tokenizer())?,
            _ => Supervision::default(),
        };
        if known.images.len() != num_images {
            known.images = vec![None; num_images];
        }
        if !phase.settings.losses().exclude_unseen {
            known.possible.clear();
        }
        Ok(known)
    }

    /// Samples with images from the frozen encoder; those that come again are encoded once.
    pub(super) fn frozen_samples(
        &mut self,
        encoder: &VisionEncoder,
        mut batch: MicroBatch<'_, S>,
    ) -> Result<Vec<KnownSample>, TrainError> {
        if self.encoded.0 != batch.seed {
            self.encoded = (batch.seed, HashMap::new());
        }
        let (mut samples, mut new) = (Vec::new(), Vec::new());
        for number in batch.samples.clone() {
            let first = batch.feed.first(number);
            match self.encoded.1.get(&first) {
                Some(known) => samples.push((number, known.clone())),
                None => new.extend(self.input(&mut batch, number)?.map(|input| (number, input))),
            }
        }
        let (dtype, device) = (burn::tensor::FloatDType::from(batch.phase.compute_dtype), self.device.clone().inner());
        let encode = |images: Vec<Patches>| {
            let encode_one = |patches: Patches| {
                let grid = patches.grid;
                let values = encoder.forward(patches.into_tensor(&device).cast(dtype), &[grid]);
                Ok(ImageEmbeds::new(Tensor::from_inner(values), grid)?)
            };
            images.into_iter().map(encode_one).collect::<Result<Vec<_>, TrainError>>()
        };
        let encoded = batch.workers.map(new, |(number, input)| {
            let known = self.known(batch.phase, &input)?;
            let TrainingInput { token_ids, labels, input_images, answer_images, .. } = input.input;
            let (inputs, targets) = (encode(input_images)?, encode(answer_images)?);
            let sample = TrainingSample { token_ids, labels, inputs, targets };
            Ok::<_, TrainError>((number, KnownSample { sample, known }))
        });
        for encoded in encoded {
            let (number, sample) = encoded?;
            if batch.phase.distinct_samples.is_some() {
                self.encoded.1.insert(batch.feed.first(number), sample.clone());
            }
            samples.push((number, sample));
        }
        // What was known must make no difference: a run that goes on knows less.
        samples.sort_by_key(|(number, _)| *number);
        Ok(samples.into_iter().map(|(_, sample)| sample).collect())
    }

    /// Samples with images from the encoder that is trained, in one pass, and what is needed to look at them again.
    pub(super) fn trained_samples(
        &self,
        encoder: &VisionEncoder,
        phase: &Phase<S>,
        inputs: Vec<KnownInput>,
        blocks: &mut Recomputation<'_>,
    ) -> Result<(Vec<KnownSample>, Option<Seen>), TrainError> {
        let (mut texts, mut patches) = (Vec::new(), Vec::new());
        let mut shown = Shown::new(phase.settings.losses().exclude_unseen);
        for input in inputs {
            let known = self.known(phase, &input)?;
            let TrainingInput { token_ids, labels, input_images, answer_images, .. } = input.input;
            let (num_inputs, num_answers) = (input_images.len(), answer_images.len());
            for (image, labels) in input_images.into_iter().chain(answer_images).zip(&known.images) {
                shown.push(image.grid, labels.clone());
                patches.push(image);
            }
            texts.push((token_ids, labels, num_inputs, num_answers, known));
        }
        let seen = (!patches.is_empty()).then(|| {
            let pixels = patches.into_iter().map(|patches| patches.into_tensor(&self.device)).collect();
            let pixels: Tensor<2> = Tensor::cat(pixels, 0);
            let dtype: burn::tensor::FloatDType = phase.compute_dtype.into();
            let embeds = encoder.forward(pixels.clone().cast(dtype), &shown.grids());
            // The language model reads them, and so do losses of their own.
            let [embeds] = blocks.enter([embeds]);
            Seen { embeds: embeds.value(), pixels, shown }
        });
        let mut images = seen.as_ref().map(Seen::images).transpose()?.unwrap_or_default().into_iter();
        let samples = texts.into_iter().map(|(token_ids, labels, num_inputs, num_answers, known)| {
            let inputs = images.by_ref().take(num_inputs).collect();
            let targets = images.by_ref().take(num_answers).collect();
            KnownSample { sample: TrainingSample { token_ids, labels, inputs, targets }, known }
        });
        Ok((samples.collect(), seen))
    }
}

/// Where the tokens of samples should look, in the layer that finds and in the one after it, in the order of the samples.
pub(super) fn looks(samples: &[KnownSample]) -> (Vec<Attended>, Vec<Attended>) {
    let of = |looks: fn(&Supervision) -> &[TokenLooks]| {
        let numbered = samples.iter().enumerate();
        let attended = numbered.flat_map(|(sample, KnownSample { known, .. })| {
            looks(known).iter().map(move |TokenLooks { queries, tokens }| Attended {
                sample,
                queries: queries.clone(),
                tokens: tokens.clone(),
            })
        });
        attended.collect()
    };
    (of(|known| &known.attended), of(|known| &known.selected))
}

/// Tokens that do not compete for labels, in the order of the samples.
pub(super) fn excluded(samples: &[KnownSample]) -> Vec<ExcludedToken> {
    let of = |(sample, KnownSample { known, .. }): (usize, &KnownSample)| {
        let possible = known.possible.clone().into_iter();
        possible.map(move |PossibleToken { index, id }| ExcludedToken { sample, index, id })
    };
    samples.iter().enumerate().flat_map(of).collect()
}

/// Images of samples that are given and those that are answers, in order.
pub(super) fn inputs_and_answers(samples: &[KnownSample], spares_possible: bool) -> (Shown, Shown) {
    let (mut inputs, mut answers) = (Shown::new(spares_possible), Shown::new(spares_possible));
    for KnownSample { sample, known } in samples {
        let (known_inputs, known_answers) = known.images.split_at(sample.inputs.len());
        let push = |images: &[ImageEmbeds], known: &[Option<TokenLabels>], into: &mut Shown| {
            images.iter().zip(known).for_each(|(image, labels)| into.push(image.grid, labels.clone()));
        };
        push(&sample.inputs, known_inputs, &mut inputs);
        push(&sample.targets, known_answers, &mut answers);
    }
    (inputs, answers)
}
