//! How do I train a model? `cargo run --release -p nexus-train --example train -- --recipe recipes/nexus-tiny/autoencoder.json --model tiny --run runs/autoencoder`
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "examples talk to a person")]

mod curves;

use std::{
    fs,
    io::IsTerminal,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use nexus_train::{Recipe, TrainEvent, TrainOutcome, TrainedPart, fill_text_encoders, train};

/// Keeps freed memory for the next tensor; the system's allocator gives every large one back at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Trains one part of a model; started again, it goes on where it was left.
#[derive(Parser)]
struct Args {
    /// What is trained and how
    #[arg(long)]
    recipe: PathBuf,
    /// Directory with Nexus-GenV2/ and FLUX/FLUX.1-dev/: configuration files, and the weights of the parts that this
    /// one needs
    #[arg(long)]
    model: PathBuf,
    /// Directory of the run: checkpoints, metrics, curves, sample pictures
    #[arg(long)]
    run: PathBuf,
    /// Device: cpu, cuda:0, wgpu, vulkan, metal, rocm (those compiled in)
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Copy the finished weights into the model's directory
    #[arg(long)]
    install: bool,
    /// Stop after so many seconds, with a checkpoint
    #[arg(long)]
    seconds: Option<u64>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    env_logger::builder().filter_level(log::LevelFilter::Warn).parse_default_env().init();
    let recipe = Recipe::read(&args.recipe)?;
    let device = nexus::device(&args.device)?;
    for path in fill_text_encoders(&recipe, &args.model, &device)? {
        println!("random weights: {}", path.display());
    }
    let outcome = train(&recipe, &args.model, &args.run, &device, &mut observer(&recipe, &args.run, args.seconds))?;
    match outcome {
        TrainOutcome::Stopped(state) => println!("stopped after step {}; run it again to go on", state.steps),
        TrainOutcome::Finished(weights) => {
            println!("weights: {}", weights.display());
            if args.install {
                install(&recipe, &weights, &args.model)?;
            }
        }
    }
    Ok(())
}

/// A bar with the losses, or plain lines where there is no terminal.
fn observer(recipe: &Recipe, run: &Path, seconds: Option<u64>) -> impl FnMut(TrainEvent<'_>) -> ControlFlow<()> {
    let bar = ProgressBar::new(recipe.num_steps() as u64);
    let template = "{wide_bar} {pos}/{len} steps, {eta} left  {msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    let (plain, every) = (!std::io::stderr().is_terminal(), recipe.log_every);
    let started = std::time::Instant::now();
    let mut sum_seconds = 0.0;
    let mut sum_samples = 0;
    move |event| {
        // A bar that is hidden prints nothing.
        let say = |line: String| if plain { eprintln!("{line}") } else { bar.println(line) };
        match event {
            TrainEvent::Resumed { checkpoint, steps } => {
                bar.set_position(steps as u64);
                eprintln!("going on from {}", checkpoint.display());
            }
            TrainEvent::Step { metrics, steps, samples, seconds } => {
                sum_seconds += seconds;
                sum_samples += samples;
                let rate = f64::from(sum_samples as u32) / sum_seconds;
                let parts: String = metrics.parts.iter().map(|(name, value)| format!(" {name} {value:.4}")).collect();
                let message = format!(
                    "{}: loss {:.4}{parts} lr {:.1e} norm {:.2} {rate:.1} samples/s",
                    metrics.stage, metrics.loss, metrics.learning_rate, metrics.grad_norm
                );
                if plain && metrics.step.is_multiple_of(every) {
                    let left = (steps - metrics.step) as f64 * sum_seconds / (sum_samples as f64 / samples as f64);
                    eprintln!("step {}/{steps} {message} {:.0} s left", metrics.step, left);
                }
                bar.set_position(metrics.step as u64);
                bar.set_message(message);
                if metrics.step.is_multiple_of(every) {
                    (sum_seconds, sum_samples) = (sum_seconds * 0.5, sum_samples / 2);
                }
            }
            TrainEvent::Checkpoint { path } => {
                say(format!("checkpoint: {}", path.display()));
                if let Err(error) = curves::draw(run) {
                    say(format!("no curves: {error:#}"));
                }
            }
            TrainEvent::Samples { path } => say(format!("samples: {}", path.display())),
            _ => {}
        }
        match seconds.is_some_and(|limit| started.elapsed().as_secs() >= limit) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// Puts the weights where the model's directory has them.
fn install(recipe: &Recipe, weights: &Path, model: &Path) -> Result<()> {
    let files = nexus::ModelFiles::find(model)?;
    let dir = if recipe.part == TrainedPart::Autoencoder { &files.flux } else { &files.nexus };
    for entry in fs::read_dir(weights)? {
        let from = entry?.path();
        let to = dir.join(from.file_name().context("a file of weights has a name")?);
        let beside = to.with_extension("unfinished");
        fs::copy(&from, &beside).and_then(|_| fs::rename(&beside, &to)).with_context(|| to.display().to_string())?;
        println!("installed: {}", to.display());
    }
    Ok(())
}
