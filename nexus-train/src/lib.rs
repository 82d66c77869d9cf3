//! Training: a recipe -> a run that can be killed and goes on -> weights under the released file names.
//!
//! ```no_run
//! use nexus_train::{Recipe, train, unobserved};
//!
//! let device = nexus::device("cpu")?;
//! let recipe = Recipe::read("recipe.json")?;
//! let outcome = train(&recipe, "models", "runs/ar", &device, &mut unobserved)?;
//! println!("{outcome:?}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Every number that a run draws depends on the recipe's seed and the number of the sample alone, so a run that was
//! killed goes on with the same losses, bit for bit, on a CPU with the same number of threads. Micro-batches that are
//! computed side by side make no difference to them.
//!
//! Samples come from files of messages, or from a [`Source`] of the program that runs the recipe. Such a source may attach
//! what it knows of its samples, as [`Supervision`] in their tokens.

mod autoencoder;
mod decoders;
mod drawing;
mod error;
mod feed;
mod language;
pub mod optim;
mod recipe;
mod run;
mod run_dir;
mod sheet;
mod source;
mod supervision;
mod text_encoders;
mod trainer;
mod training;
mod workers;

use std::{ops::ControlFlow, path::Path};

use burn::tensor::Device;

pub use error::TrainError;
pub use recipe::{
    AutoencoderSettings, AutoregressiveSettings, ComputeDType, DataRecipe, DecoderInitial, DecoderSettings,
    EditingInitial, EditingStart, Initial, LanguageInitial, MessagesRecipe, PartRecipe, Phase, Qwen2_5VlStart, Recipe,
    Schedule, SourceRecipe, TrainedPart, VisionEncoderSettings,
};
pub use run::{Run, Step, StepMetrics, TrainOutcome, unobserved};
pub use run_dir::{RunDir, RunState};
pub use source::{LabelClasses, Sample, Source, Truth};
pub use supervision::{PossibleClass, PossibleToken, Supervision, TokenLabels, TokenLooks};
pub use text_encoders::fill_text_encoders;
pub use trainer::Trainer;

/// File of a run in which bad samples are set aside.
pub const REJECTED: &str = "rejected.jsonl";

/// What happens while a run goes on.
#[derive(Debug)]
#[non_exhaustive]
pub enum TrainEvent<'a> {
    /// The run goes on from a checkpoint.
    Resumed {
        /// Where it was.
        checkpoint: &'a Path,
        /// Steps done.
        steps: usize,
    },
    /// A step is done.
    Step {
        /// Losses, learning rate and norm.
        metrics: &'a StepMetrics,
        /// Steps of the recipe.
        steps: usize,
        /// Samples of this step.
        samples: usize,
        /// Seconds since the step before.
        seconds: f64,
    },
    /// A checkpoint is on disk.
    Checkpoint {
        /// Its directory.
        path: &'a Path,
    },
    /// Sample pictures were drawn.
    Samples {
        /// Their file.
        path: &'a Path,
    },
}

/// Hears events; [`ControlFlow::Break`] after a step writes a checkpoint and stops.
pub type TrainObserver<'a> = dyn FnMut(TrainEvent<'_>) -> ControlFlow<()> + 'a;

/// [`Trainer::train`] of a recipe whose samples come from files of messages alone.
///
/// # Errors
/// As [`Trainer::train`].
pub fn train(
    recipe: &Recipe,
    model: impl AsRef<Path>,
    run: impl AsRef<Path>,
    device: &Device,
    observer: &mut TrainObserver<'_>,
) -> Result<TrainOutcome, TrainError> {
    Trainer::new().train(recipe, model, run, device, observer)
}
