//! The parts of a model, each from its files: a directory, a device and options -> a module with its weights.

use std::path::Path;

use burn::tensor::Device;
use nexus_ar::{ArConfig, ArModel};
use nexus_checkpoint::{Checkpoint, LoadOptions};
use nexus_diffusion::{
    Autoencoder, ClipTextEncoder, EditingDecoder, GenerationDecoder, T5Encoder,
    config::{AutoencoderConfig, ClipConfig, DiffusionConfig, DitConfig, MergerConfig, T5Config},
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

    /// Loads the autoencoder.
    ///
    /// # Errors
    /// [`Error`] naming the file at fault.
    pub fn load_autoencoder(&self, device: &Device, options: &LoadOptions) -> Result<Autoencoder, Error> {
        let (path, config) = (self.autoencoder()?, AutoencoderConfig::read_beside(&self.flux)?);
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
        Ok(ClipConfig::read(&self.text_encoder()?.join("config.json"))?)
    }

    /// Loads the T5 text encoder.
    ///
    /// # Errors
    /// [`Error`] naming the file at fault.
    pub fn load_t5(&self, device: &Device, options: &LoadOptions) -> Result<T5Encoder, Error> {
        let dir = self.text_encoder_2()?;
        let config = T5Config::read(&dir.join("config.json"))?;
        Ok(T5Encoder::load(&Checkpoint::open(dir)?, &config, device, options)?)
    }

    /// Sizes of a decoder: those that a directory has, where its weights lie, or the released ones.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field at fault.
    pub fn diffusion_config(&self, dir: &Path) -> Result<DiffusionConfig, Error> {
        let config = DiffusionConfig { merger: MergerConfig::read(&self.config())?, dit: DitConfig::read_beside(dir)? };
        config.validate()?;
        Ok(config)
    }
}
