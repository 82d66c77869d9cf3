//! Does nexus compute the right thing on this device? `cargo run --release --example verify -- --device cpu`
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "examples talk to a person")]

#[path = "../cli/mod.rs"]
mod cli;
mod stages;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use nexus::{
    DeviceInfo, FloatDType, Precision, Quantization,
    core::checkpoint::{Checkpoint, LoadDType, Manifest},
};
use nexus_core::testing::{fixtures_dir, random_models_dir};
use stages::{PICTURES, STAGES, Setting, Verdict, draw, hash, verify, weights_in_memory};

/// Runs every stage on a device and compares it with PyTorch's results, which the repository carries.
///
/// The exit status is 0 if every stage passes.
#[derive(Parser)]
struct Args {
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
    /// Check every tensor of this model against --manifest
    #[arg(long, value_name = "DIR", requires = "manifest")]
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

/// What `--json` writes.
#[derive(serde::Serialize)]
struct Certificate {
    device: String,
    /// What the device and its driver are called.
    info: DeviceInfo,
    dtype: String,
    quantization: Option<Quantization>,
    nexus: &'static str,
    target: String,
    /// SHA-256 of every file of weights.
    weights: Vec<(String, String)>,
    /// Bytes of the weights of nexus-tiny's large stages on the device, if every stage passes.
    bytes: Vec<(&'static str, usize)>,
    stages: Vec<Verdict>,
    passes: bool,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    env_logger::builder().filter_level(log::LevelFilter::Warn).parse_default_env().init();
    let device = nexus::device(&args.device)?;
    let precision = args.dtype.map_or_else(|| Precision::of(&device), Dtype::precision);
    precision.check(&device)?;
    let info = DeviceInfo::of(&device);
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
    if let (Some(model), Some(manifests)) = (&args.model, &args.manifest) {
        check_manifests(model, manifests)?;
    }

    let linear = quantization.map(|quantization| format!(", linear layers {quantization:?}")).unwrap_or_default();
    println!("{} in {:?}, weights {:?}{linear}", args.device, precision.compute, precision.weights);
    println!("{info}\n");
    println!("{:<28} {:>9} {:>9} {:>9}  verdict", "stage", "drift", "limit", "seconds");
    let stages: Vec<Verdict> = STAGES.into_iter().map(|(stage, run)| show(verify(stage, run, &setting))).collect();
    let passes = stages.iter().all(Verdict::passes);
    // What failed in a stage may fail here too, and must not keep the certificate back.
    let bytes = if passes { weights_in_memory(&setting)? } else { vec![] };
    let kilobytes: Vec<String> = bytes.iter().map(|(stage, bytes)| format!("{stage} {} kB", bytes / 1000)).collect();
    if passes {
        println!("\nweights of nexus-tiny in memory: {}", kilobytes.join(", "));
    }
    println!("\n{}", if passes { "PASS: every stage computes the right thing here" } else { "FAIL" });
    if let Some(path) = &args.json {
        let certificate = Certificate {
            device: args.device,
            info,
            dtype: format!("{:?}", precision.compute),
            quantization,
            nexus: env!("CARGO_PKG_VERSION"),
            target: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            weights: [weights(&setting.random)?, weights(&setting.tiny)?].concat(),
            bytes,
            stages,
            passes,
        };
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

/// Hashes of the files of weights below a directory, by name.
fn weights(dir: &Path) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let mut pending = vec![dir.to_path_buf()];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "safetensors" || extension == "bin") {
                let name = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap_or(&path).display().to_string();
                found.push((name, hash(&std::fs::read(&path)?)));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Compares every tensor of a model that has a manifest.
fn check_manifests(model: &Path, manifests: &Path) -> Result<()> {
    let files = nexus::ModelFiles::find(model)?;
    let mut checked = 0;
    for (stage, path) in files.weights() {
        let manifest = manifests.join(format!("{stage}.json"));
        if let (Ok(path), true) = (path, manifest.is_file()) {
            Manifest::load(&manifest)?.verify(&Checkpoint::open(path)?, &mut |_| ())?;
            println!("{stage}: every tensor is the one of {}", manifest.display());
            checked += 1;
        }
    }
    ensure!(checked > 0, "{}: no manifest of a stage that {} has", manifests.display(), model.display());
    Ok(())
}
