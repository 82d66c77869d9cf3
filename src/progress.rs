//! What the caller hears while a request runs; an observer may stop it.

use std::ops::ControlFlow;

/// Parts of the model that are loaded and run on their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// Pixels to embeddings.
    VisionEncoder,
    /// Text and embeddings to text and new embeddings.
    Ar,
    /// Embeddings to latents, for new pictures.
    GenerationDecoder,
    /// Embeddings and a reference to latents, for changed pictures.
    EditingDecoder,
    /// CLIP and T5, for negative prompts.
    TextEncoders,
    /// Latents to pixels.
    Autoencoder,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::VisionEncoder => "vision encoder",
            Self::Ar => "autoregressive model",
            Self::GenerationDecoder => "generation decoder",
            Self::EditingDecoder => "editing decoder",
            Self::TextEncoders => "text encoders",
            Self::Autoencoder => "autoencoder",
        })
    }
}

/// One event of a running request, in the order in which things happen.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Progress {
    /// A stage is being loaded.
    Loading(Stage),
    /// A stage has started to compute.
    Running(Stage),
    /// The prompt has been read.
    PromptRead {
        /// Its length in tokens.
        tokens: usize,
    },
    /// The model has written some text.
    Text(String),
    /// The model has predicted the embeddings of a picture.
    ImagePredicted {
        /// Which picture of the reply, from 0.
        index: usize,
    },
    /// The size asked for is no multiple of 16 pixels and was rounded up.
    SizeRounded {
        /// Width and height asked for.
        asked: (usize, usize),
        /// Width and height that are drawn.
        used: (usize, usize),
    },
    /// A denoising step is done.
    Step {
        /// Steps done.
        done: usize,
        /// Steps in all.
        total: usize,
    },
}

/// Hears events and says whether to go on; [`ControlFlow::Break`] ends the request with [`crate::Error::Cancelled`].
pub type Observer<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;
