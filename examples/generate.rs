//! How do I draw a picture? `cargo run --release --example generate -- --prompt "a red circle to the left of a blue square"`
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "examples talk to a person")]

mod cli;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use nexus::Language;

/// Draws a picture of what the prompt describes.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    #[command(flatten)]
    draw: cli::DrawArgs,
    /// What to draw
    #[arg(long, default_value = "a red circle to the left of a blue square")]
    prompt: String,
    /// Language of the words around the prompt: en or zh; without it, the prompt's own
    #[arg(long, value_parser = ["en", "zh"])]
    language: Option<String>,
    /// Where the picture goes: PNG or JPEG
    #[arg(long = "result_path", default_value = "generation.png")]
    result_path: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let nexus = args.model.load()?;
    let mut options = draw_options!(nexus.default_options().generate.clone(), args.draw);
    options.language = args.language.map(|code| if code == "zh" { Language::Chinese } else { Language::English });
    let picture = nexus.generate(&args.prompt, &options, cli::progress())?;
    if let Some(reply) = &picture.reply {
        println!("{reply}");
    }
    picture.save(&args.result_path)?;
    println!("picture: {}", args.result_path.display());
    Ok(())
}
