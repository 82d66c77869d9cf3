//! What requests return: text, pictures, and the intermediate results behind them.

use std::path::Path;

use burn::tensor::Tensor;
use nexus_ar::Generation;
use nexus_core::ImageEmbeds;
use nexus_data::Image;

use crate::Error;

/// An answer of the model; displays as its text.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Readable text; `<image>` stands for each picture.
    pub text: String,
    /// The prompt as the model read it, rendered, with one `<|image_pad|>` per image.
    pub prompt: String,
    /// Token ids, positions, embeddings of the pictures and, if asked for, scores.
    pub generation: Generation,
}

impl std::fmt::Display for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// A picture that was drawn, with what it was drawn from.
#[derive(Clone)]
pub struct Picture {
    /// The pixels.
    pub image: Image,
    /// The embeddings that it shows.
    pub embeds: ImageEmbeds,
    /// The embeddings of the source image, if it was drawn by the editing decoder with a reference.
    pub reference: Option<ImageEmbeds>,
    /// The denoised latents, `[1, 16, height / 8, width / 8]`.
    pub latents: Tensor<4>,
    /// The answer that predicted the embeddings, if there was one.
    pub reply: Option<Reply>,
}

impl std::fmt::Debug for Picture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let latents = format_args!("{:?} {:?}", self.latents.dtype(), self.latents.dims());
        f.debug_struct("Picture")
            .field("image", &self.image)
            .field("embeds", &self.embeds)
            .field("reference", &self.reference)
            .field("latents", &latents)
            .field("reply", &self.reply.as_ref().map(|reply| &reply.text))
            .finish()
    }
}

impl Picture {
    /// Writes the picture as PNG or JPEG, by the extension.
    ///
    /// # Errors
    /// [`Error::Data`] if the path cannot be written or has another extension; no partial file is left.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        Ok(self.image.save(path)?)
    }
}
