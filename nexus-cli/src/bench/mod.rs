//! `nexus bench`: stages of the model, timed on the devices of this computer.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a bench may panic")]

mod chart;
mod devices;
mod measure;
mod models;
mod place;
mod run;
#[cfg(feature = "train")]
mod training;
mod work;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use serde::Serialize;

use crate::{Output, paths::write_whole};

pub use models::Weights;
pub use place::{device, ramp};
pub use work::{RELEASED_MODELS, STAGES, Stage, Work};

#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  nexus bench
  nexus bench --devices cpu,wgpu --stages prefill_300,decode_token
  nexus bench list
  nexus bench run prefill_300 --device cuda:0 --runs 20

Weights are random. Every stage runs on every device in a process of its own, so that a driver that
fails spoils one row alone. Exit status: 0 if every stage ran on every device, 1 if not."
)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    devices: devices::DeviceArgs,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Print the names of the stages
    List,
    /// Write models with random weights into a directory, for `run --models` and for other programs
    Write {
        /// Made if it is not there
        dir: PathBuf,
    },
    /// Time one stage in this process
    Run(run::Args),
}

/// What a program reads of `list`.
#[derive(Serialize)]
struct Names {
    command: &'static str,
    stages: Vec<&'static str>,
}

pub fn run(args: Args, output: &Output) -> Result<ExitCode> {
    match args.command {
        None => return devices::run(&args.devices, output),
        Some(Command::List) => {
            let stages: Vec<&str> = STAGES.iter().map(|stage| stage.name).collect();
            stages.iter().for_each(|name| output.say(name));
            output.object(&Names { command: "bench list", stages })?;
        }
        Some(Command::Write { dir }) => models::write(&dir)?,
        Some(Command::Run(args)) => run::run(&args, output)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The stage of a name.
fn stage(name: &str) -> Result<&'static Stage> {
    STAGES.iter().find(|stage| stage.name == name).ok_or_else(|| {
        let known: Vec<&str> = STAGES.iter().map(|stage| stage.name).collect();
        crate::failure::usage(format!("`{name}` is not a stage: use {}", known.join(", ")))
    })
}
