//! `nexus verify`: every stage on a device, next to PyTorch's results, which the repository carries -> a certificate.

mod certificate;
pub mod hashes;
pub mod limits;
pub mod model;
pub mod stages;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Result, ensure};
use nexus::{DeviceInfo, FloatDType, Precision, Quantization, checkpoint::LoadDType};
use nexus_core::testing::{fixtures_dir, random_models_dir};

use crate::{
    Output,
    model::{Bits, Dtype, device, repository},
    paths::{check_writable, write_whole},
};
use certificate::{Certificate, Results};
use model::{ModelVerdict, check_model};
use stages::{PICTURES, STAGES, Setting, Verdict, draw, verify, weights_in_memory};

#[derive(clap::Args)]
#[command(after_help = "Examples:
  nexus verify
  nexus verify --device cuda:0 -o certificate.json
  nexus verify --dtype f32 --quantize q8
  nexus verify --model models --manifest manifests

Exit status: 0 if every stage passes, and the model too if one is given; 1 if not.")]
pub struct Args {
    /// cpu, cuda:0, wgpu, vulkan, metal, rocm: those of this build, which `nexus devices` lists
    #[arg(short, long, default_value = "cpu")]
    device: String,
    /// Dtype of weights and activations [default: what the device computes in]
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Keep the weights of linear layers in fewer bits; the limits are those of so few bits
    #[arg(long, value_name = "BITS")]
    quantize: Option<Bits>,
    /// Write the certificate into this file, as JSON
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Let the certificate take the place of a file that is there
    #[arg(long)]
    overwrite: bool,
    /// Check this model too: every tensor against --manifest; without it, names and shapes against the released files
    #[arg(short, long, alias = "ckpt_path", value_name = "DIR")]
    model: Option<PathBuf>,
    /// Directory with manifests, as `nexus inspect --manifest DIR` writes them
    #[arg(long, value_name = "DIR", requires = "model")]
    manifest: Option<PathBuf>,
    /// Write the expected pictures of nexus-tiny instead, on the CPU, after its weights changed
    #[arg(long, hide = true, conflicts_with_all = ["device", "dtype", "quantize"])]
    golden: bool,
}

pub fn run(args: Args, output: &Output) -> Result<ExitCode> {
    if let Some(path) = &args.output {
        check_writable(path, args.overwrite)?;
    }
    let device = device(&args.device)?;
    let precision = args.dtype.map_or_else(|| Precision::of(&device), precision);
    precision.check(&device)?;
    let tiny = repository().join("assets/nexus-tiny");
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
    let model = args.model.as_ref().map(|dir| check_model(dir, args.manifest.as_deref())).transpose()?;
    if let Some(model) = &model {
        show_model(model, output);
    }
    let linear = quantization.map(|quantization| format!(", linear layers {quantization:?}")).unwrap_or_default();
    output.say(format!("{} in {:?}, weights {:?}{linear}", args.device, precision.compute, precision.weights));
    output.say(format!("{}\n", DeviceInfo::of(&setting.device)));
    output.say(format!("{:<28} {:>9} {:>9} {:>9}  verdict", "stage", "drift", "limit", "seconds"));
    let mut stages = vec![];
    for stage in &STAGES {
        let verdict = verify(stage, &setting);
        show(&verdict, output);
        stages.push(verdict);
    }
    let right = stages.iter().all(Verdict::passes);
    // What failed in a stage may fail here too, and must not keep the certificate back.
    let bytes = if right { weights_in_memory(&setting)? } else { vec![] };
    let kilobytes: Vec<String> = bytes.iter().map(|(stage, bytes)| format!("{stage} {} kB", bytes / 1000)).collect();
    if right {
        output.say(format!("\nweights of nexus-tiny in memory: {}", kilobytes.join(", ")));
    }
    let passes = right && model.as_ref().is_none_or(|model| model.passes);
    output.say(format!("\n{}", if passes { "PASS: every stage computes the right thing here" } else { "FAIL" }));
    if args.output.is_some() || output.is_json() {
        let certificate = Certificate::new(args.device, &setting, Results { bytes, stages, model, passes })?;
        if let Some(path) = &args.output {
            write_whole(path, &serde_json::to_vec_pretty(&certificate)?)?;
            output.say(format!("certificate: {}", path.display()));
        }
        output.object(&certificate)?;
    }
    Ok(if passes { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn precision(dtype: Dtype) -> Precision {
    let compute = FloatDType::from(dtype);
    Precision { weights: LoadDType::Convert(compute), compute }
}

fn show(verdict: &Verdict, output: &Output) {
    let Verdict { stage, drift, limit, seconds, error } = verdict;
    let drift = drift.map_or("-".to_string(), |drift| format!("{drift:.1e}"));
    let word = if verdict.passes() { "pass" } else { "FAIL" };
    output.say(format!("{stage:<28} {drift:>9} {limit:>9.1e} {seconds:>9.2}  {word}"));
    if let Some(error) = error {
        output.say(format!("    {error}"));
    }
}

fn show_model(model: &ModelVerdict, output: &Output) {
    for stage in &model.stages {
        output.say(match (&stage.error, stage.against) {
            (Some(error), _) => format!("{}: FAIL: {error}", stage.stage),
            (None, Some(against)) => format!("{}: as the {against} says", stage.stage),
            (None, None) => format!("{}: no manifest, not checked", stage.stage),
        });
    }
    output.say("");
}
