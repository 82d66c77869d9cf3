//! The stage: messages -> token ids and pixel patches, and token ids -> text.

use std::path::Path;

use nexus_core::GridThw;

use crate::error::DataError;
use crate::image::{Alpha, Image};
use crate::image_processor::{ImageProcessor, MAX_PIXELS_AR, Patches};
use crate::message::Message;
use crate::prompt::{clean_reply, expand_image_pads, render_chat};
use crate::tokenizer::Tokenizer;

/// How images in messages are prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ProcessOptions {
    /// Largest area of an image, in pixels.
    pub max_pixels: usize,
    /// What becomes of an alpha channel.
    pub alpha: Alpha,
}

impl Default for ProcessOptions {
    /// [`MAX_PIXELS_AR`], and alpha is dropped.
    fn default() -> Self {
        Self { max_pixels: MAX_PIXELS_AR, alpha: Alpha::Drop }
    }
}

/// What the models read.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInput {
    /// The rendered prompt, with one `<|image_pad|>` per image.
    pub text: String,
    /// Token ids of the prompt, with one `<|image_pad|>` per merged token of each image.
    pub token_ids: Vec<u32>,
    /// The images in the order of the prompt.
    pub images: Vec<Patches>,
}

impl ModelInput {
    /// Sizes of the images, in order.
    pub fn grids(&self) -> Vec<GridThw> {
        self.images.iter().map(|patches| patches.grid).collect()
    }
}

/// Tokenizer and image processor of one model.
#[derive(Debug, Clone)]
pub struct Processor {
    tokenizer: Tokenizer,
    image_processor: ImageProcessor,
}

impl Processor {
    /// Reads `tokenizer.json` and `preprocessor_config.json` from a model folder or its `processor` subfolder.
    ///
    /// # Errors
    /// As [`Tokenizer::open`] and [`ImageProcessor::open`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, DataError> {
        let dir = dir.as_ref();
        Ok(Self { tokenizer: Tokenizer::open(dir)?, image_processor: ImageProcessor::open(dir)? })
    }

    /// Joins a tokenizer and an image processor.
    pub fn new(tokenizer: Tokenizer, image_processor: ImageProcessor) -> Self {
        Self { tokenizer, image_processor }
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The image processor.
    pub fn image_processor(&self) -> &ImageProcessor {
        &self.image_processor
    }

    /// Renders a conversation and prepares its images; `add_generation_prompt` opens the model's answer.
    ///
    /// # Errors
    /// As [`render_chat`] for the texts, as [`ImageProcessor::bound`] for the images, and [`DataError::Tokenize`].
    pub fn process(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        options: &ProcessOptions,
    ) -> Result<ModelInput, DataError> {
        let text = render_chat(messages, add_generation_prompt)?;
        self.prepare(text, messages.iter().flat_map(Message::images), options)
    }

    /// Prepares a prompt that is rendered already, with one `<|image_pad|>` where each image goes.
    ///
    /// # Errors
    /// [`DataError::EmptyPrompt`] if the text is empty; [`DataError::ImageMarkers`] if there are not as many
    /// `<|image_pad|>` as images; otherwise as [`Processor::process`].
    pub fn process_text(
        &self,
        text: &str,
        images: &[Image],
        options: &ProcessOptions,
    ) -> Result<ModelInput, DataError> {
        if text.is_empty() {
            return Err(DataError::EmptyPrompt);
        }
        self.prepare(text.to_string(), images.iter(), options)
    }

    fn prepare<'a>(
        &self,
        text: String,
        images: impl Iterator<Item = &'a Image>,
        options: &ProcessOptions,
    ) -> Result<ModelInput, DataError> {
        let patches = images.map(|image| {
            let bounded = self.image_processor.bound(&image.to_rgb(options.alpha), options.max_pixels)?;
            self.image_processor.patches(&bounded)
        });
        let mut input = ModelInput { text, token_ids: Vec::new(), images: patches.collect::<Result<_, _>>()? };
        input.token_ids = self.tokenizer.encode(&expand_image_pads(&input.text, &input.grids())?)?;
        Ok(input)
    }

    /// Text of token ids, special tokens included.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn decode(&self, token_ids: &[u32]) -> Result<String, DataError> {
        self.tokenizer.decode(token_ids, false)
    }

    /// Readable text of the token ids of a reply: see [`clean_reply`].
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn decode_reply(&self, token_ids: &[u32]) -> Result<String, DataError> {
        Ok(clean_reply(&self.decode(token_ids)?))
    }
}
