//! How do I change a picture? `cargo run --release --example edit -- --input_image cat.png --instruction "Add a hat"`
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "examples talk to a person")]

mod cli;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use nexus::{EditWith, Image};

/// Changes a picture as the instruction says.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    #[command(flatten)]
    draw: cli::DrawArgs,
    /// Picture to change
    #[arg(long = "input_image", default_value = cli::SAMPLE_IMAGE)]
    input_image: PathBuf,
    /// What to change
    #[arg(long, default_value = "Colour the purple cross yellow.")]
    instruction: String,
    /// Draw by the generation decoder, which does not see the source picture
    #[arg(long = "use_generation_decoder")]
    use_generation_decoder: bool,
    /// Largest area of the picture as the language model sees it, in pixels
    #[arg(long = "max_pixels")]
    max_pixels: Option<usize>,
    /// Where the picture goes: PNG or JPEG
    #[arg(long = "result_path", default_value = "edit_result.png")]
    result_path: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let decoder = if args.use_generation_decoder { EditWith::GenerationDecoder } else { EditWith::EditingDecoder };
    let image = Image::open(&args.input_image)?;
    let nexus = args.model.load()?;
    let mut options = draw_options!(nexus.default_options().edit.clone(), args.draw);
    options.decoder = decoder;
    options.text.max_pixels = args.max_pixels.unwrap_or(options.text.max_pixels);
    let picture = nexus.edit(&image, &args.instruction, &options, cli::progress())?;
    if let Some(reply) = &picture.reply {
        println!("{reply}");
    }
    picture.save(&args.result_path)?;
    println!("picture: {}", args.result_path.display());
    Ok(())
}
