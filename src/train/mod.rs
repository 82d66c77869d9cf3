//! Training: a recipe -> a run that can be killed and goes on -> weights under the released file names.
//!
//! ```no_run
//! use nexus::train::{Recipe, train, unobserved};
//!
//! let device = nexus::device("cpu")?;
//! let recipe = Recipe::read("recipes/nexus-tiny/autoregressive.json")?;
//! let outcome = train(&recipe, "models", "runs/ar", &device, &mut unobserved)?;
//! println!("{outcome:?}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Every number that a run draws depends on the recipe's seed and the number of the sample alone, so a run that was
//! killed goes on with the same losses, bit for bit, on a CPU with the same number of threads. Micro-batches that are
//! computed side by side make no difference to them.

mod attended;
mod autoregressive;
mod curves;
mod decoders;
mod drawing;
mod error;
mod feed;
mod labels;
mod pretraining;
mod recipe;
mod recipe_fields;
mod run;
mod sheet;
mod text_encoders;
mod trainer;
mod unseen;
mod workers;

use std::{ops::ControlFlow, path::Path};

use burn::tensor::Device;

pub use error::TrainError;
pub use recipe::{
    ComputeDType, DataRecipe, DecoderRecipe, Initial, LossRecipe, Recipe, Schedule, Source, StageRecipe, TrainedPart,
};
pub use run::{RunDir, RunState};
pub use text_encoders::fill_text_encoders;
pub use trainer::{StepMetrics, TrainOutcome, unobserved};

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

/// Runs a recipe with the model in `model` in the directory `run`, or goes on where the run was left.
///
/// # Errors
/// [`TrainError`]; the checkpoints on disk stay usable.
pub fn train(
    recipe: &Recipe,
    model: impl AsRef<Path>,
    run: impl AsRef<Path>,
    device: &Device,
    observer: &mut TrainObserver<'_>,
) -> Result<TrainOutcome, TrainError> {
    let (model, run) = (model.as_ref(), run.as_ref());
    match recipe.part {
        TrainedPart::Autoencoder => {
            let task = pretraining::AutoencoderTask::open(recipe, model, device)?;
            trainer::train(task, recipe, run, device, observer)
        }
        TrainedPart::VisionEncoder => {
            let task = autoregressive::LanguageTask::open(recipe, model, device, true)?;
            trainer::train(task, recipe, run, device, observer)
        }
        TrainedPart::Autoregressive => {
            let task = autoregressive::LanguageTask::open(recipe, model, device, false)?;
            trainer::train(task, recipe, run, device, observer)
        }
        TrainedPart::GenerationDecoder => {
            let task = decoders::DecoderTask::<nexus_diffusion::GenerationDecoder>::open(recipe, model, device)?;
            trainer::train(task, recipe, run, device, observer)
        }
        TrainedPart::EditingDecoder => {
            let task = decoders::DecoderTask::<nexus_diffusion::EditingDecoder>::open(recipe, model, device)?;
            trainer::train(task, recipe, run, device, observer)
        }
    }
}
