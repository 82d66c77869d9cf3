//! How do I change a picture? `cargo run --release --example edit`
#![allow(clippy::print_stdout, reason = "an example talks to a person")]

use anyhow::Result;
use nexus::{Image, Nexus};

fn main() -> Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "assets/nexus-tiny".to_string());
    let nexus = Nexus::load(model, &nexus::device("cpu")?)?;

    // Bytes that are in memory already: `Image::from_bytes`; pixels: `Image::from_rgb8`.
    let source = Image::open("assets/nexus-tiny/sample.png")?;

    // The result has the size of the options; for another one, set both sides.
    let options = nexus.default_options().edit.clone();
    let picture = nexus.edit(&source, "Colour the purple cross yellow.", &options, ())?;
    picture.save("edited.png")?;
    println!("edited.png");

    // What was not to change has stayed: the editing decoder sees the source too. What the language model alone made of
    // the instruction is in `picture.embeds`.
    println!("{:?} drawn from embeddings of {:?}", options.decoder, picture.embeds.values.dims());
    Ok(())
}
