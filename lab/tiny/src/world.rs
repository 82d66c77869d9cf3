//! What the world looks like: samples -> texts, a sheet of pictures, a file of conversations, or how well they are read.

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use lab_world::{Emphasis, SIDE_PX, Split, Task, World, judge};
use nexus::{Image, Message, Role};
use nexus_data::MessagesWriter;

/// Shows samples of the world: their texts, a sheet of their pictures, or a file of conversations to train on.
#[derive(clap::Args)]
pub struct Args {
    /// What the samples ask for
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Asked::Generation])]
    task: Vec<Asked>,
    /// Samples of each task
    #[arg(long, default_value_t = 24)]
    count: u64,
    /// Seed of the world
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Scenes with compositions that training never sees
    #[arg(long)]
    held_out: bool,
    /// Samples full of what is hard and rare otherwise
    #[arg(long, value_enum)]
    emphasis: Option<Hard>,
    /// Shades of the colours in all pictures but those of edits
    #[arg(long)]
    shades: bool,
    /// Print the texts, one to a line, for `lab/tiny/make_tokenizer.py`
    #[arg(long)]
    texts: bool,
    /// Read every picture back and print the share that is read right
    #[arg(long)]
    read: bool,
    /// Write a sheet of the last pictures
    #[arg(long)]
    sheet: Option<PathBuf>,
    /// Write the conversations and their pictures in the messages format
    #[arg(long)]
    messages: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Asked {
    Understanding,
    Generation,
    Editing,
    MultiTurn,
    Reconstruction,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Hard {
    /// Objects that share their colour or their shape
    Lookalikes,
    /// Objects on top of others
    Stacked,
}

/// Shows the samples.
pub fn run(args: &Args) -> Result<()> {
    let emphasis = args.emphasis.map(|hard| match hard {
        Hard::Lookalikes => Emphasis::Lookalikes,
        Hard::Stacked => Emphasis::Stacked,
    });
    let world = World::new(args.seed).with_emphasis(emphasis).with_shades(args.shades);
    let split = if args.held_out { Split::HeldOut } else { Split::Train };
    let mut writer = args.messages.as_ref().map(MessagesWriter::create).transpose()?;
    let mut pictures = vec![];
    let (mut right, mut read) = (0, 0);
    for asked in &args.task {
        let task = match asked {
            Asked::Understanding => Task::Understanding,
            Asked::Generation => Task::Generation,
            Asked::Editing => Task::Editing,
            Asked::MultiTurn => Task::MultiTurn,
            Asked::Reconstruction => Task::Reconstruction,
        };
        for index in 0..args.count {
            let sample = world.sample(task, split, index);
            if let Some(writer) = &mut writer {
                writer.push(&sample.messages)?;
            }
            if args.read {
                for (picture, truth) in sample.messages.iter().flat_map(Message::images).zip(&sample.scenes) {
                    let verdict = judge(picture, truth);
                    read += 1;
                    right += u64::from(verdict.correct);
                    if !verdict.correct {
                        println!("{}: {verdict}", sample.id);
                    }
                }
            } else if args.texts {
                for text in sample.messages.iter().flat_map(Message::texts) {
                    println!("{text}");
                }
            } else {
                let answer = sample.messages.iter().rev().find(|message| message.role == Role::Assistant);
                let answer: String = answer.map(|message| message.texts().collect()).unwrap_or_default();
                println!("{:?}: {} -> {answer}", sample.kind, sample.prompt);
            }
            pictures.extend(sample.messages.iter().rev().flat_map(Message::images).next().cloned());
        }
    }
    if let Some(writer) = writer {
        writer.finish()?;
    }
    if args.read {
        println!("{right} of {read} pictures are read right");
    }
    match &args.sheet {
        Some(path) => Ok(sheet(&pictures)?.save(path)?),
        None => Ok(()),
    }
}

fn sheet(pictures: &[Image]) -> Result<Image> {
    const COLUMNS: usize = 8;
    let step = SIDE_PX + 4;
    let (width, height) = (COLUMNS * step, pictures.len().div_ceil(COLUMNS).max(1) * step);
    let mut rgb = vec![255; 3 * width * height];
    for (index, picture) in pictures.iter().enumerate() {
        let (left, top) = (index % COLUMNS * step, index / COLUMNS * step);
        for (y, line) in picture.rgb().chunks_exact(3 * SIDE_PX).enumerate() {
            rgb[3 * ((top + y) * width + left)..][..line.len()].copy_from_slice(line);
        }
    }
    Ok(Image::from_rgb8(width, height, rgb)?)
}
