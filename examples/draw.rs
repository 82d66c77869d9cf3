//! How do I draw a picture? `cargo run --release --example draw`
#![allow(clippy::print_stdout, reason = "an example talks to a person")]

use anyhow::Result;
use nexus::{Nexus, Noise};

fn main() -> Result<()> {
    // A directory with `Nexus-GenV2/` and `FLUX/FLUX.1-dev/`, under the names that they were released with.
    let model = std::env::args().nth(1).unwrap_or_else(|| "assets/nexus-tiny".to_string());
    let nexus = Nexus::load(model, &nexus::device("cpu")?)?;

    // A model may bring options that suit it; without them, they are those of the original's scripts.
    let mut options = nexus.default_options().generate.clone();
    options.draw.steps = 20;
    options.draw.noise = Noise::Seed(7);
    let picture = nexus.generate("a red circle to the left of a blue square", &options, ())?;

    // The same prompt, options and seed draw the same picture again.
    picture.save("drawn.png")?;
    println!("drawn.png: {}x{} pixels", picture.image.width_px(), picture.image.height_px());
    Ok(())
}
