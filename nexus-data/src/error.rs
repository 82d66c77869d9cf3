//! What can be wrong with the input of this crate: one enum, fields instead of sentences, sources kept.

use std::path::{Path, PathBuf};

use nexus_core::EmbedsError;
use nexus_core::config::ConfigError;

/// An error of a library underneath (image codec, tokenizer), kept as the source.
pub type BoxedSource = Box<dyn std::error::Error + Send + Sync>;

/// Formats of images, with those that are features of this crate.
const READ_FORMATS: &str = match (cfg!(feature = "webp"), cfg!(feature = "gif")) {
    (true, true) => "PNG, JPEG, BMP, WebP or GIF",
    (true, false) => "PNG, JPEG, BMP or WebP (GIF with the feature `gif`)",
    (false, true) => "PNG, JPEG, BMP or GIF (WebP with the feature `webp`)",
    (false, false) => "PNG, JPEG or BMP (WebP and GIF with the features `webp` and `gif`)",
};

/// What can be wrong with messages, prompts, tokenizer files and images.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// There is nothing to answer: no message, or a prompt without text.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The places for images in the text are not as many as the images.
    #[error("the text has {markers} places for images, but {images} images were given")]
    ImageMarkers {
        /// Places in the text: `<image>` in messages, `<|image_pad|>` in a rendered prompt.
        markers: usize,
        /// Images given.
        images: usize,
    },
    /// A message spells a token that stands for an image, or that begins or ends a turn.
    #[error(
        "the text contains the reserved token `{token}`; write `<image>` where an image goes, and each turn as a message"
    )]
    SpecialTokenInText {
        /// Token that was found.
        token: &'static str,
    },
    /// A message has embeddings where the image itself is needed.
    #[error("message {message} has embeddings in the place of an image, and here its pixels are needed")]
    PixelsMissing {
        /// Which message, from 0.
        message: usize,
    },
    /// A conversation to learn from in which the model says nothing.
    #[error("the conversation has no message of the assistant")]
    AnswerMissing,
    /// A conversation to learn from that does not end with the model.
    #[error("the last message of the conversation is not the assistant's")]
    AnswerNotLast,
    /// A message of the model to learn from that has neither text nor image.
    #[error("message {message} of the conversation is an empty answer")]
    AnswerEmpty {
        /// Number of the message, from 0.
        message: usize,
    },
    /// A system message with an image.
    #[error("a system message has an image")]
    ImageInSystem,
    /// A line of a file of conversations cannot be used.
    #[error("{path}, line {line}: {source}", path = path.display())]
    Sample {
        /// File of conversations.
        path: PathBuf,
        /// Number of the line, from 1.
        line: u64,
        /// What is wrong with it.
        source: Box<SampleError>,
    },
    /// A conversation was asked for that the file does not have.
    #[error("{path}: there is no conversation {index}, only {len}", path = path.display())]
    SampleIndex {
        /// File of conversations.
        path: PathBuf,
        /// Conversation asked for, from 0.
        index: u64,
        /// Conversations in the file.
        len: u64,
    },
    /// A file of a dataset cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    DatasetFile {
        /// File that was to be read or written.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// More samples were bad than a run allows.
    #[error("{count} samples were set aside, over the limit of {limit}; see {path}", path = path.display())]
    TooManyRejected {
        /// File that lists them.
        path: PathBuf,
        /// Samples set aside.
        count: u64,
        /// Samples that may be set aside.
        limit: u64,
    },
    /// The list of samples that were set aside is shorter than a run that goes on left it.
    #[error("{path}: {found} samples are listed, but the run had set {expected} aside", path = path.display())]
    RejectedMissing {
        /// File that lists them.
        path: PathBuf,
        /// Samples in the file.
        found: u64,
        /// Samples that the run had set aside.
        expected: u64,
    },
    /// The weight of a source is negative, infinite or not a number.
    #[error("source {source_index} of the mixture has the weight {weight}")]
    MixtureWeight {
        /// Number of the source, from 0.
        source_index: usize,
        /// Its weight.
        weight: f64,
    },
    /// A source with a weight has no samples.
    #[error("source {source_index} of the mixture has no samples")]
    MixtureSourceEmpty {
        /// Number of the source, from 0.
        source_index: usize,
    },
    /// No source has a weight.
    #[error("no source of the mixture has a weight")]
    MixtureEmpty,
    /// No tokenizer file at this place.
    #[error("{path}: no such tokenizer file", path = path.display())]
    TokenizerMissing {
        /// File that was looked for.
        path: PathBuf,
    },
    /// The tokenizer file cannot be used.
    #[error("{path}: not a usable tokenizer: {source}", path = path.display())]
    TokenizerInvalid {
        /// File that was read.
        path: PathBuf,
        /// What the tokenizer library or the file system said.
        source: BoxedSource,
    },
    /// The tokenizer has a SentencePiece model only.
    #[error("{path}: only a SentencePiece model is here; a `tokenizer.json` is needed", path = path.display())]
    SentencePieceOnly {
        /// The SentencePiece file.
        path: PathBuf,
    },
    /// The tokenizer lacks a token that the model needs.
    #[error("{path}: the tokenizer has no token `{token}`", path = path.display())]
    SpecialTokenMissing {
        /// Token that was looked for.
        token: &'static str,
        /// Tokenizer file.
        path: PathBuf,
    },
    /// The tokenizer failed on a text or on token ids.
    #[error("the tokenizer failed: {source}")]
    Tokenize {
        /// What the tokenizer library said.
        source: BoxedSource,
    },
    /// No image file at this place.
    #[error("{path}: no such image file", path = path.display())]
    ImageMissing {
        /// File that was looked for.
        path: PathBuf,
    },
    /// The image file cannot be read.
    #[error("{path}: cannot be read: {source}", path = path.display())]
    ImageRead {
        /// File that was read.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bytes are in no image format that is read here.
    #[error("{}: not an image that this build reads: {}", origin(path), READ_FORMATS)]
    NotAnImage {
        /// File, if the bytes came from one.
        path: Option<PathBuf>,
    },
    /// The image is damaged, or of a kind that the codec does not support.
    #[error("{}: the image cannot be decoded: {source}", origin(path))]
    ImageDecode {
        /// File, if the bytes came from one.
        path: Option<PathBuf>,
        /// What the codec said.
        source: BoxedSource,
    },
    /// The image ends before its last pixel.
    #[error("{}: the image is truncated", origin(path))]
    ImageTruncated {
        /// File, if the bytes came from one.
        path: Option<PathBuf>,
    },
    /// An image without pixels.
    #[error("an image of {width_px}x{height_px} pixels is empty")]
    ImageEmpty {
        /// Width in pixels.
        width_px: usize,
        /// Height in pixels.
        height_px: usize,
    },
    /// More pixels than allowed; nothing was decoded.
    #[error(
        "{}: {width_px}x{height_px} pixels are over the limit of {max_side_px} pixels per side and {max_pixels} in all",
        origin(path)
    )]
    ImageTooLarge {
        /// File, if the bytes came from one.
        path: Option<PathBuf>,
        /// Width in pixels.
        width_px: usize,
        /// Height in pixels.
        height_px: usize,
        /// Largest width and height allowed.
        max_side_px: usize,
        /// Largest area allowed, in pixels.
        max_pixels: usize,
    },
    /// More bytes than allowed; nothing was decoded.
    #[error("{}: the file is over the limit of {max_bytes} bytes", origin(path))]
    ImageFileTooLarge {
        /// File, if the bytes came from one.
        path: Option<PathBuf>,
        /// Largest size allowed, in bytes.
        max_bytes: u64,
    },
    /// An image that is far longer than wide, or the reverse.
    #[error("an image of {width_px}x{height_px} pixels has an aspect ratio over {max_ratio}")]
    AspectRatio {
        /// Width in pixels.
        width_px: usize,
        /// Height in pixels.
        height_px: usize,
        /// Largest ratio of the longer to the shorter side.
        max_ratio: usize,
    },
    /// No whole number of 28x28 cells fits the allowed area.
    #[error("an image of {width_px}x{height_px} pixels does not fit into {max_pixels} pixels in cells of 28x28")]
    PixelBudget {
        /// Width in pixels.
        width_px: usize,
        /// Height in pixels.
        height_px: usize,
        /// Largest area allowed, in pixels.
        max_pixels: usize,
    },
    /// A buffer that does not hold the image it is said to hold.
    #[error("an image of {width_px}x{height_px} pixels does not have {found} values")]
    BufferLength {
        /// Width in pixels.
        width_px: usize,
        /// Height in pixels.
        height_px: usize,
        /// Values in the buffer.
        found: usize,
    },
    /// A decoded picture holds NaN or infinite values, for example after an overflow in half precision.
    #[error("the decoded picture holds {count} values that are not finite")]
    NotFinite {
        /// How many.
        count: usize,
    },
    /// The file name does not say which format to write.
    #[error("{path}: the extension must be png, jpg or jpeg", path = path.display())]
    ImageExtension {
        /// File that was to be written.
        path: PathBuf,
    },
    /// The image file cannot be written.
    #[error("{path}: cannot be written: {source}", path = path.display())]
    ImageWrite {
        /// File that was to be written.
        path: PathBuf,
        /// What the system or the codec said.
        source: BoxedSource,
    },
    /// An image size that is not a whole number of merged tokens.
    #[error(transparent)]
    Grid(#[from] EmbedsError),
    /// A configuration file cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// What can be wrong with one line of a file of conversations.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// The line is not the JSON of a conversation.
    #[error("not a conversation in JSON: {0}")]
    Json(#[source] serde_json::Error),
    /// A conversation without messages.
    #[error("there are no messages")]
    NoMessages,
    /// A role that is not system, user or assistant.
    #[error("the role `{role}` of message {message} is unknown")]
    UnknownRole {
        /// Number of the message, from 0.
        message: usize,
        /// Role in the file.
        role: String,
    },
    /// A message of the assistant without text or image.
    #[error("message {message} is an empty answer")]
    EmptyAnswer {
        /// Number of the message, from 0.
        message: usize,
    },
    /// The `<image>` markers of all messages are not as many as the images.
    #[error("there are {markers} `<image>` markers, but {images} images")]
    ImageMarkers {
        /// Markers in the messages.
        markers: usize,
        /// Images listed.
        images: usize,
    },
    /// An image is absent or cannot be read.
    #[error("image {image}: {source}")]
    Image {
        /// Number of the image, from 0.
        image: usize,
        /// What is wrong with it.
        source: DataError,
    },
}

fn origin(path: &Option<PathBuf>) -> std::path::Display<'_> {
    path.as_deref().unwrap_or(Path::new("image in memory")).display()
}
