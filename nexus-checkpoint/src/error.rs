//! What can be wrong with checkpoint files: one variant for each way, always with the file and, where there is one,
//! the tensor.

use std::path::{Path, PathBuf};

use burn::tensor::DType;

use crate::report::LoadReport;
#[cfg(feature = "manifest")]
use crate::{manifest::ManifestDifference, report::write_some};

/// A checkpoint that cannot be opened, read, loaded into a module, written or verified.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// No such file or directory.
    #[error("{path}: no such file or directory: check the path, or download the checkpoint", path = path.display())]
    NotFound {
        /// Path that was given.
        path: PathBuf,
    },
    /// A directory without weights.
    #[error("{path}: no weights in this directory: looked for {looked_for}", path = directory.display())]
    NoWeights {
        /// Directory that was searched.
        directory: PathBuf,
        /// File names that would have been taken, in order.
        looked_for: &'static str,
    },
    /// A directory with several checkpoints and no rule to choose one.
    #[error(
        "{path}: several checkpoints in this directory, name one of them: {candidates}",
        path = directory.display(), candidates = candidates.join(", ")
    )]
    SeveralCheckpoints {
        /// Directory that was searched.
        directory: PathBuf,
        /// Names of the files among which there is no choice.
        candidates: Vec<String>,
    },
    /// A file name whose extension says nothing known.
    #[error(
        "{path}: not a checkpoint that can be read: expected .safetensors, .safetensors.index.json, .bin, .pt or .pth",
        path = path.display()
    )]
    UnknownFormat {
        /// Path that was given.
        path: PathBuf,
    },
    /// The system refused to open, map or read a file.
    #[error("{path}: cannot be read: {source}", path = path.display())]
    Read {
        /// File that was read.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The system refused to write a file; nothing was left at its path.
    #[error("{path}: cannot be written: {source}", path = path.display())]
    Write {
        /// File that was to be written.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// The file is shorter than its header says.
    #[error(
        "{path}: truncated: {actual} bytes of {expected}: download or copy the file again",
        path = path.display()
    )]
    Truncated {
        /// File that was read.
        path: PathBuf,
        /// Size that the header asks for, in bytes.
        expected: u64,
        /// Size of the file, in bytes.
        actual: u64,
    },
    /// The header's declared length is absurd.
    #[error(
        "{path}: the header claims {declared} bytes (limit {limit}): this is not a safetensors file, or it is damaged",
        path = path.display()
    )]
    HeaderTooLarge {
        /// File that was read.
        path: PathBuf,
        /// Length that the file declares, in bytes.
        declared: u64,
        /// Longest header that is accepted, in bytes.
        limit: u64,
    },
    /// The header does not fit in the file.
    #[error(
        "{path}: the header claims {declared} bytes, but only {available} follow: the file is cut or damaged",
        path = path.display()
    )]
    HeaderBeyondFile {
        /// File that was read.
        path: PathBuf,
        /// Length that the file declares, in bytes.
        declared: u64,
        /// Bytes after the length field.
        available: u64,
    },
    /// The header is not the JSON object that the format asks for.
    #[error("{path}: the header is not valid safetensors JSON: {source}", path = path.display())]
    HeaderJson {
        /// File that was read.
        path: PathBuf,
        /// What serde said.
        source: serde_json::Error,
    },
    /// A name occurs twice.
    #[error("{path}: tensor `{tensor}` occurs twice", path = path.display())]
    DuplicateTensor {
        /// File that was read or was to be written.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
    },
    /// A dtype that no format defines.
    #[error("{path}: tensor `{tensor}` has the unknown dtype `{dtype}`", path = path.display())]
    UnknownDType {
        /// File that was read.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Dtype as the file spells it.
        dtype: String,
    },
    /// A dtype that is known and cannot be held by a tensor, such as `F8_E4M3`.
    #[error(
        "{path}: tensor `{tensor}` has dtype `{dtype}`, which is not supported: convert the file to bf16, f16 or f32",
        path = path.display()
    )]
    UnsupportedDType {
        /// File that was read or was to be written.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Dtype as the file spells it.
        dtype: String,
    },
    /// A shape whose size does not fit in memory.
    #[error("{path}: tensor `{tensor}` has the impossible shape {shape:?}", path = path.display())]
    ShapeOverflow {
        /// File that was read.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Shape that the file declares.
        shape: Vec<usize>,
    },
    /// Shape and dtype need another number of bytes than the tensor has.
    #[error(
        "{path}: tensor `{tensor}` has {actual} bytes, but {shape:?} of {dtype} needs {expected}: the header is wrong",
        path = path.display(), dtype = dtype.name()
    )]
    WrongSize {
        /// File that was read.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Shape that the file declares.
        shape: Vec<usize>,
        /// Dtype that the file declares.
        dtype: DType,
        /// Bytes that shape and dtype need.
        expected: u64,
        /// Bytes between the offsets.
        actual: u64,
    },
    /// A tensor that ends before it begins.
    #[error("{path}: tensor `{tensor}` begins at byte {begin} and ends at {end}", path = path.display())]
    ReversedOffsets {
        /// File that was read.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Declared begin, in bytes from the start of the data.
        begin: u64,
        /// Declared end, in bytes from the start of the data.
        end: u64,
    },
    /// A tensor that lies past the end of the file.
    #[error(
        "{path}: tensor `{tensor}` ends at byte {end} of the data, which has {available}: the header is wrong",
        path = path.display()
    )]
    OffsetsBeyondFile {
        /// File that was read.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Declared end, in bytes from the start of the data.
        end: u64,
        /// Bytes of data in the file.
        available: u64,
    },
    /// Two tensors share bytes.
    #[error("{path}: tensors `{first}` and `{second}` overlap", path = path.display())]
    Overlap {
        /// File that was read.
        path: PathBuf,
        /// Tensor that begins first.
        first: String,
        /// Tensor that begins inside it.
        second: String,
    },
    /// Bytes that belong to no tensor, which the format does not allow.
    #[error(
        "{path}: {bytes} bytes at byte {at} of the data belong to no tensor: the file is damaged",
        path = path.display()
    )]
    Hole {
        /// File that was read.
        path: PathBuf,
        /// Where they begin, in bytes from the start of the data.
        at: u64,
        /// How many there are.
        bytes: u64,
    },

    /// The index of a sharded checkpoint is malformed.
    #[error("{path}: not a usable index: {reason}", path = path.display())]
    Index {
        /// Index file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The index names a shard that is absent.
    #[error("{path}: the index names `{shard}`, which is not beside it: download the missing shard", path = index.display())]
    ShardMissing {
        /// Index file.
        index: PathBuf,
        /// File that it names.
        shard: String,
    },
    /// The index promises a tensor that its shard does not have.
    #[error("{path}: the index puts `{tensor}` in `{shard}`, which does not have it", path = index.display())]
    NotInShard {
        /// Index file.
        index: PathBuf,
        /// Shard that the index names.
        shard: String,
        /// Name of the tensor.
        tensor: String,
    },
    /// A shard has a tensor that the index does not promise there.
    #[error(
        "{path}: `{shard}` has `{tensor}`, which the index does not put there: index and shards are of different checkpoints",
        path = index.display()
    )]
    NotInIndex {
        /// Index file.
        index: PathBuf,
        /// Shard that has the tensor.
        shard: String,
        /// Name of the tensor.
        tensor: String,
    },

    /// The file is not a zip archive of the kind that `torch.save` writes.
    #[error(
        "{path}: not a torch.save archive: {reason}: download it again, or save it again with torch 1.6 or newer",
        path = path.display()
    )]
    BrokenZip {
        /// File that was read.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A compressed entry, which could inflate without bound; `torch.save` stores its entries.
    #[error(
        "{path}: `{entry}` is compressed ({stored} bytes claim to become {declared}) and inflates without bound: \
         torch.save stores entries as they are, so save the file again",
        path = path.display()
    )]
    CompressedEntry {
        /// File that was read.
        path: PathBuf,
        /// Name of the entry.
        entry: String,
        /// Size in the file, in bytes.
        stored: u64,
        /// Size that it claims to have afterwards, in bytes.
        declared: u64,
    },
    /// The pickle asks for code that no checkpoint of tensors needs. It was not run.
    #[error(
        "{path}: the pickle asks for `{global}`, which is not part of a checkpoint of plain tensors, and was not run: \
         save `model.state_dict()` again, or convert the file to safetensors",
        path = path.display()
    )]
    ForeignGlobal {
        /// File that was read.
        path: PathBuf,
        /// `module.name` that the pickle asks for.
        global: String,
    },
    /// The pickle is malformed or uses what a checkpoint of tensors does not need.
    #[error("{path}: the pickle cannot be read at byte {at}: {reason}", path = path.display())]
    Pickle {
        /// File that was read.
        path: PathBuf,
        /// Position in `data.pkl`, in bytes.
        at: usize,
        /// What is wrong.
        reason: String,
    },
    /// The pickle holds something else than a dictionary of tensors.
    #[error("{path}: `{key}` is not a tensor: save only `model.state_dict()`", path = path.display())]
    NotATensor {
        /// File that was read.
        path: PathBuf,
        /// Key of the dictionary.
        key: String,
    },
    /// A tensor that reaches beyond its storage.
    #[error(
        "{path}: tensor `{tensor}` reaches element {needed} of storage `{storage}`, which has {available}",
        path = path.display()
    )]
    BeyondStorage {
        /// File that was read.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Name of the storage.
        storage: String,
        /// Elements that the tensor needs the storage to have.
        needed: u64,
        /// Elements that it has.
        available: u64,
    },
    /// A strided tensor that repeats elements, so that its size has no bound in the file.
    #[error(
        "{path}: tensor `{tensor}` of shape {shape:?} has strides {strides:?}, which repeat elements: \
         save it again after `.contiguous()`",
        path = path.display()
    )]
    RepeatingStrides {
        /// File that was read.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides, in elements.
        strides: Vec<usize>,
    },

    /// The checkpoint has no such tensor.
    #[error("{path}: no tensor `{name}`{nearest}", path = path.display(), nearest = nearest_hint(nearest))]
    NoTensor {
        /// Checkpoint that was asked.
        path: PathBuf,
        /// Name that was asked for.
        name: String,
        /// The most similar name that it has.
        nearest: Option<String>,
    },
    /// A boolean tensor with a byte other than 0 and 1.
    #[error("{path}: boolean tensor `{tensor}` holds a byte other than 0 and 1: the file is damaged", path = path.display())]
    NotBoolean {
        /// File that was read.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
    },
    /// The tensors of the files and the parameters of the module do not fit together; no weight was touched.
    #[error("{0}")]
    Mismatch(Box<LoadReport>),
    /// A weight holds NaN or infinity.
    #[error(
        "{path}: tensor `{name}` holds {count} values that are NaN or infinite, the first at element {first_index}",
        path = file.display()
    )]
    NotFinite {
        /// Name of the tensor.
        name: String,
        /// File that holds it.
        file: PathBuf,
        /// Number of such values.
        count: usize,
        /// Index of the first, in row-major order.
        first_index: usize,
    },
    /// A tensor's values cannot be converted to, or read back as, the dtype asked for.
    #[error("{path}: tensor `{name}`: {reason}", path = path.display())]
    Values {
        /// File that was read or was to be written.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// What burn said.
        reason: String,
    },

    /// A manifest that is not JSON of the expected form.
    #[cfg(feature = "manifest")]
    #[error("{path}: not a manifest: {source}", path = path.display())]
    ManifestJson {
        /// Manifest file.
        path: PathBuf,
        /// What serde said.
        source: serde_json::Error,
    },
    /// A manifest of a version that this crate does not know.
    #[cfg(feature = "manifest")]
    #[error("{path}: manifest version {version} is not known (expected {expected}): make it again", path = path.display())]
    ManifestVersion {
        /// Manifest file.
        path: PathBuf,
        /// Version that it states.
        version: u32,
        /// Version that is known.
        expected: u32,
    },
    /// The checkpoint is not the one that the manifest describes.
    #[cfg(feature = "manifest")]
    #[error("{path}: not the checkpoint of the manifest:{differences}", path = path.display(), differences = difference_lines(differences))]
    ManifestMismatch {
        /// Checkpoint that was verified.
        path: PathBuf,
        /// Every difference, by name.
        differences: Vec<ManifestDifference>,
    },
}

impl CheckpointError {
    /// A system error on reading: [`CheckpointError::NotFound`] or [`CheckpointError::Read`].
    pub(super) fn read(path: &Path, source: std::io::Error) -> Self {
        match source.kind() {
            std::io::ErrorKind::NotFound => Self::NotFound { path: path.to_path_buf() },
            _ => Self::Read { path: path.to_path_buf(), source },
        }
    }

    /// A system error on writing.
    pub(super) fn write(path: &Path, source: std::io::Error) -> Self {
        Self::Write { path: path.to_path_buf(), source }
    }
}

fn nearest_hint(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|name| format!(" (nearest: `{name}`)")).unwrap_or_default()
}

#[cfg(feature = "manifest")]
fn difference_lines(differences: &[ManifestDifference]) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_some(&mut text, differences, |out, difference| write!(out, "\n  {difference}"));
    text
}
