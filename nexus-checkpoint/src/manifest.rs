//! Manifests: an open checkpoint -> a list of its tensors with hashes, to keep beside it or in a repository -> proof
//! later that a download or a copy is the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Write;
use std::num::NonZero;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::CheckpointError;
use crate::write::write_atomically;
use crate::{Checkpoint, Located, TensorEntry, values};

const VERSION: u32 = 1;

/// What a checkpoint contains, tensor by tensor.
///
/// Tensors are compared by name, shape, dtype and values, so a checkpoint that was sharded differently or moved to
/// another format is the same one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this form.
    pub version: u32,
    /// All tensors, sorted by name.
    pub tensors: Vec<ManifestTensor>,
}

/// One tensor of a [`Manifest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestTensor {
    /// Name in the file.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Dtype, as safetensors spells it (`BF16`).
    pub dtype: String,
    /// SHA-256 of the values in row-major order, little-endian, as lower-case hexadecimal digits.
    pub sha256: String,
    /// Name of the file that held it, without its directory; for information, not compared.
    pub file: String,
    /// Number of values that are NaN or infinite.
    pub non_finite: usize,
}

/// How far reading a checkpoint for a [`Manifest`] has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestProgress {
    /// Tensors that are done.
    pub tensors: usize,
    /// Tensors in all.
    pub total_tensors: usize,
    /// Bytes that are done.
    pub bytes: usize,
    /// Bytes in all.
    pub total_bytes: usize,
}

/// One way in which a checkpoint is not what its manifest says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ManifestDifference {
    /// In the manifest and not in the checkpoint.
    Missing {
        /// Name of the tensor.
        name: String,
    },
    /// In the checkpoint and not in the manifest.
    Extra {
        /// Name of the tensor.
        name: String,
    },
    /// Of another shape.
    Shape {
        /// Name of the tensor.
        name: String,
        /// Shape in the manifest.
        expected: Vec<usize>,
        /// Shape in the checkpoint.
        found: Vec<usize>,
    },
    /// Of another dtype.
    DType {
        /// Name of the tensor.
        name: String,
        /// Dtype in the manifest.
        expected: String,
        /// Dtype in the checkpoint.
        found: String,
    },
    /// Of the same shape and dtype, with other values.
    Values {
        /// Name of the tensor.
        name: String,
        /// File that holds the other values.
        file: String,
    },
}

impl fmt::Display for ManifestDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { name } => write!(f, "{name}: missing"),
            Self::Extra { name } => write!(f, "{name}: not in the manifest"),
            Self::Shape { name, expected, found } => write!(f, "{name}: expected shape {expected:?}, found {found:?}"),
            Self::DType { name, expected, found } => write!(f, "{name}: expected dtype {expected}, found {found}"),
            Self::Values { name, file } => write!(f, "{name}: other values, in {file}"),
        }
    }
}

impl Manifest {
    /// Reads every value of a checkpoint once, on all cores.
    ///
    /// `on_progress` is called on this thread after each tensor.
    ///
    /// # Errors
    /// [`CheckpointError::NotBoolean`] if a boolean is neither 0 nor 1.
    pub fn of(
        checkpoint: &Checkpoint,
        on_progress: &mut dyn FnMut(ManifestProgress),
    ) -> Result<Manifest, CheckpointError> {
        let sums = checksums(checkpoint, &checkpoint.tensors.iter().collect::<Vec<_>>(), on_progress)?;
        let tensors = checkpoint.entries().zip(sums).map(|(entry, sum)| ManifestTensor {
            name: entry.name.clone(),
            shape: entry.shape.clone(),
            dtype: dtype_name(entry),
            sha256: sum.sha256,
            file: file_name(entry),
            non_finite: sum.non_finite,
        });
        Ok(Manifest { version: VERSION, tensors: tensors.collect() })
    }

    /// Checks that a checkpoint holds exactly these tensors; values are read only if names, shapes and dtypes agree.
    ///
    /// # Errors
    /// [`CheckpointError::ManifestMismatch`] with every difference, and as [`Manifest::of`].
    pub fn verify(
        &self,
        checkpoint: &Checkpoint,
        on_progress: &mut dyn FnMut(ManifestProgress),
    ) -> Result<(), CheckpointError> {
        let mut differences = self.differences_of_headers(checkpoint);
        if differences.is_empty() {
            let now = Self::of(checkpoint, on_progress)?;
            let expected: BTreeMap<&str, &str> =
                self.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.sha256.as_str())).collect();
            let other = now.tensors.into_iter().filter(|tensor| {
                !expected.get(tensor.name.as_str()).is_some_and(|sum| sum.eq_ignore_ascii_case(&tensor.sha256))
            });
            differences =
                other.map(|ManifestTensor { name, file, .. }| ManifestDifference::Values { name, file }).collect();
        }
        match differences.is_empty() {
            true => Ok(()),
            false => Err(CheckpointError::ManifestMismatch { path: checkpoint.path().to_path_buf(), differences }),
        }
    }

    /// Writes the manifest as JSON; the file appears whole or not at all.
    ///
    /// # Errors
    /// [`CheckpointError::Write`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), CheckpointError> {
        let path = path.as_ref();
        let write = |source| CheckpointError::write(path, source);
        let mut text = serde_json::to_vec_pretty(self).map_err(|source| write(source.into()))?;
        text.push(b'\n');
        write_atomically(path, |file| file.write_all(&text).map_err(write))
    }

    /// Reads what [`Manifest::save`] wrote.
    ///
    /// # Errors
    /// [`CheckpointError::NotFound`], [`CheckpointError::Read`], [`CheckpointError::ManifestJson`] or
    /// [`CheckpointError::ManifestVersion`].
    pub fn load(path: impl AsRef<Path>) -> Result<Manifest, CheckpointError> {
        let path = path.as_ref();
        let text = std::fs::read(path).map_err(|source| CheckpointError::read(path, source))?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|source| CheckpointError::ManifestJson { path: path.to_path_buf(), source })?;
        match manifest.version {
            VERSION => Ok(manifest),
            version => Err(CheckpointError::ManifestVersion { path: path.to_path_buf(), version, expected: VERSION }),
        }
    }

    fn differences_of_headers(&self, checkpoint: &Checkpoint) -> Vec<ManifestDifference> {
        let mut differences = Vec::new();
        for ManifestTensor { name, shape, dtype, .. } in &self.tensors {
            let Some(entry) = checkpoint.entry(name) else {
                differences.push(ManifestDifference::Missing { name: name.clone() });
                continue;
            };
            if entry.shape != *shape {
                let (name, expected, found) = (name.clone(), shape.clone(), entry.shape.clone());
                differences.push(ManifestDifference::Shape { name, expected, found });
            } else if dtype_name(entry) != *dtype {
                let (name, expected, found) = (name.clone(), dtype.clone(), dtype_name(entry));
                differences.push(ManifestDifference::DType { name, expected, found });
            }
        }
        let known: BTreeSet<&str> = self.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        let extra = checkpoint.entries().filter(|entry| !known.contains(entry.name.as_str()));
        differences.extend(extra.map(|entry| ManifestDifference::Extra { name: entry.name.clone() }));
        differences
    }
}

fn dtype_name(entry: &TensorEntry) -> String {
    values::dtype_name(entry.dtype).unwrap_or_default().to_string()
}

fn file_name(entry: &TensorEntry) -> String {
    entry.file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[derive(Default)]
struct Checksum {
    sha256: String,
    non_finite: usize,
}

/// Hashes tensors on all cores, largest first; the sums are in the order of the tensors.
fn checksums(
    checkpoint: &Checkpoint,
    tensors: &[&Located],
    on_progress: &mut dyn FnMut(ManifestProgress),
) -> Result<Vec<Checksum>, CheckpointError> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(tensors[at].entry.num_bytes));
    let mut sums: Vec<Checksum> = std::iter::repeat_with(Checksum::default).take(tensors.len()).collect();
    let mut progress = ManifestProgress {
        tensors: 0,
        total_tensors: tensors.len(),
        bytes: 0,
        total_bytes: tensors.iter().map(|tensor| tensor.entry.num_bytes).sum(),
    };
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        let workers = std::thread::available_parallelism().map_or(1, NonZero::get).min(tensors.len());
        for _ in 0..workers {
            let (sender, order, next) = (sender.clone(), &order, &next);
            scope.spawn(move || {
                while let Some(&at) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                    // Sending fails when the receiver has met an error and left.
                    if sender.send((at, checksum(checkpoint, tensors[at]))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        // Taking the receiver in lets the workers stop as soon as this returns an error.
        let receiver = receiver;
        for (at, sum) in receiver {
            sums[at] = sum?;
            progress.tensors += 1;
            progress.bytes += tensors[at].entry.num_bytes;
            on_progress(progress);
        }
        Ok(sums)
    })
}

fn checksum(checkpoint: &Checkpoint, tensor: &Located) -> Result<Checksum, CheckpointError> {
    let TensorEntry { name, dtype, .. } = &tensor.entry;
    let data = checkpoint.data(name)?;
    let digest = Sha256::digest(data.as_bytes());
    let sha256 = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Checksum { sha256, non_finite: values::non_finite(data.as_bytes(), *dtype).count })
}
