//! The one error type of the facade: what the stages report, and what only the whole can get wrong.

use std::path::PathBuf;

use burn::tensor::{Device, Tensor, TensorData};
use nexus_core::{OutOfMemory, failure_reason, mib};

use crate::DeviceError;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A message, prompt, tokenizer or image cannot be used.
    #[error(transparent)]
    Data(#[from] nexus_data::DataError),
    /// The vision encoder cannot be loaded or run.
    #[error(transparent)]
    VisionEncoder(#[from] nexus_vision_encoder::VisionEncoderError),
    /// The autoregressive model cannot be loaded or run.
    #[error(transparent)]
    Ar(#[from] nexus_ar::ArError),
    /// A decoder, the autoencoder or a text encoder cannot be loaded or run.
    #[error(transparent)]
    Diffusion(#[from] nexus_diffusion::DiffusionError),
    /// A checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] nexus_checkpoint::CheckpointError),
    /// A configuration file cannot be used.
    #[error(transparent)]
    Config(#[from] nexus_core::config::ConfigError),
    /// Image embeddings do not fit their grid, or cannot be read or written.
    #[error(transparent)]
    Embeds(#[from] nexus_core::EmbedsError),
    /// There is no such device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The directory of the models is not there.
    #[error("{path}: no such directory", path = path.display())]
    NoSuchDirectory {
        /// Directory that was looked for.
        path: PathBuf,
    },
    /// The directory holds no model.
    #[error("{path}: no Nexus-Gen model here; looked for {}", list(looked_for), path = path.display())]
    NoModel {
        /// Directory that was given.
        path: PathBuf,
        /// Files that would have made it a model.
        looked_for: Vec<PathBuf>,
    },
    /// A file that this request needs is not there.
    #[error("the {what} is needed for this but not there; looked for {}", list(looked_for))]
    FileMissing {
        /// What the file is.
        what: &'static str,
        /// Where it was looked for.
        looked_for: Vec<PathBuf>,
    },
    /// The model answered with text only where a picture was wanted.
    #[error("the model answered without drawing: {reply:?}; ask for an image more plainly")]
    NoImage {
        /// What it wrote.
        reply: String,
    },
    /// More pixels than allowed; nothing was computed.
    #[error(
        "a picture of {width}x{height} pixels is over the limit of {max_pixels} pixels (Loader::max_picture_pixels)"
    )]
    PictureTooLarge {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// Largest area allowed, in pixels.
        max_pixels: usize,
    },
    /// A conversation cannot be written, or a file holds none.
    #[error("{path}: no conversation: {reason}", path = path.display())]
    ConversationFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The conversation has no picture that could be changed.
    #[error("there is no picture in the conversation to edit: send one with the message")]
    NothingToEdit,
    /// Less noise than all, and no picture below it.
    #[error("a strength of {strength} keeps a part of a picture to start from, and there is none: set `start`, or 1")]
    NothingToStartFrom {
        /// Strength asked for.
        strength: f64,
    },
    /// The device failed while it computed.
    #[error("the device failed to give a result back: {reason}; try again, or on another device")]
    Read {
        /// What the backend said, and what the device's memory holds.
        reason: String,
    },
    /// The device has too little memory. What the model held there is freed, and loaded again when it is needed.
    #[error(
        "the device has not enough memory{}: {reason}; draw a smaller picture or in tiles, load the model with quantised \
         weights or one stage at a time, or end other programs that use the device", amounts(*needed, *available)
    )]
    OutOfDeviceMemory {
        /// Bytes of the allocation that failed, where the backend names them.
        needed: Option<u64>,
        /// Bytes that were there for it at most, where the backend tells; see [`OutOfMemory`].
        available: Option<u64>,
        /// What the backend said, and what the device's memory held.
        reason: String,
    },
    /// The device failed, and does not compute any more: it was taken away, or its driver was reset.
    #[error(
        "the device is lost ({reason}); what it held is gone: load the model on another device, or start the program again"
    )]
    DeviceLost {
        /// What it did when it was asked to add.
        reason: String,
    },
    /// The observer stopped the request.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// A failure of the device, by what it said.
    #[doc(hidden)]
    pub fn of_device(reason: String, device: &Device) -> Self {
        match OutOfMemory::of(&reason, device) {
            Some(OutOfMemory { needed, available }) => Self::OutOfDeviceMemory { needed, available, reason },
            None => Self::Read { reason },
        }
    }
}

/// Values of a tensor; waits for the device.
///
/// # Errors
/// [`Error::Read`] or [`Error::OutOfDeviceMemory`].
pub fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>, Error> {
    let data = read_data(tensor)?;
    data.try_into_vec_as().map_err(|error| Error::Read { reason: error.to_string() })
}

/// Values of a tensor in its dtype; waits for the device.
pub(crate) fn read_data<const D: usize>(tensor: Tensor<D>) -> Result<TensorData, Error> {
    let device = tensor.device();
    tensor.try_into_data().map_err(|error| Error::of_device(failure_reason(&error, &device), &device))
}

/// Amounts of memory as a part of a message.
pub fn amounts(needed: Option<u64>, available: Option<u64>) -> String {
    match (needed, available) {
        (None, None) => String::new(),
        (Some(needed), None) => format!(" ({} MiB asked for at once)", mib(needed)),
        (None, Some(available)) => format!(" (at most {} MiB available)", mib(available)),
        (Some(needed), Some(available)) => {
            format!(" ({} MiB asked for at once, at most {} MiB available)", mib(needed), mib(available))
        }
    }
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}
