//! What can go wrong while training.

use std::path::{Path, PathBuf};

use nexus::amounts;

/// What can go wrong while training; what is on disk stays usable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// A stage of the model, its files or its input.
    #[error(transparent)]
    Model(#[from] nexus::Error),
    /// The saved state does not fit the model.
    #[error(transparent)]
    State(#[from] crate::optim::TrainStateError),
    /// Another process trains in this directory.
    #[error("{path}: another process trains here; wait for it or choose another directory", path = path.display())]
    Busy {
        /// Directory of the run.
        path: PathBuf,
    },
    /// The run was begun with another recipe.
    #[error(
        "{path}: this run was begun with another recipe, which differs in `{field}`; use another directory to begin anew",
        path = path.display()
    )]
    OtherRecipe {
        /// Directory of the run.
        path: PathBuf,
        /// First field that differs.
        field: &'static str,
    },
    /// A file of the run cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    RunFile {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The loss, a gradient or a weight is no number; the latest checkpoint is from before.
    #[error(
        "step {step}: NaN or infinite, first seen in `{parameter}`; the latest checkpoint is intact: begin anew with a \
         lower learning rate, or look at the latest samples"
    )]
    NotFinite {
        /// Step at fault, counted from 1.
        step: usize,
        /// Parameter whose weights or gradient are not finite, or `loss`.
        parameter: String,
    },
    /// The device has too little memory for a step; the latest checkpoint is from before.
    #[error(
        "the device has not enough memory{}: {reason}; lower `batch_size` of the recipe, set `recompute`, or end other \
         programs that use the device: the latest checkpoint is intact", amounts(*needed, *available)
    )]
    OutOfDeviceMemory {
        /// Bytes of the allocation that failed, where the backend names them.
        needed: Option<u64>,
        /// Bytes that were there for it at most, where the backend tells; see [`nexus_core::OutOfMemory`].
        available: Option<u64>,
        /// What the backend said, and what the device's memory held.
        reason: String,
    },
    /// No sample of the data can be used.
    #[error("phase `{phase}`: none of its data can be used; the reasons are in {rejected}", rejected = rejected.display())]
    NoSamples {
        /// Phase of the recipe.
        phase: String,
        /// File of the reasons.
        rejected: PathBuf,
    },
    /// The recipe names a source that the program does not know.
    #[error("`{name}` is no source of samples here; there are {known}")]
    UnknownSource {
        /// Name in the recipe.
        name: String,
        /// Names that are known.
        known: String,
    },
    /// A source of the program cannot be opened with its settings in the recipe.
    #[error("source `{name}`: {source}")]
    Source {
        /// Name in the recipe.
        name: String,
        /// What the source said.
        source: nexus_data::BoxedSource,
    },
    /// A step of this run failed before.
    #[error("this run failed before; begin it again, and it goes on from its latest checkpoint")]
    Failed,
    /// No threads for micro-batches side by side.
    #[error("{count} micro-batches side by side: {reason}; lower `parallel_micro_batches` in the recipe")]
    Workers {
        /// Micro-batches side by side.
        count: usize,
        /// What the system said.
        reason: String,
    },
    /// A pattern of the recipe means nothing.
    #[error("phase `{phase}`: `{pattern}` in `frozen` or `muon` matches no parameter")]
    UnknownPattern {
        /// Phase of the recipe.
        phase: String,
        /// Pattern at fault.
        pattern: String,
    },
    /// All parameters are frozen.
    #[error("phase `{phase}`: every parameter is frozen, so there is nothing to train")]
    NothingTrained {
        /// Phase of the recipe.
        phase: String,
    },
    /// A text encoder without weights, of a model that is there already.
    #[error(
        "{path}: no such file; download it, or copy it from another model: only a recipe that begins with random weights \
         makes random text encoders too",
        path = path.display()
    )]
    TextEncoderMissing {
        /// File that was looked for.
        path: PathBuf,
    },
}

impl TrainError {
    pub(crate) fn file(path: &Path) -> impl Fn(std::io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::RunFile { path: path.clone(), source }
    }
}

macro_rules! through_the_facade {
    ($($error:ty),*) => {
        $(impl From<$error> for TrainError {
            fn from(error: $error) -> Self {
                Self::Model(error.into())
            }
        })*
    };
}

through_the_facade!(
    nexus_data::DataError,
    nexus_vision_encoder::VisionEncoderError,
    nexus_ar::ArError,
    nexus_diffusion::DiffusionError,
    nexus_checkpoint::CheckpointError,
    nexus_core::config::ConfigError,
    nexus_core::EmbedsError
);
