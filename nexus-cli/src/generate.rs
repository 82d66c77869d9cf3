//! `nexus generate`: a text -> a picture of what it describes.

use std::process::ExitCode;

use anyhow::Result;
use nexus::Language;

use crate::{
    Output,
    draw::{DrawArgs, PictureReport},
    failure::usage,
    interrupt::Interrupt,
    model::{ModelArgs, Place},
    paths::PictureArgs,
    watch::Watch,
};

/// What nexus-tiny draws unless it is told otherwise.
const SAMPLE_PROMPT: &str = "a red circle to the left of a blue square";

#[derive(clap::Args)]
#[command(after_help = "Examples:
  nexus generate \"a red circle to the left of a blue square\"
  nexus generate \"a red circle\" -o circle.png --steps 20 --seed 7
  nexus generate \"A cute cat\" --model models --device cuda:0 --width 1024 --height 1024
  nexus generate \"a green cross\" --seed random --json

Without -o, the picture goes to generation.png, generation-2.png, ...: the first name that is not taken.
The options of the original's scripts are taken too: --prompt, --num_inference_steps, --result_path, --ckpt_path, ...")]
pub struct Args {
    /// What to draw
    prompt: Option<String>,
    /// What to draw, as an option
    #[arg(long = "prompt", value_name = "PROMPT", conflicts_with = "prompt", hide = true)]
    prompt_option: Option<String>,
    /// Language of the words around the prompt [default: the prompt's own]
    #[arg(long, value_parser = ["en", "zh"])]
    language: Option<String>,
    #[command(flatten)]
    picture: PictureArgs,
    #[command(flatten)]
    draw: DrawArgs,
    #[command(flatten)]
    model: ModelArgs,
}

pub fn run(args: Args, output: &Output) -> Result<ExitCode> {
    let place = Place::of(args.model.model.as_deref(), output)?;
    let prompt = match args.prompt.or(args.prompt_option) {
        Some(prompt) => prompt,
        None if place.is_tiny => SAMPLE_PROMPT.to_string(),
        None => return Err(usage("nothing to draw: say what, as in `nexus generate \"a red circle\"`")),
    };
    let path = args.picture.resolve("generation.png")?;
    let interrupt = Interrupt::listen()?;
    let mut watch = Watch::new(output, &interrupt);
    let nexus = args.model.load(&place, &mut watch)?;
    let mut options = nexus.default_options().generate.clone();
    args.draw.apply(&mut options.draw);
    options.language = args.language.map(|code| if code == "zh" { Language::Chinese } else { Language::English });
    let picture = nexus.generate(&prompt, &options, watch.observer())?;
    picture.save(&path)?;
    let report = PictureReport {
        command: "generate",
        path: &path,
        picture: &picture,
        draw: &options.draw,
        prompt: &prompt,
        images: vec![],
        model: &place.dir,
        device: &args.model.device,
        seconds: watch.rest(),
    };
    report.show(output)?;
    Ok(ExitCode::SUCCESS)
}
