//! How do I hold a conversation? `cargo run --release --example chat`, then type; `/image cat.png` sends a picture.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "examples talk to a person")]

mod cli;

use std::{
    io::{BufRead, Write},
    path::PathBuf,
};

use anyhow::Result;
use clap::Parser;
use nexus::{AnswerPart, Image, Message};

/// Talks with the model: text and pictures in, text and pictures out.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    #[command(flatten)]
    draw: cli::DrawArgs,
    /// Directory for drawn pictures
    #[arg(long = "result_path", default_value = ".")]
    result_path: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let nexus = args.model.load()?;
    let mut options = nexus.default_options().clone();
    options.generate = draw_options!(options.generate, args.draw.clone());
    options.edit = draw_options!(options.edit, args.draw);
    let mut conversation = nexus.conversation_with(options);
    let mut pictures = 0;
    let mut images = vec![];
    prompt()?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if let Some(path) = line.strip_prefix("/image ") {
            match Image::open(path.trim()) {
                Ok(image) => images.push(image),
                Err(error) => println!("{error}"),
            }
        } else if !line.trim().is_empty() {
            let message = images.drain(..).fold(Message::user(), Message::with_image).with_text(line);
            for part in conversation.send(message, cli::progress())?.parts {
                match part {
                    AnswerPart::Text(text) => println!("{text}"),
                    AnswerPart::Image(picture) => {
                        pictures += 1;
                        let path = args.result_path.join(format!("chat_{pictures}.png"));
                        picture.save(&path)?;
                        println!("picture: {}", path.display());
                    }
                }
            }
        }
        prompt()?;
    }
    Ok(())
}

fn prompt() -> Result<()> {
    print!("> ");
    Ok(std::io::stdout().flush()?)
}
