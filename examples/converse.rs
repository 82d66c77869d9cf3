//! How do I hold a conversation? `cargo run --release --example converse`
#![allow(clippy::print_stdout, reason = "an example talks to a person")]

use anyhow::Result;
use nexus::{AnswerPart, Message, Nexus};

fn main() -> Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "assets/nexus-tiny".to_string());
    let nexus = Nexus::load(model, &nexus::device("cpu")?)?;

    // It remembers what was said and drawn; a model has as many conversations as one likes.
    let mut conversation = nexus.conversation();
    for message in [
        "Generate an image according to the following description: a blue circle",
        "What colour is the circle?",
        "Colour the blue circle red.",
    ] {
        println!("> {message}");
        // A picture comes with a message by `Message::text(..).with_image(image)`.
        let answer = conversation.send(Message::text(message), ())?;
        for part in answer.parts {
            match part {
                AnswerPart::Text(text) => println!("{text}"),
                AnswerPart::Image(picture) => {
                    let path = format!("turn-{}.png", conversation.history().len() / 2);
                    picture.save(&path)?;
                    println!("{path}");
                }
            }
        }
    }

    // To go on later, with this model or another one.
    conversation.save("conversation.safetensors")?;
    let conversation = nexus.load_conversation("conversation.safetensors")?;
    println!("conversation.safetensors: {} messages", conversation.history().len());
    Ok(())
}
