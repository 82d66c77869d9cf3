//! Reading a `torch.save` archive: its mapped bytes -> a checked list of tensors that lie in the map.
//!
//! Layout: a zip of stored entries under one folder: `data.pkl` (a pickled dictionary of tensors), `data/<n>` (the
//! storages, aligned to 64 bytes), `byteorder`, `version`. Several tensors may share a storage.
//!
//! Source: PyTorch `torch/serialization.py` (`_save`, `_load`).

use std::collections::HashMap;
use std::path::Path;

use bytes::Bytes;

use crate::error::CheckpointError;
use crate::pickle::{self, PickledTensor};
use crate::{Located, TensorEntry, values, zip};

const PICKLE_NAME: &str = "data.pkl";

/// Reads a mapped archive.
///
/// # Errors
/// The variants of [`CheckpointError`] from `BrokenZip` to `RepeatingStrides`, and
/// [`CheckpointError::ShapeOverflow`].
pub(super) fn read(path: &Path, file: &Bytes) -> Result<Vec<Located>, CheckpointError> {
    let broken = |reason: String| CheckpointError::BrokenZip { path: path.to_path_buf(), reason };
    let entries = zip::read(path, file)?;
    let folders = entries.keys().filter_map(|name| name.strip_suffix(PICKLE_NAME));
    let mut folders = folders.filter(|folder| folder.is_empty() || folder.ends_with('/'));
    let (Some(folder), None) = (folders.next(), folders.next()) else {
        return Err(broken(format!("it must hold one `{PICKLE_NAME}`")));
    };
    if entries.get(&format!("{folder}byteorder")).is_some_and(|order| order.as_ref() != b"little") {
        return Err(broken("its byte order is not little-endian".to_string()));
    }
    let tensors = pickle::read(path, &entries[&format!("{folder}{PICKLE_NAME}")])?;
    tensors.into_iter().map(|(name, tensor)| locate(path, &entries, folder, name, tensor)).collect()
}

/// Finds the values of a tensor in its storage.
fn locate(
    path: &Path,
    entries: &HashMap<String, Bytes>,
    folder: &str,
    name: String,
    tensor: PickledTensor,
) -> Result<Located, CheckpointError> {
    let own_path = || path.to_path_buf();
    let PickledTensor { storage, storage_len, dtype, offset, shape, strides } = tensor;
    let broken = |reason: String| CheckpointError::BrokenZip { path: own_path(), reason };
    let stored = entries.get(&format!("{folder}data/{storage}"));
    let stored = stored.ok_or_else(|| broken(format!("storage `{storage}` of tensor `{name}` is absent")))?;
    let element = dtype.size();
    if storage_len.checked_mul(element as u64) != Some(stored.len() as u64) {
        let found = stored.len();
        return Err(broken(format!("storage `{storage}` has {found} bytes, not {storage_len} x {element}")));
    }
    let Some(num_bytes) = values::num_bytes(&shape, dtype) else {
        return Err(CheckpointError::ShapeOverflow { path: own_path(), tensor: name, shape });
    };

    let needed = elements_needed(offset, &shape, &strides);
    let Some(needed) = needed.filter(|&needed| needed <= storage_len) else {
        let needed = needed.unwrap_or(u64::MAX);
        return Err(CheckpointError::BeyondStorage {
            path: own_path(),
            tensor: name,
            storage,
            needed,
            available: storage_len,
        });
    };
    // An empty tensor needs no element, wherever it claims to begin.
    let begin = offset.min(needed) as usize * element;
    let bytes = stored.slice(begin..needed as usize * element);
    let strides = (!is_row_major(&shape, &strides)).then_some(strides);
    if let Some(strides) = &strides
        && num_bytes > bytes.len()
    {
        return Err(CheckpointError::RepeatingStrides {
            path: own_path(),
            tensor: name,
            shape,
            strides: strides.clone(),
        });
    }
    Ok(Located { entry: TensorEntry { name, shape, dtype, num_bytes, file: own_path() }, bytes, strides })
}

/// Elements that the storage must have; `None` if they cannot be counted.
fn elements_needed(offset: u64, shape: &[usize], strides: &[usize]) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    let last = shape.iter().zip(strides).try_fold(offset, |last, (side, stride)| {
        let reach = (*side as u64 - 1).checked_mul(*stride as u64)?;
        last.checked_add(reach)
    })?;
    last.checked_add(1)
}

/// Whether the elements follow one another in row-major order; the strides of sides of length 1 say nothing.
fn is_row_major(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    shape.contains(&0)
        || shape.iter().zip(strides).rev().filter(|(side, _)| **side != 1).all(|(side, stride)| {
            let fits = *stride == expected;
            expected *= side;
            fits
        })
}
