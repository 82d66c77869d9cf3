//! Training the decoders: pictures and their embeddings -> flow-matching losses.

use std::{collections::HashMap, path::Path};

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Tensor},
};
use nexus_ar::{ArModel, ArObjective, TrainingBatch, TrainingSample};
use nexus_checkpoint::{Checkpoint, WeightNames, save_module_as};
use nexus_core::{GridThw, ImageEmbeds, nn::Recomputation};
use nexus_data::{Image, Message, Patches, ProcessOptions, Processor, decoder_image};
use nexus_diffusion::{
    Autoencoder, Conditioning, EditingDecoder, FlowMatching, FlowMatchingInput, GenerationDecoder, LatentSize,
    connector::{Adapter, EmbeddingMerger},
    transformer::Dit,
    weights::{EDITING_DECODER, GENERATION_DECODER},
};
use nexus_vision_encoder::VisionEncoder;

use crate::{
    DecoderInitial, DecoderSettings, EditingInitial, EditingStart, Phase, Sample, TrainError,
    autoencoder::{answer_and_source, tensor},
    drawing::{self, SAMPLE_PICTURES, sample_latents},
    feed::usable_input,
    optim::{Draws, initialize},
    sheet,
    training::{Losses, MASTER_WEIGHTS, MicroBatch, PartTraining},
};
use nexus::ModelFiles;

/// What the two decoders have in common for training.
pub(crate) trait TrainedDecoder: Module + Sync {
    /// Names in the released file.
    const NAMES: WeightNames;
    /// Name of the exported file.
    const FILE: &'static str;
    /// Whether it sees a source picture.
    const SEES_REFERENCE: bool;

    /// What its weights may begin with.
    type Initial;

    /// The decoder with its first weights.
    fn begin(initial: &Self::Initial, files: &ModelFiles, device: &Device) -> Result<Self, TrainError>;
    fn condition(
        &self,
        embeds: &ImageEmbeds,
        reference: Option<&ImageEmbeds>,
        size: LatentSize,
    ) -> Result<Conditioning, TrainError>;
    fn dit(&self) -> &Dit;
}

impl TrainedDecoder for GenerationDecoder {
    const NAMES: WeightNames = GENERATION_DECODER;
    const FILE: &'static str = "generation_decoder.safetensors";
    const SEES_REFERENCE: bool = false;

    type Initial = DecoderInitial;

    fn begin(initial: &DecoderInitial, files: &ModelFiles, device: &Device) -> Result<Self, TrainError> {
        let random = || -> Result<Self, TrainError> { Ok(Self::new(&files.diffusion_config(&files.nexus)?, device)) };
        Ok(match initial {
            DecoderInitial::Checkpoint => files.load_generation_decoder(device, &MASTER_WEIGHTS)?,
            DecoderInitial::Random(weights) => initialize(random()?, &Self::NAMES, weights),
            DecoderInitial::Flux1Dev(weights) => {
                let Connector { adapter } = initialize(Connector { adapter: random()?.adapter }, &Self::NAMES, weights);
                Self { adapter, dit: files.load_flux1_dev(device, &MASTER_WEIGHTS)? }
            }
        })
    }

    fn condition(
        &self,
        embeds: &ImageEmbeds,
        _: Option<&ImageEmbeds>,
        _: LatentSize,
    ) -> Result<Conditioning, TrainError> {
        Ok(self.condition(embeds)?)
    }

    fn dit(&self) -> &Dit {
        &self.dit
    }
}

impl TrainedDecoder for EditingDecoder {
    const NAMES: WeightNames = EDITING_DECODER;
    const FILE: &'static str = "edit_decoder.safetensors";
    const SEES_REFERENCE: bool = true;

    type Initial = EditingInitial;

    fn begin(initial: &EditingInitial, files: &ModelFiles, device: &Device) -> Result<Self, TrainError> {
        let random = || -> Result<Self, TrainError> { Ok(Self::new(&files.diffusion_config(&files.nexus)?, device)) };
        let merger = |weights| -> Result<EmbeddingMerger, TrainError> {
            let connector = EditingConnector { embedding_merger: random()?.embedding_merger };
            Ok(initialize(connector, &Self::NAMES, weights).embedding_merger)
        };
        Ok(match initial {
            EditingInitial::Checkpoint => files.load_editing_decoder(device, &MASTER_WEIGHTS)?,
            EditingInitial::Random(weights) => initialize(random()?, &Self::NAMES, weights),
            EditingInitial::GenerationDecoder(weights) => {
                let GenerationDecoder { dit, .. } = files.load_generation_decoder(device, &MASTER_WEIGHTS)?;
                Self { embedding_merger: merger(weights)?, dit }
            }
            EditingInitial::Flux1Dev(EditingStart { language_model, projector }) => {
                let language_model = Checkpoint::open(language_model)?;
                let merger = merger(projector)?.with_qwen2_5_vl_layer(&language_model, &MASTER_WEIGHTS)?;
                Self { embedding_merger: merger, dit: files.load_flux1_dev(device, &MASTER_WEIGHTS)? }
            }
        })
    }

    fn condition(
        &self,
        embeds: &ImageEmbeds,
        reference: Option<&ImageEmbeds>,
        size: LatentSize,
    ) -> Result<Conditioning, TrainError> {
        Ok(self.condition(embeds, reference, size)?)
    }

    fn dit(&self) -> &Dit {
        &self.dit
    }
}

/// A generation decoder without its transformer, under the same names.
#[derive(Module, Debug)]
struct Connector {
    adapter: Adapter,
}

/// An editing decoder without its transformer, under the same names.
#[derive(Module, Debug)]
struct EditingConnector {
    embedding_merger: EmbeddingMerger,
}

/// Training of one decoder; all other parts are frozen and on the plain device.
pub(crate) struct DecoderTraining<D: TrainedDecoder> {
    module: D,
    processor: Processor,
    encoder: VisionEncoder,
    autoencoder: Autoencoder,
    ar: Option<ArModel>,
    pooled: Tensor<2>,
    flow: FlowMatching,
    device: Device,
    /// Samples that will be seen again, and the seed of the phase that they belong to.
    encoded: (u64, HashMap<u64, Encoded>),
    /// What the latest micro-batch was about, for the sheet of samples.
    latest: Option<Prepared>,
}

/// A micro-batch on the plain device.
#[derive(Clone)]
pub(crate) struct Prepared {
    seed: u64,
    numbers: Vec<u64>,
    latents: Tensor<4>,
    embeds: ImageEmbeds,
    reference: Option<ImageEmbeds>,
}

/// What the frozen parts make of one sample, on the plain device.
#[derive(Clone)]
struct Encoded {
    messages: Vec<Message>,
    latents: Tensor<4>,
    embeds: ImageEmbeds,
    /// The language model's prediction of `embeds`, once it was asked for.
    predicted: Option<ImageEmbeds>,
    reference: Option<ImageEmbeds>,
}

impl<D: TrainedDecoder> DecoderTraining<D> {
    pub(crate) fn open(
        initial: &D::Initial,
        phases: &[Phase<DecoderSettings>],
        model: &Path,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let files = ModelFiles::find(model)?;
        let encoder = files.load_vision_encoder(device, &MASTER_WEIGHTS)?;
        let needs_ar = phases.iter().any(|phase| phase.settings.predicted_embeds > 0.0);
        let ar = match needs_ar {
            true => Some(files.load_ar(device, &MASTER_WEIGHTS)?),
            false => None,
        };
        let autoencoder = files.load_autoencoder(device, &MASTER_WEIGHTS)?;
        let pooled = drawing::empty_prompt(&files, device, &MASTER_WEIGHTS)?;
        let tracked = device.clone().autodiff();
        let module = D::begin(initial, &files, &tracked)?;
        let processor = Processor::open(&files.nexus)?;
        let flow = FlowMatching::new();
        let encoded = (0, HashMap::new());
        Ok(Self { module, processor, encoder, autoencoder, ar, pooled, flow, device: tracked, encoded, latest: None })
    }

    /// What the frozen parts make of a sample; the outer error is one of the run, the inner one of the sample.
    fn encode(
        &self,
        messages: Vec<Message>,
        &DecoderSettings { picture_px: side, predicted_embeds, .. }: &DecoderSettings,
    ) -> Result<Result<Encoded, String>, TrainError> {
        let images = self.processor.image_processor();
        let Some((answer, source)) = answer_and_source(&messages) else {
            return Ok(Err("no answer with an image".to_string()));
        };
        let read = || -> Result<_, nexus_data::DataError> {
            let reference = source.as_ref().filter(|_| D::SEES_REFERENCE);
            let reference = reference.map(|source| images.reference_patches(source)).transpose()?;
            Ok((images.target_patches(&answer)?, decoder_image(&answer, side, side)?, reference))
        };
        let (target, pixels, reference) = match read() {
            Ok(read) => read,
            Err(error) => return Ok(Err(error.to_string())),
        };
        if D::SEES_REFERENCE && reference.is_none() {
            return Ok(Err("no image to be edited".to_string()));
        }
        // Here and not when it is drawn to be predicted, so that every visit finds a sample good or bad.
        if let Some(ar) = self.ar.as_ref().filter(|_| predicted_embeds > 0.0)
            && let Err(reason) = usable_input(&self.processor, &messages, ar.config())
        {
            return Ok(Err(reason));
        }
        let picture = tensor(pixels, [1, 3, side, side], &self.device.clone().inner());
        Ok(Ok(Encoded {
            messages,
            latents: self.autoencoder.encode(picture, None),
            embeds: self.embed(target)?,
            predicted: None,
            reference: reference.map(|patches| self.embed(patches)).transpose()?,
        }))
    }

    /// Embeddings of an image, on the plain device.
    fn embed(&self, patches: Patches) -> Result<ImageEmbeds, TrainError> {
        let grid = patches.grid;
        let values = self.encoder.forward(patches.into_tensor(&self.device.clone().inner()), &[grid]);
        Ok(ImageEmbeds::new(values, grid)?)
    }

    /// What the language model predicts for the last picture that it is to draw, of messages that are usable.
    fn predict(&self, ar: &ArModel, messages: &[Message]) -> Result<Option<ImageEmbeds>, TrainError> {
        let input = self.processor.training_input(messages, &ProcessOptions::default())?;
        let embed = |patches: Vec<Patches>| -> Result<Vec<ImageEmbeds>, TrainError> {
            patches.into_iter().map(|patches| self.embed(patches)).collect()
        };
        // A batch checks that there is a target for each answer; the predictions do not depend on them.
        let (inputs, targets) = (embed(input.input_images)?, embed(input.answer_images)?);
        let grid = targets.last().map(|target| target.grid);
        let sample = TrainingSample { token_ids: input.token_ids, labels: input.labels, inputs, targets };
        let batch = TrainingBatch::new(vec![sample], ar.config())?;
        let predicted = ArObjective::default().predict_answers(ar, &batch, FloatDType::F32)?;
        let last = predicted.last().cloned().zip(grid);
        Ok(last.map(|(values, grid)| ImageEmbeds::new(values, grid)).transpose()?)
    }

    /// One sample of a micro-batch; `None` if it cannot be used.
    fn sample(
        &mut self,
        batch: &mut MicroBatch<'_, DecoderSettings>,
        number: u64,
    ) -> Result<Option<Encoded>, TrainError> {
        let MicroBatch { phase, seed, .. } = *batch;
        let first = batch.feed.first(number);
        if self.encoded.0 != seed {
            self.encoded = (seed, HashMap::new());
        }
        let mut encoded = match self.encoded.1.remove(&first) {
            Some(known) => known,
            None => {
                let Some(Sample { messages, .. }) = batch.feed.sample(number)? else { return Ok(None) };
                match self.encode(messages, &phase.settings)? {
                    Ok(encoded) => encoded,
                    Err(reason) => {
                        batch.feed.reject(number, &reason)?;
                        return Ok(None);
                    }
                }
            }
        };
        let predicts = Draws::new(seed, "predicted embeds", number).unit() < phase.settings.predicted_embeds as f32;
        if let (Some(ar), true, None) = (&self.ar, predicts, &encoded.predicted) {
            encoded.predicted = self.predict(ar, &encoded.messages)?;
        }
        if phase.distinct_samples.is_some() {
            self.encoded.1.insert(first, encoded.clone());
        }
        if let Some(predicted) = encoded.predicted.take().filter(|_| predicts) {
            encoded.embeds = predicted;
        }
        Ok(Some(encoded))
    }
}

impl<D: TrainedDecoder> PartTraining for DecoderTraining<D> {
    type Module = D;
    type Batch = Prepared;
    type Settings = DecoderSettings;

    fn names(&self) -> WeightNames {
        D::NAMES
    }

    fn module(&self) -> Result<D, TrainError> {
        Ok(self.module.clone())
    }

    fn prepare(&mut self, mut batch: MicroBatch<'_, DecoderSettings>) -> Result<Option<Prepared>, TrainError> {
        let (mut numbers, mut latents, mut embeds, mut references) = (vec![], vec![], vec![], vec![]);
        let (mut grid, mut reference_grid) = (GridThw::GENERATED, GridThw::REFERENCE);
        for number in batch.samples.clone() {
            let Some(sample) = self.sample(&mut batch, number)? else { continue };
            numbers.push(number);
            latents.push(sample.latents);
            grid = sample.embeds.grid;
            embeds.push(sample.embeds.values);
            if let Some(reference) = sample.reference {
                reference_grid = reference.grid;
                references.push(reference.values);
            }
        }
        if numbers.is_empty() {
            return Ok(None);
        }
        let join = |values: Vec<Tensor<3>>, grid| ImageEmbeds::new(Tensor::cat(values, 0), grid);
        let reference = (!references.is_empty()).then(|| join(references, reference_grid)).transpose()?;
        let (latents, embeds) = (Tensor::cat(latents, 0), join(embeds, grid)?);
        let prepared = Prepared { seed: batch.seed, numbers, latents, embeds, reference };
        self.latest = Some(prepared.clone());
        Ok(Some(prepared))
    }

    fn loss<'a>(
        &self,
        module: &'a D,
        phase: &Phase<DecoderSettings>,
        batch: Prepared,
        blocks: &mut Recomputation<'a>,
    ) -> Result<Losses, TrainError> {
        let Prepared { seed, numbers, latents, embeds, reference } = batch;
        let [count, channels, height, width] = latents.dims();
        let dtype: FloatDType = phase.compute_dtype.into();
        let per_sample = channels * height * width;
        let noise = numbers.iter().flat_map(|&number| Draws::new(seed, "noise", number).normal_values(per_sample));
        let noise = tensor(noise.collect(), [count, channels, height, width], &self.device);
        let timesteps = numbers.iter().map(|&number| Draws::new(seed, "timestep", number).below(1000));
        let timestep_indices: Vec<usize> = timesteps.collect();
        let dropped =
            |number| f64::from(Draws::new(seed, "condition", number).unit()) < phase.settings.condition_dropout;
        let kept: Vec<f32> = numbers.iter().map(|&number| if dropped(number) { 0.0 } else { 1.0 }).collect();
        let kept: Tensor<3> = tensor(kept, [count, 1, 1], &self.device);
        let tracked = |embeds: ImageEmbeds| {
            let values = Tensor::from_inner(embeds.values) * kept.clone();
            ImageEmbeds::new(values.cast(dtype), embeds.grid)
        };
        let (embeds, reference) = (tracked(embeds)?, reference.map(tracked).transpose()?);
        let latents = Tensor::from_inner(latents).cast(dtype);
        let conditioning = module.condition(&embeds, reference.as_ref(), LatentSize::of(&latents))?;
        let pooled = Tensor::from_inner(self.pooled.clone()).cast(dtype).repeat_dim(0, count);
        let input = FlowMatchingInput {
            conditioning: &conditioning,
            pooled,
            latents,
            noise: noise.cast(dtype),
            timestep_indices: &timestep_indices,
            embedded_guidance: phase.settings.embedded_guidance as f32,
        };
        let loss = self.flow.loss(module.dit(), input, blocks);
        Ok(Losses { total: loss.total, parts: vec![("mse", loss.mse)] })
    }

    fn export(&self, module: D, dir: &Path, _: MicroBatch<'_, DecoderSettings>) -> Result<(), TrainError> {
        Ok(save_module_as(&module, &D::NAMES, &dir.join(D::FILE), FloatDType::BF16)?)
    }

    fn samples(&mut self, module: &D, phase: &Phase<DecoderSettings>) -> Result<Option<Image>, TrainError> {
        let Some(latest) = self.latest.clone() else { return Ok(None) };
        let shown = latest.numbers.len().min(SAMPLE_PICTURES);
        let first = |embeds: ImageEmbeds| ImageEmbeds::new(embeds.values.narrow(0, 0, shown), embeds.grid);
        let (embeds, reference) = (first(latest.embeds)?, latest.reference.map(first).transpose()?);
        let truth = latest.latents.narrow(0, 0, shown);
        let size = LatentSize::of(&truth);
        let module = module.valid();
        let conditioning = module.condition(&embeds, reference.as_ref(), size)?;
        let guidance = phase.settings.embedded_guidance;
        let drawn = sample_latents(module.dit(), conditioning, &self.pooled, size, guidance)?;
        let drawn = self.autoencoder.decode(drawn, None);
        Ok(Some(sheet::rows(&[self.autoencoder.decode(truth, None), drawn])?))
    }
}

#[cfg(test)]
mod tests {
    use nexus_core::testing::{cpu, ramp, random_models_dir};
    use serde_json::json;

    use super::*;

    fn phase(condition_dropout: f64) -> Phase<DecoderSettings> {
        let phase = json!({
            "name": "only", "steps": 1, "batch_size": 4, "data": [], "learning_rate": 1.0,
            "settings": {"picture_px": 32, "condition_dropout": condition_dropout},
        });
        serde_json::from_value(phase).unwrap()
    }

    #[test]
    fn a_sample_without_condition_sees_zeros() {
        let initial = EditingInitial::Checkpoint;
        let training =
            DecoderTraining::<EditingDecoder>::open(&initial, &[phase(0.0)], &random_models_dir(), &cpu()).unwrap();
        let (module, count) = (training.module().unwrap(), 4);
        let width = nexus_diffusion::config::MergerConfig::read(random_models_dir().join("Nexus-GenV2/config.json"))
            .unwrap()
            .hidden_size;
        let embeds = |grid: GridThw, seed| ramp::<3>([count, grid.num_merged_tokens(), width], seed);
        let seen = [embeds(GridThw::GENERATED, 1), embeds(GridThw::REFERENCE, 2)];
        let loss = |dropout: f64, [embeds, reference]: [Tensor<3>; 2]| {
            let batch = Prepared {
                seed: 8,
                numbers: (0..count as u64).collect(),
                latents: ramp([count, 16, 4, 4], 3),
                embeds: ImageEmbeds::new(embeds, GridThw::GENERATED).unwrap(),
                reference: Some(ImageEmbeds::new(reference, GridThw::REFERENCE).unwrap()),
            };
            let losses = training.loss(&module, &phase(dropout), batch, &mut Recomputation::none()).unwrap();
            losses.total.into_data().try_to_vec_as::<f32>().unwrap()[0]
        };
        let scaled =
            |values: &Tensor<3>, factors: &[f32]| values.clone() * tensor(factors.to_vec(), [count, 1, 1], &cpu());
        let zeros = seen.clone().map(|values| values.zeros_like());
        assert_eq!(loss(1.0, seen.clone()), loss(0.0, zeros.clone()));
        assert_ne!(loss(0.0, seen.clone()), loss(0.0, zeros));

        // Half of them, each by the draw of its own number.
        let dropped: Vec<bool> = (0..4).map(|number| Draws::new(8, "condition", number).unit() < 0.5).collect();
        assert!(dropped.contains(&true) && dropped.contains(&false), "{dropped:?}");
        let half = loss(0.5, seen.clone());
        for (sample, &is_dropped) in dropped.iter().enumerate() {
            for of in 0..2 {
                let mut factors = [1.0; 4];
                factors[sample] = 2.0;
                let mut other = seen.clone();
                other[of] = scaled(&seen[of], &factors);
                assert_eq!(loss(0.5, other) == half, is_dropped, "sample {sample}, input {of}");
            }
        }
    }
}
