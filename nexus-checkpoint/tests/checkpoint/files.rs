//! Safetensors files, sharded and single: what is read, what is refused and why, and what is written.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{BoolStore, DType, TensorData, bf16, f16};
use nexus_checkpoint::{Checkpoint, CheckpointError, write_safetensors};
use tempfile::TempDir;

/// A safetensors file of a header, as it stands, and data.
fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Writes a file into a directory of its own.
fn file(name: &str, bytes: &[u8]) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::write(&path, bytes).unwrap();
    (directory, path)
}

/// The error that opening these bytes gives; it must name the file.
fn refused(bytes: &[u8]) -> CheckpointError {
    let (_directory, path) = file("weights.safetensors", bytes);
    let error = Checkpoint::open(&path).unwrap_err();
    assert!(error.to_string().contains("weights.safetensors"), "{error}");
    error
}

macro_rules! check {
    ($error:expr, $pattern:pat $(if $guard:expr)?) => {
        match $error {
            $pattern $(if $guard)? => {}
            other => panic!("{other:?}"),
        }
    };
}

fn floats(values: &[f32], shape: &[usize]) -> TensorData {
    TensorData::new(values.to_vec(), shape.to_vec())
}

const ONE: &str = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

#[test]
fn reads_what_the_format_allows() {
    let header = concat!(
        r#"{"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[4,8]},"__metadata__":{"format":"pt"},"#,
        r#""a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"empty":{"dtype":"I64","shape":[0,3],"data_offsets":[4,4]}}    "#
    );
    let data = [1.5f32.to_le_bytes().to_vec(), bf16::from_f32(2.0).to_le_bytes().repeat(2)].concat();
    let (_directory, path) = file("w.safetensors", &safetensors(header, &data));
    let checkpoint = Checkpoint::open(&path).unwrap();

    let names: Vec<_> = checkpoint.entries().map(|entry| (entry.name.as_str(), entry.shape.as_slice())).collect();
    assert_eq!(names, [("a", &[][..]), ("b", &[1, 2]), ("empty", &[0, 3])]);
    assert_eq!(checkpoint.files(), std::slice::from_ref(&path));
    assert_eq!(checkpoint.num_bytes(), 8);
    assert_eq!(checkpoint.metadata()["format"], "pt");
    assert!(checkpoint.contains("a") && !checkpoint.contains("c") && checkpoint.entry("c").is_none());
    assert_eq!(checkpoint.entry("b").unwrap().file, path);
    assert_eq!(checkpoint.data("a").unwrap().try_to_vec::<f32>().unwrap(), [1.5]);
    assert_eq!(checkpoint.data("b").unwrap(), TensorData::new(vec![bf16::from_f32(2.0); 2], [1, 2]));
    assert_eq!(checkpoint.data("empty").unwrap().shape().as_slice(), [0, 3]);
    check!(checkpoint.data("emptyy"), Err(CheckpointError::NoTensor { nearest: Some(near), .. }) if near == "empty");
}

#[test]
fn aligned_values_stay_in_the_map_and_others_are_copied() {
    for (pad, aligned) in [(0, true), (1, false)] {
        let header = format!("{ONE}{}", " ".repeat(ONE.len().next_multiple_of(8) - ONE.len() + pad));
        let (_directory, path) = file("w.safetensors", &safetensors(&header, &[0, 0, 128, 63, 0, 0, 0, 64]));
        let checkpoint = Checkpoint::open(&path).unwrap();
        let (first, second) = (checkpoint.data("w").unwrap(), checkpoint.data("w").unwrap());
        assert_eq!(first.as_slice::<f32>().unwrap(), [1.0, 2.0]);
        assert_eq!(first.as_bytes().as_ptr() == second.as_bytes().as_ptr(), aligned);
        // The map outlives the checkpoint that made it.
        drop(checkpoint);
        assert_eq!(first, second);
    }
}

#[test]
fn refuses_absent_and_unknown_paths() {
    let directory = tempfile::tempdir().unwrap();
    let absent = directory.path().join("model.safetensors");
    check!(Checkpoint::open(&absent), Err(CheckpointError::NotFound { path }) if path == absent);
    let (_directory, path) = file("notes.txt", b"");
    check!(Checkpoint::open(path), Err(CheckpointError::UnknownFormat { .. }));
}

#[test]
fn refuses_headers_that_lie_about_their_length() {
    check!(refused(b""), CheckpointError::Truncated { expected: 8, actual: 0, .. });
    check!(refused(&[1, 2, 3]), CheckpointError::Truncated { actual: 3, .. });
    check!(refused(&[0xff; 64]), CheckpointError::HeaderTooLarge { declared: u64::MAX, limit: 100_000_000, .. });
    let mut beyond = safetensors(ONE, &[0; 8]);
    beyond[0] = 200;
    check!(refused(&beyond), CheckpointError::HeaderBeyondFile { declared: 200, .. });
    let mut short = safetensors(ONE, &[0; 8]);
    short[0] -= 1;
    check!(refused(&short), CheckpointError::HeaderJson { .. });
}

#[test]
fn refuses_headers_that_are_not_what_the_format_says() {
    for header in ["", "nonsense", "[]", "{\"w\":3}", r#"{"w":{"dtype":"F32","shape":[2]}}"#, "{\"w\":"] {
        check!(refused(&safetensors(header, &[])), CheckpointError::HeaderJson { .. });
    }
    let negative = ONE.replace("[2]", "[-2]");
    check!(refused(&safetensors(&negative, &[0; 8])), CheckpointError::HeaderJson { .. });
    let not_utf8 = [&8u64.to_le_bytes()[..], b"{\"\xff\xfe\":1}"].concat();
    check!(refused(&not_utf8), CheckpointError::HeaderJson { .. });
    // Nesting is cut by the parser and not by the stack.
    check!(refused(&safetensors(&"[".repeat(1 << 20), &[])), CheckpointError::HeaderJson { .. });
}

#[test]
fn refuses_duplicate_names() {
    let one = r#""w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let header = format!("{{{one},{}}}", one.replace("[0,1]", "[1,2]"));
    check!(refused(&safetensors(&header, &[0; 2])), CheckpointError::DuplicateTensor { tensor, .. } if tensor == "w");
}

#[test]
fn refuses_dtypes_that_are_unknown_or_unsupported() {
    let unknown = refused(&safetensors(&ONE.replace("F32", "F33"), &[0; 8]));
    check!(unknown, CheckpointError::UnknownDType { dtype, .. } if dtype == "F33");
    let header = ONE.replace("F32", "F8_E4M3").replace("[0,8]", "[0,2]");
    let unsupported = refused(&safetensors(&header, &[0; 2]));
    assert!(unsupported.to_string().contains("F8_E4M3") && unsupported.to_string().contains("`w`"), "{unsupported}");
    check!(unsupported, CheckpointError::UnsupportedDType { .. });
}

#[test]
fn refuses_shapes_that_do_not_fit_the_bytes() {
    let wrong = refused(&safetensors(&ONE.replace("[2]", "[3]"), &[0; 8]));
    check!(wrong, CheckpointError::WrongSize { expected: 12, actual: 8, dtype: DType::F32, .. });
    let wraps = ONE.replace("[2]", "[4611686018427387904,2]");
    check!(refused(&safetensors(&wraps, &[0; 8])), CheckpointError::ShapeOverflow { .. });
    let wraps = ONE.replace("[2]", "[4611686018427387906]");
    check!(refused(&safetensors(&wraps, &[0; 8])), CheckpointError::ShapeOverflow { .. });
}

#[test]
fn refuses_offsets_that_leave_the_file_overlap_or_leave_holes() {
    check!(refused(&safetensors(ONE, &[0; 7])), CheckpointError::Truncated { expected: 70, actual: 69, .. });
    check!(refused(&safetensors(ONE, &[0; 9])), CheckpointError::Hole { at: 8, bytes: 1, .. });
    let reversed = ONE.replace("[0,8]", "[8,0]");
    check!(refused(&safetensors(&reversed, &[0; 8])), CheckpointError::ReversedOffsets { begin: 8, end: 0, .. });
    let beyond = ONE.replace("[0,8]", "[8,16]");
    check!(refused(&safetensors(&beyond, &[0; 8])), CheckpointError::OffsetsBeyondFile { end: 16, available: 8, .. });
    check!(refused(&safetensors(&beyond, &[0; 16])), CheckpointError::Hole { at: 0, bytes: 8, .. });
    let huge = ONE.replace("[0,8]", "[18446744073709551607,18446744073709551615]");
    check!(refused(&safetensors(&huge, &[0; 8])), CheckpointError::OffsetsBeyondFile { .. });
    let two = |second: &str| {
        let header = format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"b":{{"dtype":"F32","shape":[2],"data_offsets":{second}}}}}"#
        );
        refused(&safetensors(&header, &[0; 16]))
    };
    check!(two("[4,12]"), CheckpointError::Overlap { first, second, .. } if first == "a" && second == "b");
    check!(two("[0,8]"), CheckpointError::Overlap { .. });
}

#[test]
fn refuses_booleans_that_are_none() {
    let header = r#"{"b":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}}"#;
    let (_directory, path) = file("w.safetensors", &safetensors(header, &[1, 2]));
    check!(Checkpoint::open(path).unwrap().data("b"), Err(CheckpointError::NotBoolean { tensor, .. }) if tensor == "b");
    let (_directory, path) = file("w.safetensors", &safetensors(header, &[1, 0]));
    let data = Checkpoint::open(path).unwrap().data("b").unwrap();
    assert_eq!(data.try_to_vec::<bool>().unwrap(), [true, false]);
}

/// A directory with two shards, `a` in the first and `b` in the second, and an index of these entries.
fn sharded(index: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (shard, name) in [("s1.safetensors", "a"), ("s2.safetensors", "b")] {
        let tensors = vec![(name.to_string(), floats(&[1.0, 2.0], &[2]))];
        write_safetensors(&directory.path().join(shard), tensors, None).unwrap();
    }
    fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
    directory
}

fn index(entries: &str) -> String {
    format!(r#"{{"metadata":{{"total_size":16}},"weight_map":{{{entries}}}}}"#)
}

#[test]
fn reads_shards() {
    let directory = sharded(&index(r#""b":"s2.safetensors","a":"s1.safetensors""#));
    for path in [directory.path().to_path_buf(), directory.path().join("model.safetensors.index.json")] {
        let checkpoint = Checkpoint::open(path).unwrap();
        assert_eq!(checkpoint.entries().map(|entry| entry.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(checkpoint.files().len(), 2);
        assert!(checkpoint.entry("b").unwrap().file.ends_with("s2.safetensors"));
        assert_eq!(checkpoint.data("b").unwrap(), floats(&[1.0, 2.0], &[2]));
    }
}

#[test]
fn refuses_an_index_that_disagrees_with_its_shards() {
    let open = |entries: &str| Checkpoint::open(sharded(&index(entries)).path()).unwrap_err();
    let missing = open(r#""a":"s1.safetensors","b":"s3.safetensors""#);
    check!(missing, CheckpointError::ShardMissing { shard, .. } if shard == "s3.safetensors");
    let promised = open(r#""a":"s1.safetensors","b":"s2.safetensors","c":"s2.safetensors""#);
    check!(promised, CheckpointError::NotInShard { tensor, shard, .. } if tensor == "c" && shard == "s2.safetensors");
    check!(open(r#""b":"s2.safetensors","c":"s1.safetensors""#), CheckpointError::NotInIndex { tensor, .. } if tensor == "a");
    check!(open(r#""a":"s2.safetensors","b":"s2.safetensors""#), CheckpointError::NotInShard { tensor, .. } if tensor == "a");
    check!(open(r#""a":"s1.safetensors","a":"s2.safetensors""#), CheckpointError::DuplicateTensor { tensor, .. } if tensor == "a");
}

#[test]
fn refuses_an_index_that_is_none() {
    for text in ["", "[]", "{}", r#"{"weight_map":[]}"#, r#"{"weight_map":{"a":3}}"#, r#"{"weight_map":{}}"#] {
        check!(Checkpoint::open(sharded(text).path()), Err(CheckpointError::Index { .. }));
    }
    for elsewhere in ["../s1.safetensors", "/etc/passwd", "", "..", "sub/s1.safetensors", "./s1.safetensors"] {
        let directory = sharded(&index(&format!(r#""a":"{elsewhere}""#)));
        check!(Checkpoint::open(directory.path()), Err(CheckpointError::Index { .. }));
    }
}

#[test]
fn refuses_a_damaged_shard() {
    let directory = sharded(&index(r#""a":"s1.safetensors","b":"s2.safetensors""#));
    let shard = directory.path().join("s2.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    check!(Checkpoint::open(directory.path()), Err(CheckpointError::Truncated { path, .. }) if path == shard);
}

#[test]
fn chooses_among_the_files_of_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let put = |name: &str| {
        let path = directory.path().join(name);
        match name.ends_with(".json") {
            true => fs::write(path, index(r#""a":"other.safetensors""#)).unwrap(),
            false => write_safetensors(&path, vec![("a".to_string(), floats(&[1.0], &[1]))], None).unwrap(),
        }
    };
    let chosen = || Checkpoint::open(directory.path()).map(|c| c.files()[0].file_name().unwrap().to_owned());

    fs::write(directory.path().join("pytorch_model.bin"), b"").unwrap();
    let none = chosen().unwrap_err();
    assert!(none.to_string().contains("model.safetensors.index.json"), "{none}");
    check!(none, CheckpointError::NoWeights { .. });
    put("other.safetensors");
    assert_eq!(chosen().unwrap(), "other.safetensors");
    put("third.safetensors");
    check!(chosen(), Err(CheckpointError::SeveralCheckpoints { candidates, .. }) if candidates.len() == 2);
    put("model.safetensors");
    assert_eq!(chosen().unwrap(), "model.safetensors");
    put("x.safetensors.index.json");
    assert_eq!(chosen().unwrap(), "other.safetensors");
    put("y.safetensors.index.json");
    check!(chosen(), Err(CheckpointError::SeveralCheckpoints { .. }));
    put("model.safetensors.index.json");
    assert_eq!(chosen().unwrap(), "other.safetensors");
}

fn every_dtype() -> Vec<(String, TensorData)> {
    let named = |name: &str, data: TensorData| (name.to_string(), data);
    vec![
        named("z.bool", TensorData::new(vec![true, false, true], [3])),
        named("f32", floats(&[1.0, f32::NAN, -0.0], &[3, 1])),
        named("f16", TensorData::new(vec![f16::from_f32(0.1); 3], [3])),
        named("bf16", TensorData::new(vec![bf16::from_f32(0.1); 3], [1, 3])),
        named("f64", TensorData::new(vec![0.1f64], [1])),
        named("i64", TensorData::new(vec![-1i64], [1])),
        named("i32", TensorData::new(vec![-1i32; 4], [2, 2])),
        named("u8", TensorData::new(vec![255u8; 5], [5])),
        named("empty", TensorData::new(Vec::<f32>::new(), [0, 7])),
        named("a \"quoted\"\n näme", floats(&[3.0], &[1])),
    ]
}

#[test]
fn writes_and_reads_every_dtype() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    let metadata = HashMap::from([("format".to_string(), "pt".to_string()), ("by".to_string(), "nexus".to_string())]);
    write_safetensors(&path, every_dtype(), Some(metadata.clone())).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.entries().count(), every_dtype().len());
    assert_eq!(checkpoint.metadata().len(), 2);
    for (name, data) in every_dtype() {
        let read = checkpoint.data(&name).unwrap();
        assert_eq!(
            (read.shape(), read.dtype(), read.as_bytes()),
            (data.shape(), data.dtype(), data.as_bytes()),
            "{name}"
        );
    }

    // The order of the arguments does not matter, and neither does that of the metadata.
    let again = directory.path().join("again.safetensors");
    write_safetensors(&again, every_dtype().into_iter().rev().collect(), Some(metadata)).unwrap();
    assert_eq!(fs::read(path).unwrap(), fs::read(again).unwrap());
}

#[test]
fn the_safetensors_crate_reads_what_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    write_safetensors(&path, every_dtype(), None).unwrap();
    let bytes = fs::read(path).unwrap();
    let oracle = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(oracle.len(), every_dtype().len());
    for (name, data) in every_dtype() {
        let tensor = oracle.tensor(&name).unwrap();
        assert_eq!((tensor.shape(), tensor.data()), (data.shape().as_slice(), data.as_bytes()), "{name}");
    }
}

#[test]
fn writing_refuses_what_it_cannot_write() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    let twice = vec![("a".to_string(), floats(&[1.0], &[1])), ("a".to_string(), floats(&[2.0], &[1]))];
    check!(write_safetensors(&path, twice, None), Err(CheckpointError::DuplicateTensor { .. }));
    let wide = TensorData::new(vec![1u32, 0], [2]);
    let (bytes, shape, _) = wide.into_parts();
    let wide = TensorData::from_bytes(bytes, shape, DType::Bool(BoolStore::U32));
    write_safetensors(&path, vec![("b".to_string(), wide)], None).unwrap();
    assert_eq!(Checkpoint::open(&path).unwrap().data("b").unwrap().try_to_vec::<bool>().unwrap(), [true, false]);
}

#[test]
fn a_failed_write_leaves_nothing_and_keeps_the_old_file() {
    let directory = tempfile::tempdir().unwrap();
    let one = || vec![("a".to_string(), floats(&[1.0], &[1]))];
    let absent = directory.path().join("absent").join("w.safetensors");
    check!(write_safetensors(&absent, one(), None), Err(CheckpointError::Write { path, .. }) if path == absent);
    check!(write_safetensors(Path::new("/"), one(), None), Err(CheckpointError::Write { .. }));

    // Renaming onto a directory fails after everything was written.
    let occupied = directory.path().join("occupied.safetensors");
    fs::create_dir_all(occupied.join("inside")).unwrap();
    check!(write_safetensors(&occupied, one(), None), Err(CheckpointError::Write { .. }));
    assert!(occupied.join("inside").is_dir());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

/// Root may write anywhere, so permissions are only a test for other users.
#[cfg(unix)]
#[test]
fn an_unwritable_directory_is_reported() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o555)).unwrap();
    let privileged = fs::write(directory.path().join("probe"), b"").is_ok();
    let path = directory.path().join("w.safetensors");
    let result = write_safetensors(&path, vec![("a".to_string(), floats(&[1.0], &[1]))], None);
    assert_eq!(result.is_ok(), privileged);
    assert_eq!(path.exists(), privileged);
}

/// Overwriting a file that is mapped must not change what the map shows.
#[test]
fn replacing_a_mapped_file_keeps_the_map() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    write_safetensors(&path, vec![("a".to_string(), floats(&[1.0; 4096], &[4096]))], None).unwrap();
    let before = Checkpoint::open(&path).unwrap();
    write_safetensors(&path, vec![("a".to_string(), floats(&[2.0], &[1]))], None).unwrap();
    assert_eq!(before.data("a").unwrap(), floats(&[1.0; 4096], &[4096]));
    assert_eq!(Checkpoint::open(&path).unwrap().data("a").unwrap(), floats(&[2.0], &[1]));
}

/// Damaged files are refused or read, and never a panic; what is accepted, the safetensors crate accepts too.
#[test]
fn damaged_files_never_panic() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.safetensors");
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    write_safetensors(&path, every_dtype(), Some(metadata)).unwrap();
    let whole = fs::read(&path).unwrap();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below as u64) as usize
    };
    for round in 0..3000 {
        let mut bytes = whole.clone();
        if round % 3 == 0 {
            bytes.truncate(next(whole.len()));
        }
        for _ in 0..next(4) {
            if let Some(byte) = {
                let at = next(whole.len());
                bytes.get_mut(at)
            } {
                *byte = next(256) as u8;
            }
        }
        fs::write(&path, &bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            for entry in checkpoint.entries() {
                let _ = checkpoint.data(&entry.name);
            }
            assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok(), "round {round}");
        }
    }
}
