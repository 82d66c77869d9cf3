//! The model as a whole: checkpoint + device + residency -> the verbs.

use std::{
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use burn::tensor::{Device, FloatDType};
use nexus_ar::{ArConfig, GenerateEvent, Generation, GenerationConfig, Prompt, SamplingOptions};
use nexus_checkpoint::{LoadDType, LoadOptions, Quantization};
use nexus_core::{
    ImageEmbeds,
    config::{ConfigError, read_json},
};
use nexus_data::{Image, Message, ModelInput, Processor};
use nexus_diffusion::LatentSize;

use crate::{
    Chat, ChatOptions, DrawOptions, DrawWith, EditOptions, Error, GenerateOptions, Images, ModelFiles, Observer,
    Picture, Precision, Progress, Reply, Residency, Session, Stage, TextOptions, session::emit, stages::Stages,
};

/// Largest picture that is drawn unless [`Loader::max_picture_pixels`] says otherwise: 4096x4096.
const MAX_PICTURE_PIXELS: usize = 4096 * 4096;

/// A model that understands, generates and edits images.
///
/// Every verb also exists on [`Session`], which [`Nexus::with_progress`] makes, with progress and cancelling.
pub struct Nexus {
    pub(crate) processor: Processor,
    pub(crate) stages: Stages,
    generation_config: GenerationConfig,
    default_options: ChatOptions,
    max_picture_pixels: usize,
}

/// How a model is loaded; made by [`Nexus::loader`].
#[derive(Debug, Clone)]
pub struct Loader {
    dir: PathBuf,
    flux_dir: Option<PathBuf>,
    generation_decoder: Option<PathBuf>,
    edit_decoder: Option<PathBuf>,
    residency: Residency,
    check_finite: bool,
    weights_dtype: Option<LoadDType>,
    compute_dtype: Option<FloatDType>,
    quantization: Option<Quantization>,
    max_picture_pixels: usize,
}

impl Loader {
    /// Where the FLUX files are, if not beside the model: `models`, `models/FLUX/FLUX.1-dev`, or a place like it.
    #[must_use]
    pub fn flux_dir(self, dir: impl Into<PathBuf>) -> Self {
        Self { flux_dir: Some(dir.into()), ..self }
    }

    /// Another generation decoder, `.safetensors` or `.bin`.
    #[must_use]
    pub fn generation_decoder(self, path: impl Into<PathBuf>) -> Self {
        Self { generation_decoder: Some(path.into()), ..self }
    }

    /// Another editing decoder, `.safetensors` or `.bin`.
    #[must_use]
    pub fn edit_decoder(self, path: impl Into<PathBuf>) -> Self {
        Self { edit_decoder: Some(path.into()), ..self }
    }

    /// Which stages stay in memory between requests.
    #[must_use]
    pub fn residency(self, residency: Residency) -> Self {
        Self { residency, ..self }
    }

    /// Dtype of the weights in memory; by default what [`Precision::of`] says of the device.
    #[must_use]
    pub fn weights_dtype(self, dtype: LoadDType) -> Self {
        Self { weights_dtype: Some(dtype), ..self }
    }

    /// Dtype of the activations; by default what [`Precision::of`] says of the device.
    #[must_use]
    pub fn compute_dtype(self, dtype: FloatDType) -> Self {
        Self { compute_dtype: Some(dtype), ..self }
    }

    /// Keeps the linear layers of the language model and of the decoders in 8 or 4 bits, for devices with little memory.
    ///
    /// A layer becomes floats again each time it is used; on a CPU, where weights stay in the mapped
    /// file, it saves nothing.
    #[must_use]
    pub fn quantization(self, quantization: Quantization) -> Self {
        Self { quantization: Some(quantization), ..self }
    }

    /// Whether every weight is read and NaN or infinity refused; off by default, because it reads the whole files.
    #[must_use]
    pub fn check_finite(self, check_finite: bool) -> Self {
        Self { check_finite, ..self }
    }

    /// Largest picture that may be drawn, in pixels; 4096x4096 by default.
    #[must_use]
    pub fn max_picture_pixels(self, max_picture_pixels: usize) -> Self {
        Self { max_picture_pixels, ..self }
    }

    /// Reads the configuration, checks the names, shapes and dtypes of all files that are there, and loads the vision
    /// encoder and the language model (with [`Residency::KeepAll`]); the decoders are loaded when first used.
    ///
    /// # Errors
    /// [`Error::Device`] for a dtype that the device has not, [`Error::NoSuchDirectory`], [`Error::NoModel`],
    /// [`Error::Config`], [`Error::Data`] for the tokenizer, [`Error::OutOfDeviceMemory`], and the stages' errors for
    /// their weights. That the decoders or FLUX files are absent is an error only when they are needed.
    pub fn load(self, device: &Device) -> Result<Nexus, Error> {
        self.load_with_progress(device, &mut |_| ControlFlow::Continue(()))
    }

    /// [`Loader::load`] with an observer that hears which stage is being loaded.
    ///
    /// # Errors
    /// As [`Loader::load`], and [`Error::Cancelled`].
    pub fn load_with_progress(self, device: &Device, observer: &mut Observer<'_>) -> Result<Nexus, Error> {
        let suited = Precision::of(device);
        let precision = Precision {
            weights: self.weights_dtype.unwrap_or(suited.weights),
            compute: self.compute_dtype.unwrap_or(suited.compute),
        };
        precision.check(device)?;
        let options =
            LoadOptions { dtype: precision.weights, check_finite: self.check_finite, quantization: self.quantization };
        let mut files = ModelFiles::find(&self.dir)?;
        if let Some(dir) = self.flux_dir {
            files.set_flux(&dir)?;
        }
        files.override_decoders(self.generation_decoder, self.edit_decoder)?;
        let processor = Processor::open(&files.nexus)?;
        let config = ArConfig::read(files.config())?;
        check_tokenizer(&processor, &config)?;
        let generation_config = GenerationConfig::read(files.generation_config())?;
        let default_options = match read_json(files.default_options()) {
            Err(ConfigError::Missing { .. }) => ChatOptions::default(),
            read => read?,
        };
        let mut stages = Stages::open(files, config, device, options, precision.compute, self.residency)?;
        if self.residency == Residency::KeepAll {
            let loaded = catch_unwind(AssertUnwindSafe(|| {
                stages.vision_encoder(observer)?;
                stages.ar(observer)?;
                Ok(())
            }));
            stages.judge(loaded)?;
        }
        let max_picture_pixels = self.max_picture_pixels;
        Ok(Nexus { processor, stages, generation_config, default_options, max_picture_pixels })
    }
}

/// The tokens that steer images must be the model's.
fn check_tokenizer(processor: &Processor, config: &ArConfig) -> Result<(), ConfigError> {
    let (special, ids) = (processor.tokenizer().special_tokens(), config.token_ids);
    for (field, in_config, in_tokenizer) in [
        ("vision_start_token_id", ids.vision_start_token_id, special.boi),
        ("vision_end_token_id", ids.vision_end_token_id, special.eoi),
        ("image_token_id", ids.image_token_id, special.image),
    ] {
        if in_config != in_tokenizer {
            let reason = format!("config.json says {in_config}, but tokenizer.json says {in_tokenizer}");
            return Err(ConfigError::incoherent(field, reason));
        }
    }
    Ok(())
}

impl Nexus {
    /// Loads a model from `models/` or `models/Nexus-GenV2` and keeps its stages in memory.
    ///
    /// # Errors
    /// As [`Loader::load`].
    pub fn load(dir: impl AsRef<Path>, device: &Device) -> Result<Self, Error> {
        Self::loader(dir).load(device)
    }

    /// Chooses how a model is loaded.
    pub fn loader(dir: impl AsRef<Path>) -> Loader {
        Loader {
            dir: dir.as_ref().to_path_buf(),
            flux_dir: None,
            generation_decoder: None,
            edit_decoder: None,
            residency: Residency::default(),
            check_finite: false,
            weights_dtype: None,
            compute_dtype: None,
            quantization: None,
            max_picture_pixels: MAX_PICTURE_PIXELS,
        }
    }

    /// The same verbs with an observer, which hears what happens and may cancel by returning
    /// [`ControlFlow::Break`].
    pub fn with_progress<'a>(&'a mut self, observer: impl FnMut(Progress) -> ControlFlow<()> + 'a) -> Session<'a> {
        Session { nexus: self, observer: Box::new(observer) }
    }

    fn quietly(&mut self) -> Session<'_> {
        self.with_progress(|_| ControlFlow::Continue(()))
    }

    /// Answers a question about one or several images, given before it unless `<image>` marks in the question say
    /// where they go.
    ///
    /// Transparent images are put on white.
    ///
    /// # Errors
    /// [`Error::Data`] for an empty question, marks that do not match the images, or an unusable image;
    /// [`Error::Ar`] for a prompt longer than the context or an option out of range.
    pub fn understand<'i>(
        &mut self,
        images: impl Into<Images<'i>>,
        question: &str,
        options: &TextOptions,
    ) -> Result<Reply, Error> {
        self.quietly().understand(images, question, options)
    }

    /// Draws a picture of what the prompt describes.
    ///
    /// # Errors
    /// [`Error::NoImage`] if the model answers with text only; [`Error::Data`] for an empty prompt;
    /// [`Error::Diffusion`] and [`Error::PictureTooLarge`] for options out of range; [`Error::FileMissing`] if a decoder
    /// is not there; [`Error::OutOfDeviceMemory`], [`Error::DeviceLost`] and [`Error::Read`] if the device fails;
    /// otherwise the stages' errors.
    pub fn generate(&mut self, prompt: &str, options: &GenerateOptions) -> Result<Picture, Error> {
        self.quietly().generate(prompt, options)
    }

    /// Changes a picture as the instruction says.
    ///
    /// An alpha channel is dropped. The result has the size of the options, not of the source.
    ///
    /// # Errors
    /// As [`Nexus::generate`].
    pub fn edit(&mut self, image: &Image, instruction: &str, options: &EditOptions) -> Result<Picture, Error> {
        self.quietly().edit(image, instruction, options)
    }

    /// Begins a conversation with the model's default options.
    pub fn chat(&mut self) -> Chat<'_> {
        self.chat_with(self.default_options.clone())
    }

    /// Begins a conversation.
    pub fn chat_with(&mut self, options: ChatOptions) -> Chat<'_> {
        self.quietly().chat(options)
    }

    /// The model's answer to a conversation: text, and embeddings of pictures that are not drawn yet.
    ///
    /// # Errors
    /// As [`Nexus::understand`].
    pub fn reply(&mut self, messages: &[Message], options: &TextOptions) -> Result<Reply, Error> {
        self.quietly().reply(messages, options)
    }

    /// The model's answer to a prompt that was prepared by [`Nexus::processor`], for example one that ends with the
    /// token that begins an image.
    ///
    /// # Errors
    /// As [`Nexus::understand`].
    pub fn reply_to(&mut self, input: ModelInput, options: &TextOptions) -> Result<Reply, Error> {
        self.quietly().reply_to(input, options)
    }

    /// Embeddings of an image as the language model sees it, at most `max_pixels` large.
    ///
    /// # Errors
    /// [`Error::Data`] if the image cannot be used.
    pub fn embed(&mut self, image: &Image, max_pixels: usize) -> Result<ImageEmbeds, Error> {
        self.quietly().embed(image, max_pixels)
    }

    /// Embeddings of an image as the editing decoder sees it: 324, whatever its size and shape.
    ///
    /// # Errors
    /// [`Error::Data`] if the image cannot be used.
    pub fn reference(&mut self, image: &Image) -> Result<ImageEmbeds, Error> {
        self.quietly().reference(image)
    }

    /// Draws embeddings: predicted ones, or those of an image.
    ///
    /// They, and start noise that is given, may be on any device and in any dtype of floats.
    ///
    /// # Errors
    /// As [`Nexus::generate`].
    pub fn draw(&mut self, embeds: &ImageEmbeds, with: DrawWith<'_>, options: &DrawOptions) -> Result<Picture, Error> {
        self.quietly().draw(embeds, with, options)
    }

    /// Tokenizer and image processor of the model.
    pub fn processor(&self) -> &Processor {
        &self.processor
    }

    /// Where the model's files are.
    pub fn files(&self) -> &ModelFiles {
        &self.stages.files
    }

    /// Options that suit the model: what `nexus_options.json` says, or those of the original's scripts without it.
    pub fn default_options(&self) -> &ChatOptions {
        &self.default_options
    }

    /// What `generation_config.json` says.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation_config
    }

    /// Frees every stage and the prompts that were kept; they are loaded and encoded again when needed.
    pub fn unload(&mut self) {
        self.stages.unload();
    }

    pub(crate) fn check_drawing(&self, options: &DrawOptions) -> Result<LatentSize, Error> {
        let DrawOptions { width, height, .. } = *options;
        options.denoise().validate()?;
        let size = LatentSize::from_pixels(height, width)?;
        let (used_height, used_width) = size.pixels();
        if used_height.saturating_mul(used_width) > self.max_picture_pixels {
            return Err(Error::PictureTooLarge { width, height, max_pixels: self.max_picture_pixels });
        }
        Ok(size)
    }

    pub(crate) fn generate_tokens(
        &mut self,
        token_ids: &[u32],
        images: &[ImageEmbeds],
        options: &TextOptions,
        observer: &mut Observer<'_>,
    ) -> Result<Generation, Error> {
        let from_config = || SamplingOptions::from_config(&self.generation_config, 0);
        let generate_options = nexus_ar::GenerateOptions {
            max_new_tokens: options.max_new_tokens,
            sampling: options.sampling.clone().unwrap_or_else(from_config),
            eos_token_ids: self.generation_config.eos_token_id.clone(),
            image_pass: options.image_pass,
            positions_after_image: options.positions_after_image,
            dtype: self.stages.compute_dtype,
            keep_scores: options.keep_scores,
        };
        let ar = self.stages.ar(observer)?;
        emit(observer, Progress::Running(Stage::Ar))?;
        let mut text = self.processor.tokenizer().decode_stream(true);
        let mut num_images = 0;
        let mut failed = None;
        let mut hear = |event: GenerateEvent<'_>| {
            let progress = match event {
                GenerateEvent::PromptRead { tokens } => Progress::PromptRead { tokens },
                GenerateEvent::Token { id } => match text.push(id) {
                    Ok(Some(piece)) => Progress::Text(piece),
                    Ok(None) => return ControlFlow::Continue(()),
                    Err(error) => {
                        failed = Some(error);
                        return ControlFlow::Break(());
                    }
                },
                GenerateEvent::Image { .. } => {
                    num_images += 1;
                    Progress::ImagePredicted { index: num_images - 1 }
                }
                _ => return ControlFlow::Continue(()),
            };
            observer(progress)
        };
        let prompt = Prompt { token_ids, images };
        let generation = nexus_ar::generate(ar, prompt, &generate_options, &mut hear)?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        match generation.finish {
            nexus_ar::FinishReason::Stopped => Err(Error::Cancelled),
            _ => Ok(generation),
        }
    }
}
