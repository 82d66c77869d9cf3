//! Reading one safetensors file: its mapped bytes -> a fully checked list of tensors.
//!
//! Layout: 8 bytes little-endian header length, the header (a JSON object of name -> dtype, shape and offsets, padded
//! with spaces), the data. The data holds every tensor once, with no overlaps, holes or trailing bytes.
//!
//! Source: the safetensors format (README of huggingface/safetensors). The crate of that name checks the same, but
//! keeps the last of duplicate names and does not say which tensor is wrong; the tests use it as the oracle.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;

use burn::tensor::DType;
use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::error::CheckpointError;
use crate::values::{self, Named};
use crate::{Located, TensorEntry};

/// Longest header that is accepted, in bytes; the limit of the safetensors crate.
pub(super) const MAX_HEADER: u64 = 100_000_000;
/// Bytes of the length field.
pub(super) const LENGTH_FIELD: usize = 8;
/// Key under which the header keeps strings about the file.
pub(super) const METADATA_KEY: &str = "__metadata__";

/// What a safetensors file holds.
pub(super) struct Header {
    /// Every tensor, in the order of the data.
    pub tensors: Vec<Located>,
    /// Strings about the file.
    pub metadata: BTreeMap<String, String>,
}

/// Reads and checks the header of a mapped file.
///
/// # Errors
/// The variants of [`CheckpointError`] from `Truncated` to `Hole`.
pub(super) fn read(path: &Path, file: &Bytes) -> Result<Header, CheckpointError> {
    let own_path = || path.to_path_buf();
    let size = file.len() as u64;
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_FIELD>() else {
        return Err(CheckpointError::Truncated { path: own_path(), expected: LENGTH_FIELD as u64, actual: size });
    };
    let declared = u64::from_le_bytes(*length);
    let available = rest.len() as u64;
    if declared > MAX_HEADER {
        return Err(CheckpointError::HeaderTooLarge { path: own_path(), declared, limit: MAX_HEADER });
    }
    if declared > available {
        return Err(CheckpointError::HeaderBeyondFile { path: own_path(), declared, available });
    }
    let (header, data) = rest.split_at(declared as usize);
    let raw: RawHeader =
        serde_json::from_slice(header).map_err(|source| CheckpointError::HeaderJson { path: own_path(), source })?;

    let mut names = HashSet::with_capacity(raw.tensors.len());
    let mut tensors = Vec::with_capacity(raw.tensors.len());
    for (name, tensor) in raw.tensors {
        if !names.insert(name.clone()) {
            return Err(CheckpointError::DuplicateTensor { path: own_path(), tensor: name });
        }
        tensors.push(check(path, name, tensor)?);
    }
    tensors.sort_by(|a, b| (a.begin, a.end, &a.name).cmp(&(b.begin, b.end, &b.name)));
    check_layout(path, &tensors, data.len() as u64, size)?;

    let data = file.slice(file.len() - data.len()..);
    let locate = |tensor: Checked| Located {
        bytes: data.slice(tensor.begin as usize..tensor.end as usize),
        strides: None,
        entry: TensorEntry {
            num_bytes: (tensor.end - tensor.begin) as usize,
            name: tensor.name,
            shape: tensor.shape,
            dtype: tensor.dtype,
            file: own_path(),
        },
    };
    Ok(Header { tensors: tensors.into_iter().map(locate).collect(), metadata: raw.metadata })
}

struct Checked {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    begin: u64,
    end: u64,
}

/// Checks one tensor on its own: dtype, shape, and whether both need the bytes between the offsets.
fn check(path: &Path, name: String, raw: RawTensor) -> Result<Checked, CheckpointError> {
    let path = path.to_path_buf();
    let RawTensor { dtype, shape, data_offsets: [begin, end] } = raw;
    let dtype = match values::dtype_from_name(&dtype) {
        Named::Supported(dtype) => dtype,
        Named::Unsupported => return Err(CheckpointError::UnsupportedDType { path, tensor: name, dtype }),
        Named::Unknown => return Err(CheckpointError::UnknownDType { path, tensor: name, dtype }),
    };
    let Some(expected) = values::num_bytes(&shape, dtype) else {
        return Err(CheckpointError::ShapeOverflow { path, tensor: name, shape });
    };
    let Some(actual) = end.checked_sub(begin) else {
        return Err(CheckpointError::ReversedOffsets { path, tensor: name, begin, end });
    };
    if expected as u64 != actual {
        let expected = expected as u64;
        return Err(CheckpointError::WrongSize { path, tensor: name, shape, dtype, expected, actual });
    }
    Ok(Checked { name, dtype, shape, begin, end })
}

/// Checks that the tensors, sorted by position, fill the data exactly.
fn check_layout(path: &Path, tensors: &[Checked], available: u64, file_size: u64) -> Result<(), CheckpointError> {
    let own_path = || path.to_path_buf();
    let mut filled = 0;
    let mut previous = "";
    for Checked { name, begin, end, .. } in tensors {
        if *begin < filled {
            let (first, second) = (previous.to_string(), name.clone());
            return Err(CheckpointError::Overlap { path: own_path(), first, second });
        }
        if *begin > filled {
            return Err(match *end > available {
                true => {
                    CheckpointError::OffsetsBeyondFile { path: own_path(), tensor: name.clone(), end: *end, available }
                }
                false => CheckpointError::Hole { path: own_path(), at: filled, bytes: begin - filled },
            });
        }
        filled = *end;
        previous = name;
    }
    if filled > available {
        let expected = (file_size - available).saturating_add(filled);
        return Err(CheckpointError::Truncated { path: own_path(), expected, actual: file_size });
    }
    if filled < available {
        return Err(CheckpointError::Hole { path: own_path(), at: filled, bytes: available - filled });
    }
    Ok(())
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// The header as it stands: a list, because a map would hide duplicate names.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader { tensors: Vec::new(), metadata: BTreeMap::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
