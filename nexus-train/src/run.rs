//! A run: samples -> losses -> gradients -> step -> metrics and checkpoints, resumable at any moment.

mod part;
mod progress;
mod step;

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};

use serde::Serialize;

use crate::{Recipe, RunState, TrainError, TrainEvent, TrainObserver};

pub(crate) use part::PartRun;

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepMetrics {
    /// Steps done in all.
    pub step: usize,
    /// Name of the phase.
    pub phase: String,
    /// The loss, a mean over the micro-batches of this step.
    pub loss: f64,
    /// Its parts.
    #[serde(flatten)]
    pub parts: BTreeMap<String, f64>,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
}

/// A step that was taken.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Step {
    /// Losses, learning rate and norm.
    pub metrics: StepMetrics,
    /// Samples of the step.
    pub samples: usize,
    /// Whether it is the last one of its phase.
    pub ends_phase: bool,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrainOutcome {
    /// All phases are done; the exported weights are here.
    Finished(PathBuf),
    /// The observer stopped it; the run goes on from here when it is started again.
    Stopped(RunState),
}

/// A run that is driven step by step; [`Trainer::resume`](crate::Trainer::resume) begins it or goes on where it was left.
///
/// ```no_run
/// use nexus_train::{Recipe, Trainer};
///
/// let recipe = Recipe::read("autoregressive.json")?;
/// let mut run = Trainer::new().resume(&recipe, "models", "runs/ar", &nexus::device("cpu")?)?;
/// while let Some(step) = run.step()? {
///     println!("{}: {}", step.metrics.step, step.metrics.loss);
///     if step.ends_phase || step.metrics.step % 100 == 0 {
///         run.checkpoint()?;
///     }
/// }
/// println!("{}", run.export()?.display());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Run(Box<dyn AnyRun>);

impl Run {
    pub(crate) fn new(run: impl AnyRun + 'static) -> Self {
        Self(Box::new(run))
    }

    /// The checkpoint that it goes on from, if it does not begin.
    pub fn resumed_from(&self) -> Option<&Path> {
        self.0.resumed_from()
    }

    /// Where it is.
    pub fn state(&self) -> &RunState {
        self.0.state()
    }

    /// Takes the next step and writes its line of metrics if it is due; `None` if all phases are done.
    ///
    /// # Errors
    /// [`TrainError`]; what the latest checkpoint has stays usable, this run does not.
    pub fn step(&mut self) -> Result<Option<Step>, TrainError> {
        self.0.step()
    }

    /// Writes a checkpoint of where it is.
    ///
    /// # Errors
    /// [`TrainError::NotFinite`] if a weight is no number, [`TrainError::RunFile`].
    pub fn checkpoint(&mut self) -> Result<PathBuf, TrainError> {
        self.0.checkpoint()
    }

    /// Draws a sheet of sample pictures, if the part that is trained draws.
    ///
    /// # Errors
    /// [`TrainError`].
    pub fn draw_samples(&mut self) -> Result<Option<PathBuf>, TrainError> {
        self.0.draw_samples()
    }

    /// Writes the averaged weights under the released file names, and returns their directory.
    ///
    /// # Errors
    /// [`TrainError`].
    pub fn export(&mut self) -> Result<PathBuf, TrainError> {
        self.0.export()
    }
}

/// A run of any part; see [`Run`].
pub(crate) trait AnyRun {
    fn resumed_from(&self) -> Option<&Path>;
    fn state(&self) -> &RunState;
    fn step(&mut self) -> Result<Option<Step>, TrainError>;
    fn checkpoint(&mut self) -> Result<PathBuf, TrainError>;
    fn draw_samples(&mut self) -> Result<Option<PathBuf>, TrainError>;
    fn export(&mut self) -> Result<PathBuf, TrainError>;
}

/// Drives a run to its end, or until the observer stops it.
pub(crate) fn drive(
    mut run: Run,
    recipe: &Recipe,
    observer: &mut TrainObserver<'_>,
) -> Result<TrainOutcome, TrainError> {
    if let Some(checkpoint) = run.resumed_from() {
        let _ = observer(TrainEvent::Resumed { checkpoint, steps: run.state().steps });
    }
    let (steps, sample_every) = (recipe.num_steps(), recipe.train.sample_every());
    let mut watch = Instant::now();
    while let Some(Step { metrics, samples, ends_phase }) = run.step()? {
        let seconds = watch.elapsed().as_secs_f64();
        watch = Instant::now();
        let flow = observer(TrainEvent::Step { metrics: &metrics, steps, samples, seconds });
        if sample_every.is_some_and(|every| metrics.step.is_multiple_of(every))
            && let Some(path) = run.draw_samples()?
        {
            let _ = observer(TrainEvent::Samples { path: &path });
        }
        if ends_phase || flow.is_break() || run.state().phase_steps.is_multiple_of(recipe.checkpoint_every) {
            let path = run.checkpoint()?;
            let _ = observer(TrainEvent::Checkpoint { path: &path });
        }
        if flow.is_break() {
            return Ok(TrainOutcome::Stopped(run.state().clone()));
        }
    }
    run.export().map(TrainOutcome::Finished)
}

/// An observer that hears nothing and never stops.
pub fn unobserved(_: TrainEvent<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}
