//! Reading a zip archive in place: the mapped bytes of a file -> its stored entries, as slices of the map.
//!
//! Only what `torch.save` writes is admitted: entries that are stored, neither compressed nor encrypted, in one file,
//! with or without the 64-bit extension. Nothing is extracted, so no entry can be larger than the file.
//!
//! Source: APPNOTE.TXT 6.3.10, sections 4.3 to 4.5.

use std::collections::HashMap;
use std::path::Path;

use bytes::Bytes;

use crate::error::CheckpointError;

const END_OF_DIRECTORY: u32 = 0x0605_4b50;
const END_OF_DIRECTORY_LEN: usize = 22;
const END_OF_DIRECTORY_64: u32 = 0x0606_4b50;
const LOCATOR_64: u32 = 0x0706_4b50;
const LOCATOR_64_LEN: usize = 20;
const DIRECTORY_ENTRY: u32 = 0x0201_4b50;
const DIRECTORY_ENTRY_LEN: usize = 46;
const LOCAL_HEADER: u32 = 0x0403_4b50;
const LOCAL_HEADER_LEN: usize = 30;
const EXTRA_64: u16 = 1;
const FLAG_ENCRYPTED: u16 = 1;
/// Longest comment that may follow the directory.
const MAX_COMMENT: usize = u16::MAX as usize;

/// The entries of an archive by name.
///
/// # Errors
/// [`CheckpointError::BrokenZip`], [`CheckpointError::CompressedEntry`].
pub(super) fn read(path: &Path, file: &Bytes) -> Result<HashMap<String, Bytes>, CheckpointError> {
    let broken = |reason: String| CheckpointError::BrokenZip { path: path.to_path_buf(), reason };
    let directory = find_directory(file).map_err(broken)?;
    let mut entries = HashMap::new();
    let mut at = directory.at;
    for _ in 0..directory.num_entries {
        let (entry, next) = directory_entry(file, at).map_err(broken)?;
        at = next;
        let Entry { name, method, stored, declared, .. } = &entry;
        if *method != 0 {
            let (path, entry) = (path.to_path_buf(), name.clone());
            return Err(CheckpointError::CompressedEntry { path, entry, stored: *stored, declared: *declared });
        }
        let bytes = content(file, &entry).map_err(broken)?;
        if entries.insert(entry.name.clone(), bytes).is_some() {
            return Err(broken(format!("entry `{}` occurs twice", entry.name)));
        }
    }
    Ok(entries)
}

struct Directory {
    at: usize,
    num_entries: u64,
}

struct Entry {
    name: String,
    method: u16,
    stored: u64,
    declared: u64,
    header_at: u64,
}

/// Finds the directory through the record at the end of the file.
fn find_directory(file: &[u8]) -> Result<Directory, String> {
    let last = file.len().checked_sub(END_OF_DIRECTORY_LEN).ok_or("the file is too short")?;
    let ends_here = |at: usize| {
        let comment = u16_at(file, at + 20).map(usize::from);
        u32_at(file, at) == Some(END_OF_DIRECTORY) && comment == Some(last - at)
    };
    let end = (last.saturating_sub(MAX_COMMENT)..=last).rev().find(|&at| ends_here(at));
    let end = end.ok_or("no zip directory at the end: it is cut, or not a zip archive")?;

    let field = || "the zip directory is cut".to_string();
    let locator = end.checked_sub(LOCATOR_64_LEN).filter(|&at| u32_at(file, at) == Some(LOCATOR_64));
    let (num_entries, at) = match locator {
        Some(locator) => {
            let end = to_usize(u64_at(file, locator + 8).ok_or_else(field)?)?;
            if u32_at(file, end) != Some(END_OF_DIRECTORY_64) {
                return Err("the 64-bit zip directory is not where it should be".to_string());
            }
            (u64_at(file, end + 32).ok_or_else(field)?, u64_at(file, end + 48).ok_or_else(field)?)
        }
        None => {
            let num_entries = u16_at(file, end + 10).ok_or_else(field)?;
            (u64::from(num_entries), u64::from(u32_at(file, end + 16).ok_or_else(field)?))
        }
    };
    Ok(Directory { at: to_usize(at)?, num_entries })
}

/// Reads the directory entry at a position; also gives the position of the next.
fn directory_entry(file: &[u8], at: usize) -> Result<(Entry, usize), String> {
    let field = || "the zip directory is cut".to_string();
    if u32_at(file, at) != Some(DIRECTORY_ENTRY) {
        return Err(format!("no zip directory entry at byte {at}"));
    }
    let short = |offset: usize| u16_at(file, at + offset).ok_or_else(field);
    let word = |offset: usize| u32_at(file, at + offset).ok_or_else(field);
    let (name_len, extra_len, comment_len) = (short(28)?, short(30)?, short(32)?);
    let name_at = at + DIRECTORY_ENTRY_LEN;
    let extra_at = name_at + usize::from(name_len);
    let comment_at = extra_at + usize::from(extra_len);
    let name = file.get(name_at..extra_at).ok_or_else(field)?;
    let name = std::str::from_utf8(name).map_err(|_| "an entry name is not UTF-8".to_string())?.to_string();
    if short(8)? & FLAG_ENCRYPTED != 0 {
        return Err(format!("entry `{name}` is encrypted"));
    }

    // Fields that do not fit in 32 bits are in the extra field, in this order.
    let extra = file.get(extra_at..comment_at).ok_or_else(field)?;
    let mut wide = wide_fields(extra).chunks_exact(8);
    let mut widen = |narrow: u32| match narrow {
        u32::MAX => {
            wide.next().and_then(|bytes| u64_at(bytes, 0)).ok_or(format!("entry `{name}` lacks its 64-bit sizes"))
        }
        _ => Ok(u64::from(narrow)),
    };
    let (declared, stored, header_at) = (widen(word(24)?)?, widen(word(20)?)?, widen(word(42)?)?);
    let method = short(10)?;
    Ok((Entry { name, method, stored, declared, header_at }, comment_at + usize::from(comment_len)))
}

/// The payload of the 64-bit extra field; empty if there is none.
fn wide_fields(mut extra: &[u8]) -> &[u8] {
    while let (Some(id), Some(len)) = (u16_at(extra, 0), u16_at(extra, 2)) {
        let Some((payload, rest)) = extra[4..].split_at_checked(usize::from(len)) else { break };
        if id == EXTRA_64 {
            return payload;
        }
        extra = rest;
    }
    &[]
}

/// The bytes of a stored entry.
fn content(file: &Bytes, entry: &Entry) -> Result<Bytes, String> {
    let Entry { name, stored, declared, header_at, .. } = entry;
    if stored != declared {
        return Err(format!("entry `{name}` is stored in {stored} bytes and claims {declared}"));
    }
    let header_at = to_usize(*header_at)?;
    if u32_at(file, header_at) != Some(LOCAL_HEADER) {
        return Err(format!("entry `{name}` is not at byte {header_at}"));
    }
    let cut = || format!("entry `{name}` is cut");
    let name_len = u16_at(file, header_at + 26).ok_or_else(cut)?;
    let extra_len = u16_at(file, header_at + 28).ok_or_else(cut)?;
    let name_at = header_at + LOCAL_HEADER_LEN;
    let begin = name_at + usize::from(name_len) + usize::from(extra_len);
    if file.get(name_at..name_at + usize::from(name_len)) != Some(name.as_bytes()) {
        return Err(format!("entry `{name}` has another name at byte {header_at}"));
    }
    let end = begin.checked_add(to_usize(*stored)?).filter(|&end| end <= file.len()).ok_or_else(cut)?;
    Ok(file.slice(begin..end))
}

/// A position or size that can be used for indexing, with room to add header lengths.
fn to_usize(value: u64) -> Result<usize, String> {
    let value = usize::try_from(value).ok().filter(|&value| value < usize::MAX / 2);
    value.ok_or_else(|| "a position lies beyond any file".to_string())
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes_at(bytes, at).map(u64::from_le_bytes)
}
