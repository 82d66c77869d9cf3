//! A model against what it should be: its files -> every difference from manifests, or from the released layout.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, bail, ensure};
use nexus::{
    ModelFiles,
    checkpoint::{Checkpoint, Manifest},
};
use nexus_core::testing::fixtures_dir;

use super::hashes::{HashedFile, hash_file};

/// Stages of [`ModelFiles::weights`] and their files in `released_layout.json`.
const RELEASED: [(&str, &str); 6] = [
    ("language_model", "Nexus-GenV2/model.safetensors"),
    ("generation_decoder", "Nexus-GenV2/generation_decoder.bin"),
    ("edit_decoder", "Nexus-GenV2/edit_decoder.bin"),
    ("autoencoder", "FLUX/FLUX.1-dev/ae.safetensors"),
    ("text_encoder", "FLUX/FLUX.1-dev/text_encoder/model.safetensors"),
    ("text_encoder_2", "FLUX/FLUX.1-dev/text_encoder_2/model.safetensors"),
];

/// Most differences of a file that are listed.
const SHOWN: usize = 8;

/// What was found out about a model.
#[derive(Debug, serde::Serialize)]
pub struct ModelVerdict {
    pub stages: Vec<StageVerdict>,
    pub passes: bool,
}

/// What was found out about the weights of a stage.
#[derive(Debug, serde::Serialize)]
pub struct StageVerdict {
    pub stage: &'static str,
    /// `manifest` or `released layout`; absent if there was nothing to compare with.
    pub against: Option<&'static str>,
    pub files: Vec<HashedFile>,
    /// How the weights differ, or why they cannot be read.
    pub error: Option<String>,
}

/// Compares every tensor with the manifests of a directory, or, without one, names and shapes with the released layout.
pub fn check_model(model: &Path, manifests: Option<&Path>) -> Result<ModelVerdict> {
    let files = ModelFiles::find(model)?;
    let released = released_layout()?;
    let mut stages = Vec::new();
    for (stage, path) in files.weights() {
        let manifest = manifests.map(|dir| dir.join(format!("{stage}.json")));
        let against = match &manifest {
            None => Some("released layout"),
            Some(manifest) => manifest.exists().then_some("manifest"),
        };
        let mut files = Vec::new();
        let check = || -> Result<()> {
            let checkpoint = Checkpoint::open(path?)?;
            for file in checkpoint.files() {
                let name = file.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
                files.push(hash_file(file, name)?);
            }
            match &manifest {
                None => compare(&checkpoint, &released[stage]),
                Some(manifest) if manifest.exists() => Ok(Manifest::load(manifest)?.verify(&checkpoint, &mut |_| ())?),
                Some(_) => Ok(()),
            }
        };
        let result = check();
        // Parts that nothing is said about may be absent.
        let error = result.err().filter(|_| against.is_some()).map(|error| format!("{error:#}"));
        stages.push(StageVerdict { stage, against, files, error });
    }
    if let Some(dir) = manifests {
        ensure!(
            stages.iter().any(|stage| stage.against.is_some()),
            "{}: no manifest of a stage; `nexus inspect --manifest DIR` writes them",
            dir.display()
        );
    }
    let passes = stages.iter().all(|stage| stage.error.is_none());
    Ok(ModelVerdict { stages, passes })
}

/// Shapes of tensors by name.
pub type Layout = BTreeMap<String, Vec<usize>>;

/// Names and shapes of the released files by stage.
pub fn released_layout() -> Result<BTreeMap<&'static str, Layout>> {
    #[derive(serde::Deserialize)]
    struct Layouts {
        files: Vec<Released>,
    }
    #[derive(serde::Deserialize)]
    struct Released {
        file: String,
        tensors: Vec<Tensors>,
    }
    /// One tensor, or one for each `n`.
    #[derive(serde::Deserialize)]
    struct Tensors {
        name: String,
        shape: Vec<usize>,
        #[serde(default)]
        n: Vec<usize>,
    }
    let path = fixtures_dir().join("released_layout.json");
    let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let mut layouts: Layouts = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    let named = |tensors: Tensors| -> Vec<(String, Vec<usize>)> {
        let Tensors { name, shape, n } = tensors;
        if n.is_empty() {
            return vec![(name, shape)];
        }
        n.iter().map(|n| (name.replace("{n}", &n.to_string()), shape.clone())).collect()
    };
    RELEASED
        .into_iter()
        .map(|(stage, file)| {
            let released = layouts.files.iter_mut().find(|released| released.file == file);
            let released = released.with_context(|| format!("{}: no {file}", path.display()))?;
            Ok((stage, std::mem::take(&mut released.tensors).into_iter().flat_map(named).collect()))
        })
        .collect()
}

/// Fails with the differences of a file from the released one.
pub fn compare(checkpoint: &Checkpoint, expected: &Layout) -> Result<()> {
    let mut differences = Vec::new();
    for (name, shape) in expected {
        match checkpoint.entry(name) {
            None => differences.push(format!("{name}: missing")),
            Some(entry) if entry.shape != *shape => {
                differences.push(format!("{name}: released with shape {shape:?}, found {:?}", entry.shape));
            }
            Some(_) => {}
        }
    }
    let extra = checkpoint.entries().filter(|entry| !expected.contains_key(&entry.name));
    differences.extend(extra.map(|entry| format!("{}: not in the released file", entry.name)));
    if !differences.is_empty() {
        let (file, count) = (checkpoint.path().display(), differences.len());
        differences.truncate(SHOWN);
        bail!("{file}: {count} differences from the released layout, such as {}", differences.join("; "));
    }
    Ok(())
}
