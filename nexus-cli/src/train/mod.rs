//! `nexus train`: a recipe, a model and a directory -> a run, which goes on where it was left.

mod curves;

use std::{
    fs,
    io::IsTerminal,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use nexus_train::{Recipe, TrainEvent, TrainOutcome, TrainedPart, Trainer, fill_text_encoders};
use serde::Serialize;

use crate::{Output, failure, interrupt::Interrupt, model::device, output::show_bar};

#[derive(clap::Args)]
#[command(after_help = "Examples:
  nexus train recipe.json --model models --run runs/first
  nexus train recipe.json --model models --run runs/first --seconds 3600 --device cuda:0

The same command goes on where a run was left. Ctrl-C and --seconds end it after a step, with a
checkpoint.")]
pub struct Args {
    /// What is trained and how
    #[arg(required_unless_present = "recipe_option")]
    recipe: Option<PathBuf>,
    /// What is trained and how, as an option
    #[arg(long = "recipe", value_name = "RECIPE", conflicts_with = "recipe", hide = true)]
    recipe_option: Option<PathBuf>,
    /// Directory with Nexus-GenV2/ and FLUX/FLUX.1-dev/: configuration files, and the weights of the parts that this one needs
    #[arg(short, long, alias = "ckpt_path", value_name = "DIR")]
    model: PathBuf,
    /// Directory of the run: checkpoints, metrics, curves, sample pictures
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// cpu, cuda:0, wgpu, vulkan, metal, rocm: those of this build, which `nexus devices` lists
    #[arg(short, long, default_value = "cpu")]
    device: String,
    /// Copy the finished weights into the model's directory
    #[arg(long)]
    install: bool,
    /// Stop after so many seconds, with a checkpoint
    #[arg(long, value_name = "COUNT")]
    seconds: Option<u64>,
}

/// What a program reads.
#[derive(Serialize)]
struct Report<'a> {
    command: &'static str,
    run: &'a Path,
    /// Whether every step of the recipe is done.
    finished: bool,
    /// Steps done.
    steps: usize,
    /// Directory of the finished weights.
    weights: Option<&'a Path>,
    /// Files that --install wrote.
    installed: Vec<PathBuf>,
    seconds: f64,
}

pub fn run(args: Args, output: &Output) -> Result<ExitCode> {
    run_with(&Trainer::new(), args, output)
}

/// The same with a trainer that knows other sources of samples.
pub fn run_with(trainer: &Trainer, args: Args, output: &Output) -> Result<ExitCode> {
    let path = args.recipe.or(args.recipe_option).context("no recipe")?;
    let recipe = Recipe::read(&path)?;
    let device = device(&args.device)?;
    let interrupt = Interrupt::listen()?;
    let started = Instant::now();
    for path in fill_text_encoders(&recipe, &args.model, &device)? {
        output.say(format!("random weights: {}", path.display()));
    }
    let mut watch = Watch::new(&recipe, &args.run, output);
    let limit = args.seconds;
    let stops = || interrupt.is_asked() || limit.is_some_and(|limit| started.elapsed().as_secs() >= limit);
    let result = trainer.train(&recipe, &args.model, &args.run, &device, &mut |event| {
        watch.hear(event);
        if stops() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    drop(watch);
    let seconds = started.elapsed().as_secs_f64();
    let mut report = Report {
        command: "train",
        run: &args.run,
        finished: false,
        steps: recipe.num_steps(),
        weights: None,
        installed: vec![],
        seconds,
    };
    match result? {
        TrainOutcome::Stopped(state) => {
            output.say(format!("stopped after step {}; run it again to go on", state.steps));
            report.steps = state.steps;
            output.object(&report)?;
            Ok(if interrupt.is_asked() { failure::cancelled() } else { ExitCode::SUCCESS })
        }
        TrainOutcome::Finished(weights) => {
            output.say(format!("weights: {}", weights.display()));
            if args.install {
                report.installed = install(&recipe, &weights, &args.model, output)?;
            }
            (report.finished, report.weights) = (true, Some(weights.as_path()));
            output.object(&report)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// A bar with the losses, or plain lines where there is no terminal.
struct Watch<'a> {
    output: &'a Output,
    run: &'a Path,
    bar: ProgressBar,
    /// Whether lines take the place of the bar.
    plain: bool,
    /// Steps between two of them.
    every: usize,
    seconds: f64,
    samples: usize,
}

impl<'a> Watch<'a> {
    fn new(recipe: &Recipe, run: &'a Path, output: &'a Output) -> Self {
        let bar = if output.is_quiet() { ProgressBar::hidden() } else { ProgressBar::new(recipe.num_steps() as u64) };
        if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} steps, {eta} left  {msg}") {
            bar.set_style(style);
        }
        show_bar(Some(bar.clone()));
        let plain = !std::io::stderr().is_terminal();
        Self { output, run, bar, plain, every: recipe.log_every, seconds: 0.0, samples: 0 }
    }

    fn hear(&mut self, event: TrainEvent<'_>) {
        let Self { output, bar, .. } = self;
        match event {
            TrainEvent::Resumed { checkpoint, steps } => {
                bar.set_position(steps as u64);
                output.note(format!("going on from {}", checkpoint.display()));
            }
            TrainEvent::Step { metrics, steps, samples, seconds } => {
                self.seconds += seconds;
                self.samples += samples;
                let rate = self.samples as f64 / self.seconds;
                let parts: String = metrics.parts.iter().map(|(name, value)| format!(" {name} {value:.4}")).collect();
                let message = format!(
                    "{}: loss {:.4}{parts} lr {:.1e} norm {:.2} {rate:.1} samples/s",
                    metrics.phase, metrics.loss, metrics.learning_rate, metrics.grad_norm
                );
                if self.plain && metrics.step.is_multiple_of(self.every) {
                    let left = (steps - metrics.step) as f64 * samples as f64 / rate;
                    output.note(format!("step {}/{steps} {message} {left:.0} s left", metrics.step));
                }
                bar.set_position(metrics.step as u64);
                bar.set_message(message);
                if metrics.step.is_multiple_of(self.every) {
                    (self.seconds, self.samples) = (self.seconds * 0.5, self.samples / 2);
                }
            }
            TrainEvent::Checkpoint { path } => {
                output.note(format!("checkpoint: {}", path.display()));
                if let Err(error) = curves::draw(self.run) {
                    output.warn(&format!("warning: no curves: {}", failure::text(&error)));
                }
            }
            TrainEvent::Samples { path } => output.note(format!("samples: {}", path.display())),
            _ => {}
        }
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        show_bar(None);
        self.bar.finish_and_clear();
    }
}

/// Puts the weights where the model's directory has them.
fn install(recipe: &Recipe, weights: &Path, model: &Path, output: &Output) -> Result<Vec<PathBuf>> {
    let files = nexus::ModelFiles::find(model)?;
    let dir = if recipe.part() == TrainedPart::Autoencoder { &files.flux } else { &files.nexus };
    let mut installed = vec![];
    for entry in fs::read_dir(weights)? {
        let from = entry?.path();
        let to = dir.join(from.file_name().context("a file of weights has a name")?);
        let beside = to.with_extension("unfinished");
        fs::copy(&from, &beside).and_then(|_| fs::rename(&beside, &to)).with_context(|| to.display().to_string())?;
        output.say(format!("installed: {}", to.display()));
        installed.push(to);
    }
    Ok(installed)
}
