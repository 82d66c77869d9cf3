//! How do I draw a picture? `cargo run --release --example generate -- --prompt "A cute cat"`
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "examples talk to a person")]

mod cli;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use nexus::{GenerateOptions, Language, Noise};

/// Draws a picture of what the prompt describes.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    #[command(flatten)]
    draw: cli::DrawArgs,
    /// What to draw
    #[arg(long, default_value = "A cute cat")]
    prompt: String,
    /// Language of the words around the prompt: en or zh; without it, the prompt's own
    #[arg(long, value_parser = ["en", "zh"])]
    language: Option<String>,
    /// Classifier-free guidance; 1 is off and twice as fast
    #[arg(long = "cfg_scale", default_value_t = 3.0)]
    cfg_scale: f64,
    /// Seed of the noise that the picture starts from
    #[arg(long, default_value_t = 52)]
    seed: u64,
    /// Where the picture goes: PNG or JPEG
    #[arg(long = "result_path", default_value = "generation.png")]
    result_path: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let options = GenerateOptions {
        width: args.draw.width,
        height: args.draw.height,
        steps: args.draw.num_inference_steps,
        cfg_scale: args.cfg_scale,
        embedded_guidance: args.draw.embedded_guidance,
        negative_prompt: args.draw.negative_prompt,
        noise: Noise::Seed(args.seed),
        tiled: args.draw.tiled,
        language: args.language.map(|language| if language == "zh" { Language::Chinese } else { Language::English }),
        ..GenerateOptions::default()
    };
    let mut nexus = args.model.load()?;
    let picture = nexus.with_progress(cli::progress()).generate(&args.prompt, &options)?;
    if let Some(reply) = &picture.reply {
        println!("{reply}");
    }
    picture.save(&args.result_path)?;
    println!("picture: {}", args.result_path.display());
    Ok(())
}
