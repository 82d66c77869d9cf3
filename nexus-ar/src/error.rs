//! What can go wrong in the autoregressive model.

use nexus_checkpoint::CheckpointError;
use nexus_core::{EmbedsError, config::ConfigError};

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArError {
    /// A configuration file is absent, malformed or incoherent.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights cannot be read or do not fit.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Embeddings do not fit their grid.
    #[error(transparent)]
    Embeds(#[from] EmbedsError),
    /// A prompt without tokens.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// The prompt does not leave room for a reply.
    #[error("the prompt has {tokens} tokens, but the model's context holds {limit}: shorten it or use smaller images")]
    PromptTooLong {
        /// Length of the prompt.
        tokens: usize,
        /// Length of the context, `max_position_embeddings`.
        limit: usize,
    },
    /// A token id that the model has no embedding for.
    #[error("token id {id} is outside of the model's vocabulary of {vocab_size}: the tokenizer is another model's")]
    TokenOutOfVocabulary {
        /// The id.
        id: u32,
        /// Number of ids.
        vocab_size: usize,
    },
    /// The prompt's image positions and the images given disagree.
    #[error("the prompt has {positions} image tokens, but the images given have {embeddings} embeddings")]
    ImageTokens {
        /// Image tokens in the prompt.
        positions: usize,
        /// Embeddings of all images given.
        embeddings: usize,
    },
    /// More or fewer images in the prompt than grids.
    #[error("the prompt marks {markers} images, but {grids} were given")]
    ImageCount {
        /// Begin-of-image tokens followed by image tokens.
        markers: usize,
        /// Grids given.
        grids: usize,
    },
    /// Image embeddings of another model's width.
    #[error("image embeddings of width {found} were given to a model of width {expected}")]
    EmbedWidth {
        /// Width given.
        found: usize,
        /// Width of the model.
        expected: usize,
    },
    /// Several images in one [`nexus_core::ImageEmbeds`].
    #[error("image embeddings of batch {batch} were given: give one `ImageEmbeds` of batch 1 per image of the prompt")]
    EmbedBatch {
        /// Batch given.
        batch: usize,
    },
    /// A batch without samples.
    #[error("a batch needs at least one sample")]
    EmptyBatch,
    /// A training sample that cannot be used.
    #[error("sample {index} of the batch: {source}")]
    Sample {
        /// Index in the batch.
        index: usize,
        /// What is wrong with it.
        source: Box<ArError>,
    },
    /// More or fewer labels than tokens.
    #[error("{labels} labels were given for {tokens} tokens")]
    LabelCount {
        /// Labels given.
        labels: usize,
        /// Tokens given.
        tokens: usize,
    },
    /// A label that is not the token at its place.
    #[error("label {index} is {label}, but the token is {id}: labels are the tokens themselves, not shifted")]
    Label {
        /// Index in the sample.
        index: usize,
        /// Label given.
        label: u32,
        /// Token there.
        id: u32,
    },
    /// A token that should not compete for a label which is not there, or which is that token.
    #[error(
        "token {id} cannot be left out at {index} of sample {sample}: no label of text is there, or it is that token"
    )]
    ExcludedToken {
        /// Index of the sample.
        sample: usize,
        /// Index in the sample.
        index: usize,
        /// Token given.
        id: u32,
    },
    /// A sample from which nothing is learned.
    #[error("no token after the first has a label: nothing would be learned")]
    NoLabels,
    /// Labelled image tokens without true embeddings, or the reverse.
    #[error("{labels} image tokens have labels, but the answer images given have {embeddings} embeddings")]
    AnswerImages {
        /// Image tokens with labels.
        labels: usize,
        /// Embeddings of the answer images.
        embeddings: usize,
    },
    /// An answer image of a size that the model does not draw.
    #[error("an answer image has {tokens} embeddings, but the model draws images of {expected}: resize it to 252x252")]
    AnswerTokens {
        /// Embeddings given.
        tokens: usize,
        /// Embeddings of a drawn image.
        expected: usize,
    },
    /// An option that cannot be used.
    #[error("option `{option}`: {reason}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// Why it cannot be used and what can.
        reason: String,
    },
    /// The device failed while it computed: it was lost, or its memory was not enough.
    #[error(
        "the device failed to compute the scores for token {index}: {reason}; if its memory was not enough, load the \
         model with quantised weights or one stage at a time"
    )]
    Device {
        /// Index of the token in the sequence.
        index: usize,
        /// What the backend said, and what the device's memory holds.
        reason: String,
    },
    /// The model computed NaN or infinite scores.
    #[error(
        "the model's scores for token {index} are not numbers: check the weights with a NaN scan, or compute in f32"
    )]
    NotFinite {
        /// Index of the token in the sequence.
        index: usize,
    },
}
