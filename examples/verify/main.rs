//! Does nexus compute the right thing on this device? `cargo run --release --example verify -- --device cpu`
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "examples talk to a person")]

mod certificate;
#[path = "../cli/mod.rs"]
mod cli;
pub(crate) mod hashes;
pub(crate) mod limits;
pub(crate) mod model;
pub(crate) mod stages;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Result, ensure};
use certificate::{Certificate, Results};
use clap::{Parser, ValueEnum};
use model::{ModelVerdict, check_model};
use nexus::{DeviceInfo, FloatDType, Precision, Quantization, checkpoint::LoadDType};
use nexus_core::testing::{fixtures_dir, random_models_dir};
use stages::{PICTURES, STAGES, Setting, Verdict, draw, verify, weights_in_memory};

/// Runs every stage on a device and compares it with PyTorch's results, which the repository carries.
///
/// The exit status is 0 if every stage passes, and the model too if one is given.
#[derive(Parser)]
pub struct Args {
    /// Device: cpu, cuda:0, wgpu, vulkan, metal, rocm (those compiled in); `--example devices` lists them
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Dtype of weights and activations; without it, what the device computes in by default
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Keep the weights of linear layers in fewer bits; the limits are those of so few bits
    #[arg(long)]
    quantize: Option<cli::Bits>,
    /// Write the certificate as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Check this model too: every tensor against --manifest; without it, names and shapes against the released files
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Directory with manifests, as `--example inspect -- --manifest DIR` writes them
    #[arg(long, value_name = "DIR", requires = "model")]
    manifest: Option<PathBuf>,
    /// Write the expected pictures of nexus-tiny instead, on the CPU, after its weights changed
    #[arg(long, conflicts_with_all = ["device", "dtype", "quantize"])]
    golden: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    env_logger::builder().filter_level(log::LevelFilter::Warn).parse_default_env().init();
    run(args)
}

/// The whole program: 0 if everything passes.
pub fn run(args: Args) -> Result<ExitCode> {
    let device = nexus::device(&args.device)?;
    let precision = args.dtype.map_or_else(|| Precision::of(&device), Dtype::precision);
    precision.check(&device)?;
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/nexus-tiny");
    let quantization = args.quantize.map(Quantization::from);
    let setting = Setting { random: random_models_dir(), tiny, device, precision, quantization };
    for dir in [&setting.random, &setting.tiny, &fixtures_dir()] {
        ensure!(dir.is_dir(), "{}: not here; verify runs in a clone of the repository", dir.display());
    }
    if args.golden {
        for (picture, name) in draw(&setting)?.iter().zip(PICTURES) {
            picture.save(fixtures_dir().join(name))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let checked = |dir: &PathBuf| check_model(dir, args.manifest.as_deref()).map(show_model);
    let model = args.model.as_ref().map(checked).transpose()?;

    let linear = quantization.map(|quantization| format!(", linear layers {quantization:?}")).unwrap_or_default();
    println!("{} in {:?}, weights {:?}{linear}", args.device, precision.compute, precision.weights);
    println!("{}\n", DeviceInfo::of(&setting.device));
    println!("{:<28} {:>9} {:>9} {:>9}  verdict", "stage", "drift", "limit", "seconds");
    let stages: Vec<Verdict> = STAGES.iter().map(|stage| show(verify(stage, &setting))).collect();
    let right = stages.iter().all(Verdict::passes);
    // What failed in a stage may fail here too, and must not keep the certificate back.
    let bytes = if right { weights_in_memory(&setting)? } else { vec![] };
    let kilobytes: Vec<String> = bytes.iter().map(|(stage, bytes)| format!("{stage} {} kB", bytes / 1000)).collect();
    if right {
        println!("\nweights of nexus-tiny in memory: {}", kilobytes.join(", "));
    }
    let passes = right && model.as_ref().is_none_or(|model| model.passes);
    println!("\n{}", if passes { "PASS: every stage computes the right thing here" } else { "FAIL" });
    if let Some(path) = &args.json {
        let certificate = Certificate::new(args.device, &setting, Results { bytes, stages, model, passes })?;
        cli::write_whole(path, &serde_json::to_vec_pretty(&certificate)?)?;
        println!("certificate: {}", path.display());
    }
    Ok(if passes { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Dtype {
    fn precision(self) -> Precision {
        let compute = match self {
            Self::F32 => FloatDType::F32,
            Self::F16 => FloatDType::F16,
            Self::Bf16 => FloatDType::BF16,
        };
        Precision { weights: LoadDType::Convert(compute), compute }
    }
}

fn show(verdict: Verdict) -> Verdict {
    let Verdict { stage, drift, limit, seconds, error } = &verdict;
    let drift = drift.map_or("-".to_string(), |drift| format!("{drift:.1e}"));
    let word = if verdict.passes() { "pass" } else { "FAIL" };
    println!("{stage:<28} {drift:>9} {limit:>9.1e} {seconds:>9.2}  {word}");
    if let Some(error) = error {
        println!("    {error}");
    }
    verdict
}

fn show_model(model: ModelVerdict) -> ModelVerdict {
    for stage in &model.stages {
        match (&stage.error, stage.against) {
            (Some(error), _) => println!("{}: FAIL: {error}", stage.stage),
            (None, Some(against)) => println!("{}: as the {against} says", stage.stage),
            (None, None) => println!("{}: no manifest, not checked", stage.stage),
        }
    }
    println!();
    model
}
