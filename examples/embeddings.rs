//! How do I keep what a picture means, and draw it again? `cargo run --release --example embeddings`
#![allow(clippy::print_stdout, reason = "an example talks to a person")]

use anyhow::Result;
use nexus::{DrawWith, ImageEmbeds, Nexus, Noise};

fn main() -> Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "assets/nexus-tiny".to_string());
    let device = nexus::device("cpu")?;
    let nexus = Nexus::load(model, &device)?;
    let options = nexus.default_options().generate.clone();

    // What the language model predicts is 81 embeddings; the pixels are drawn from them alone.
    let picture = nexus.generate("a yellow triangle above a red square", &options, ())?;
    picture.save("first.png")?;
    picture.embeds.save("picture.safetensors")?;

    // Later, or elsewhere: the same content from other noise, without the language model.
    let embeds = ImageEmbeds::load("picture.safetensors", &device)?;
    let mut draw = options.draw;
    draw.noise = Noise::Seed(99);
    let again = nexus.draw(&embeds, DrawWith::GenerationDecoder, &draw, ())?;
    again.save("second.png")?;

    // Pictures have embeddings of the same kind, so that the two can be compared.
    let seen = nexus.embed(&again.image, 252 * 252, ())?;
    let difference = (seen.values - embeds.values).abs().mean().into_scalar::<f32>();
    println!("first.png and second.png; what is seen differs from what was meant by {difference:.3} in the mean");
    Ok(())
}
