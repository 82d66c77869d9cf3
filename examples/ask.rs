//! How do I ask about pictures? `cargo run --release --example ask`
#![allow(clippy::print_stdout, reason = "an example talks to a person")]

use anyhow::Result;
use nexus::{Image, Nexus};

fn main() -> Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "assets/nexus-tiny".to_string());
    let nexus = Nexus::load(model, &nexus::device("cpu")?)?;
    let picture = Image::open("assets/nexus-tiny/sample.png")?;

    let mut options = nexus.default_options().text.clone();
    // A shorter reply ends sooner; a smaller picture is read faster, and seen less well.
    options.max_new_tokens = 64;
    options.max_pixels = 252 * 252;
    for question in ["What colour is the cross?", "Describe the image."] {
        let reply = nexus.understand(&picture, question, &options, ())?;
        println!("{question}\n    {reply}");
    }

    // Several pictures come before the question, or where `<image>` stands in it: `&[first, second]`.
    // What the model read and wrote, token by token, is there too.
    let reply = nexus.understand(&[picture], "Where is <image> the cross?", &options, ())?;
    println!("{} tokens read, {} written", reply.generation.prompt_len, reply.generation.new_token_ids().len());
    Ok(())
}
