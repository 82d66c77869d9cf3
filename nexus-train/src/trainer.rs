//! The loop: samples -> losses -> gradients -> step -> metrics and checkpoints, resumable at any moment.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use nexus_checkpoint::{
    Checkpoint, LoadOptions, WeightNames, load_module, module_layout, save_module, write_safetensors,
};
use nexus_core::{
    nn::Recomputation,
    train::{GradientSum, NamePattern, Optimizer, TrainStateError, WeightAverage, check_weights, freeze},
};
use nexus_data::Image;
use serde::Serialize;

use crate::{
    Recipe, RunDir, RunState, StageRecipe, TrainError, TrainEvent, TrainObserver, feed::Feed, workers::Workers,
};
use nexus::read;

/// What is trained: a module, its names, and how a batch becomes a loss.
pub(crate) trait Task: Sync {
    /// Everything that has trained or frozen parameters.
    type Module: Module;

    /// A micro-batch, ready for the module.
    type Batch: Send;

    /// Names of the module's parameters in checkpoints and patterns.
    fn names(&self) -> WeightNames;

    /// The module as the recipe begins it, on the autodiff device.
    fn module(&self) -> Result<Self::Module, TrainError>;

    /// Some samples of a stage, ready for the module; `None` if none of them can be used.
    fn prepare(&mut self, micro_batch: MicroBatch<'_>) -> Result<Option<Self::Batch>, TrainError>;

    /// The losses of a micro-batch; `blocks` gives their gradients.
    fn loss<'a>(
        &self,
        module: &'a Self::Module,
        stage: &StageRecipe,
        batch: Self::Batch,
        blocks: &mut Recomputation<'a>,
    ) -> Result<Losses, TrainError>;

    /// Writes the module under the released file names; what it must know of the data depends on `seen` alone, the
    /// samples of the last stage.
    fn export(&self, module: Self::Module, dir: &Path, seen: MicroBatch<'_>) -> Result<(), TrainError>;

    /// A sheet of pictures that shows what the module can do, if it draws.
    fn samples(&mut self, module: &Self::Module, stage: &StageRecipe) -> Result<Option<Image>, TrainError>;
}

/// Which samples to compute with.
pub(crate) struct MicroBatch<'a> {
    pub(crate) stage: &'a StageRecipe,
    pub(crate) feed: &'a mut Feed,
    pub(crate) workers: &'a Workers,
    /// Seed of everything random, which together with the number of a sample names its draws.
    pub(crate) seed: u64,
    /// Numbers of the samples in the stage.
    pub(crate) samples: std::ops::Range<u64>,
}

/// A loss and what it is made of.
pub(crate) struct Losses {
    pub(crate) total: Tensor<1>,
    pub(crate) parts: Vec<(&'static str, Tensor<1>)>,
}

impl Losses {
    /// Adds a part with its weight, if there is something that it could be computed from.
    pub(crate) fn add(&mut self, name: &'static str, weight: f64, part: Option<Tensor<1>>) {
        if let Some(part) = part {
            self.total = self.total.clone() + part.clone() * weight;
            self.parts.push((name, part));
        }
    }
}

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepMetrics {
    /// Steps done in all.
    pub step: usize,
    /// Name of the stage.
    pub stage: String,
    /// The loss, a mean over the micro-batches of this step.
    pub loss: f64,
    /// Its parts.
    #[serde(flatten)]
    pub parts: std::collections::BTreeMap<String, f64>,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrainOutcome {
    /// All stages are done; the exported weights are here.
    Finished(PathBuf),
    /// The observer stopped it; the run goes on from here when it is started again.
    Stopped(RunState),
}

/// Runs a recipe in a directory, or goes on where it was left.
pub(crate) fn train<T: Task>(
    mut task: T,
    recipe: &Recipe,
    run: &Path,
    device: &Device,
    observer: &mut TrainObserver<'_>,
) -> Result<TrainOutcome, TrainError> {
    recipe.validate()?;
    let (mut dir, latest) = RunDir::open(run, recipe)?;
    let names = task.names();
    let mut module = task.module()?;
    let mut state = RunState { seed: recipe.seed, ..RunState::default() };
    let mut saved = None;
    if let Some((checkpoint, at)) = latest {
        let file = Checkpoint::open(checkpoint.join(MODULE))?;
        module = load_module(module, &file, &names, &LoadOptions::default())?;
        let _ = observer(TrainEvent::Resumed { checkpoint: &checkpoint, steps: at.steps });
        (saved, state) = (Some(checkpoint), at);
    }
    let workers = Workers::new(recipe.parallel_micro_batches)?;
    for (index, stage) in recipe.stages.iter().enumerate().skip(state.stage) {
        if state.stage != index {
            state = RunState { stage: index, stage_steps: 0, cursor: 0, average_steps: 0, ..state };
            saved = None;
        }
        let (frozen, counts) = freeze(module, &names, &stage.frozen);
        module = frozen;
        if let Some(at) = counts.iter().position(|&count| count == 0) {
            let (stage, pattern) = (stage.name.clone(), stage.frozen[at].0.clone());
            return Err(TrainError::UnknownPattern { stage, pattern });
        }
        let is_frozen = |name: &str| stage.frozen.iter().any(|pattern| pattern.matches(name));
        let layout = module_layout(&module, &names);
        if layout.iter().all(|(name, _)| is_frozen(name)) {
            return Err(TrainError::NothingTrained { stage: stage.name.clone() });
        }
        let is_unknown = |pattern: &&NamePattern| !layout.iter().any(|(name, _)| pattern.matches(name));
        if let Some(pattern) = stage.muon.iter().flat_map(|muon| &muon.matrices).find(is_unknown) {
            let (stage, pattern) = (stage.name.clone(), pattern.0.clone());
            return Err(TrainError::UnknownPattern { stage, pattern });
        }
        let mut progress = StageProgress::begin(&module, &names, stage, &state, saved.take(), device)?;
        let mut feed = Feed::open(stage, recipe, index, &dir, state.rejected)?;
        let mut watch = Instant::now();
        while state.stage_steps < stage.steps {
            let (before, step) = (state.stage_steps, state.steps + 1);
            let mut unusable = 0;
            let (mut gradients, sums) = loop {
                let samples = state.cursor..state.cursor + (stage.batch_size * stage.accumulation) as u64;
                state.cursor = samples.end;
                let seed = recipe.seed.wrapping_add(index as u64);
                let batch = MicroBatch { stage, feed: &mut feed, workers: &workers, seed, samples };
                let (gradients, sums) = backward_step(&mut task, &module, batch)?;
                if sums.count > 0 {
                    break (gradients, sums);
                }
                unusable += (stage.batch_size * stage.accumulation) as u64;
                if feed.round().is_some_and(|round| unusable >= round) {
                    return Err(feed.no_samples(stage));
                }
            };
            gradients.scale(1.0 / sums.count as f64);
            let not_finite = |error| match error {
                TrainStateError::NotFinite { parameter } | TrainStateError::WeightNotFinite { parameter } => {
                    TrainError::NotFinite { step, parameter }
                }
                other => other.into(),
            };
            let grad_norm = gradients.norm().map_err(not_finite)?;
            if !sums.total.is_finite() {
                return Err(TrainError::NotFinite { step, parameter: "loss".to_string() });
            }
            if let Some(limit) = stage.max_grad_norm
                && grad_norm > limit
            {
                gradients.scale(limit / grad_norm);
            }
            let learning_rate = stage.learning_rate_at(before);
            module = progress.optimizer.step(module, &names, gradients, learning_rate);
            if let Some(average) = &mut progress.average {
                average.update(&module, &names);
                state.average_steps += 1;
            }
            state.stage_steps += 1;
            state.steps += 1;
            state.rejected = feed.rejected();
            let metrics = sums.metrics(step, &stage.name, learning_rate, grad_norm);
            if step.is_multiple_of(recipe.log_every) || state.stage_steps == stage.steps {
                dir.log(&metrics)?;
            }
            let seconds = watch.elapsed().as_secs_f64();
            watch = Instant::now();
            let samples = stage.batch_size * stage.accumulation;
            let event = TrainEvent::Step { metrics: &metrics, steps: recipe.num_steps(), samples, seconds };
            let flow = observer(event);
            if recipe.sample_every.is_some_and(|every| step.is_multiple_of(every)) {
                let drawn = progress.averaged(&module, &names);
                if let Some(sheet) = task.samples(&drawn, stage)? {
                    let path = save_sheet(&dir, step, &sheet)?;
                    let _ = observer(TrainEvent::Samples { path: &path });
                }
            }
            let is_last = state.stage_steps == stage.steps;
            if is_last || flow.is_break() || state.stage_steps.is_multiple_of(recipe.checkpoint_every) {
                check_weights(&module, &names).map_err(not_finite)?;
                let path = dir.checkpoint(&state, recipe.keep_checkpoints, |to| progress.save(&module, &names, to))?;
                let _ = observer(TrainEvent::Checkpoint { path: &path });
            }
            if flow.is_break() {
                return Ok(TrainOutcome::Stopped(state));
            }
        }
        // A stage begins with the averaged weights of the one before, which are those that were measured.
        module = progress.averaged(&module, &names);
    }
    let Some((index, stage)) = recipe.stages.iter().enumerate().next_back() else {
        unreachable!("a valid recipe has stages")
    };
    let export = run.join(EXPORT);
    std::fs::create_dir_all(&export).map_err(TrainError::file(&export))?;
    let mut feed = Feed::open(stage, recipe, index, &dir, state.rejected)?;
    let seed = recipe.seed.wrapping_add(index as u64);
    let seen = MicroBatch { stage, feed: &mut feed, workers: &workers, seed, samples: 0..state.cursor };
    task.export(module, &export, seen)?;
    Ok(TrainOutcome::Finished(export))
}

/// Gradients and losses of all samples of a step, summed over its micro-batches; of none if no sample can be used.
fn backward_step<T: Task>(
    task: &mut T,
    module: &T::Module,
    MicroBatch { stage, feed, workers, seed, samples }: MicroBatch<'_>,
) -> Result<(GradientSum, LossSums), TrainError> {
    let (mut gradients, mut sums) = (GradientSum::new(), LossSums::default());
    let firsts: Vec<u64> = samples.step_by(stage.batch_size).collect();
    for side_by_side in firsts.chunks(workers.count()) {
        let mut batches = Vec::new();
        for &first in side_by_side {
            let samples = first..first + stage.batch_size as u64;
            batches.extend(task.prepare(MicroBatch { stage, feed: &mut *feed, workers, seed, samples })?);
        }
        for micro_batch in backward_all(task, module, stage, batches, workers) {
            let (values, parts) = micro_batch?;
            sums.add(values);
            gradients.merge(parts);
        }
    }
    Ok((gradients, sums))
}

/// Values and gradients of the losses of some micro-batches, in order.
fn backward_all<T: Task>(
    task: &T,
    module: &T::Module,
    stage: &StageRecipe,
    batches: Vec<T::Batch>,
    workers: &Workers,
) -> Vec<Result<(LossValues, GradientSum), TrainError>> {
    // Gradients of one graph wait for each other, so each micro-batch has parameters of its own.
    let forks = batches.into_iter().enumerate().map(|(index, batch)| {
        let module = module.clone();
        let device = module.devices().into_iter().next().filter(|_| index > 0);
        (
            match device {
                Some(device) => module.fork(&device),
                None => module,
            },
            batch,
        )
    });
    workers.map(forks.collect(), |(module, batch)| {
        let mut blocks = if stage.recompute { Recomputation::of_blocks() } else { Recomputation::none() };
        let losses = task.loss(&module, stage, batch, &mut blocks)?;
        let (values, mut gradients) = (LossValues::read(&losses)?, GradientSum::new());
        // Samples may not reach what is trained, such as text alone with a vision head.
        if losses.total.is_tracked() {
            blocks.backward(&losses.total, |part| gradients.add(part, &module, &task.names()));
        }
        Ok((values, gradients))
    })
}

const MODULE: &str = "module.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const AVERAGE: &str = "average.safetensors";
const EXPORT: &str = "export";

/// What a stage keeps besides the module.
struct StageProgress {
    optimizer: Optimizer,
    average: Option<WeightAverage>,
}

impl StageProgress {
    fn begin<M: Module>(
        module: &M,
        names: &WeightNames,
        stage: &StageRecipe,
        state: &RunState,
        saved: Option<PathBuf>,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let Some(saved) = saved.filter(|_| state.stage_steps > 0) else {
            let average = stage.ema_decay.map(WeightAverage::new);
            return Ok(Self { optimizer: Optimizer::new(stage.optimizer).with_muon(stage.muon.clone()), average });
        };
        let trained = |name: &str| !stage.frozen.iter().any(|pattern| pattern.matches(name));
        let layout = module_layout(module, names).into_iter().filter(|(name, _)| trained(name));
        let sizes: Vec<(String, usize)> = layout.map(|(name, shape)| (name, shape.iter().product())).collect();
        let file = Checkpoint::open(saved.join(OPTIMIZER))?;
        let optimizer = Optimizer::restore(stage.optimizer, stage.muon.clone(), &file, &sizes, device)?;
        let average = match stage.ema_decay {
            Some(decay) => {
                let file = Checkpoint::open(saved.join(AVERAGE))?;
                Some(WeightAverage::restore(decay, state.average_steps, &file, &sizes, device)?)
            }
            None => None,
        };
        Ok(Self { optimizer, average })
    }

    fn averaged<M: Module>(&self, module: &M, names: &WeightNames) -> M {
        match &self.average {
            Some(average) => average.apply(module.clone(), names),
            None => module.clone(),
        }
    }

    fn save(&self, module: &impl Module, names: &WeightNames, dir: &Path) -> Result<(), TrainError> {
        save_module(module, names, &dir.join(MODULE), None)?;
        write_safetensors(&dir.join(OPTIMIZER), self.optimizer.state()?, None)?;
        if let Some(average) = &self.average {
            write_safetensors(&dir.join(AVERAGE), average.state()?.0, None)?;
        }
        Ok(())
    }
}

/// A loss and its parts as numbers.
struct LossValues {
    total: f64,
    parts: Vec<(&'static str, f64)>,
}

impl LossValues {
    fn read(losses: &Losses) -> Result<Self, TrainError> {
        let value =
            |loss: &Tensor<1>| Ok::<f64, TrainError>(read(loss.clone())?.first().copied().unwrap_or(f32::NAN).into());
        let parts = losses.parts.iter().map(|(name, part)| Ok((*name, value(part)?)));
        Ok(Self { total: value(&losses.total)?, parts: parts.collect::<Result<_, TrainError>>()? })
    }
}

/// Losses of the micro-batches of a step.
#[derive(Default)]
struct LossSums {
    count: usize,
    total: f64,
    parts: Vec<(&'static str, f64)>,
}

impl LossSums {
    fn add(&mut self, losses: LossValues) {
        self.count += 1;
        self.total += losses.total;
        for (name, value) in losses.parts {
            match self.parts.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum += value,
                None => self.parts.push((name, value)),
            }
        }
    }

    fn metrics(&self, step: usize, stage: &str, learning_rate: f64, grad_norm: f64) -> StepMetrics {
        let mean = |sum: f64| sum / self.count as f64;
        let parts = self.parts.iter().map(|(name, sum)| (name.to_string(), mean(*sum))).collect();
        StepMetrics { step, stage: stage.to_string(), loss: mean(self.total), parts, learning_rate, grad_norm }
    }
}

fn save_sheet(dir: &RunDir, step: usize, sheet: &Image) -> Result<PathBuf, TrainError> {
    let samples = dir.path().join("samples");
    std::fs::create_dir_all(&samples).map_err(TrainError::file(&samples))?;
    let path = samples.join(format!("step-{step:08}.png"));
    sheet.save(&path)?;
    Ok(path)
}

/// An observer that hears nothing and never stops.
pub fn unobserved(_: TrainEvent<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}
