//! Text encoders of a model that starts from nothing: configuration files -> seeded random weights.
//!
//! No recipe trains them: the positive branch sees CLIP's vector of the empty text alone, which is a constant, and T5
//! serves negative prompts only.

use std::path::Path;

use burn::tensor::{Device, FloatDType};
use nexus_core::{
    checkpoint::save_module_as,
    train::{InitialWeights, initialize},
};
use nexus_diffusion::{
    ClipTextEncoder, T5Encoder,
    config::{ClipConfig, T5Config},
    weights::{CLIP, T5},
};

use super::TrainError;
use crate::ModelFiles;

/// Gives random weights to the text encoders of a model that have a `config.json` but no weights.
///
/// # Errors
/// [`TrainError::Model`] if the directory holds no model, a configuration is wrong, or a file cannot be written.
pub fn fill_text_encoders(model: impl AsRef<Path>, seed: u64, device: &Device) -> Result<(), TrainError> {
    let files = ModelFiles::find(model)?;
    let weights = InitialWeights { seed, gain: 1.0, zero: Vec::new() };
    let missing = |dir: &Path| {
        let has_weights =
            ["model.safetensors", "model.safetensors.index.json"].iter().any(|name| dir.join(name).exists());
        dir.join("config.json").is_file() && !has_weights
    };
    if let Ok(dir) = files.text_encoder()
        && missing(&dir)
    {
        let clip = ClipTextEncoder::new(&ClipConfig::read(&dir.join("config.json"))?, device);
        let clip = initialize(clip, &CLIP, &weights);
        save_module_as(&clip, &CLIP, &dir.join("model.safetensors"), FloatDType::BF16)?;
    }
    if let Ok(dir) = files.text_encoder_2()
        && missing(&dir)
    {
        let t5 = initialize(T5Encoder::new(&T5Config::read(&dir.join("config.json"))?, device), &T5, &weights);
        save_module_as(&t5, &T5, &dir.join("model.safetensors"), FloatDType::BF16)?;
    }
    Ok(())
}
