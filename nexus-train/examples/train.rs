//! How do I train a part on my own pictures? `cargo run --release -p nexus-train --example train`
#![allow(clippy::print_stdout, reason = "an example talks to a person")]

use std::{error::Error, fs};

use nexus::{Image, Message, data::MessagesFile};
use nexus_train::{Recipe, Trainer};
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "assets/nexus-tiny".to_string());

    // Samples are conversations, as the model is to hold them: here a description and the picture that it asks for.
    fs::create_dir_all("runs")?;
    let picture = Image::open("assets/nexus-tiny/sample.png")?;
    let prompt = "Generate an image according to the following description: a purple cross and a blue circle";
    let answer = Message::assistant().with_text("Here is the image: ").with_image(picture);
    MessagesFile::write("runs/example.jsonl", &[vec![Message::text(prompt), answer]])?;

    // What is trained and how, most often a file (`Recipe::read`).
    let recipe: Recipe = serde_json::from_value(json!({
        "command": "cargo run --release -p nexus-train --example train",
        "time": "seconds",
        "expected": "weights in runs/example/export",
        "seed": 1,
        "checkpoint_every": 10,
        "train": {
            "part": "generation_decoder",
            "initial": "checkpoint",
            "phases": [{
                "name": "example",
                "steps": 10,
                "batch_size": 1,
                "learning_rate": 1e-4,
                "data": [{"source": {"messages": {"path": "runs/example.jsonl"}}, "weight": 1.0}],
                "settings": {"picture_px": 144, "embedded_guidance": 3.5},
            }],
        },
    }))?;

    // A run that was stopped, or killed, goes on where it was; one that is done takes no step.
    let mut run = Trainer::new().resume(&recipe, &model, "runs/example", &nexus::device("cpu")?)?;
    while let Some(step) = run.step()? {
        println!("step {}: loss {:.4}", step.metrics.step, step.metrics.loss);
        if step.ends_phase {
            run.checkpoint()?;
        }
    }

    // Files under the released names, for `Nexus::loader(..).generation_decoder(..)` or in place of the model's own.
    println!("weights: {}", run.export()?.display());
    Ok(())
}
