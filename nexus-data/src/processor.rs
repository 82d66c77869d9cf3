//! The stage: messages -> token ids and pixel patches, and token ids -> text.

use std::path::Path;

use nexus_core::{GridThw, ImageEmbeds};

use crate::error::DataError;
use crate::image::{Alpha, Image};
use crate::image_processor::{ImageProcessor, MAX_PIXELS_AR, Patches};
use crate::message::{Message, Part};
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

/// An image of a prompt.
#[allow(clippy::large_enum_variant, reason = "a prompt has few of them, and a box would be in the way of who matches")]
#[derive(Debug, Clone)]
pub enum PromptImage {
    /// Pixels for the vision encoder.
    Patches(Patches),
    /// What the vision encoder, or the language model, has made already.
    Embeds(ImageEmbeds),
}

impl PromptImage {
    /// Size of the image in patches.
    pub fn grid(&self) -> GridThw {
        match self {
            Self::Patches(patches) => patches.grid,
            Self::Embeds(embeds) => embeds.grid,
        }
    }
}

/// What the models read.
#[derive(Debug, Clone)]
pub struct ModelInput {
    /// The rendered prompt, with one `<|image_pad|>` per image.
    pub text: String,
    /// Token ids of the prompt, with one `<|image_pad|>` per merged token of each image.
    pub token_ids: Vec<u32>,
    /// The images in the order of the prompt.
    pub images: Vec<PromptImage>,
}

impl ModelInput {
    /// Sizes of the images, in order.
    pub fn grids(&self) -> Vec<GridThw> {
        self.images.iter().map(PromptImage::grid).collect()
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
        let images = messages.iter().flat_map(|message| &message.parts).filter_map(|part| match part {
            Part::Text(_) => None,
            Part::Image(image) => Some(self.input_patches(image, options).map(PromptImage::Patches)),
            Part::Embeds(embeds) => Some(Ok(PromptImage::Embeds(embeds.clone()))),
        });
        let mut input = ModelInput { text, token_ids: Vec::new(), images: images.collect::<Result<_, _>>()? };
        input.token_ids = self.tokenizer.encode(&expand_image_pads(&input.text, &input.grids())?)?;
        Ok(input)
    }

    /// Patches of an image of the prompt.
    pub(crate) fn input_patches(&self, image: &Image, options: &ProcessOptions) -> Result<Patches, DataError> {
        let bounded = self.image_processor.bound(&image.to_rgb(options.alpha), options.max_pixels)?;
        self.image_processor.patches(&bounded)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::edit_prompt;
    use crate::tokenizer::testing::write_byte_tokenizer;

    fn processor() -> Processor {
        let dir = tempfile::tempdir().unwrap();
        write_byte_tokenizer(dir.path(), "");
        Processor::open(dir.path()).unwrap()
    }

    fn grey(width: usize, height: usize) -> Image {
        Image::from_rgb8(width, height, vec![128; 3 * width * height]).unwrap()
    }

    #[test]
    fn every_merged_token_has_a_place_in_the_prompt() {
        let processor = processor();
        let messages = [
            Message::text(edit_prompt("Add a hat").unwrap()).with_image(grey(56, 84)),
            Message::assistant().with_text("Done."),
            Message::text("And ").with_image(grey(112, 56)),
        ];
        let input = processor.process(&messages, true, &ProcessOptions::default()).unwrap();
        assert_eq!(input.text, render_chat(&messages, true).unwrap());
        assert_eq!(input.grids(), [GridThw { t: 1, h: 6, w: 4 }, GridThw { t: 1, h: 4, w: 8 }]);
        let special = processor.tokenizer().special_tokens();
        let runs: Vec<usize> =
            input.token_ids.split(|&id| id != special.image).map(<[u32]>::len).filter(|&length| length > 0).collect();
        assert_eq!(runs, [6, 8]);
        let decoded = processor.decode(&input.token_ids).unwrap();
        assert_eq!(decoded, expand_image_pads(&input.text, &input.grids()).unwrap());
    }

    #[test]
    fn images_are_bounded_by_the_options() {
        let processor = processor();
        let message = Message::user().with_image(grey(600, 300));
        let grid = |max_pixels| {
            let options = ProcessOptions { max_pixels, ..Default::default() };
            processor.process(std::slice::from_ref(&message), true, &options).unwrap().images[0].grid()
        };
        assert_eq!(grid(MAX_PIXELS_AR), GridThw { t: 1, h: 22, w: 42 });
        assert_eq!(grid(20_000), GridThw { t: 1, h: 6, w: 14 });
        let options = ProcessOptions { max_pixels: 10, ..Default::default() };
        assert!(matches!(processor.process(&[message], true, &options), Err(DataError::PixelBudget { .. })));
    }

    #[test]
    fn alpha_follows_the_options() {
        let processor = processor();
        let clear = Image::from_rgba8(56, 56, &[0; 4 * 56 * 56]).unwrap();
        let first_value = |alpha| {
            let options = ProcessOptions { alpha, ..Default::default() };
            let message = Message::user().with_image(clear.clone());
            let input = processor.process(&[message], true, &options).unwrap();
            let [PromptImage::Patches(patches)] = &input.images[..] else { panic!("pixels stay pixels") };
            patches.values[0]
        };
        assert!(first_value(Alpha::Drop) < 0.0);
        assert!(first_value(Alpha::OnWhite) > 0.0);
    }

    #[test]
    fn embeddings_take_the_places_of_their_grid() {
        let processor = processor();
        let (device, grid) = (nexus_core::testing::cpu(), GridThw { t: 1, h: 2, w: 6 });
        let embeds = ImageEmbeds::new(burn::tensor::Tensor::zeros([1, 3, 8], &device), grid).unwrap();
        let message = Message::text("x").with_image(grey(56, 56)).with_embeds(embeds);
        let input = processor.process(&[message], true, &ProcessOptions::default()).unwrap();
        assert_eq!(input.grids(), [GridThw { t: 1, h: 4, w: 4 }, grid]);
        assert!(matches!(&input.images[..], [PromptImage::Patches(_), PromptImage::Embeds(_)]));
        let image = processor.tokenizer().special_tokens().image;
        assert_eq!(input.token_ids.iter().filter(|id| **id == image).count(), 4 + 3);
    }

    #[test]
    fn replies_are_decoded_and_made_readable() {
        let processor = processor();
        let ids = processor.tokenizer().encode("Here:<|vision_start|><|image_pad|><|vision_end|>ok<|im_end|>").unwrap();
        assert_eq!(processor.decode_reply(&ids).unwrap(), "Here:<image>ok");
    }

    #[test]
    fn a_folder_without_tokenizer_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Processor::open(dir.path()), Err(DataError::TokenizerMissing { .. })));
    }
}
