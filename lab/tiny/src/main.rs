//! The program that makes nexus-tiny: `lab-tiny train`, `lab-tiny evaluate`, `lab-tiny world`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to a person")]

mod contact_sheet;
mod evaluate;
mod world;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use lab_tiny::trainer;
use nexus_cli::Output;

/// Keeps freed memory for the next tensor; the system's allocator gives every large one back at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Trains, judges and shows what nexus-tiny is made of
#[derive(Parser)]
enum Command {
    /// Train one part of a model, on the world or on files of messages; started again, it goes on where it was left
    Train(nexus_cli::train::Args),
    /// Score a model on held-out scenes, whose truth is known
    Evaluate(evaluate::Args),
    /// Show samples of the world: their texts, a sheet of their pictures, or a file of conversations to train on
    World(world::Args),
}

fn main() -> Result<ExitCode> {
    let command = Command::parse();
    let output = Output::new(false, false, 0);
    match command {
        Command::Train(args) => return nexus_cli::train::run_with(&trainer(), args, &output),
        Command::Evaluate(args) => evaluate::run(&args)?,
        Command::World(args) => world::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}
