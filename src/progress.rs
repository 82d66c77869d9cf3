//! What the caller hears while a request runs; an observer may stop it.

use std::ops::ControlFlow;

use crate::Error;

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
        /// Tokens at its start that a conversation had read before.
        reused: usize,
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
    /// In the step that is done next, TeaCache skipped the blocks of some passes: one pass for each branch of the guidance,
    /// and for each tile.
    StepSkipped {
        /// The step, from 1.
        step: usize,
        /// Passes that were skipped.
        passes: usize,
    },
    /// A denoising step is done.
    Step {
        /// Steps done.
        done: usize,
        /// Steps in all.
        total: usize,
    },
}

/// Hears the events of a request and says whether it goes on; [`ControlFlow::Break`] ends it with [`Error::Cancelled`].
///
/// `()` hears nothing; a closure is an observer, and so is `&mut` of one. A type of your own is passed by value, or as
/// `&mut dyn Observer`. An observer runs on the thread of its request, which waits for it; it must not call the model that
/// it watches, which may wait for the request to end.
///
/// ```
/// use std::ops::ControlFlow;
///
/// use nexus::Progress;
///
/// let observer = |event: Progress| {
///     if let Progress::Step { done, total } = event {
///         println!("{done} of {total}");
///     }
///     ControlFlow::Continue(())
/// };
/// # fn heard(_: impl nexus::Observer) {}
/// # heard(observer);
/// ```
pub trait Observer {
    /// Takes the next event.
    fn hear(&mut self, event: Progress) -> ControlFlow<()>;
}

impl Observer for () {
    fn hear(&mut self, _: Progress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl<F: FnMut(Progress) -> ControlFlow<()>> Observer for F {
    fn hear(&mut self, event: Progress) -> ControlFlow<()> {
        self(event)
    }
}

impl Observer for &mut (dyn Observer + '_) {
    fn hear(&mut self, event: Progress) -> ControlFlow<()> {
        (**self).hear(event)
    }
}

/// Passes an event on; a break becomes [`Error::Cancelled`].
pub(crate) fn emit(observer: &mut dyn Observer, event: Progress) -> Result<(), Error> {
    match observer.hear(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Cancelled),
    }
}
