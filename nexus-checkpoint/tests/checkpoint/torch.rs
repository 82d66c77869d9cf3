//! `torch.save` archives: what is read without running it, and what is refused and why.
//!
//! `torch.bin` was written by torch 2.15:
//! `torch.save(OrderedDict(a=torch.arange(6.).reshape(2, 3).t(), b=torch.tensor([1.5, -2.]).bfloat16()), path)`

use std::fs;

use burn::tensor::{DType, TensorData, bf16};
use nexus_checkpoint::{Checkpoint, CheckpointError};

macro_rules! check {
    ($error:expr, $pattern:pat $(if $guard:expr)?) => {
        match $error {
            $pattern $(if $guard)? => {}
            other => panic!("{other:?}"),
        }
    };
}

/// One entry of a zip archive.
struct Entry {
    name: &'static str,
    bytes: Vec<u8>,
    method: u16,
    flags: u16,
    declared: u32,
}

fn entry(name: &'static str, bytes: &[u8]) -> Entry {
    Entry { name, bytes: bytes.to_vec(), method: 0, flags: 0, declared: bytes.len() as u32 }
}

/// A zip archive of these entries.
fn zip(entries: &[Entry]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for Entry { name, bytes, method, flags, declared } in entries {
        let header_at = file.len() as u32;
        let sizes = [0, bytes.len() as u32, *declared].map(u32::to_le_bytes).concat();
        let common = [&[20, 0][..], &flags.to_le_bytes(), &method.to_le_bytes(), &[0; 4], &sizes].concat();
        let lengths = [name.len() as u16, 0].map(u16::to_le_bytes).concat();
        file.extend([b"PK\x03\x04", &common[..], &lengths, name.as_bytes(), bytes].concat());
        directory.extend(
            [b"PK\x01\x02\x14\x00", &common[..], &lengths, &[0; 10], &header_at.to_le_bytes(), name.as_bytes()]
                .concat(),
        );
    }
    let count = (entries.len() as u16).to_le_bytes();
    let place = [directory.len() as u32, file.len() as u32].map(u32::to_le_bytes).concat();
    let end = [b"PK\x05\x06", &[0; 4][..], &count, &count, &place, &[0; 2]].concat();
    [file, directory, end].concat()
}

/// The same with 64-bit fields wherever the format has them, as in files of more than 4 GB.
fn zip_64(entries: &[Entry]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for Entry { name, bytes, .. } in entries {
        let header_at = file.len() as u64;
        let common = [&[45, 0, 0, 0, 0, 0][..], &[0; 8], &[0xff; 8]].concat();
        let name_len = (name.len() as u16).to_le_bytes();
        let sizes = [bytes.len() as u64; 2].map(u64::to_le_bytes).concat();
        file.extend(
            [b"PK\x03\x04", &common[..], &name_len, &[20, 0], name.as_bytes(), &[1, 0, 16, 0], &sizes, bytes].concat(),
        );
        // Another extra field comes first.
        let extra = [&[0x42, 0x46, 2, 0, 0, 0, 1, 0, 24, 0][..], &sizes, &header_at.to_le_bytes()].concat();
        let lengths = [&name_len[..], &(extra.len() as u16).to_le_bytes()].concat();
        let entry =
            [b"PK\x01\x02\x2d\x00", &common[..], &lengths, &[0; 10], &[0xff; 4], name.as_bytes(), &extra].concat();
        directory.extend(entry);
    }
    let count = (entries.len() as u64).to_le_bytes();
    let place = [directory.len() as u64, file.len() as u64].map(u64::to_le_bytes).concat();
    let end_at = ((file.len() + directory.len()) as u64).to_le_bytes();
    let end = [b"PK\x06\x06", &44u64.to_le_bytes()[..], &[45, 0, 45, 0], &[0; 8], &count, &count, &place].concat();
    let locator = [b"PK\x06\x07", &[0; 4][..], &end_at, &[1, 0, 0, 0]].concat();
    [file, directory, end, locator, b"PK\x05\x06\0\0\0\0".to_vec(), vec![0xff; 12], b"\x05\0hello".to_vec()].concat()
}

fn archive(pickle: &[u8], storages: &[(&'static str, &[u8])]) -> Vec<u8> {
    let mut entries = vec![entry("m/data.pkl", pickle), entry("m/byteorder", b"little")];
    entries.extend(storages.iter().map(|(name, bytes)| entry(name, bytes)));
    zip(&entries)
}

fn open(bytes: &[u8]) -> Result<Checkpoint, CheckpointError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("weights.bin");
    fs::write(&path, bytes).unwrap();
    let result = Checkpoint::open(&path);
    if let Err(error) = &result {
        assert!(error.to_string().contains("weights.bin"), "{error}");
    }
    result
}

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn tuple(sizes: &[i64]) -> Vec<u8> {
    let items = sizes.iter().flat_map(|size| [&[0x8a, 8][..], &size.to_le_bytes()].concat());
    [b"(".to_vec(), items.collect(), b"t".to_vec()].concat()
}

/// A dictionary item: a tensor in storage `0`, which has `len` elements.
fn item(name: &str, kind: &str, len: u8, offset: u8, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    [
        &text(name),
        &b"ctorch._utils\n_rebuild_tensor_v2\n(("[..],
        &text("storage"),
        format!("ctorch\n{kind}\n").as_bytes(),
        &text("0"),
        &text("cpu"),
        &[b'K', len, b't', b'Q', b'K', offset],
        &tuple(shape),
        &tuple(strides),
        b"\x89ccollections\nOrderedDict\n)RtRs",
    ]
    .concat()
}

/// The pickle of a plain dictionary.
fn dict(items: &[Vec<u8>]) -> Vec<u8> {
    [b"\x80\x02}", &items.concat()[..], b"."].concat()
}

/// The pickle of a dictionary with the one tensor `w` in a storage of six bytes.
fn one(offset: u8, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    dict(&[item("w", "ByteStorage", 6, offset, shape, strides)])
}

const SIX: (&str, &[u8]) = ("m/data/0", &[1, 2, 3, 4, 5, 6]);

#[test]
fn reads_what_torch_wrote() {
    let checkpoint = Checkpoint::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/checkpoint/torch.bin")).unwrap();
    let entries: Vec<_> = checkpoint.entries().map(|e| (e.name.as_str(), e.shape.as_slice(), e.dtype)).collect();
    assert_eq!(entries, [("a", &[3, 2][..], DType::F32), ("b", &[2], DType::BF16)]);
    assert_eq!(checkpoint.data("a").unwrap(), TensorData::new(vec![0f32, 3.0, 1.0, 4.0, 2.0, 5.0], [3, 2]));
    let b = checkpoint.data("b").unwrap();
    assert_eq!(b, TensorData::new([1.5, -2.0].map(bf16::from_f32).to_vec(), [2]));
    // Torch aligns storages, so contiguous tensors stay in the map.
    assert_eq!(b.as_bytes().as_ptr(), checkpoint.data("b").unwrap().as_bytes().as_ptr());
}

#[test]
fn reads_large_archives() {
    let file = zip_64(&[entry("m/data.pkl", &one(0, &[6], &[1])), entry(SIX.0, SIX.1)]);
    assert_eq!(open(&file).unwrap().data("w").unwrap().as_slice::<u8>().unwrap(), SIX.1);
    for cut in 1..file.len() {
        check!(open(&file[..cut]), Err(CheckpointError::BrokenZip { .. }));
    }
}

#[test]
fn reads_views_of_one_storage() {
    type Case<'a> = (u8, &'a [i64], &'a [i64], &'a [u8]);
    let cases: &[Case<'_>] = &[
        (0, &[2, 3], &[3, 1], &[1, 2, 3, 4, 5, 6]),
        (0, &[3, 2], &[1, 3], &[1, 4, 2, 5, 3, 6]),
        (2, &[3], &[1], &[3, 4, 5]),
        (1, &[3], &[2], &[2, 4, 6]),
        (5, &[], &[], &[6]),
        (3, &[1, 3, 1], &[99, 1, 77], &[4, 5, 6]),
        (6, &[0, 4], &[4, 1], &[]),
        (200, &[0], &[1], &[]),
    ];
    for (offset, shape, strides, expected) in cases {
        let checkpoint = open(&archive(&one(*offset, shape, strides), &[SIX])).unwrap();
        assert_eq!(checkpoint.data("w").unwrap().as_slice::<u8>().unwrap(), *expected, "{shape:?} {strides:?}");
        assert_eq!(checkpoint.num_bytes(), expected.len());
    }
}

#[test]
fn reads_ordered_dictionaries_with_attributes_and_tied_tensors() {
    let items = [item("b", "ByteStorage", 6, 0, &[6], &[1]), item("a", "ByteStorage", 6, 0, &[6], &[1])].concat();
    let attributes = [&b"}"[..], &text("_metadata"), b"ccollections\nOrderedDict\n)Rsb"].concat();
    let pickle = [b"\x80\x02ccollections\nOrderedDict\n)Rq\x00", &items[..], &attributes, b"."].concat();
    let checkpoint = open(&archive(&pickle, &[SIX])).unwrap();
    assert_eq!(checkpoint.entries().map(|entry| entry.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(checkpoint.data("a").unwrap().as_bytes().as_ptr(), checkpoint.data("b").unwrap().as_bytes().as_ptr());
}

#[test]
fn refuses_foreign_globals_by_name() {
    let calls: [(&[u8], &str); 4] = [
        (b"\x80\x02cos\nsystem\n", "os.system"),
        (b"\x80\x02}X\x01\x00\x00\x00wcbuiltins\neval\n", "builtins.eval"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n", "torch._utils._rebuild_parameter"),
        (b"\x80\x02ctorch\nComplexFloatStorage\n", "torch.ComplexFloatStorage"),
    ];
    for (pickle, expected) in calls {
        check!(open(&archive(pickle, &[])), Err(CheckpointError::ForeignGlobal { global, .. }) if global == expected);
    }
}

#[test]
fn refuses_pickles_that_are_no_dictionary_of_tensors() {
    let not_a_tensor = dict(&[[text("epoch"), b"K\x03s".to_vec()].concat()]);
    check!(open(&archive(&not_a_tensor, &[])), Err(CheckpointError::NotATensor { key, .. }) if key == "epoch");
    let number_as_key = dict(&[b"K\x03K\x03s".to_vec()]);
    check!(open(&archive(&number_as_key, &[])), Err(CheckpointError::NotATensor { key, .. }) if key == "3");
    let twice = [item("w", "ByteStorage", 6, 0, &[6], &[1]), item("w", "ByteStorage", 6, 0, &[6], &[1])];
    check!(open(&archive(&dict(&twice), &[SIX])), Err(CheckpointError::DuplicateTensor { .. }));
}

#[test]
fn refuses_malformed_pickles() {
    let cases: &[&[u8]] = &[
        b"",
        b"\x80\x04}.",
        b"}.",
        b"\x80\x02.",
        b"\x80\x02K\x03.",
        b"\x80\x02}",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02}K\x01s.",
        b"\x80\x02t.",
        b"\x80\x02}(Ks.",
        b"\x80\x02h\x07.",
        b"\x80\x02q\x07.",
        b"\x80\x02NQ.",
        b"\x80\x02))R.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02Na.",
        b"\x80\x02N)b.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
        b"\x80\x02\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x00.",
        b"\x80\x02cno end",
        b"\x80\x02(S'protocol 0'\n.",
    ];
    for pickle in cases {
        check!(open(&archive(pickle, &[])), Err(CheckpointError::Pickle { .. }));
    }
}

/// What would overflow a recursive reader, or multiply a few bytes into a lot of memory, is refused or harmless.
#[test]
fn survives_deep_circular_and_multiplying_pickles() {
    let deep = [b"\x80\x02)".to_vec(), b"\x85".repeat(900_000), b".".to_vec()].concat();
    check!(open(&archive(&deep, &[])), Err(CheckpointError::Pickle { .. }));
    let many = [b"\x80\x02".to_vec(), b"N".repeat(2_000_000)].concat();
    check!(open(&archive(&many, &[])), Err(CheckpointError::Pickle { reason, .. }) if reason == "too many objects");
    let marks = [b"\x80\x02".to_vec(), b"(".repeat(2_000_000)].concat();
    check!(open(&archive(&marks, &[])), Err(CheckpointError::Pickle { reason, .. }) if reason == "too many objects");
    let own_item = [b"\x80\x02}q\x00".to_vec(), text("self"), b"h\x00s.".to_vec()].concat();
    check!(open(&archive(&own_item, &[])), Err(CheckpointError::NotATensor { .. }));
    let long_shape = one(0, &[1; 17], &[1; 17]);
    check!(open(&archive(&long_shape, &[SIX])), Err(CheckpointError::Pickle { .. }));
}

#[test]
fn refuses_tensors_that_leave_their_storage() {
    let cases: &[(u8, &[i64], &[i64], u64)] = &[
        (0, &[7], &[1], 7),
        (1, &[6], &[1], 7),
        (0, &[2, 3], &[4, 1], 7),
        (6, &[], &[], 7),
        (0, &[2], &[i64::MAX], 1 << 63),
        (0, &[3], &[i64::MAX], u64::MAX),
    ];
    for (offset, shape, strides, expected) in cases {
        let error = open(&archive(&one(*offset, shape, strides), &[SIX]));
        check!(error, Err(CheckpointError::BeyondStorage { needed, available: 6, .. }) if needed == *expected);
    }
    let huge = one(0, &[1 << 40, 1 << 40], &[0, 0]);
    check!(open(&archive(&huge, &[SIX])), Err(CheckpointError::ShapeOverflow { .. }));
}

#[test]
fn refuses_strides_that_repeat_elements_or_run_backwards() {
    let expanded = one(0, &[1 << 40, 6], &[0, 1]);
    check!(open(&archive(&expanded, &[SIX])), Err(CheckpointError::RepeatingStrides { tensor, .. }) if tensor == "w");
    let unfolded = one(0, &[4, 3], &[1, 1]);
    check!(open(&archive(&unfolded, &[SIX])), Err(CheckpointError::RepeatingStrides { .. }));
    for (shape, strides) in [(&[6][..], &[-1][..]), (&[-6], &[1]), (&[6], &[1, 1])] {
        check!(open(&archive(&one(0, shape, strides), &[SIX])), Err(CheckpointError::Pickle { .. }));
    }
}

#[test]
fn refuses_storages_that_are_absent_or_of_another_size() {
    let pickle = one(0, &[6], &[1]);
    check!(open(&archive(&pickle, &[])), Err(CheckpointError::BrokenZip { reason, .. }) if reason.contains("absent"));
    for bytes in [&[1, 2, 3, 4, 5][..], &[0; 7]] {
        let error = open(&archive(&pickle, &[("m/data/0", bytes)]));
        check!(error, Err(CheckpointError::BrokenZip { reason, .. }) if reason.contains("storage `0`"));
    }
}

#[test]
fn refuses_broken_archives() {
    let good = archive(&one(0, &[6], &[1]), &[SIX]);
    assert!(open(&good).is_ok());
    check!(open(b""), Err(CheckpointError::BrokenZip { .. }));
    check!(open(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."), Err(CheckpointError::BrokenZip { .. }));
    for cut in [1, 10, 22, 60, 200, good.len() - 1] {
        check!(open(&good[..good.len() - cut]), Err(CheckpointError::BrokenZip { .. }));
        // Cut at the front, as by a broken resume.
        check!(open(&good[cut..]), Err(CheckpointError::BrokenZip { .. }));
    }
    check!(open(&zip(&[])), Err(CheckpointError::BrokenZip { reason, .. }) if reason.contains("data.pkl"));
    let two = zip(&[entry("a/data.pkl", b""), entry("b/data.pkl", b"")]);
    check!(open(&two), Err(CheckpointError::BrokenZip { reason, .. }) if reason.contains("data.pkl"));
    let same = zip(&[entry("a/data.pkl", b""), entry("a/data.pkl", b"")]);
    check!(open(&same), Err(CheckpointError::BrokenZip { reason, .. }) if reason.contains("twice"));
    let big = zip(&[entry("m/data.pkl", &dict(&[])), entry("m/byteorder", b"big")]);
    check!(open(&big), Err(CheckpointError::BrokenZip { reason, .. }) if reason.contains("byte order"));
    let secret = zip(&[Entry { flags: 1, ..entry("m/data.pkl", &dict(&[])) }]);
    check!(open(&secret), Err(CheckpointError::BrokenZip { reason, .. }) if reason.contains("encrypted"));
    let liar = zip(&[Entry { declared: 1 << 30, ..entry("m/data.pkl", &dict(&[])) }]);
    check!(open(&liar), Err(CheckpointError::BrokenZip { reason, .. }) if reason.contains("claims"));
}

#[test]
fn refuses_an_archive_that_inflates_without_bound() {
    let bomb = Entry { method: 8, declared: u32::MAX - 1, ..entry("m/data/0", &[0x63, 0x60, 0, 0]) };
    let error = open(&zip(&[entry("m/data.pkl", &one(0, &[6], &[1])), bomb])).unwrap_err();
    assert!(error.to_string().contains("inflates without bound"), "{error}");
    check!(error, CheckpointError::CompressedEntry { entry, declared: 4_294_967_294, stored: 4, .. } if entry == "m/data/0");
}

/// Truncations and random bytes are refused or read, and never a panic.
#[test]
fn damaged_archives_never_panic() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/checkpoint/torch.bin");
    let views = [item("v", "ByteStorage", 6, 1, &[2, 2], &[2, 1]), item("w", "ByteStorage", 6, 0, &[3, 2], &[1, 3])];
    let wholes = [fs::read(path).unwrap(), archive(&dict(&views), &[SIX])];
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("w.bin");
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut next = move |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below as u64) as usize
    };
    let mut damage = move |bytes: &mut Vec<u8>, cut: bool| {
        let len = bytes.len();
        if cut {
            bytes.truncate(next(len));
        }
        for _ in 0..=next(4) {
            if let Some(byte) = bytes.get_mut(next(len)) {
                *byte = next(256) as u8;
            }
        }
    };
    let mut opened = 0;
    for round in 0..6000 {
        let bytes = match round % 3 {
            // The pickle alone, in a sound archive.
            0 => {
                let mut pickle = dict(&views);
                damage(&mut pickle, round % 5 == 0);
                archive(&pickle, &[SIX])
            }
            whole => {
                let mut bytes = wholes[whole - 1].clone();
                damage(&mut bytes, round % 5 == 0);
                bytes
            }
        };
        fs::write(&path, &bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            opened += 1;
            for entry in checkpoint.entries() {
                let _ = checkpoint.data(&entry.name);
            }
        }
    }
    // Damage to values and padding goes unnoticed here, so a good part must still open.
    assert!(opened > 500, "{opened}");
}
