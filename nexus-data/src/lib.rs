//! Messages, prompts, tokenizers and images for Nexus-Gen: what a person gives -> what the models read, and back.
//!
//! Data flow: [`Message`]s -> [`Processor`] -> [`ModelInput`] (token ids and pixel [`Patches`]); reply token ids ->
//! [`Tokenizer`] -> text; decoded pixels -> [`Image`] -> file. There are no weights here, and no tensors before
//! [`Patches::into_tensor`].
//!
//! ```no_run
//! use nexus_data::{Image, Message, ProcessOptions, Processor, edit_prompt};
//!
//! let processor = Processor::open("models/Nexus-GenV2")?;
//! let cat = Image::open("cat.png")?;
//! let message = Message::text(edit_prompt("Add a pair of sunglasses")?).with_image(cat);
//! let input = processor.process(&[message], true, &ProcessOptions::default())?;
//! println!("{} tokens, of which {} for {} image(s)",
//!     input.token_ids.len(),
//!     input.grids().iter().map(|grid| grid.num_merged_tokens()).sum::<usize>(),
//!     input.images.len());
//! # Ok::<(), nexus_data::DataError>(())
//! ```

mod dataset;
mod error;
mod flux_tokenizer;
mod image;
mod image_file;
mod image_processor;
mod message;
mod processor;
mod prompt;
mod resample;
mod tokenizer;
mod training_input;

pub use dataset::{MessagesFile, MessagesWriter, Mixture, Permutation, Pick, RejectedSamples};
pub use error::{BoxedSource, DataError, SampleError};
pub use flux_tokenizer::{CLIP_LEN, ClipTokenizer, T5_LEN, T5Tokenizer, clip_empty_ids, t5_empty_ids};
pub use image::{Alpha, Image};
pub use image_file::ImageLimits;
pub use image_processor::{
    ImageProcessor, MAX_ASPECT_RATIO, MAX_PIXELS_AR, MAX_PIXELS_PROCESSOR, MIN_PIXELS, PATCH_LEN, Patches,
    TEMPORAL_PATCH_SIZE, decoder_image, smart_resize,
};
pub use message::{Message, Part, Role};
pub use processor::{ModelInput, ProcessOptions, Processor, PromptImage};
pub use prompt::{
    IMAGE_MARKER, IMAGE_PAD, Language, VIDEO_PAD, VISION_END, VISION_START, clean_reply, edit_prompt,
    expand_image_pads, generation_prompt, render_chat, without_reserved_tokens,
};
pub use resample::{Filter, resize};
pub use tokenizer::{DecodeStream, SpecialTokens, Tokenizer};
pub use training_input::TrainingInput;
