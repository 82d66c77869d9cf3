//! How do I show progress, and stop a request? `cargo run --release --example progress`
#![allow(clippy::print_stdout, reason = "an example talks to a person")]

use std::{ops::ControlFlow, time::Instant};

use anyhow::Result;
use nexus::{Error, Nexus, Progress};

fn main() -> Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "assets/nexus-tiny".to_string());
    let nexus = Nexus::load(model, &nexus::device("cpu")?)?;
    let options = nexus.default_options().generate.clone();

    // An observer hears every event on the thread of the request. In an app it would send them to the window, and read
    // a flag that a button sets; `Nexus` can be cloned into a thread of its own for that.
    let started = Instant::now();
    let observer = |event: Progress| {
        match event {
            Progress::Running(stage) => println!("{:5.2} s  {stage}", started.elapsed().as_secs_f64()),
            Progress::Text(piece) => println!("         it says {piece:?}"),
            Progress::Step { done: 5, .. } => return ControlFlow::Break(()),
            Progress::Step { done, total } => println!("         step {done} of {total}"),
            // More kinds of events may come with later versions.
            _ => {}
        }
        ControlFlow::Continue(())
    };
    match nexus.generate("a green cross", &options, observer) {
        Err(Error::Cancelled) => println!("stopped, as the observer asked"),
        other => other?.save("progress.png")?,
    }

    // Nobody has to listen, and the model is as it was.
    nexus.generate("a green cross", &options, ())?.save("progress.png")?;
    println!("progress.png");
    Ok(())
}
