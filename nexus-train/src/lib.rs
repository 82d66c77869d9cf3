//! Training: a recipe -> a run that can be killed and goes on -> weights under the released file names.
//!
//! ```no_run
//! use nexus_train::{Recipe, train, unobserved};
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

use std::{
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use burn::tensor::{Device, FloatDType};
use nexus_core::train::TrainStateError;

use nexus::{DeviceError, Error, diagnose};

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
/// [`TrainError`], before anything is read if the device has not got a dtype of the recipe; the checkpoints on disk stay
/// usable. A device that fails is [`TrainError::OutOfDeviceMemory`], or [`Error::DeviceLost`] if it does not
/// compute any more.
pub fn train(
    recipe: &Recipe,
    model: impl AsRef<Path>,
    run: impl AsRef<Path>,
    device: &Device,
    observer: &mut TrainObserver<'_>,
) -> Result<TrainOutcome, TrainError> {
    let (model, run) = (model.as_ref(), run.as_ref());
    check_dtypes(recipe, |dtype| device.supports_dtype(dtype))?;
    on_device(device, || run_part(recipe, model, run, device, observer))
}

fn run_part(
    recipe: &Recipe,
    model: &Path,
    run: &Path,
    device: &Device,
    observer: &mut TrainObserver<'_>,
) -> Result<TrainOutcome, TrainError> {
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

/// Runs what keeps nothing on the device when it ends, and diagnoses how it failed.
fn on_device<T>(device: &Device, run: impl FnOnce() -> Result<T, TrainError>) -> Result<T, TrainError> {
    let result = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Err(TrainError::Model(error))) => Ok(Err(error)),
        Ok(Err(TrainError::State(TrainStateError::Read { parameter, reason }))) => {
            Ok(Err(Error::of_device(format!("`{parameter}`: {reason}"), device)))
        }
        Ok(result) => return result,
        Err(panic) => Err(panic),
    };
    diagnose(device, || (), result).map_err(|error| match error {
        Error::OutOfDeviceMemory { needed, available, reason } => {
            TrainError::OutOfDeviceMemory { needed, available, reason }
        }
        error => error.into(),
    })
}

/// Weights are kept in f32, which every device has; stages may compute in another dtype.
fn check_dtypes(recipe: &Recipe, supports: impl Fn(FloatDType) -> bool) -> Result<(), TrainError> {
    match recipe.stages.iter().map(autoregressive::compute_dtype).find(|&dtype| !supports(dtype)) {
        Some(dtype) => Err(Error::from(DeviceError::UnsupportedDType { dtype }).into()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_in_a_dtype_that_the_device_has_not_is_refused() {
        let recipe = |dtypes: &[&str]| {
            let stage = |dtype: &&str| {
                serde_json::json!({
                    "name": "only", "steps": 1, "batch_size": 1, "learning_rate": 1e-3, "compute_dtype": dtype,
                    "data": [{"source": {"world": {"seed": 1, "task": "generation"}}, "weight": 1.0}],
                })
            };
            let stages: Vec<_> = dtypes.iter().map(stage).collect();
            serde_json::from_value::<Recipe>(serde_json::json!({
                "command": "", "time": "", "expected": "", "part": "autoencoder", "seed": 5, "checkpoint_every": 1,
                "log_every": 1, "max_rejected": 0, "stages": stages,
            }))
            .unwrap()
        };
        let only_f32 = |dtype| dtype == FloatDType::F32;
        assert!(check_dtypes(&recipe(&["f32", "f32"]), only_f32).is_ok());
        assert!(check_dtypes(&recipe(&["f32", "bf16"]), |_| true).is_ok());
        let error = check_dtypes(&recipe(&["f32", "bf16"]), only_f32).unwrap_err();
        let expected = DeviceError::UnsupportedDType { dtype: FloatDType::BF16 };
        assert!(matches!(&error, TrainError::Model(Error::Device(found)) if *found == expected), "{error}");
    }
}
