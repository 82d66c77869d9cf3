//! How a model is loaded: a directory, a device and what is chosen beside them -> [`Nexus`].

use std::{
    path::{Path, PathBuf},
    sync::Once,
};

use burn::tensor::{Device, FloatDType};
use nexus_ar::{ArConfig, GenerationConfig};
use nexus_checkpoint::{LoadDType, LoadOptions, Quantization};
use nexus_core::config::{ConfigError, read_json};
use nexus_data::Processor;

use crate::{
    ConversationOptions, Error, ModelFiles, Nexus, Observer, Precision, Residency, nexus::Model, stages::Stages,
};

/// Largest picture that is drawn unless [`Loader::max_picture_pixels`] says otherwise: 4096x4096.
const MAX_PICTURE_PIXELS: usize = 4096 * 4096;

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

    /// Files of the model in a directory, and nothing else decided.
    pub(crate) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_path_buf(),
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

    /// Reads the configuration, checks the names, shapes and dtypes of all files that are there, and loads the vision
    /// encoder and the language model (with [`Residency::KeepAll`]); the decoders are loaded when first used. The
    /// observer hears which stage is being loaded.
    ///
    /// # Errors
    /// [`Error::Device`] for a dtype that the device does not have, [`Error::NoSuchDirectory`], [`Error::NoModel`],
    /// [`Error::Config`], [`Error::Data`] for the tokenizer, [`Error::OutOfDeviceMemory`], [`Error::Cancelled`], and the
    /// stages' errors for their weights. That the decoders or FLUX files are absent is an error only when they are needed.
    pub fn load(self, device: &Device, mut observer: impl Observer) -> Result<Nexus, Error> {
        warn_if_unoptimized();
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
            Err(ConfigError::Missing { .. }) => ConversationOptions::default(),
            read => read?,
        };
        files.check(device, &options)?;
        let stages = Stages::new(files, device, options, precision.compute, self.residency);
        if self.residency == Residency::KeepAll {
            stages.run(|| {
                stages.vision_encoder(&mut observer)?;
                stages.ar(&mut observer)?;
                Ok(())
            })?;
        }
        let max_picture_pixels = self.max_picture_pixels;
        Ok(Nexus::new(Model { processor, stages, generation_config, default_options, max_picture_pixels }))
    }
}

/// Profiles of this workspace do not reach those who depend on it.
fn warn_if_unoptimized() {
    static SAID: Once = Once::new();
    if !nexus_core::IS_OPTIMIZED {
        SAID.call_once(|| {
            log::warn!(
                "nexus was built without optimisation and is a hundred times slower: build with --release, or put \
                 `[profile.dev.package.\"*\"]` with `opt-level = 3` into the Cargo.toml of your workspace"
            );
        });
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
