//! How fast is one stage in a process of its own? `cargo run --release --example bench_stage -- --help`.
//!
//! `write DIR` makes the weights, `run prefill_300 --models DIR` prints one line of JSON, which
//! `lab/bench/compare.py` sets beside that of other programs.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::exit,
    missing_docs,
    reason = "a bench may panic and print"
)]

#[path = "../benches/stages/measure.rs"]
mod measure;
#[path = "../benches/stages/models.rs"]
mod models;
#[path = "../benches/stages/place.rs"]
mod place;
#[path = "../benches/stages/training.rs"]
mod training;
#[path = "../benches/stages/work.rs"]
mod work;

use std::{fs, path::PathBuf};

use anyhow::Context;
use burn::tensor::FloatDType;
use clap::{Parser, ValueEnum};
use nexus_kernels::testing::{CpuLevel, limit_cpu};
use serde_json::json;

use measure::{Measured, measure};
use models::Weights;
use work::STAGES;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Times one stage, or writes the weights for it.
#[derive(Parser)]
enum Command {
    /// Prints the names of the stages.
    List,
    /// Writes models with random weights into a folder.
    Write {
        /// Made if it is not there.
        models: PathBuf,
    },
    /// Runs one stage: once to warm up, then until one of the limits is reached.
    Run {
        /// One of the names that `list` prints.
        stage: String,
        /// A folder that `write` made.
        #[arg(long)]
        models: PathBuf,
        /// Most runs.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// No new run after this many seconds.
        #[arg(long, default_value_t = 10.0)]
        seconds: f64,
        /// Dtype of the activations: f32, bf16 or f16; without this, what suits the device.
        #[arg(long)]
        dtype: Option<Dtype>,
        /// Kernels use no instructions beyond AVX2; products that burn does choose for themselves.
        #[arg(long)]
        avx2: bool,
        /// Where to write what the stage computed: little-endian f32.
        #[arg(long)]
        output: Option<PathBuf>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    Bf16,
    F16,
}

impl From<Dtype> for FloatDType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::BF16,
            Dtype::F16 => Self::F16,
        }
    }
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::List => STAGES.iter().for_each(|stage| println!("{}", stage.name)),
        Command::Write { models } => models::write(&models)?,
        Command::Run { stage, models, runs, seconds, dtype, avx2, output } => {
            let stage = STAGES.iter().find(|known| known.name == stage).context("no such stage; see `list`")?;
            dtype.into_iter().for_each(|dtype| place::choose_compute(dtype.into()));
            if avx2 {
                limit_cpu(CpuLevel::Avx2);
            }
            let measured = measure(stage, Weights::Files(&models), runs, seconds);
            if let Some(output) = output {
                fs::write(output, measured.bytes())?;
            }
            let Measured { times, load_seconds, start_bytes, peak_bytes, device_bytes, .. } = &measured;
            let line = json!({
                "group": stage.group,
                "stage": stage.name,
                "program": "nexus",
                "dtype": measure::dtype(stage),
                "median": measured.median(),
                "min": times.iter().copied().reduce(f64::min),
                "max": times.iter().copied().reduce(f64::max),
                "times": times,
                "threads": threads(),
                "load_seconds": load_seconds,
                "start_bytes": start_bytes,
                "peak_bytes": peak_bytes,
                "device_bytes": device_bytes,
            });
            println!("{line}");
        }
    }
    Ok(())
}

/// Threads of rayon, which the CPU backend runs on.
fn threads() -> usize {
    let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|threads| threads.parse().ok());
    asked.filter(|&threads| threads > 0).unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into))
}
