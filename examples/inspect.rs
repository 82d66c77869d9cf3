//! What is in this checkpoint? `cargo run --release --example inspect -- --model models --manifest manifests`
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "examples talk to a person")]

mod cli;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use nexus::checkpoint::{Checkpoint, Manifest};

/// Shows the stages of a checkpoint with sizes and dtypes, checks it, and hashes it.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    model: cli::ModelArgs,
    /// Hash every tensor, look for NaN, and write one manifest per stage into this directory
    #[arg(long, value_name = "DIR", conflicts_with = "verify")]
    manifest: Option<PathBuf>,
    /// Compare every tensor with the manifests in this directory
    #[arg(long, value_name = "DIR")]
    verify: Option<PathBuf>,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    // Loading compares the names, shapes and dtypes of every file with the model.
    let nexus = args.model.load()?;
    let files = nexus.files();
    println!("{}\n{}", files.nexus.display(), files.flux.display());
    println!("\n{:<20} {:>8} {:>14} {:>12}  dtypes", "stage", "tensors", "parameters", "bytes");
    let mut bad = vec![];
    for (stage, path) in files.weights() {
        let Ok(path) = path else {
            println!("{stage:<20} not there");
            continue;
        };
        let checkpoint = Checkpoint::open(path)?;
        print_stage(stage, &checkpoint, args.tensors);
        if let Some(dir) = &args.manifest {
            bad.extend(write_manifest(stage, &checkpoint, dir)?);
        }
        if let Some(dir) = &args.verify {
            Manifest::load(dir.join(format!("{stage}.json")))?.verify(&checkpoint, &mut bar(stage))?;
        }
    }
    if !bad.is_empty() {
        bail!("NaN or infinity in {}", bad.join(", "));
    }
    for licence in files.licences()? {
        println!("\n{}\n    {}, says {}\n    {}", licence.weights, licence.licence, licence.stated_by, licence.link);
        for clause in licence.clauses {
            println!("    {}: {}", clause.number, clause.says);
        }
    }
    println!("\nevery tensor that the model needs is there, with its shape and dtype, and nothing else");
    Ok(())
}

fn print_stage(stage: &str, checkpoint: &Checkpoint, tensors: bool) {
    let (mut count, mut parameters) = (0, 0);
    let mut dtypes = BTreeMap::new();
    for entry in checkpoint.entries() {
        count += 1;
        parameters += entry.shape.iter().product::<usize>();
        *dtypes.entry(format!("{:?}", entry.dtype)).or_insert(0) += 1;
    }
    let dtypes: Vec<String> = dtypes.iter().map(|(dtype, count)| format!("{dtype} ({count})")).collect();
    println!("{stage:<20} {count:>8} {parameters:>14} {:>12}  {}", checkpoint.num_bytes(), dtypes.join(", "));
    if tensors {
        for entry in checkpoint.entries() {
            println!("    {:<60} {:?} {:?}", entry.name, entry.dtype, entry.shape);
        }
    }
}

/// Writes the manifest of a stage; returns the tensors that hold NaN or infinity.
fn write_manifest(stage: &str, checkpoint: &Checkpoint, dir: &Path) -> Result<Vec<String>> {
    let manifest = Manifest::of(checkpoint, &mut bar(stage))?;
    std::fs::create_dir_all(dir)?;
    let path = dir.join(format!("{stage}.json"));
    manifest.save(&path)?;
    println!("    manifest: {}", path.display());
    let bad = manifest.tensors.iter().filter(|tensor| tensor.non_finite > 0);
    Ok(bad.map(|tensor| tensor.name.clone()).collect())
}

fn bar(stage: &str) -> impl FnMut(nexus::checkpoint::ManifestProgress) {
    let bar = ProgressBar::no_length().with_message(stage.to_string());
    if let Ok(style) = ProgressStyle::with_template("hashing {msg} {wide_bar} {bytes}/{total_bytes}, {eta} left") {
        bar.set_style(style);
    }
    move |progress| {
        bar.set_length(progress.total_bytes as u64);
        bar.set_position(progress.bytes as u64);
        if progress.tensors == progress.total_tensors {
            bar.finish_and_clear();
        }
    }
}
