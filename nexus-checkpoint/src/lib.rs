//! Checkpoints: files of weights -> checked lists of tensors -> modules, and back.
//!
//! Data flow: a path (one `.safetensors` file, a sharded index, a `torch.save` archive, or a directory of these) ->
//! [`Checkpoint::open`], which maps the files and checks their headers -> [`load_module`], which compares names, shapes
//! and dtypes with a lazy module, reports every difference, and hands the mapped bytes to burn. [`WeightNames`] says,
//! as data, how the parameters are called in the files. [`save_module`] and [`write_safetensors`] go the other way;
//! `Manifest`, of the feature `manifest`, records and verifies contents.
//!
//! Nothing is executed: a pickle is read by a small interpreter that knows tensors and nothing else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{AllocationProperty, DType, TensorData};
use bytes::Bytes;

mod error;
mod header;
mod load;
#[cfg(feature = "manifest")]
mod manifest;
mod names;
mod open;
mod path;
mod pickle;
mod quantization;
mod report;
mod torch;
mod values;
mod write;
mod zip;

pub use error::CheckpointError;
pub use load::{LoadDType, LoadOptions, check_module, load_module, module_layout, save_module, save_module_as};
#[cfg(feature = "manifest")]
pub use manifest::{Manifest, ManifestDifference, ManifestProgress, ManifestTensor};
pub use names::WeightNames;
pub use path::ModulePath;
pub use quantization::{Quantization, weight_bytes};
pub use report::{LoadReport, Missing, Unused, WrongDType, WrongShape};
pub use write::write_safetensors;

/// One tensor of a checkpoint, as its header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name in the file.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Dtype of the stored values.
    pub dtype: DType,
    /// Size of the values, in bytes.
    pub num_bytes: usize,
    /// File that holds the values.
    pub file: PathBuf,
}

/// Files of weights, mapped into memory and checked.
///
/// Opening reads headers alone. Values stay in the files until they are used, and clones share the maps. The files
/// must not be shortened or edited in place while a checkpoint or a tensor made from it lives; replacing them by
/// renaming is fine.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<PathBuf>,
    metadata: BTreeMap<String, String>,
    /// Sorted by name.
    tensors: Vec<Located>,
}

/// A tensor and where its values are.
#[derive(Debug, Clone)]
struct Located {
    entry: TensorEntry,
    /// The values; if strided, from the first element to the last that is reached.
    bytes: Bytes,
    /// Strides in elements, if the values are not in row-major order.
    strides: Option<Vec<usize>>,
}

impl Checkpoint {
    /// Opens a checkpoint: maps its files and checks their headers completely.
    ///
    /// - a `.safetensors` file;
    /// - a `*.safetensors.index.json`, with its shards beside it;
    /// - a `.bin`, `.pt` or `.pth` archive of `torch.save`, holding a dictionary of tensors;
    /// - a directory, of which `model.safetensors.index.json` is taken, else the only `*.safetensors.index.json`, else
    ///   `model.safetensors`, else the only `*.safetensors`.
    ///
    /// # Errors
    /// One variant of [`CheckpointError`] for each way in which a file can be absent, damaged or not a checkpoint.
    pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint, CheckpointError> {
        open::open(path.as_ref())
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold tensors, sorted by path.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Strings about the file, as [`write_safetensors`] takes them; of a sharded checkpoint, those of all shards.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All tensors, sorted by name.
    pub fn entries(&self) -> impl Iterator<Item = &TensorEntry> {
        self.tensors.iter().map(|tensor| &tensor.entry)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entry(name).is_some()
    }

    /// The tensor of this name, if there is one.
    pub fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.find(name).map(|tensor| &tensor.entry)
    }

    /// Size of the values of all tensors, in bytes.
    pub fn num_bytes(&self) -> usize {
        self.entries().map(|entry| entry.num_bytes).sum()
    }

    /// The values of one tensor, in the dtype of the file.
    ///
    /// Aligned values are not copied: the result refers to the mapped file. Values at an odd address, and strided
    /// ones, are copied once.
    ///
    /// # Errors
    /// [`CheckpointError::NoTensor`]; [`CheckpointError::NotBoolean`] if a boolean is neither 0 nor 1.
    pub fn data(&self, name: &str) -> Result<TensorData, CheckpointError> {
        let Some(Located { entry, bytes, strides }) = self.find(name) else {
            let nearest = report::nearest(name, self.entries().map(|entry| entry.name.as_str()));
            return Err(CheckpointError::NoTensor { path: self.path.clone(), name: name.to_string(), nearest });
        };
        let element = entry.dtype.size();
        if entry.dtype == values::BOOL && !bytes.iter().all(|&byte| byte <= 1) {
            return Err(CheckpointError::NotBoolean { path: entry.file.clone(), tensor: entry.name.clone() });
        }
        let values = match strides {
            Some(strides) => values::copy_aligned(&values::gather(bytes, &entry.shape, strides, element), element),
            None if bytes.as_ptr().addr().is_multiple_of(element) => {
                burn::tensor::Bytes::from_shared(bytes.clone(), AllocationProperty::File)
            }
            None => values::copy_aligned(bytes, element),
        };
        TensorData::try_from_bytes(values, entry.shape.clone(), entry.dtype).map_err(|source| CheckpointError::Values {
            path: entry.file.clone(),
            name: entry.name.clone(),
            reason: source.to_string(),
        })
    }

    fn find(&self, name: &str) -> Option<&Located> {
        let at = self.tensors.binary_search_by(|tensor| tensor.entry.name.as_str().cmp(name)).ok()?;
        self.tensors.get(at)
    }
}
