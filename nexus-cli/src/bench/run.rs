//! `nexus bench run`: one stage in this process -> times, memory, and what it computed.

use std::{fs, path::PathBuf};

use anyhow::Result;
use nexus_kernels::testing::{CpuLevel, limit_cpu};
use serde_json::json;

use super::{
    measure::{self, Measured, measure},
    models::Weights,
    place, stage,
};
use crate::{Output, model::Dtype};

#[derive(clap::Args)]
pub struct Args {
    /// One of the names that `nexus bench list` prints
    stage: String,
    /// A directory that `nexus bench write` made [default: random weights]
    #[arg(long, value_name = "DIR")]
    models: Option<PathBuf>,
    /// cpu, cuda:0, wgpu, vulkan, metal, rocm: those of this build, which `nexus devices` lists
    #[arg(short, long, default_value = "cpu")]
    device: String,
    /// Most runs, after one to warm up
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    runs: usize,
    /// No new run after this many seconds
    #[arg(long, value_name = "COUNT", default_value_t = 10.0)]
    seconds: f64,
    /// Dtype of the activations [default: what suits the device]
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Let kernels use no instructions beyond AVX2; products that burn does choose for themselves
    #[arg(long)]
    avx2: bool,
    /// Where to write what the stage computed: little-endian f32
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub fn run(args: &Args, output: &Output) -> Result<()> {
    let stage = stage(&args.stage)?;
    place::choose(crate::model::device(&args.device)?);
    args.dtype.into_iter().for_each(|dtype| place::choose_compute(dtype.into()));
    if args.avx2 {
        limit_cpu(CpuLevel::Avx2);
    }
    let weights = args.models.as_deref().map_or(Weights::Random, Weights::Files);
    let measured = measure(stage, weights, args.runs, args.seconds);
    if let Some(path) = &args.output {
        fs::write(path, measured.bytes())?;
    }
    let Measured { times, load_seconds, start_bytes, peak_bytes, device_bytes, .. } = &measured;
    output.say(format!("{:<22} {:<10} {:>9.1} ms", stage.name, args.device, 1000.0 * measured.median()));
    output.object(&json!({
        "command": "bench run",
        "group": stage.group,
        "stage": stage.name,
        "program": "nexus",
        "device": args.device,
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
    }))
}

/// Threads of rayon, which the CPU backend runs on.
fn threads() -> usize {
    let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|threads| threads.parse().ok());
    asked.filter(|&threads| threads > 0).unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into))
}
