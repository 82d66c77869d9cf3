//! Training the decoders: pictures and their embeddings -> flow-matching losses.

use std::path::Path;

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Tensor},
};
use nexus_ar::{ArConfig, ArModel, TrainingBatch, TrainingSample};
use nexus_core::{
    GridThw, ImageEmbeds,
    checkpoint::{Checkpoint, LoadDType, LoadOptions, WeightNames, save_module_as},
    train::{Draws, initialize},
};
use nexus_data::{Image, Message, Patches, ProcessOptions, Processor, clip_empty_ids, decoder_image};
use nexus_diffusion::{
    Autoencoder, Branch, Branches, ClipTextEncoder, Conditioning, DenoiseOptions, Denoiser, EditingDecoder,
    FlowMatching, FlowMatchingInput, GenerationDecoder, LatentSize,
    config::{AutoencoderConfig, ClipConfig, DiffusionConfig, DitConfig, MergerConfig},
    transformer::Dit,
    weights::{EDITING_DECODER, GENERATION_DECODER},
};
use nexus_vision_encoder::{VisionConfig, VisionEncoder};

use super::{
    Initial, Recipe, StageRecipe, TrainError,
    autoregressive::{compute_dtype, training_device},
    pretraining::{answer_and_source, tensor},
    sheet,
    trainer::{Losses, MicroBatch, Task},
};
use crate::ModelFiles;

/// Steps of the sample pictures.
const SAMPLE_STEPS: usize = 12;

/// Pictures on a sheet of samples.
const SAMPLE_PICTURES: usize = 8;

/// What the two decoders have in common for training.
pub(crate) trait TrainedDecoder: Module {
    /// Names in the released file.
    const NAMES: WeightNames;
    /// Name of the exported file.
    const FILE: &'static str;
    /// Whether it sees a source picture.
    const SEES_REFERENCE: bool;

    fn new(config: &DiffusionConfig, device: &Device) -> Self;
    fn path(files: &ModelFiles) -> Result<std::path::PathBuf, crate::Error>;
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

    fn new(config: &DiffusionConfig, device: &Device) -> Self {
        Self::new(config, device)
    }

    fn path(files: &ModelFiles) -> Result<std::path::PathBuf, crate::Error> {
        files.generation_decoder()
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

    fn new(config: &DiffusionConfig, device: &Device) -> Self {
        Self::new(config, device)
    }

    fn path(files: &ModelFiles) -> Result<std::path::PathBuf, crate::Error> {
        files.edit_decoder()
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

/// Training of one decoder; all other parts are frozen and on the plain device.
pub(crate) struct DecoderTask<D: TrainedDecoder> {
    module: D,
    processor: Processor,
    encoder: VisionEncoder,
    autoencoder: Autoencoder,
    ar: Option<ArModel>,
    pooled: Tensor<2>,
    flow: FlowMatching,
    device: Device,
    /// What the latest micro-batch was about, for the sheet of samples.
    latest: Option<Prepared>,
}

/// A micro-batch on the plain device.
#[derive(Clone)]
struct Prepared {
    numbers: Vec<u64>,
    latents: Tensor<4>,
    embeds: ImageEmbeds,
    reference: Option<ImageEmbeds>,
}

/// One sample before it is encoded.
struct Sample {
    number: u64,
    messages: Vec<Message>,
    pixels: Vec<f32>,
    target: Patches,
    reference: Option<Patches>,
}

impl<D: TrainedDecoder> DecoderTask<D> {
    pub(crate) fn open(recipe: &Recipe, model: &Path, device: &Device) -> Result<Self, TrainError> {
        let files = ModelFiles::find(model)?;
        let options = LoadOptions { dtype: LoadDType::Convert(FloatDType::F32), check_finite: true };
        let language_model = files.open_language_model()?;
        let vision_config = VisionConfig::read(files.config())?;
        let encoder = VisionEncoder::load(&language_model, &vision_config, device, &options)?;
        let needs_ar = recipe.stages.iter().any(|stage| stage.decoder.predicted_embeds > 0.0);
        let ar = match needs_ar {
            true => Some(ArModel::load(&language_model, &ArConfig::read(files.config())?, device, &options)?),
            false => None,
        };
        let config = AutoencoderConfig::read_beside(&files.flux)?;
        let autoencoder = Autoencoder::load(&Checkpoint::open(files.autoencoder()?)?, &config, device, &options)?;
        let clip_dir = files.text_encoder()?;
        let clip_config = ClipConfig::read(&clip_dir.join("config.json"))?;
        let clip = ClipTextEncoder::load(&Checkpoint::open(clip_dir)?, &clip_config, device, &options)?;
        let ids = clip_empty_ids(clip_config.vocab_size, clip_config.max_position_embeddings);
        let pooled = clip.pooled(&ids, FloatDType::F32)?;
        let tracked = training_device(recipe, device);
        let config = DiffusionConfig {
            merger: MergerConfig::read(&files.config())?,
            dit: DitConfig::read_beside(&files.nexus)?,
        };
        config.validate()?;
        let module = D::new(&config, &tracked);
        let module = match &recipe.initial {
            Initial::Random(weights) => initialize(module, &D::NAMES, weights),
            Initial::Checkpoint => {
                let checkpoint = Checkpoint::open(D::path(&files)?)?;
                nexus_core::checkpoint::load_module(module, &checkpoint, &D::NAMES, &options)?
            }
        };
        let processor = Processor::open(&files.nexus)?;
        let flow = FlowMatching::new();
        Ok(Self { module, processor, encoder, autoencoder, ar, pooled, flow, device: tracked, latest: None })
    }

    /// Reads a sample, or says why it cannot be used.
    fn read(&self, number: u64, messages: Vec<Message>, side: usize) -> Result<Sample, String> {
        let images = self.processor.image_processor();
        let (answer, source) = answer_and_source(&messages).ok_or("no answer with an image")?;
        let failed = |error: nexus_data::DataError| error.to_string();
        let reference = match D::SEES_REFERENCE {
            true => Some(images.reference_patches(&source.ok_or("no image to be edited")?).map_err(failed)?),
            false => None,
        };
        let target = images.target_patches(&answer).map_err(failed)?;
        let pixels = decoder_image(&answer, side, side).map_err(failed)?;
        Ok(Sample { number, messages, pixels, target, reference })
    }

    /// Embeddings of images of one size, on the plain device.
    fn encode(&self, patches: Vec<Patches>) -> Result<ImageEmbeds, TrainError> {
        let grids: Vec<GridThw> = patches.iter().map(|patches| patches.grid).collect();
        let device = self.device.clone().inner();
        let pixels = patches.into_iter().map(|patches| patches.into_tensor(&device)).collect();
        let values = self.encoder.forward(Tensor::cat(pixels, 0), &grids);
        let [_, tokens, hidden] = values.dims();
        Ok(ImageEmbeds::new(values.reshape([grids.len(), tokens / grids.len(), hidden]), grids[0])?)
    }

    fn prepare(&self, samples: Vec<Sample>, stage: &StageRecipe, seed: u64) -> Result<Prepared, TrainError> {
        let side = stage.decoder.picture_px;
        let device = self.device.clone().inner();
        let numbers: Vec<u64> = samples.iter().map(|sample| sample.number).collect();
        let (mut pixels, mut targets, mut references) = (Vec::new(), Vec::new(), Vec::new());
        let mut conversations = Vec::new();
        for sample in samples {
            pixels.extend(sample.pixels);
            targets.push(sample.target);
            references.extend(sample.reference);
            conversations.push(sample.messages);
        }
        let pictures = tensor(pixels, [numbers.len(), 3, side, side], &device);
        let latents = self.autoencoder.encode(pictures, None);
        let mut embeds = self.encode(targets)?;
        if let Some(ar) = &self.ar {
            let share = stage.decoder.predicted_embeds as f32;
            let predicted = |number| Draws::new(seed, "predicted embeds", number).unit() < share;
            let chosen: Vec<usize> = (0..numbers.len()).filter(|&i| predicted(numbers[i])).collect();
            embeds = self.with_predictions(ar, embeds, &chosen, &conversations)?;
        }
        let reference = if references.is_empty() { None } else { Some(self.encode(references)?) };
        Ok(Prepared { numbers, latents, embeds, reference })
    }

    /// Puts the language model's predictions in the place of some true embeddings.
    fn with_predictions(
        &self,
        ar: &ArModel,
        embeds: ImageEmbeds,
        chosen: &[usize],
        conversations: &[Vec<Message>],
    ) -> Result<ImageEmbeds, TrainError> {
        if chosen.is_empty() {
            return Ok(embeds);
        }
        let (mut samples, mut last_answer) = (Vec::with_capacity(chosen.len()), Vec::with_capacity(chosen.len()));
        let mut answers = 0;
        for &index in chosen {
            let input = self.processor.training_input(&conversations[index], &ProcessOptions::default())?;
            let encode = |patches: Vec<Patches>| {
                patches.into_iter().map(|patches| self.encode(vec![patches])).collect::<Result<Vec<_>, _>>()
            };
            let (inputs, targets) = (encode(input.input_images)?, encode(input.answer_images)?);
            answers += targets.len();
            last_answer.push(answers - 1);
            samples.push(TrainingSample { token_ids: input.token_ids, labels: input.labels, inputs, targets });
        }
        let predicted = ar.predict_answers(&TrainingBatch::new(samples, ar.config())?, FloatDType::F32)?;
        let grid = embeds.grid;
        let rows = (0..embeds.values.dims()[0]).map(|index| match chosen.iter().position(|&at| at == index) {
            Some(at) => predicted[last_answer[at]].clone(),
            None => embeds.values.clone().narrow(0, index, 1),
        });
        Ok(ImageEmbeds::new(Tensor::cat(rows.collect(), 0), grid)?)
    }
}

impl<D: TrainedDecoder> Task for DecoderTask<D> {
    type Module = D;

    fn names(&self) -> WeightNames {
        D::NAMES
    }

    fn module(&self) -> Result<D, TrainError> {
        Ok(self.module.clone())
    }

    fn loss(&mut self, module: &D, batch: MicroBatch<'_>) -> Result<Option<Losses>, TrainError> {
        let MicroBatch { stage, feed, seed, samples } = batch;
        let side = stage.decoder.picture_px;
        let mut read = Vec::new();
        for number in samples {
            let Some(messages) = feed.conversation(number)? else { continue };
            match self.read(number, messages, side) {
                Ok(sample) => read.push(sample),
                Err(reason) => feed.reject(number, &reason)?,
            }
        }
        if read.is_empty() {
            return Ok(None);
        }
        let prepared = self.prepare(read, stage, seed)?;
        self.latest = Some(prepared.clone());
        let Prepared { numbers, latents, embeds, reference } = prepared;
        let [count, channels, height, width] = latents.dims();
        let dtype = compute_dtype(stage);
        let per_sample = channels * height * width;
        let noise = numbers.iter().flat_map(|&number| Draws::new(seed, "noise", number).normal_values(per_sample));
        let noise = tensor(noise.collect(), [count, channels, height, width], &self.device);
        let timesteps = numbers.iter().map(|&number| Draws::new(seed, "timestep", number).below(1000));
        let timestep_indices: Vec<usize> = timesteps.collect();
        let dropped =
            |number| f64::from(Draws::new(seed, "condition", number).unit()) < stage.decoder.condition_dropout;
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
            embedded_guidance: stage.decoder.embedded_guidance as f32,
        };
        let loss = self.flow.loss(module.dit(), input);
        Ok(Some(Losses { total: loss.total, parts: vec![("mse", loss.mse)] }))
    }

    fn export(&self, module: D, dir: &Path) -> Result<(), TrainError> {
        Ok(save_module_as(&module, &D::NAMES, &dir.join(D::FILE), FloatDType::BF16)?)
    }

    fn samples(&mut self, module: &D, stage: &StageRecipe) -> Result<Option<Image>, TrainError> {
        let Some(latest) = self.latest.clone() else { return Ok(None) };
        let shown = latest.numbers.len().min(SAMPLE_PICTURES);
        let first = |embeds: ImageEmbeds| ImageEmbeds::new(embeds.values.narrow(0, 0, shown), embeds.grid);
        let (embeds, reference) = (first(latest.embeds)?, latest.reference.map(first).transpose()?);
        let truth = latest.latents.narrow(0, 0, shown);
        let size = LatentSize::of(&truth);
        let module = module.valid();
        let conditioning = module.condition(&embeds, reference.as_ref(), size)?;
        let options = DenoiseOptions {
            num_steps: SAMPLE_STEPS,
            cfg_scale: 1.0,
            embedded_guidance: stage.decoder.embedded_guidance,
            ..DenoiseOptions::default()
        };
        let positive = Branch { conditioning, pooled: self.pooled.clone().repeat_dim(0, shown) };
        let denoiser = Denoiser::new(module.dit(), Branches { positive, negative: None }, size, &options)?;
        let noise = Draws::new(0, "samples", 0).normal(truth.dims(), &self.device.clone().inner());
        let mut state = denoiser.start(noise, None)?;
        let _ = denoiser.run(&mut state, &mut |_| std::ops::ControlFlow::Continue(()));
        let drawn = self.autoencoder.decode(state.latents, None);
        Ok(Some(sheet::rows(&[self.autoencoder.decode(truth, None), drawn])?))
    }
}
