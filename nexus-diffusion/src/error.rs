//! What can be wrong with the files and requests that reach the diffusion side.

use nexus_checkpoint::CheckpointError;
use nexus_core::{GridThw, config::ConfigError};

/// A decoder, autoencoder or text encoder that cannot be loaded, or a request that cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffusionError {
    /// Weights cannot be loaded.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A configuration file cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A token id that the text encoder does not have.
    #[error(
        "token id {id} is not in the vocabulary of {encoder}, which has {vocab_size} ids: check that tokenizer and text encoder belong together"
    )]
    TokenOutOfVocabulary {
        /// Text encoder.
        encoder: &'static str,
        /// First such id.
        id: u32,
        /// Number of ids that it has.
        vocab_size: usize,
    },
    /// No tokens, or more than the text encoder has positions for.
    #[error("{encoder} takes 1 to {max} tokens, got {tokens}")]
    TokenCount {
        /// Text encoder.
        encoder: &'static str,
        /// Number of tokens given.
        tokens: usize,
        /// Largest number that it takes.
        max: usize,
    },
    /// Image embeddings of another model's width.
    #[error(
        "image embeddings are {found} wide, but this decoder was trained for {expected}: they come from another model"
    )]
    EmbedsWidth {
        /// Width given.
        found: usize,
        /// Width that the decoder takes.
        expected: usize,
    },
    /// Image embeddings of several frames.
    #[error("image embeddings of grid {grid} have several frames, but decoders draw one picture")]
    Frames {
        /// Grid given.
        grid: GridThw,
    },
    /// Image and reference embeddings that do not belong together.
    #[error("the reference embeddings are of batch {reference}, the image embeddings of batch {embeds}")]
    ReferenceBatch {
        /// Batch of the reference embeddings.
        reference: usize,
        /// Batch of the image embeddings.
        embeds: usize,
    },
    /// A picture without pixels.
    #[error("a picture of {height}x{width} pixels cannot be drawn")]
    ImageSize {
        /// Height in pixels.
        height: usize,
        /// Width in pixels.
        width: usize,
    },
    /// Start noise of the wrong shape.
    #[error(
        "the start noise is {found:?}, but this picture needs {expected:?} (batch, channels, height / 8, width / 8)"
    )]
    NoiseShape {
        /// Shape given.
        found: [usize; 4],
        /// Shape that is needed.
        expected: [usize; 4],
    },
    /// An option outside its range.
    #[error("option `{option}` is {value}: {expected}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// Value given.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
}

impl DiffusionError {
    /// An option outside its range.
    pub(crate) fn option(option: &'static str, value: impl ToString, expected: &'static str) -> Self {
        Self::Option { option, value: value.to_string(), expected }
    }
}
