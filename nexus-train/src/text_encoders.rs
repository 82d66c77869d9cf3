//! Text encoders of a model that starts from nothing: configuration files -> seeded random weights.
//!
//! No recipe trains them: the positive branch sees CLIP's vector of the empty text alone, which is a constant, and T5
//! serves negative prompts only.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{Device, FloatDType};
use nexus_checkpoint::save_module_as;
use nexus_diffusion::{
    ClipTextEncoder, T5Encoder,
    config::{ClipConfig, T5Config},
    weights::{CLIP, T5},
};

use crate::{
    Recipe, TrainError,
    optim::{InitialWeights, initialize},
};
use nexus::ModelFiles;

/// Gives random weights to the text encoders of a model that have a `config.json` but no weights, if the recipe begins
/// with random weights itself; returns the files that it wrote.
///
/// # Errors
/// [`TrainError::TextEncoderMissing`] if the recipe begins with a model that is there, or if a part of the weights is;
/// [`TrainError::Model`] if the directory holds no model, a configuration is wrong, or a file cannot be written.
pub fn fill_text_encoders(
    recipe: &Recipe,
    model: impl AsRef<Path>,
    device: &Device,
) -> Result<Vec<PathBuf>, TrainError> {
    let files = ModelFiles::find(model)?;
    let weights = InitialWeights { seed: recipe.seed, gain: 1.0, zero: Vec::new() };
    let from_nothing = recipe.train.begins_random();
    let mut written = Vec::new();
    if let Ok(dir) = files.text_encoder()
        && let Some(path) = missing_weights(&dir, from_nothing)?
    {
        let clip = ClipTextEncoder::new(&ClipConfig::read(dir.join("config.json"))?, device);
        save_module_as(&initialize(clip, &CLIP, &weights), &CLIP, &path, FloatDType::BF16)?;
        written.push(path);
    }
    if let Ok(dir) = files.text_encoder_2()
        && let Some(path) = missing_weights(&dir, from_nothing)?
    {
        let t5 = T5Encoder::new(&T5Config::read(dir.join("config.json"))?, device);
        save_module_as(&initialize(t5, &T5, &weights), &T5, &path, FloatDType::BF16)?;
        written.push(path);
    }
    Ok(written)
}

/// Where the weights of a text encoder belong, if there are none but a `config.json`.
fn missing_weights(dir: &Path, from_nothing: bool) -> Result<Option<PathBuf>, TrainError> {
    let path = dir.join("model.safetensors");
    if !dir.join("config.json").is_file() || path.exists() || dir.join("model.safetensors.index.json").exists() {
        return Ok(None);
    }
    // Shards without an index, or a download that was cut off.
    let entries = fs::read_dir(dir).map_err(TrainError::file(dir))?;
    let is_part = |entry: fs::DirEntry| entry.file_name().to_string_lossy().contains(".safetensors");
    match from_nothing && !entries.flatten().any(is_part) {
        true => Ok(Some(path)),
        false => Err(TrainError::TextEncoderMissing { path }),
    }
}

#[cfg(test)]
mod tests {
    use nexus_core::testing::{cpu, random_models_dir};
    use serde_json::json;

    use super::*;

    #[test]
    fn text_encoders_are_random_only_in_a_model_that_starts_from_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let copied = |path: &str| {
            let to = dir.path().join(path);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(random_models_dir().join(path), &to).unwrap();
            to
        };
        copied("Nexus-GenV2/config.json");
        let [clip, t5] = ["text_encoder", "text_encoder_2"]
            .map(|name| copied(&format!("FLUX/FLUX.1-dev/{name}/config.json")).with_file_name("model.safetensors"));
        let fill = |initial: serde_json::Value| {
            let recipe = json!({
                "command": "", "time": "", "expected": "", "seed": 1,
                "train": {"part": "autoencoder", "initial": initial, "phases": []},
            });
            fill_text_encoders(&serde_json::from_value(recipe).unwrap(), dir.path(), &cpu())
        };
        let refused = |initial| match fill(initial).unwrap_err() {
            TrainError::TextEncoderMissing { path } => path,
            other => panic!("{other}"),
        };
        let random = json!({"random": {"seed": 1}});
        assert_eq!(refused(json!("checkpoint")), clip);
        let cut_off = clip.with_file_name("model.safetensors.part");
        fs::write(&cut_off, "").unwrap();
        assert_eq!(refused(random.clone()), clip);
        assert!(!clip.exists() && !t5.exists());
        fs::remove_file(&cut_off).unwrap();
        assert_eq!(fill(random.clone()).unwrap(), [clip.clone(), t5.clone()]);
        assert!(clip.is_file() && t5.is_file());
        assert_eq!(fill(random).unwrap(), [] as [PathBuf; 0]);
        assert_eq!(fill(json!("checkpoint")).unwrap(), [] as [PathBuf; 0]);
    }
}
