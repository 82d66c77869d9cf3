//! SHA-256 of files: paths -> names and hexadecimal digits.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::model::repository;

/// A file and its SHA-256.
#[derive(Debug, serde::Serialize)]
pub struct HashedFile {
    pub name: String,
    pub sha256: String,
}

/// SHA-256 in hexadecimal digits.
pub fn hash(bytes: &[u8]) -> String {
    digits(Sha256::new_with_prefix(bytes))
}

fn digits(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hashes a file that may be larger than memory.
pub fn hash_file(path: &Path, name: String) -> Result<HashedFile> {
    let mut hasher = Sha256::new();
    let read = File::open(path).and_then(|mut file| io::copy(&mut file, &mut hasher));
    read.with_context(|| format!("reading {}", path.display()))?;
    Ok(HashedFile { name, sha256: digits(hasher) })
}

/// Hashes of the files below a directory that have one of these extensions, by name.
pub fn hash_below(dir: &Path, extensions: &[&str]) -> Result<Vec<HashedFile>> {
    let mut found = Vec::new();
    let mut pending: Vec<PathBuf> = vec![dir.to_path_buf()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                pending.push(path);
            } else if extensions.iter().any(|&extension| path.extension().is_some_and(|found| found == extension)) {
                let name = path.strip_prefix(repository()).unwrap_or(&path).display().to_string();
                found.push(hash_file(&path, name)?);
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}
