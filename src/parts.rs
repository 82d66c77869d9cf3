//! The parts of a model, each from its files: a directory, a device and options -> a module with its weights.

use std::path::Path;

use burn::tensor::Device;
use nexus_ar::{ArConfig, ArModel};
use nexus_checkpoint::{Checkpoint, LoadOptions, check_module};
use nexus_diffusion::{
    Autoencoder, ClipTextEncoder, EditingDecoder, GenerationDecoder, T5Encoder,
    config::{AutoencoderConfig, ClipConfig, DiffusionConfig, DitConfig, MergerConfig, T5Config},
    transformer::Dit,
    weights,
};
use nexus_vision_encoder::{VisionConfig, VisionEncoder};

use crate::{Error, ModelFiles};

impl ModelFiles {
    /// Loads the vision encoder.
    ///
    /// # Errors
    /// [`Error`] naming the file at fault.
    pub fn load_vision_encoder(&self, device: &Device, options: &LoadOptions) -> Result<VisionEncoder, Error> {
        let config = VisionConfig::read(self.config())?;
        Ok(VisionEncoder::load(&self.open_language_model()?, &config, device, options)?)
    }

    /// Loads the language model with vision head and prefill embeddings.
    ///
    /// # Errors
    /// [`Error`] naming the file at fault.
    pub fn load_ar(&self, device: &Device, options: &LoadOptions) -> Result<ArModel, Error> {
        let config = ArConfig::read(self.config())?;
        Ok(ArModel::load(&self.open_language_model()?, &config, device, options)?)
    }

    /// Loads the generation decoder.
    ///
    /// # Errors
    /// [`Error`] naming the file at fault.
    pub fn load_generation_decoder(&self, device: &Device, options: &LoadOptions) -> Result<GenerationDecoder, Error> {
        let path = self.generation_decoder()?;
        let config = self.diffusion_config(path.parent().unwrap_or(&self.nexus))?;
        Ok(GenerationDecoder::load(&Checkpoint::open(path)?, &config, device, options)?)
    }

    /// Loads the editing decoder.
    ///
    /// # Errors
    /// [`Error`] naming the file at fault.
    pub fn load_editing_decoder(&self, device: &Device, options: &LoadOptions) -> Result<EditingDecoder, Error> {
        let path = self.edit_decoder()?;
        let config = self.diffusion_config(path.parent().unwrap_or(&self.nexus))?;
        Ok(EditingDecoder::load(&Checkpoint::open(path)?, &config, device, options)?)
    }

    /// Loads the transformer of FLUX.1-dev, from which decoders were trained.
    ///
    /// # Errors
    /// [`Error`] naming the file at fault.
    pub fn load_flux1_dev(&self, device: &Device, options: &LoadOptions) -> Result<Dit, Error> {
        let (path, config) = (self.flux1_dev()?, self.diffusion_config(&self.nexus)?);
        Ok(Dit::load_flux1_dev(&Checkpoint::open(path)?, &config.dit, device, options)?)
    }

    /// Loads the autoencoder.
    ///
    /// # Errors
    /// [`Error`] naming the file at fault.
    pub fn load_autoencoder(&self, device: &Device, options: &LoadOptions) -> Result<Autoencoder, Error> {
        let (path, config) = (self.autoencoder()?, AutoencoderConfig::read_in(&self.flux)?);
        Ok(Autoencoder::load(&Checkpoint::open(path)?, &config, device, options)?)
    }

    /// Loads the CLIP text encoder.
    ///
    /// # Errors
    /// [`Error`] naming the file at fault.
    pub fn load_clip(&self, device: &Device, options: &LoadOptions) -> Result<ClipTextEncoder, Error> {
        let config = self.clip_config()?;
        Ok(ClipTextEncoder::load(&Checkpoint::open(self.text_encoder()?)?, &config, device, options)?)
    }

    /// Sizes of the CLIP text encoder.
    ///
    /// # Errors
    /// [`Error::FileMissing`] or [`Error::Config`].
    pub fn clip_config(&self) -> Result<ClipConfig, Error> {
        Ok(ClipConfig::read(self.text_encoder()?.join("config.json"))?)
    }

    /// Loads the T5 text encoder.
    ///
    /// # Errors
    /// [`Error`] naming the file at fault.
    pub fn load_t5(&self, device: &Device, options: &LoadOptions) -> Result<T5Encoder, Error> {
        let dir = self.text_encoder_2()?;
        let config = T5Config::read(dir.join("config.json"))?;
        Ok(T5Encoder::load(&Checkpoint::open(dir)?, &config, device, options)?)
    }

    /// Sizes of a decoder: those that a directory has, where its weights lie, or the released ones.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field at fault.
    pub fn diffusion_config(&self, dir: &Path) -> Result<DiffusionConfig, Error> {
        let config = DiffusionConfig { merger: MergerConfig::read(self.config())?, dit: DitConfig::read_in(dir)? };
        config.validate()?;
        Ok(config)
    }

    /// Compares names, shapes and dtypes of every file that is there with the modules, without loading weights.
    pub(crate) fn check(&self, device: &Device, options: &LoadOptions) -> Result<(), Error> {
        let language_model = self.open_language_model()?;
        let vision_encoder = VisionEncoder::new(&VisionConfig::read(self.config())?, device);
        check_module(&vision_encoder, &language_model, &nexus_vision_encoder::NAMES, options)?;
        let ar = ArModel::new(&ArConfig::read(self.config())?, device)?;
        check_module(&ar, &language_model, &nexus_ar::NAMES, options)?;
        let (mut ae_config, mut clip_config, mut t5_config) = (None, None, None);
        if self.autoencoder().is_ok() {
            let config = ae_config.insert(AutoencoderConfig::read_in(&self.flux)?);
            let autoencoder = Autoencoder::new(config, device);
            check_module(&autoencoder, &self.open_autoencoder()?, &weights::AUTOENCODER, options)?;
        }
        if self.text_encoder().is_ok() {
            let config = clip_config.insert(self.clip_config()?);
            check_module(&ClipTextEncoder::new(config, device), &self.open_text_encoder()?, &weights::CLIP, options)?;
        }
        if let Ok(dir) = self.text_encoder_2() {
            let config = t5_config.insert(T5Config::read(dir.join("config.json"))?);
            check_module(&T5Encoder::new(config, device), &self.open_text_encoder_2()?, &weights::T5, options)?;
        }
        let fits = |config: &DiffusionConfig| {
            config.dit.validate_with(ae_config.as_ref(), clip_config.as_ref(), t5_config.as_ref())
        };
        if let Ok(path) = self.generation_decoder() {
            let config = self.diffusion_config(path.parent().unwrap_or(&self.nexus))?;
            fits(&config)?;
            let decoder = GenerationDecoder::new(&config, device);
            check_module(&decoder, &self.open_generation_decoder()?, &weights::GENERATION_DECODER, options)?;
        }
        if let Ok(path) = self.edit_decoder() {
            let config = self.diffusion_config(path.parent().unwrap_or(&self.nexus))?;
            fits(&config)?;
            let decoder = EditingDecoder::new(&config, device);
            check_module(&decoder, &self.open_edit_decoder()?, &weights::EDITING_DECODER, options)?;
        }
        Ok(())
    }
}
