//! How do I ask about pictures? `cargo run --release --example understand -- --input_image cat.png --instruction "What is this?"`
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "examples talk to a person")]

mod cli;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use nexus::Image;

/// Answers a question about one or several pictures.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// Picture to ask about; may be given several times
    #[arg(long = "input_image", default_value = cli::SAMPLE_IMAGE)]
    input_image: Vec<PathBuf>,
    /// Question or instruction; `<image>` marks say where the pictures go
    #[arg(long, default_value = "Please give a brief description of the image.")]
    instruction: String,
    /// Largest area of a picture as the language model sees it, in pixels
    #[arg(long = "max_pixels")]
    max_pixels: Option<usize>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let images = args.input_image.iter().map(Image::open).collect::<Result<Vec<_>, _>>()?;
    let nexus = args.model.load()?;
    let mut options = nexus.default_options().text.clone();
    options.max_pixels = args.max_pixels.unwrap_or(options.max_pixels);
    let reply = nexus.understand(&images, &args.instruction, &options, cli::progress())?;
    println!("{reply}");
    Ok(())
}
