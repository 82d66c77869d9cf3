//! What steps the weights of any module: gradients by name -> AdamW or Muon step -> averaged weights.
//!
//! Everything is keyed by the names that parameters have in the released files, so that what is saved can be resumed by
//! another process, and recipes name frozen parts as anyone finds them in a checkpoint.

mod average;
mod draws;
mod finite;
mod gradients;
mod initialize;
mod muon;
mod optimizer;
mod pattern;

pub use average::WeightAverage;
pub use draws::Draws;
pub use finite::check_weights;
pub use gradients::GradientSum;
pub use initialize::{InitialWeights, initialize};
pub use muon::MuonOptions;
pub use optimizer::{AdamWOptions, Optimizer};
pub use pattern::{NamePattern, freeze};

/// What can go wrong between a saved training state and a module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainStateError {
    /// The loss or a gradient is no finite number.
    #[error("the gradient of `{parameter}` is NaN or infinite; lower the learning rate or look at the latest samples")]
    NotFinite {
        /// First parameter whose gradient is not finite.
        parameter: String,
    },
    /// A weight is no finite number after a step.
    #[error("the weights of `{parameter}` are NaN or infinite; lower the learning rate")]
    WeightNotFinite {
        /// First parameter with such a weight.
        parameter: String,
    },
    /// The saved state belongs to another module.
    #[error("the saved state has no `{tensor}` of {expected} numbers; it belongs to another model or recipe")]
    State {
        /// Tensor that was looked for.
        tensor: String,
        /// Numbers of the parameter.
        expected: usize,
    },
    /// A value cannot be read back from the device.
    #[error("`{parameter}` cannot be read from the device: {reason}")]
    Read {
        /// Parameter, or all of a kind, whose value or state was asked for.
        parameter: String,
        /// What the backend said.
        reason: String,
    },
    /// The file of the saved state cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] nexus_checkpoint::CheckpointError),
}
