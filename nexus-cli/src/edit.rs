//! `nexus edit`: a picture and an instruction -> a changed picture.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use nexus::{EditWith, Image};

use crate::{
    Output,
    draw::{DrawArgs, PictureReport},
    failure::usage,
    interrupt::Interrupt,
    model::{ModelArgs, Place},
    paths::{PictureArgs, pictures_and_text},
    watch::Watch,
};

/// What nexus-tiny changes in its sample picture unless it is told otherwise.
const SAMPLE_INSTRUCTION: &str = "Colour the purple cross yellow.";

#[derive(clap::Args)]
#[command(
    override_usage = "nexus edit [OPTIONS] [PICTURE] [INSTRUCTION]",
    after_help = "Examples:
  nexus edit sample.png \"Colour the purple cross yellow.\"
  nexus edit cat.png \"Add a pair of sunglasses\" -o cool.png --model models --seed 7
  nexus edit --input-image cat.png --instruction \"Make it night\" --json

Without -o, the picture goes to edit.png, edit-2.png, ...: the first name that is not taken.
Without a picture, nexus-tiny changes its own assets/nexus-tiny/sample.png."
)]
pub struct Args {
    /// Picture to change, then what to change
    #[arg(value_names = ["PICTURE", "INSTRUCTION"], num_args = 0..=2)]
    words: Vec<String>,
    /// Picture to change, as an option
    #[arg(short, long, alias = "input_image", value_name = "PICTURE")]
    image: Option<PathBuf>,
    /// What to change, as an option
    #[arg(long)]
    instruction: Option<String>,
    /// Draw by the generation decoder, which does not see the source picture
    #[arg(long)]
    use_generation_decoder: bool,
    /// Largest area of the picture as the language model sees it, in pixels
    #[arg(long, value_name = "COUNT")]
    max_pixels: Option<usize>,
    #[command(flatten)]
    picture: PictureArgs,
    #[command(flatten)]
    draw: DrawArgs,
    #[command(flatten)]
    model: ModelArgs,
}

pub fn run(args: Args, output: &Output) -> Result<ExitCode> {
    let place = Place::of(args.model.model.as_deref(), output)?;
    let (mut images, instruction) = pictures_and_text(args.words, args.instruction)?;
    images.extend(args.image);
    let (source, instruction) = match (&images[..], instruction, place.sample_image()) {
        ([source], Some(instruction), _) => (source.clone(), instruction),
        ([], Some(instruction), Some(sample)) => (sample, instruction),
        ([], None, Some(sample)) => (sample, SAMPLE_INSTRUCTION.to_string()),
        ([], ..) => return Err(usage("no picture to change: `nexus edit cat.png \"Add a hat\"`")),
        ([_], None, _) => return Err(usage("nothing to change: say what, as in `nexus edit cat.png \"Add a hat\"`")),
        (..) => return Err(usage(format!("{} pictures to change: give one", images.len()))),
    };
    let path = args.picture.resolve("edit.png")?;
    let image = Image::open(&source)?;
    let interrupt = Interrupt::listen()?;
    let mut watch = Watch::new(output, &interrupt);
    let nexus = args.model.load(&place, &mut watch)?;
    let mut options = nexus.default_options().edit.clone();
    args.draw.apply(&mut options.draw);
    if args.use_generation_decoder {
        options.decoder = EditWith::GenerationDecoder;
    }
    options.text.max_pixels = args.max_pixels.unwrap_or(options.text.max_pixels);
    let picture = nexus.edit(&image, &instruction, &options, watch.observer())?;
    picture.save(&path)?;
    let report = PictureReport {
        command: "edit",
        path: &path,
        picture: &picture,
        draw: &options.draw,
        prompt: &instruction,
        images: vec![&source],
        model: &place.dir,
        device: &args.model.device,
        seconds: watch.rest(),
    };
    report.show(output)?;
    Ok(ExitCode::SUCCESS)
}
