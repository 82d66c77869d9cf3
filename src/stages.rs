//! The stages of the model: which are in memory, how they are loaded, and what each does with its input.

use std::{
    ops::{ControlFlow, Deref},
    sync::{Arc, Mutex, MutexGuard},
};

use burn::{
    module::Module,
    tensor::{DType, Device, FloatDType, Tensor},
};
use nexus_ar::{ArConfig, ArModel};
use nexus_checkpoint::{Checkpoint, LoadOptions, check_module};
use nexus_core::{ImageEmbeds, check_arrived, failure_reason};
use nexus_data::{ClipTokenizer, Image, Patches, PromptImage, T5_LEN, T5Tokenizer, clip_empty_ids, t5_empty_ids};
use nexus_diffusion::{
    Autoencoder, Branch, Branches, ClipTextEncoder, Conditioning, DenoiseOptions, Denoiser, EditingDecoder,
    GenerationDecoder, LatentSize, Noise, T5Encoder, Tiling,
    config::{AutoencoderConfig, ClipConfig, DiffusionConfig, T5Config},
    weights,
};
use nexus_vision_encoder::{VisionConfig, VisionEncoder};
use serde::{Deserialize, Serialize};

use crate::{
    DrawOptions, DrawWith, Error, ModelFiles, Observer, Progress, Stage,
    device::is_cpu,
    error::{read, read_data},
    progress::emit,
    slot::{Slot, lock},
};

/// Which stages stay in memory between requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residency {
    /// Every stage stays once it has been used; the text encoders never do.
    #[default]
    KeepAll,
    /// A stage is freed before the next one is loaded.
    OneStageAtATime,
}

/// Files, settings, and the stages that are in memory.
pub(crate) struct Stages {
    pub(crate) files: ModelFiles,
    pub(crate) compute_dtype: FloatDType,
    config: ArConfig,
    vision_config: VisionConfig,
    language_model: Checkpoint,
    pub(crate) device: Device,
    options: LoadOptions,
    residency: Residency,
    vision_encoder: Slot<VisionEncoder>,
    ar: Slot<ArModel>,
    generation_decoder: Slot<GenerationDecoder>,
    editing_decoder: Slot<EditingDecoder>,
    autoencoder: Slot<Autoencoder>,
    empty_prompt: Mutex<Option<Tensor<2>>>,
    negative_prompt: Mutex<Option<(String, Branch)>>,
    /// Held by who uses a stage, with [`Residency::OneStageAtATime`]: the other requests wait for their turn.
    turn: Mutex<()>,
}

/// A stage in use.
pub(crate) struct Lease<'a, T> {
    stage: Arc<T>,
    _turn: Option<MutexGuard<'a, ()>>,
}

impl<T> Deref for Lease<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.stage
    }
}

impl Stages {
    /// Opens the language model's files and checks all files that are there; loads nothing.
    pub(crate) fn open(
        files: ModelFiles,
        config: ArConfig,
        device: &Device,
        options: LoadOptions,
        compute_dtype: FloatDType,
        residency: Residency,
    ) -> Result<Self, Error> {
        let vision_config = VisionConfig::read(files.config())?;
        let language_model = files.open_language_model()?;
        let stages = Self {
            files,
            compute_dtype,
            config,
            vision_config,
            language_model,
            device: device.clone(),
            options,
            residency,
            vision_encoder: Slot::empty(),
            ar: Slot::empty(),
            generation_decoder: Slot::empty(),
            editing_decoder: Slot::empty(),
            autoencoder: Slot::empty(),
            empty_prompt: Mutex::new(None),
            negative_prompt: Mutex::new(None),
            turn: Mutex::new(()),
        };
        stages.check()?;
        Ok(stages)
    }

    /// Compares names, shapes and dtypes of every file that is there with the modules, without loading weights.
    fn check(&self) -> Result<(), Error> {
        let (device, options) = (&self.device, &self.options);
        let vision_encoder = VisionEncoder::new(&self.vision_config, device);
        check_module(&vision_encoder, &self.language_model, &nexus_vision_encoder::NAMES, options)?;
        check_module(&ArModel::new(&self.config, device)?, &self.language_model, &nexus_ar::NAMES, options)?;
        let (mut ae_config, mut clip_config, mut t5_config) = (None, None, None);
        if let Ok(path) = self.files.autoencoder() {
            let config = ae_config.insert(AutoencoderConfig::read_beside(&self.files.flux)?);
            let autoencoder = Autoencoder::new(config, device);
            check_module(&autoencoder, &Checkpoint::open(path)?, &weights::AUTOENCODER, options)?;
        }
        if let Ok(dir) = self.files.text_encoder() {
            let config = clip_config.insert(ClipConfig::read(&dir.join("config.json"))?);
            check_module(&ClipTextEncoder::new(config, device), &Checkpoint::open(dir)?, &weights::CLIP, options)?;
        }
        if let Ok(dir) = self.files.text_encoder_2() {
            let config = t5_config.insert(T5Config::read(&dir.join("config.json"))?);
            check_module(&T5Encoder::new(config, device), &Checkpoint::open(dir)?, &weights::T5, options)?;
        }
        let fits = |config: &DiffusionConfig| {
            config.dit.validate_with(ae_config.as_ref(), clip_config.as_ref(), t5_config.as_ref())
        };
        if let Ok(path) = self.files.generation_decoder() {
            let config = self.files.diffusion_config(path.parent().unwrap_or(&self.files.nexus))?;
            fits(&config)?;
            let decoder = GenerationDecoder::new(&config, device);
            check_module(&decoder, &Checkpoint::open(path)?, &weights::GENERATION_DECODER, options)?;
        }
        if let Ok(path) = self.files.edit_decoder() {
            let config = self.files.diffusion_config(path.parent().unwrap_or(&self.files.nexus))?;
            fits(&config)?;
            let decoder = EditingDecoder::new(&config, device);
            check_module(&decoder, &Checkpoint::open(path)?, &weights::EDITING_DECODER, options)?;
        }
        Ok(())
    }

    /// How the small stages are loaded: all but the language model and the decoders.
    fn unquantized(&self) -> LoadOptions {
        LoadOptions { quantization: None, ..self.options }
    }

    /// Frees everything on the device: every stage, and the prompts that were kept.
    pub(crate) fn unload(&self) {
        *lock(&self.empty_prompt) = None;
        *lock(&self.negative_prompt) = None;
        self.free_stages();
    }

    fn free_stages(&self) {
        self.vision_encoder.free();
        self.ar.free();
        self.generation_decoder.free();
        self.editing_decoder.free();
        self.autoencoder.free();
        self.device.memory_cleanup();
    }

    /// The stages that are in memory, with the bytes of their weights.
    pub(crate) fn loaded(&self) -> Vec<(Stage, usize)> {
        let all = [
            (Stage::VisionEncoder, self.vision_encoder.num_bytes()),
            (Stage::Ar, self.ar.num_bytes()),
            (Stage::GenerationDecoder, self.generation_decoder.num_bytes()),
            (Stage::EditingDecoder, self.editing_decoder.num_bytes()),
            (Stage::Autoencoder, self.autoencoder.num_bytes()),
        ];
        all.into_iter().filter(|(_, bytes)| *bytes > 0).collect()
    }

    /// Waits until no other request uses a stage, if only one may be in memory.
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        (self.residency == Residency::OneStageAtATime).then(|| lock(&self.turn))
    }

    /// Says what is loaded next, and makes room for it.
    fn announce(&self, stage: Stage, observer: &mut dyn Observer) -> Result<(), Error> {
        if self.residency == Residency::OneStageAtATime {
            self.free_stages();
        }
        emit(observer, Progress::Loading(stage))
    }

    /// A stage for the time of its use, loaded if it is not in memory.
    fn lease<'a, T: Module>(
        &'a self,
        stage: Stage,
        slot: &Slot<T>,
        observer: &mut dyn Observer,
        load: impl FnOnce() -> Result<T, Error>,
    ) -> Result<Lease<'a, T>, Error> {
        let turn = self.turn();
        let loaded = match slot.get() {
            Some(loaded) => loaded,
            None => {
                self.announce(stage, observer)?;
                slot.get_or_load(|| self.arrived(load()?))?
            }
        };
        Ok(Lease { stage: loaded, _turn: turn })
    }

    /// A module that was loaded, once all of its weights are on the device. On a CPU they are in the mapped file.
    fn arrived<M: Module>(&self, module: M) -> Result<M, Error> {
        if !is_cpu(&self.device) {
            let of_device = |error| Error::of_device(failure_reason(&error, &self.device), &self.device);
            check_arrived(&module).map_err(of_device)?;
        }
        Ok(module)
    }

    pub(crate) fn vision_encoder(&self, observer: &mut dyn Observer) -> Result<Lease<'_, VisionEncoder>, Error> {
        self.lease(Stage::VisionEncoder, &self.vision_encoder, observer, || {
            self.files.load_vision_encoder(&self.device, &self.unquantized())
        })
    }

    pub(crate) fn ar(&self, observer: &mut dyn Observer) -> Result<Lease<'_, ArModel>, Error> {
        self.lease(Stage::Ar, &self.ar, observer, || self.files.load_ar(&self.device, &self.options))
    }

    fn generation_decoder(&self, observer: &mut dyn Observer) -> Result<Lease<'_, GenerationDecoder>, Error> {
        self.files.generation_decoder()?;
        self.lease(Stage::GenerationDecoder, &self.generation_decoder, observer, || {
            self.files.load_generation_decoder(&self.device, &self.options)
        })
    }

    fn editing_decoder(&self, observer: &mut dyn Observer) -> Result<Lease<'_, EditingDecoder>, Error> {
        self.files.edit_decoder()?;
        self.lease(Stage::EditingDecoder, &self.editing_decoder, observer, || {
            self.files.load_editing_decoder(&self.device, &self.options)
        })
    }

    fn autoencoder(&self, observer: &mut dyn Observer) -> Result<Lease<'_, Autoencoder>, Error> {
        self.files.autoencoder()?;
        self.lease(Stage::Autoencoder, &self.autoencoder, observer, || {
            self.files.load_autoencoder(&self.device, &self.unquantized())
        })
    }

    /// Embeddings of the images of a prompt, each encoded on its own; none without loading anything.
    pub(crate) fn encode(
        &self,
        images: Vec<PromptImage>,
        observer: &mut dyn Observer,
    ) -> Result<Vec<ImageEmbeds>, Error> {
        let encode = |image| match image {
            PromptImage::Patches(patches) => self.encode_one(patches, observer),
            PromptImage::Embeds(embeds) => self.adopt(&embeds),
        };
        images.into_iter().map(encode).collect()
    }

    /// Embeddings made anywhere, on this device and in the dtype of the activations.
    fn adopt(&self, embeds: &ImageEmbeds) -> Result<ImageEmbeds, Error> {
        Ok(ImageEmbeds::new(adopt(&embeds.values, &self.device, self.compute_dtype)?, embeds.grid)?)
    }

    pub(crate) fn encode_one(&self, patches: Patches, observer: &mut dyn Observer) -> Result<ImageEmbeds, Error> {
        let (device, dtype) = (self.device.clone(), self.compute_dtype);
        let encoder = self.vision_encoder(observer)?;
        emit(observer, Progress::Running(Stage::VisionEncoder))?;
        let grid = patches.grid;
        let values = encoder.encode(patches.into_tensor(&device).cast(dtype), &[grid])?.remove(0).values;
        Ok(ImageEmbeds::new(values, grid)?)
    }

    /// Draws latents from embeddings.
    pub(crate) fn denoise(
        &self,
        embeds: &ImageEmbeds,
        with: DrawWith<'_>,
        size: LatentSize,
        options: &DrawOptions,
        observer: &mut dyn Observer,
    ) -> Result<Tensor<4>, Error> {
        let denoise = options.denoise();
        let pooled = self.empty_prompt(observer)?;
        let negative = match denoise.uses_negative_branch() {
            true => Some(self.negative_prompt(&options.negative_prompt, observer)?),
            false => None,
        };
        let (device, dtype) = (self.device.clone(), self.compute_dtype);
        let embeds = self.adopt(embeds)?;
        let noise = match &options.noise {
            Noise::Latents(latents) => Noise::Latents(adopt(latents, &device, dtype)?),
            seed @ Noise::Seed(_) => seed.clone(),
        };
        let (generation, editing);
        let (conditioning, dit, stage) = match with {
            DrawWith::GenerationDecoder => {
                generation = self.generation_decoder(observer)?;
                let decoder = &*generation;
                (decoder.condition(&embeds)?, &decoder.dit, Stage::GenerationDecoder)
            }
            DrawWith::EditingDecoder { reference } => {
                let reference = reference.map(|reference| self.adopt(reference)).transpose()?;
                editing = self.editing_decoder(observer)?;
                let decoder = &*editing;
                (decoder.condition(&embeds, reference.as_ref(), size)?, &decoder.dit, Stage::EditingDecoder)
            }
        };
        emit(observer, Progress::Running(stage))?;
        let branches = Branches { positive: Branch { conditioning, pooled }, negative };
        let denoiser = Denoiser::new(dit, branches, size, &denoise)?;
        let noise = noise.into_latents(dit.latent_channels(), size, dtype, &device)?;
        let mut state = denoiser.start(noise, None)?;
        let flow = denoiser
            .run(&mut state, &mut |event| observer.hear(Progress::Step { done: event.step, total: event.num_steps }));
        match flow {
            ControlFlow::Continue(()) => Ok(state.latents),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }

    /// Pixels of latents, truncated to 8 bits as in the original.
    pub(crate) fn decode(&self, latents: Tensor<4>, tiled: bool, observer: &mut dyn Observer) -> Result<Image, Error> {
        let (height, width) = LatentSize::of(&latents).pixels();
        let autoencoder = self.autoencoder(observer)?;
        emit(observer, Progress::Running(Stage::Autoencoder))?;
        let decoded = autoencoder.decode(latents, tiled.then(Tiling::default));
        Ok(Image::from_decoded(&read(decoded)?, height, width)?)
    }

    /// Pooled vector of the empty prompt, which the original gives to every positive branch.
    fn empty_prompt(&self, observer: &mut dyn Observer) -> Result<Tensor<2>, Error> {
        if let Some(pooled) = &*lock(&self.empty_prompt) {
            return Ok(pooled.clone());
        }
        let pooled = self.clip("", observer)?;
        Ok(lock(&self.empty_prompt).insert(pooled).clone())
    }

    /// What a negative prompt is to the transformer; the latest one is kept.
    fn negative_prompt(&self, prompt: &str, observer: &mut dyn Observer) -> Result<Branch, Error> {
        if let Some((kept, branch)) = &*lock(&self.negative_prompt)
            && kept == prompt
        {
            return Ok(branch.clone());
        }
        let pooled = if prompt.is_empty() { self.empty_prompt(observer)? } else { self.clip(prompt, observer)? };
        let conditioning = Conditioning::without_positions(self.t5(prompt, observer)?);
        let branch = Branch { conditioning, pooled };
        *lock(&self.negative_prompt) = Some((prompt.to_string(), branch.clone()));
        Ok(branch)
    }

    fn clip(&self, prompt: &str, observer: &mut dyn Observer) -> Result<Tensor<2>, Error> {
        let config = self.files.clip_config()?;
        let ids = match prompt.is_empty() {
            true => clip_empty_ids(config.vocab_size, config.max_position_embeddings),
            false => ClipTokenizer::open(self.files.clip_tokenizer()?)?.encode_padded(prompt)?,
        };
        let _turn = self.turn();
        self.announce(Stage::TextEncoders, observer)?;
        let clip = self.arrived(self.files.load_clip(&self.device, &self.unquantized())?)?;
        Ok(clip.pooled(&ids, self.compute_dtype)?)
    }

    fn t5(&self, prompt: &str, observer: &mut dyn Observer) -> Result<Tensor<3>, Error> {
        self.files.text_encoder_2()?;
        let ids = match prompt.is_empty() {
            true => t5_empty_ids(T5_LEN),
            false => T5Tokenizer::open(self.files.t5_tokenizer()?)?.encode_padded(prompt)?,
        };
        let _turn = self.turn();
        self.announce(Stage::TextEncoders, observer)?;
        let t5 = self.arrived(self.files.load_t5(&self.device, &self.unquantized())?)?;
        Ok(t5.encode(&ids, self.compute_dtype)?)
    }
}

/// Values made anywhere, on this device and in this dtype; from elsewhere they go through the memory of the host, because a
/// device need not have their dtype.
fn adopt<const D: usize>(values: &Tensor<D>, device: &Device, dtype: FloatDType) -> Result<Tensor<D>, Error> {
    let from = values.device();
    if from == *device && from.is_autodiff() == device.is_autodiff() {
        return Ok(values.clone().cast(dtype));
    }
    Ok(Tensor::from_data(read_data(values.clone())?, (device, DType::from(dtype))))
}

impl DrawOptions {
    /// The options of the denoising loop.
    pub(crate) fn denoise(&self) -> DenoiseOptions {
        DenoiseOptions {
            num_steps: self.steps,
            cfg_scale: self.cfg_scale,
            embedded_guidance: self.embedded_guidance,
            strength: 1.0,
            tea_cache_threshold: self.tea_cache,
            tiling: self.tiled.then(Tiling::default),
        }
    }
}
