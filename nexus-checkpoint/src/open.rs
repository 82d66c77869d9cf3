//! From a path to an open checkpoint: which files make it up, their memory maps, and whether index and shards agree.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::error::CheckpointError;
use crate::{Checkpoint, Located, header, torch};

const INDEX_SUFFIX: &str = ".safetensors.index.json";
const FILE_SUFFIX: &str = ".safetensors";
const LOOKED_FOR: &str = "model.safetensors.index.json, *.safetensors.index.json, model.safetensors, *.safetensors";

/// Opens what is at the path; see [`Checkpoint::open`].
pub(super) fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let metadata = fs::metadata(path).map_err(|source| CheckpointError::read(path, source))?;
    let file = if metadata.is_dir() { choose_in(path)? } else { path.to_path_buf() };
    let name = file.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let mut checkpoint = if name.ends_with(INDEX_SUFFIX) {
        open_index(&file)?
    } else if name.ends_with(FILE_SUFFIX) {
        let header = header::read(&file, &map_file(&file)?)?;
        assemble(&file, vec![file.clone()], header.tensors, header.metadata)
    } else if [".bin", ".pt", ".pth"].iter().any(|suffix| name.ends_with(suffix)) {
        let tensors = torch::read(&file, &map_file(&file)?)?;
        assemble(&file, vec![file.clone()], tensors, BTreeMap::new())
    } else {
        return Err(CheckpointError::UnknownFormat { path: file });
    };
    checkpoint.path = path.to_path_buf();
    Ok(checkpoint)
}

fn assemble(
    path: &Path,
    mut files: Vec<PathBuf>,
    mut tensors: Vec<Located>,
    metadata: BTreeMap<String, String>,
) -> Checkpoint {
    files.sort();
    tensors.sort_by(|a, b| a.entry.name.cmp(&b.entry.name));
    Checkpoint { path: path.to_path_buf(), files, metadata, tensors }
}

/// Chooses the checkpoint of a directory.
fn choose_in(directory: &Path) -> Result<PathBuf, CheckpointError> {
    let read = |source| CheckpointError::read(directory, source);
    let mut indices = Vec::new();
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(read)? {
        // A name that is not UTF-8 cannot be one of ours.
        if let Ok(name) = entry.map_err(read)?.file_name().into_string() {
            if name.ends_with(INDEX_SUFFIX) {
                indices.push(name);
            } else if name.ends_with(FILE_SUFFIX) {
                files.push(name);
            }
        }
    }
    for (preferred, mut names) in [("model.safetensors.index.json", indices), ("model.safetensors", files)] {
        names.sort();
        match names.as_slice() {
            [] => {}
            [only] => return Ok(directory.join(only)),
            several if several.iter().any(|name| name == preferred) => return Ok(directory.join(preferred)),
            _ => {
                let directory = directory.to_path_buf();
                return Err(CheckpointError::SeveralCheckpoints { directory, candidates: names });
            }
        }
    }
    Err(CheckpointError::NoWeights { directory: directory.to_path_buf(), looked_for: LOOKED_FOR })
}

/// Opens the shards that an index names, and checks that both say the same.
fn open_index(index: &Path) -> Result<Checkpoint, CheckpointError> {
    let bad = |reason: String| CheckpointError::Index { path: index.to_path_buf(), reason };
    let text = map_file(index)?;
    if text.len() as u64 > header::MAX_HEADER {
        return Err(bad(format!("{} bytes are too many", text.len())));
    }
    let Index { weight_map: WeightMap(entries) } =
        serde_json::from_slice(&text).map_err(|source| bad(source.to_string()))?;
    if entries.is_empty() {
        return Err(bad("`weight_map` is empty".to_string()));
    }
    let mut promised: HashMap<&str, &str> = HashMap::with_capacity(entries.len());
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in &entries {
        if promised.insert(tensor, shard).is_some() {
            return Err(CheckpointError::DuplicateTensor { path: index.to_path_buf(), tensor: tensor.clone() });
        }
        shards.entry(shard).or_default().push(tensor);
    }

    let directory = index.parent().unwrap_or(Path::new(""));
    let (mut files, mut tensors, mut metadata) = (Vec::new(), Vec::new(), BTreeMap::new());
    for (shard, names) in shards {
        // An index comes from outside: it may not reach for files elsewhere.
        let plain = Path::new(shard).file_name().is_some_and(|name| name == shard) && !shard.contains('\\');
        if !plain {
            return Err(bad(format!("shard `{shard}` is not the name of a file beside the index")));
        }
        let file = directory.join(shard);
        let map = map_file(&file).map_err(|error| match error {
            CheckpointError::NotFound { .. } => {
                CheckpointError::ShardMissing { index: index.to_path_buf(), shard: shard.to_string() }
            }
            other => other,
        })?;
        let header = header::read(&file, &map)?;
        let mut found = HashSet::with_capacity(header.tensors.len());
        for tensor in &header.tensors {
            let name = tensor.entry.name.as_str();
            if promised.get(name) != Some(&shard) {
                let (index, shard, tensor) = (index.to_path_buf(), shard.to_string(), name.to_string());
                return Err(CheckpointError::NotInIndex { index, shard, tensor });
            }
            found.insert(name);
        }
        if let Some(absent) = names.into_iter().find(|name| !found.contains(name)) {
            let (index, shard, tensor) = (index.to_path_buf(), shard.to_string(), absent.to_string());
            return Err(CheckpointError::NotInShard { index, shard, tensor });
        }
        files.push(file);
        tensors.extend(header.tensors);
        metadata.extend(header.metadata);
    }
    Ok(assemble(index, files, tensors, metadata))
}

/// Maps a whole file, read-only; clones and slices of the result keep the map alive.
///
/// Pages are read when they are touched and can be dropped by the system at any time, so a mapped checkpoint takes no
/// anonymous memory. An empty file gives empty bytes.
///
/// # Errors
/// [`CheckpointError::NotFound`] or [`CheckpointError::Read`].
fn map_file(path: &Path) -> Result<Bytes, CheckpointError> {
    let error = |source| CheckpointError::read(path, source);
    let file = File::open(path).map_err(error)?;
    let metadata = file.metadata().map_err(error)?;
    if !metadata.is_file() {
        return Err(error(std::io::Error::other("not a regular file")));
    }
    if metadata.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the map is read-only and private. Another process that writes to or shortens the file while it is
    // mapped could change these bytes or stop us with SIGBUS; released weights are not edited in place, and our own
    // writer replaces files by renaming, which leaves existing maps intact. Every value read from the map is either
    // validated or plain numbers, of which any bit pattern is valid.
    #[allow(unsafe_code)]
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(error)?;
    Ok(Bytes::from_owner(map))
}

#[derive(Deserialize)]
struct Index {
    weight_map: WeightMap,
}

/// Pairs of (tensor, shard) as they stand: a map would hide duplicate names.
struct WeightMap(Vec<(String, String)>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor name to file name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(WeightMap(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}
