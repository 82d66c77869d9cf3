//! A run of one part of the model: its module, the phase that it is in, and the step that takes it on.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::{module::Module, tensor::Device};
use nexus_checkpoint::{Checkpoint, LoadOptions, WeightNames, load_module, module_layout};

use super::{
    AnyRun, Step,
    progress::{MODULE, PhaseProgress},
    step::backward_step,
};
use crate::{
    Phase, Recipe, RunDir, RunState, Source, TrainError,
    feed::Feed,
    optim::{NamePattern, TrainStateError, check_weights, freeze},
    training::{MicroBatch, PartTraining},
    workers::Workers,
};

/// Directory of the finished weights.
const EXPORT: &str = "export";

/// A run; after an error it has no module any more.
pub(crate) struct PartRun<T: PartTraining> {
    training: T,
    recipe: Recipe,
    phases: Vec<Phase<T::Settings>>,
    /// The sources of each phase, in the order of its data.
    sources: Vec<Vec<Arc<dyn Source>>>,
    dir: RunDir,
    device: Device,
    workers: Workers,
    names: WeightNames,
    module: Option<T::Module>,
    state: RunState,
    progress: PhaseProgress,
    feed: Feed,
    resumed_from: Option<PathBuf>,
}

impl<T: PartTraining> PartRun<T> {
    /// Begins a run in a directory, or goes on where it was left.
    pub(crate) fn resume(
        training: T,
        recipe: &Recipe,
        phases: Vec<Phase<T::Settings>>,
        sources: Vec<Vec<Arc<dyn Source>>>,
        run: &Path,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let (dir, latest) = RunDir::open(run, recipe)?;
        let names = training.names();
        let mut module = training.module()?;
        let (mut state, mut resumed_from) = (RunState { seed: recipe.seed, ..RunState::default() }, None);
        if let Some((checkpoint, at)) = latest {
            let file = Checkpoint::open(checkpoint.join(MODULE))?;
            module = load_module(module, &file, &names, &LoadOptions::default())?;
            (state, resumed_from) = (at, Some(checkpoint));
        }
        let Some(phase) = phases.get(state.phase) else {
            return Err(TrainError::OtherRecipe { path: run.to_path_buf(), field: "phases" });
        };
        let module = frozen(module, &names, phase)?;
        let progress = PhaseProgress::begin(&module, &names, phase, &state, resumed_from.as_deref(), device)?;
        let feed = Feed::new(phase, sources[state.phase].clone(), recipe, state.phase, &dir, state.rejected)?;
        Ok(Self {
            training,
            recipe: recipe.clone(),
            sources,
            dir,
            device: device.clone(),
            workers: Workers::new(recipe.parallel_micro_batches)?,
            names,
            module: Some(module),
            state,
            progress,
            feed,
            resumed_from,
            phases,
        })
    }

    /// Goes on to the next phase, which begins with the averaged weights of this one: those that were measured.
    fn next_phase(&mut self, module: T::Module) -> Result<T::Module, TrainError> {
        let index = self.state.phase + 1;
        let module = self.progress.averaged(&module, &self.names);
        self.state = RunState { phase: index, phase_steps: 0, cursor: 0, average_steps: 0, ..self.state.clone() };
        let phase = &self.phases[index];
        let module = frozen(module, &self.names, phase)?;
        self.progress = PhaseProgress::begin(&module, &self.names, phase, &self.state, None, &self.device)?;
        let sources = self.sources[index].clone();
        self.feed = Feed::new(phase, sources, &self.recipe, index, &self.dir, self.state.rejected)?;
        Ok(module)
    }

    /// The module after the next step of the phase, and what the step was.
    fn step_in_phase(&mut self, module: T::Module) -> Result<(T::Module, Step), TrainError> {
        let Self { training, phases, workers, names, state, progress, feed, recipe, .. } = self;
        let phase = &phases[state.phase];
        let (step, samples) = (state.steps + 1, phase.samples_per_step());
        let seed = recipe.seed.wrapping_add(state.phase as u64);
        let mut unusable = 0;
        let (mut gradients, sums) = loop {
            let samples = state.cursor..state.cursor + samples as u64;
            state.cursor = samples.end;
            unusable += samples.end - samples.start;
            let batch = MicroBatch { phase, feed: &mut *feed, workers, seed, samples };
            let (gradients, sums) = backward_step(training, &module, batch)?;
            if sums.count > 0 {
                break (gradients, sums);
            }
            if feed.round().is_some_and(|round| unusable >= round) {
                return Err(feed.no_samples(phase));
            }
        };
        gradients.scale(1.0 / sums.count as f64);
        let grad_norm = gradients.norm().map_err(|error| not_finite(error, step))?;
        if !sums.total.is_finite() {
            return Err(TrainError::NotFinite { step, parameter: "loss".to_string() });
        }
        if let Some(limit) = phase.max_grad_norm
            && grad_norm > limit
        {
            gradients.scale(limit / grad_norm);
        }
        let learning_rate = phase.learning_rate_at(state.phase_steps);
        let module = progress.optimizer.step(module, names, gradients, learning_rate);
        if let Some(average) = &mut progress.average {
            average.update(&module, names);
            state.average_steps += 1;
        }
        state.phase_steps += 1;
        state.steps += 1;
        state.rejected = feed.rejected();
        let ends_phase = state.phase_steps == phase.steps;
        let metrics = sums.metrics(step, &phase.name, learning_rate, grad_norm);
        if step.is_multiple_of(recipe.log_every) || ends_phase {
            self.dir.log(&metrics)?;
        }
        Ok((module, Step { metrics, samples, ends_phase }))
    }

    fn module(&self) -> Result<&T::Module, TrainError> {
        self.module.as_ref().ok_or(TrainError::Failed)
    }
}

impl<T: PartTraining> AnyRun for PartRun<T> {
    fn resumed_from(&self) -> Option<&Path> {
        self.resumed_from.as_deref()
    }

    fn state(&self) -> &RunState {
        &self.state
    }

    fn step(&mut self) -> Result<Option<Step>, TrainError> {
        let mut module = self.module.take().ok_or(TrainError::Failed)?;
        while self.state.phase_steps >= self.phases[self.state.phase].steps {
            if self.state.phase + 1 == self.phases.len() {
                self.module = Some(module);
                return Ok(None);
            }
            module = self.next_phase(module)?;
        }
        let (module, step) = self.step_in_phase(module)?;
        self.module = Some(module);
        Ok(Some(step))
    }

    fn checkpoint(&mut self) -> Result<PathBuf, TrainError> {
        let module = self.module.as_ref().ok_or(TrainError::Failed)?;
        check_weights(module, &self.names).map_err(|error| not_finite(error, self.state.steps))?;
        let (progress, names) = (&self.progress, &self.names);
        self.dir.checkpoint(&self.state, self.recipe.keep_checkpoints, |to| progress.save(module, names, to))
    }

    fn draw_samples(&mut self) -> Result<Option<PathBuf>, TrainError> {
        let module = self.progress.averaged(self.module()?, &self.names);
        let Some(sheet) = self.training.samples(&module, &self.phases[self.state.phase])? else { return Ok(None) };
        let samples = self.dir.path().join("samples");
        std::fs::create_dir_all(&samples).map_err(TrainError::file(&samples))?;
        let path = samples.join(format!("step-{:08}.png", self.state.steps));
        sheet.save(&path)?;
        Ok(Some(path))
    }

    fn export(&mut self) -> Result<PathBuf, TrainError> {
        let module = self.progress.averaged(self.module()?, &self.names);
        let export = self.dir.path().join(EXPORT);
        std::fs::create_dir_all(&export).map_err(TrainError::file(&export))?;
        let Self { recipe, phases, sources, dir, state, workers, .. } = self;
        let phase = &phases[state.phase];
        let mut feed = Feed::new(phase, sources[state.phase].clone(), recipe, state.phase, dir, state.rejected)?;
        let seed = recipe.seed.wrapping_add(state.phase as u64);
        let seen = MicroBatch { phase, feed: &mut feed, workers, seed, samples: 0..state.cursor };
        self.training.export(module, &export, seen)?;
        Ok(export)
    }
}

/// The module with the parameters frozen that a phase names, each of which has to be there.
fn frozen<M: Module, S>(module: M, names: &WeightNames, phase: &Phase<S>) -> Result<M, TrainError> {
    let unknown =
        |pattern: &NamePattern| TrainError::UnknownPattern { phase: phase.name.clone(), pattern: pattern.0.clone() };
    let (module, counts) = freeze(module, names, &phase.frozen);
    if let Some(at) = counts.iter().position(|&count| count == 0) {
        return Err(unknown(&phase.frozen[at]));
    }
    let layout = module_layout(&module, names);
    if layout.iter().all(|(name, _)| phase.freezes(name)) {
        return Err(TrainError::NothingTrained { phase: phase.name.clone() });
    }
    let is_unknown = |pattern: &&NamePattern| !layout.iter().any(|(name, _)| pattern.matches(name));
    match phase.muon.iter().flat_map(|muon| &muon.matrices).find(is_unknown) {
        Some(pattern) => Err(unknown(pattern)),
        None => Ok(module),
    }
}

fn not_finite(error: TrainStateError, step: usize) -> TrainError {
    match error {
        TrainStateError::NotFinite { parameter } | TrainStateError::WeightNotFinite { parameter } => {
            TrainError::NotFinite { step, parameter }
        }
        other => other.into(),
    }
}
