//! `nexus inspect`: a checkpoint -> what it holds, whether it is whole, and whether it is the one that is known.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use nexus::checkpoint::{Checkpoint, Manifest, ManifestProgress};
use nexus::{Clause, WeightsLicence};
use serde::Serialize;

use crate::{
    Output,
    interrupt::Interrupt,
    model::{ModelArgs, Place},
    output::show_bar,
    watch::Watch,
};

#[derive(clap::Args)]
#[command(after_help = "Examples:
  nexus inspect models
  nexus inspect models --tensors
  nexus inspect models --manifest manifests     hash every tensor, and look for NaN
  nexus inspect models --verify manifests       compare with what was hashed

The names, shapes and dtypes of all files are compared with what the model should have; a difference
is an error.")]
pub struct Args {
    /// Directory with Nexus-GenV2/ and FLUX/FLUX.1-dev/, as --model takes it
    #[arg(value_name = "DIR", conflicts_with = "model")]
    dir: Option<PathBuf>,
    /// Hash every tensor, look for NaN, and write one manifest per stage into this directory
    #[arg(long, value_name = "DIR", conflicts_with = "verify")]
    manifest: Option<PathBuf>,
    /// Compare every tensor with the manifests in this directory
    #[arg(long, value_name = "DIR")]
    verify: Option<PathBuf>,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// What a program reads.
#[derive(Serialize)]
struct Report<'a> {
    command: &'static str,
    nexus: &'a Path,
    flux: &'a Path,
    stages: Vec<Stage>,
    /// What the weights are licensed under, if they are of the released sizes.
    licences: Vec<&'static WeightsLicence>,
}

/// The weights of a stage.
#[derive(Serialize)]
struct Stage {
    stage: &'static str,
    /// Absent if they are not there, and so is all that follows.
    path: Option<PathBuf>,
    num_tensors: usize,
    num_parameters: usize,
    num_bytes: usize,
    /// How many tensors have which dtype.
    dtypes: BTreeMap<String, usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    name: String,
    dtype: String,
    shape: Vec<usize>,
}

pub fn run(args: Args, output: &Output) -> Result<ExitCode> {
    let place = Place::of(args.dir.as_deref().or(args.model.model.as_deref()), output)?;
    let interrupt = Interrupt::listen()?;
    let mut watch = Watch::new(output, &interrupt);
    let nexus = args.model.open(&place, &mut watch)?;
    watch.rest();
    let files = nexus.files();
    output.say(format!("{}\n{}", files.nexus.display(), files.flux.display()));
    output.say(format!("\n{:<20} {:>8} {:>14} {:>12}  dtypes", "stage", "tensors", "parameters", "bytes"));
    let (mut stages, mut bad) = (vec![], vec![]);
    for (stage, path) in files.weights() {
        let Ok(path) = path else {
            output.say(format!("{stage:<20} not there"));
            stages.push(Stage::absent(stage));
            continue;
        };
        let checkpoint = Checkpoint::open(&path)?;
        let found = Stage::of(stage, path, &checkpoint, args.tensors);
        found.show(output);
        stages.push(found);
        if let Some(dir) = &args.manifest {
            bad.extend(write_manifest(stage, &checkpoint, dir, output)?);
        }
        if let Some(dir) = &args.verify {
            let manifest = Manifest::load(dir.join(format!("{stage}.json")))?;
            hashing(stage, output, |hear| Ok(manifest.verify(&checkpoint, hear)?))?;
        }
    }
    if !bad.is_empty() {
        bail!("NaN or infinity in {}; such a model draws nothing: get its files anew", bad.join(", "));
    }
    let licences = files.licences()?;
    for licence in &licences {
        let WeightsLicence { weights, licence, link, stated_by, clauses, .. } = licence;
        output.say(format!("\n{weights}\n    {licence}, says {stated_by}\n    {link}"));
        for Clause { number, says, .. } in *clauses {
            output.say(format!("    {number}: {says}"));
        }
    }
    output.say("\nevery tensor that the model needs is there, with its shape and dtype, and nothing else");
    output.object(&Report { command: "inspect", nexus: &files.nexus, flux: &files.flux, stages, licences })?;
    Ok(ExitCode::SUCCESS)
}

impl Stage {
    fn absent(stage: &'static str) -> Self {
        let (dtypes, tensors) = (BTreeMap::new(), vec![]);
        Self { stage, path: None, num_tensors: 0, num_parameters: 0, num_bytes: 0, dtypes, tensors }
    }

    fn of(stage: &'static str, path: PathBuf, checkpoint: &Checkpoint, list: bool) -> Self {
        let mut found = Self { path: Some(path), num_bytes: checkpoint.num_bytes(), ..Self::absent(stage) };
        for entry in checkpoint.entries() {
            let dtype = format!("{:?}", entry.dtype);
            found.num_tensors += 1;
            found.num_parameters += entry.shape.iter().product::<usize>();
            *found.dtypes.entry(dtype.clone()).or_default() += 1;
            if list {
                found.tensors.push(Entry { name: entry.name.clone(), dtype, shape: entry.shape.clone() });
            }
        }
        found
    }

    fn show(&self, output: &Output) {
        let Self { stage, num_tensors, num_parameters, num_bytes, .. } = self;
        let dtypes: Vec<String> = self.dtypes.iter().map(|(dtype, count)| format!("{dtype} ({count})")).collect();
        output.say(format!("{stage:<20} {num_tensors:>8} {num_parameters:>14} {num_bytes:>12}  {}", dtypes.join(", ")));
        for Entry { name, dtype, shape } in &self.tensors {
            output.say(format!("    {name:<60} {dtype} {shape:?}"));
        }
    }
}

/// Writes the manifest of a stage; returns the tensors that hold NaN or infinity.
fn write_manifest(stage: &str, checkpoint: &Checkpoint, dir: &Path, output: &Output) -> Result<Vec<String>> {
    let manifest = hashing(stage, output, |hear| Ok(Manifest::of(checkpoint, hear)?))?;
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let path = dir.join(format!("{stage}.json"));
    manifest.save(&path)?;
    output.say(format!("    manifest: {}", path.display()));
    let bad = manifest.tensors.iter().filter(|tensor| tensor.non_finite > 0);
    Ok(bad.map(|tensor| tensor.name.clone()).collect())
}

/// Does what takes a while, under a bar of bytes.
fn hashing<T>(
    stage: &str,
    output: &Output,
    work: impl FnOnce(&mut dyn FnMut(ManifestProgress)) -> Result<T>,
) -> Result<T> {
    let bar = if output.is_quiet() { ProgressBar::hidden() } else { ProgressBar::no_length() };
    if let Ok(style) = ProgressStyle::with_template("hashing {msg} {wide_bar} {bytes}/{total_bytes}, {eta} left") {
        bar.set_style(style);
    }
    bar.set_message(stage.to_string());
    show_bar(Some(bar.clone()));
    let result = work(&mut |progress| {
        bar.set_length(progress.total_bytes as u64);
        bar.set_position(progress.bytes as u64);
    });
    show_bar(None);
    bar.finish_and_clear();
    result
}
