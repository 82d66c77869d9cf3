//! `nexus understand`: pictures and a question -> an answer.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use nexus::Image;
use serde::Serialize;

use crate::{
    Output,
    failure::usage,
    interrupt::Interrupt,
    model::{ModelArgs, Place},
    paths::pictures_and_text,
    watch::{Seconds, Watch},
};

/// What is asked of pictures unless a question is given.
const DESCRIBE: &str = "Please give a brief description of the image.";
/// The same as nexus-tiny was taught it.
const DESCRIBE_TINY: &str = "Describe the image.";

#[derive(clap::Args)]
#[command(
    override_usage = "nexus understand [OPTIONS] [PICTURE]... [QUESTION]",
    after_help = "Examples:
  nexus understand sample.png \"Where is the circle?\"
  nexus understand cat.png --model models
  nexus understand a.png b.png \"Which of them is larger?\" --model models
  nexus understand \"Is <image> the same as <image>?\" -i a.png -i b.png --json

The last word is the question unless it is a file. Without a picture, nexus-tiny looks at its own
assets/nexus-tiny/sample.png."
)]
pub struct Args {
    /// Pictures to ask about, then the question; `<image>` marks in it say where the pictures go
    #[arg(value_names = ["PICTURE", "QUESTION"])]
    words: Vec<String>,
    /// Picture to ask about, as an option; may be given several times
    #[arg(short, long, alias = "input_image", value_name = "PICTURE")]
    image: Vec<PathBuf>,
    /// Question or instruction, as an option
    #[arg(long, alias = "question")]
    instruction: Option<String>,
    /// Largest area of a picture as the language model sees it, in pixels
    #[arg(long, value_name = "COUNT")]
    max_pixels: Option<usize>,
    #[command(flatten)]
    model: ModelArgs,
}

/// What a program reads.
#[derive(Serialize)]
struct Report<'a> {
    command: &'static str,
    reply: &'a str,
    prompt: &'a str,
    images: &'a [PathBuf],
    prompt_tokens: usize,
    reply_tokens: usize,
    model: &'a Path,
    device: &'a str,
    seconds: Seconds,
}

pub fn run(args: Args, output: &Output) -> Result<ExitCode> {
    let place = Place::of(args.model.model.as_deref(), output)?;
    let (mut paths, question) = pictures_and_text(args.words, args.instruction)?;
    paths.extend(args.image);
    if paths.is_empty() {
        paths.extend(place.sample_image());
    }
    let question = match question {
        Some(question) => question,
        None if paths.is_empty() => {
            return Err(usage("nothing to answer: `nexus understand cat.png \"What is this?\"`"));
        }
        None => if place.is_tiny { DESCRIBE_TINY } else { DESCRIBE }.to_string(),
    };
    let images = paths.iter().map(Image::open).collect::<Result<Vec<_>, _>>()?;
    let interrupt = Interrupt::listen()?;
    let mut watch = Watch::new(output, &interrupt);
    let nexus = args.model.load(&place, &mut watch)?;
    let mut options = nexus.default_options().text.clone();
    options.max_pixels = args.max_pixels.unwrap_or(options.max_pixels);
    let reply = nexus.understand(&images, &question, &options, watch.observer())?;
    let seconds = watch.rest();
    output.say(&reply);
    let reply_tokens = reply.generation.new_token_ids().len();
    output.object(&Report {
        command: "understand",
        reply: &reply.text,
        prompt: &question,
        images: &paths,
        prompt_tokens: reply.generation.token_ids.len() - reply_tokens,
        reply_tokens,
        model: &place.dir,
        device: &args.model.device,
        seconds,
    })?;
    Ok(ExitCode::SUCCESS)
}
