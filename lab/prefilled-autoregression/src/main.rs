//! What do prefilled image positions change? `cargo run --release -p lab-prefilled-autoregression -- --prefilled runs/prefilled/export --fed_back runs/fed_back/export`
//!
//! Two models of one recipe draw the same held-out prompts: one predicts all 81 embeddings from prefill embeddings in one
//! pass, the other predicts each from its own prediction before it. Their errors are measured against the embeddings of
//! the true picture, and their pictures are judged.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to a person")]

mod errors;
mod plots;

use std::{
    fmt::Write,
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use clap::Parser;
use errors::{Errors, Spread};
use indicatif::{ProgressBar, ProgressStyle};
use lab_tiny::{
    model::{ModelArgs, write_whole},
    score::Score,
};
use lab_world::{Sample, Split, Task, World, judge};
use nexus::{
    Device, DrawWith, FloatDType, GridThw, ImageEmbeds, ImagePass, Nexus, PositionsAfterImage,
    ar::{ArConfig, ArModel, ArObjective, GenerateOptions, NUM_IMAGE_TOKENS, Prompt, TrainingBatch, TrainingSample},
    checkpoint::{Checkpoint, LoadOptions},
    data::{Message, ProcessOptions},
    vision_encoder::VisionEncoder,
};
use serde::Serialize;

/// Keeps freed memory for the next tensor; the system's allocator gives every large one back at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Compares prefilled with fed-back prediction of image embeddings.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Language model trained with prefill embeddings: file or directory
    #[arg(long)]
    prefilled: PathBuf,
    /// Language model of the same recipe, trained to predict each embedding from the true one before it
    #[arg(long = "fed_back")]
    fed_back: PathBuf,
    /// Held-out prompts
    #[arg(long, default_value_t = 500)]
    count: u64,
    /// Seed of the scenes; training uses others
    #[arg(long, default_value_t = 900)]
    seed: u64,
    /// Where report and plots go
    #[arg(long, default_value = "outputs/prefilled_autoregression")]
    out: PathBuf,
}

/// One way to predict the embeddings of a picture.
struct Way {
    name: &'static str,
    pass: ImagePass,
    model: ArModel,
    errors: Errors,
    score: Score,
    seconds: Vec<f64>,
}

impl Way {
    fn new(name: &'static str, pass: ImagePass, model: ArModel) -> Self {
        Self { name, pass, model, errors: Errors::new(), score: Score::default(), seconds: vec![] }
    }

    /// The embeddings that follow a prompt which ends with the token that begins an image.
    fn predict(&mut self, prompt: &[u32]) -> Result<ImageEmbeds> {
        let options = GenerateOptions {
            max_new_tokens: NUM_IMAGE_TOKENS + 1,
            image_pass: self.pass,
            positions_after_image: PositionsAfterImage::Trained,
            ..GenerateOptions::default()
        };
        let prompt = Prompt { token_ids: prompt, images: &[] };
        let start = Instant::now();
        let generation = nexus::ar::generate(&self.model, prompt, &options, &mut |_| ControlFlow::Continue(()))?;
        let embeds = generation.images.into_iter().next().context("the prompt ends with the start of an image")?;
        // Reading a value waits for a device that works in the background.
        let _ = embeds.values.clone().slice([0..1, 0..1, 0..1]).into_data();
        self.seconds.push(start.elapsed().as_secs_f64());
        Ok(embeds)
    }

    fn median_ms(&self) -> f64 {
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        1e3 * seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let nexus = args.model.load()?;
    let device = args.model.device()?;
    let config = ArConfig::read(nexus.files().config())?;
    let encoder = nexus.files().load_vision_encoder(&device, &LoadOptions::default())?;
    let load = |path: &Path| -> Result<ArModel> {
        Ok(ArModel::load(&Checkpoint::open(path)?, &config, &device, &LoadOptions::default())?)
    };
    let mut prefilled = Way::new("prefilled", ImagePass::Parallel, load(&args.prefilled)?);
    let mut fed_back = Way::new("fed back", ImagePass::Autoregressive, load(&args.fed_back)?);
    let (mut forced, mut spread) = (Errors::new(), Spread::new());
    let draw = nexus.default_options().generate.draw.clone();
    let world = World::new(args.seed);
    let bar = ProgressBar::new(args.count);
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len}, {eta} left  {msg}") {
        bar.set_style(style);
    }
    for index in 0..args.count {
        let sample = world.sample(Task::Generation, Split::HeldOut, index);
        let Conversation { prompt, training } = conversation(&nexus, &encoder, &device, &sample)?;
        let truth = training.targets[0].clone();
        spread.add(&truth)?;
        for way in [&mut prefilled, &mut fed_back] {
            let embeds = way.predict(&prompt)?;
            way.errors.add(&embeds, &truth)?;
            let picture = nexus.draw(&embeds, DrawWith::GenerationDecoder, &draw, ())?;
            way.score.add(&[format!("{:?}", sample.kind)], judge(&picture.image, &sample.scenes[0]).correct);
        }
        let objective = ArObjective { prefill: false, ..ArObjective::default() };
        let batch = TrainingBatch::new(vec![training], &config)?;
        let predicted = objective.predict_answers(&fed_back.model, &batch, FloatDType::F32)?;
        forced.add(&ImageEmbeds::new(predicted[0].clone(), truth.grid)?, &truth)?;
        bar.inc(1);
        bar.set_message(format!(
            "prefilled {:.3}, fed back {:.3}",
            prefilled.score.overall(),
            fed_back.score.overall()
        ));
    }
    bar.finish();
    report(&args, &[prefilled, fed_back], &forced, &spread)
}

/// What a sample asks, as the language models read it.
struct Conversation {
    /// Up to the token that begins the picture.
    prompt: Vec<u32>,
    /// With the embeddings of the true picture.
    training: TrainingSample,
}

fn conversation(nexus: &Nexus, encoder: &VisionEncoder, device: &Device, sample: &Sample) -> Result<Conversation> {
    let processor = nexus.processor();
    let input = processor.training_input(&sample.messages, &ProcessOptions::default())?;
    let begins = processor.tokenizer().special_tokens().boi;
    let start = input.token_ids.iter().position(|&id| id == begins).context("an answer with a picture")?;
    let targets = sample.messages.iter().flat_map(Message::images).map(|image| {
        let patches = processor.image_processor().target_patches(image)?;
        let grid = patches.grid;
        let embeds = encoder.encode(patches.into_tensor(device), &[grid])?;
        embeds.into_iter().next().context("one picture has one embedding")
    });
    let targets = targets.collect::<Result<Vec<_>>>()?;
    let prompt = input.token_ids[..=start].to_vec();
    let training = TrainingSample { token_ids: input.token_ids, labels: input.labels, inputs: vec![], targets };
    Ok(Conversation { prompt, training })
}

#[derive(Serialize)]
struct Report<'a> {
    command: String,
    ways: Vec<WayReport<'a>>,
    /// Of the fed-back model when the true embeddings are fed: what it would be without accumulation.
    teacher_forced: &'a Errors,
    /// Mean square distance of the true embeddings from their mean, by position.
    spread: Vec<f64>,
}

#[derive(Serialize)]
struct WayReport<'a> {
    name: &'a str,
    errors: &'a Errors,
    score: &'a Score,
    median_ms: f64,
}

fn report(args: &Args, ways: &[Way; 2], forced: &Errors, spread: &Spread) -> Result<()> {
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
    let command = format!("cargo run --release -p lab-prefilled-autoregression -- {command}");
    let mut table = format!("`{command}`\n\nHeld-out scenes, seed {}.\n\n", args.seed);
    table.push_str("| embeddings | mse | 1 - cosine | first 9 | last 9 | pictures right | +- | ms for 81 |\n");
    table.push_str("|---|---|---|---|---|---|---|---|\n");
    let row = |name: &str, errors: &Errors, rest: &str| {
        let (mse, cosine) = (errors.mse(), errors.cosine());
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let (first, last) = (mean(&mse[..9]), mean(&mse[NUM_IMAGE_TOKENS - 9..]));
        format!("| {name} | {:.4} | {:.4} | {first:.4} | {last:.4} | {rest} |", mean(&mse), mean(&cosine))
    };
    for way in ways {
        let Way { name, errors, score, .. } = way;
        let (share, of, margin, time) = (score.overall(), score.count(), score.margin(), way.median_ms());
        let rest = format!("{share:.3} of {of} | {margin:.3} | {time:.1}");
        writeln!(table, "{}", row(name, errors, &rest))?;
    }
    writeln!(table, "{}", row("true ones fed", forced, "- | - | -"))?;
    let [prefilled, fed_back] = ways;
    plots::curves(
        &args.out.join("error_by_position.svg"),
        &[("prefilled", &prefilled.errors), ("fed back", &fed_back.errors), ("true ones fed", forced)],
    )?;
    let relative: Vec<f64> =
        prefilled.errors.mse().iter().zip(spread.by_position()).map(|(error, spread)| error / spread).collect();
    let side = GridThw::GENERATED.merged_w();
    plots::maps(
        &args.out.join("error_map.svg"),
        side,
        &[("mean squared error", prefilled.errors.mse()), ("share of the spread", relative)],
    )?;
    let ways = ways.iter().map(|way| WayReport {
        name: way.name,
        errors: &way.errors,
        score: &way.score,
        median_ms: way.median_ms(),
    });
    let report = Report { command, ways: ways.collect(), teacher_forced: forced, spread: spread.by_position() };
    write_whole(&args.out.join("report.json"), &serde_json::to_vec_pretty(&report)?)?;
    write_whole(&args.out.join("report.md"), table.as_bytes())?;
    println!("{table}\nreport: {}", args.out.join("report.md").display());
    Ok(())
}
