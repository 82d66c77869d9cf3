//! What the weights of a run begin with: the model's own files, random values, or the files that the authors began with.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::optim::InitialWeights;

/// What the weights of an autoencoder begin with.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Initial {
    /// The weights in the model's directory.
    #[default]
    Checkpoint,
    /// Seeded random values; the directory needs only the configuration of this part.
    Random(InitialWeights),
}

/// What the weights of the language model, and of a vision encoder that is trained with it, begin with.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LanguageInitial {
    /// The weights in the model's directory.
    #[default]
    Checkpoint,
    /// Seeded random values; the directory needs only the configuration of this part.
    Random(InitialWeights),
    /// Where the authors began: Qwen2.5-VL, with what they added at random.
    #[serde(rename = "qwen2_5_vl")]
    Qwen2_5Vl(Qwen2_5VlStart),
}

/// What the weights of a generation decoder begin with.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DecoderInitial {
    /// The weights in the model's directory.
    #[default]
    Checkpoint,
    /// Seeded random values; the directory needs only the configuration of this part.
    Random(InitialWeights),
    /// Where the authors began: the transformer of FLUX.1-dev, and seeded random values for the adapter.
    Flux1Dev(InitialWeights),
}

/// What the weights of an editing decoder begin with.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EditingInitial {
    /// The weights in the model's directory.
    #[default]
    Checkpoint,
    /// Seeded random values; the directory needs only the configuration of this part.
    Random(InitialWeights),
    /// The transformer of the generation decoder, and seeded random values for the merger.
    GenerationDecoder(InitialWeights),
    /// Where the authors began: the transformer of FLUX.1-dev, layer 0 of Qwen2.5-VL for the merger's, and seeded random
    /// values for its projector.
    Flux1Dev(EditingStart),
}

/// Qwen2.5-VL's files, and what it has not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Qwen2_5VlStart {
    /// Directory of Qwen2.5-VL; a relative path is looked for beside the recipe.
    pub path: PathBuf,
    /// Seed of vision head and prefill embeddings, which are normal with a standard deviation of 0.02, as transformers
    /// makes what a checkpoint lacks.
    pub seed: u64,
}

/// Files that an editing decoder begins with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EditingStart {
    /// Directory of Qwen2.5-VL; a relative path is looked for beside the recipe.
    pub language_model: PathBuf,
    /// Values of the projector.
    pub projector: InitialWeights,
}
