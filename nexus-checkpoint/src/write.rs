//! Writing safetensors: named tensors -> one file that appears whole or not at all.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::{DType, TensorData};
use serde::Serialize;

use crate::error::CheckpointError;
use crate::header::{LENGTH_FIELD, METADATA_KEY};
use crate::values;

/// Writes tensors as one safetensors file.
///
/// The file is written beside its place, synced to disk and renamed, so a reader sees the old file or the new one.
/// The bytes depend on the arguments alone: widest dtype first, then by name; metadata sorted by key.
///
/// # Errors
/// [`CheckpointError::DuplicateTensor`] if a name occurs twice, [`CheckpointError::UnsupportedDType`] for quantised
/// data, [`CheckpointError::Write`] if the system refuses. No partial file is left, and an existing file stays as it
/// was.
pub fn write_safetensors(
    path: &Path,
    tensors: Vec<(String, TensorData)>,
    metadata: Option<HashMap<String, String>>,
) -> Result<(), CheckpointError> {
    let mut planned = Vec::with_capacity(tensors.len());
    let mut contents = HashMap::with_capacity(tensors.len());
    for (name, data) in tensors {
        let data = native_bool(path, &name, data)?;
        planned.push(Planned { name: name.clone(), shape: data.shape().as_slice().to_vec(), dtype: data.dtype() });
        contents.insert(name, data);
    }
    write_planned(path, planned, metadata, |file| {
        for (name, data) in &contents {
            file.put(name, data.as_bytes())?;
        }
        Ok(())
    })
}

/// Name, shape and dtype of a tensor that will be written.
pub(super) struct Planned {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: DType,
}

/// Writes a file of planned tensors, whose values `fill` puts in any order, so that they need not be in memory
/// together.
///
/// # Errors
/// As [`write_safetensors`], and what `fill` returns.
pub(super) fn write_planned(
    path: &Path,
    mut planned: Vec<Planned>,
    metadata: Option<HashMap<String, String>>,
    fill: impl FnOnce(&mut PlannedFile<'_>) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    planned.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(&b.name)));
    let mut places = HashMap::with_capacity(planned.len());
    let mut header = Vec::with_capacity(planned.len());
    let mut end = 0u64;
    for Planned { name, shape, dtype } in planned {
        let (tensor, own_path) = (name.clone(), path.to_path_buf());
        let Some(dtype_name) = values::dtype_name(dtype) else {
            return Err(CheckpointError::UnsupportedDType { path: own_path, tensor, dtype: dtype.name().to_string() });
        };
        let Some(len) = values::num_bytes(&shape, dtype) else {
            return Err(CheckpointError::ShapeOverflow { path: own_path, tensor, shape });
        };
        let begin = end;
        end += len as u64;
        if places.insert(name.clone(), (begin, len)).is_some() || name == METADATA_KEY {
            return Err(CheckpointError::DuplicateTensor { path: own_path, tensor });
        }
        header.push((name, HeaderTensor { dtype: dtype_name, shape, data_offsets: [begin, end] }));
    }
    let header = header_bytes(header, metadata).map_err(|source| CheckpointError::write(path, source.into()))?;

    write_atomically(path, |file| {
        let write = |source| CheckpointError::write(path, source);
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(write)?;
        file.write_all(&header).map_err(write)?;
        let data_at = (LENGTH_FIELD + header.len()) as u64;
        file.set_len(data_at + end).map_err(write)?;
        fill(&mut PlannedFile { file, path, data_at, places: &places })
    })
}

/// A file whose header is written and whose tensors are being put in.
pub(super) struct PlannedFile<'a> {
    file: &'a mut File,
    path: &'a Path,
    data_at: u64,
    places: &'a HashMap<String, (u64, usize)>,
}

impl PlannedFile<'_> {
    /// Writes the values of one planned tensor.
    ///
    /// # Errors
    /// [`CheckpointError::Values`] if the tensor was not planned or has another size now; [`CheckpointError::Write`].
    pub(super) fn put(&mut self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        match self.places.get(name) {
            Some((begin, len)) if *len == bytes.len() => {
                let write = |source| CheckpointError::write(self.path, source);
                self.file.seek(SeekFrom::Start(self.data_at + begin)).map_err(write)?;
                self.file.write_all(bytes).map_err(write)
            }
            _ => {
                let reason = format!("{} bytes were not planned for", bytes.len());
                Err(CheckpointError::Values { path: self.path.to_path_buf(), name: name.to_string(), reason })
            }
        }
    }
}

/// Turns booleans of a backend's own width into bytes.
pub(super) fn native_bool(path: &Path, name: &str, data: TensorData) -> Result<TensorData, CheckpointError> {
    match data.dtype() {
        DType::Bool(_) => data.try_cast(values::BOOL).map_err(|source| CheckpointError::Values {
            path: path.to_path_buf(),
            name: name.to_string(),
            reason: source.to_string(),
        }),
        _ => Ok(data),
    }
}

#[derive(Serialize)]
struct HeaderTensor {
    dtype: &'static str,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// The header in the order of the data, padded so that the data is aligned to 8 bytes.
fn header_bytes(
    tensors: Vec<(String, HeaderTensor)>,
    metadata: Option<HashMap<String, String>>,
) -> Result<Vec<u8>, serde_json::Error> {
    struct Header {
        metadata: Option<BTreeMap<String, String>>,
        tensors: Vec<(String, HeaderTensor)>,
    }
    impl Serialize for Header {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            use serde::ser::SerializeMap;
            let mut map = serializer.serialize_map(None)?;
            if let Some(metadata) = &self.metadata {
                map.serialize_entry(METADATA_KEY, metadata)?;
            }
            for (name, tensor) in &self.tensors {
                map.serialize_entry(name, tensor)?;
            }
            map.end()
        }
    }
    let mut bytes = serde_json::to_vec(&Header { metadata: metadata.map(BTreeMap::from_iter), tensors })?;
    bytes.resize(bytes.len().next_multiple_of(LENGTH_FIELD), b' ');
    Ok(bytes)
}

/// Writes a file beside its place, syncs it and renames it.
///
/// # Errors
/// [`CheckpointError::Write`] and what `fill` returns; the unfinished file is removed.
pub(super) fn write_atomically(
    path: &Path,
    fill: impl FnOnce(&mut File) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let error = |source| CheckpointError::write(path, source);
    let Some(file_name) = path.file_name() else {
        return Err(error(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a file name")));
    };
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let mut unfinished_name = std::ffi::OsString::from(".");
    unfinished_name.push(file_name);
    unfinished_name.push(format!(".{}-{}.unfinished", std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed)));
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));

    let unfinished = directory.join(unfinished_name);
    let mut file = File::create_new(&unfinished).map_err(error)?;
    let mut unfinished = Unfinished { path: unfinished, renamed: false };
    fill(&mut file)?;
    file.sync_all().map_err(error)?;
    drop(file);
    fs::rename(&unfinished.path, path).map_err(error)?;
    unfinished.renamed = true;
    // The rename itself is durable once the directory is synced; not every system lets a directory be opened.
    if let Ok(directory) = File::open(directory) {
        let _ = directory.sync_all();
    }
    Ok(())
}

/// Removes the file on every way out but success, a panic included.
struct Unfinished {
    path: PathBuf,
    renamed: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.renamed {
            let _ = fs::remove_file(&self.path);
        }
    }
}
