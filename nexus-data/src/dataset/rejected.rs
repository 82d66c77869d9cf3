//! Samples that cannot be used: source, index and reason -> a line of a file, until there are too many.

use std::collections::HashSet;
use std::fmt::Display;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::image_file::write_whole;

/// A list of samples that were set aside, one JSON object with `source`, `index` and `reason` per line.
///
/// A bad sample does not stop a run unless there are more than a limit; one that comes again counts once.
#[derive(Debug)]
pub struct RejectedSamples {
    path: PathBuf,
    limit: u64,
    count: u64,
    listed: HashSet<Listed>,
}

/// What a line is about.
#[derive(Debug, PartialEq, Eq, Hash, Deserialize)]
struct Listed {
    source: String,
    index: u64,
}

#[derive(Serialize)]
struct Rejected<'a> {
    source: &'a str,
    index: u64,
    reason: &'a str,
}

impl RejectedSamples {
    /// Opens the list; one that is there already goes on, without a last line that was cut off. A new file is made with
    /// the first sample.
    ///
    /// # Errors
    /// [`DataError::DatasetFile`] if the file cannot be read or written.
    pub fn new(path: impl AsRef<Path>, limit: u64) -> Result<Self, DataError> {
        let mut list = Self { path: path.as_ref().to_path_buf(), limit, count: 0, listed: HashSet::new() };
        let lines = list.read()?;
        list.keep(&lines, num_lines(&lines))?;
        Ok(list)
    }

    /// Goes back to the first `count` samples, for a run that is resumed from an earlier point.
    ///
    /// # Errors
    /// [`DataError::RejectedMissing`] if there are fewer; [`DataError::DatasetFile`] if the file cannot be written.
    pub fn with_count(mut self, count: u64) -> Result<Self, DataError> {
        if self.count < count {
            return Err(DataError::RejectedMissing { path: self.path, found: self.count, expected: count });
        }
        self.keep(&self.read()?, count)?;
        Ok(self)
    }

    /// The file of the list.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many samples were set aside.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Sets a sample aside, unless it is already.
    ///
    /// # Errors
    /// [`DataError::TooManyRejected`] if there are more than the limit now, this one being in the list;
    /// [`DataError::DatasetFile`] if the file cannot be written.
    pub fn reject(&mut self, source: &str, index: u64, reason: &dyn Display) -> Result<(), DataError> {
        if !self.listed.insert(Listed { source: source.to_string(), index }) {
            return Ok(());
        }
        let rejected = Rejected { source, index, reason: &reason.to_string() };
        let written = serde_json::to_string(&rejected).map_err(std::io::Error::from).and_then(|line| {
            let mut file = OpenOptions::new().create(true).append(true).open(&self.path)?;
            file.write_all(format!("{line}\n").as_bytes())
        });
        written.map_err(|source| self.failed(source))?;
        self.count += 1;
        match self.count > self.limit {
            true => Err(DataError::TooManyRejected { path: self.path.clone(), count: self.count, limit: self.limit }),
            false => Ok(()),
        }
    }

    fn read(&self) -> Result<Vec<u8>, DataError> {
        match fs::read(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            result => result.map_err(|source| self.failed(source)),
        }
    }

    /// Makes the list the first `count` of these lines of its file.
    fn keep(&mut self, lines: &[u8], count: u64) -> Result<(), DataError> {
        let kept: Vec<&[u8]> = lines.split_inclusive(|&byte| byte == b'\n').take(count as usize).collect();
        self.count = count;
        self.listed = kept.iter().filter_map(|line| serde_json::from_slice(line).ok()).collect();
        let length: usize = kept.iter().map(|line| line.len()).sum();
        if length == lines.len() {
            return Ok(());
        }
        write_whole(&self.path, &lines[..length]).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: std::io::Error) -> DataError {
        DataError::DatasetFile { path: self.path.clone(), source }
    }
}

fn num_lines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|&&byte| byte == b'\n').count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn bad_samples_are_listed_with_their_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rejected.jsonl");
        let mut list = RejectedSamples::new(&path, 10).unwrap();
        assert!(!path.exists());
        list.reject("edits", 7, &DataError::ImageInSystem).unwrap();
        list.reject("画", 0, &"two\nlines").unwrap();
        assert_eq!(list.count(), 2);
        assert_eq!(
            lines(&path),
            [
                serde_json::json!({"source": "edits", "index": 7, "reason": "a system message has an image"}),
                serde_json::json!({"source": "画", "index": 0, "reason": "two\nlines"}),
            ]
        );
    }

    #[test]
    fn one_more_than_the_limit_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rejected.jsonl");
        let mut list = RejectedSamples::new(&path, 2).unwrap();
        list.reject("a", 0, &"x").unwrap();
        drop(list);
        // Opened again, the list goes on counting.
        let mut list = RejectedSamples::new(&path, 2).unwrap();
        assert_eq!(list.count(), 1);
        list.reject("a", 1, &"x").unwrap();
        let error = list.reject("a", 2, &"x").unwrap_err();
        assert!(matches!(&error, DataError::TooManyRejected { path: named, count: 3, limit: 2 } if *named == path));
        assert_eq!(lines(&path).len(), 3);
    }

    #[test]
    fn a_sample_that_comes_again_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rejected.jsonl");
        let mut list = RejectedSamples::new(&path, 3).unwrap();
        for (source, index) in [("a", 0), ("a", 1), ("a", 0), ("b", 0), ("b", 0)] {
            list.reject(source, index, &"x").unwrap();
        }
        assert_eq!((list.count(), lines(&path).len()), (3, 3));
        // Opened again, the list knows them, but not one that it goes back before.
        let mut list = RejectedSamples::new(&path, 3).unwrap().with_count(2).unwrap();
        list.reject("a", 1, &"x").unwrap();
        assert_eq!(list.count(), 2);
        list.reject("b", 0, &"x").unwrap();
        assert_eq!((list.count(), lines(&path).len()), (3, 3));
    }

    #[test]
    fn resumed_runs_go_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rejected.jsonl");
        let mut list = RejectedSamples::new(&path, 10).unwrap();
        (0..5).for_each(|index| list.reject("a", index, &"x").unwrap());
        let mut list = RejectedSamples::new(&path, 10).unwrap().with_count(3).unwrap();
        assert_eq!(list.count(), 3);
        list.reject("b", 9, &"y").unwrap();
        let found: Vec<_> = lines(&path).iter().map(|line| line["index"].as_u64().unwrap()).collect();
        assert_eq!(found, [0, 1, 2, 9]);
        let error = RejectedSamples::new(&path, 10).unwrap().with_count(5).unwrap_err();
        assert!(matches!(error, DataError::RejectedMissing { found: 4, expected: 5, .. }));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the list");
    }

    #[test]
    fn a_line_that_was_cut_off_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rejected.jsonl");
        RejectedSamples::new(&path, 10).unwrap().reject("a", 0, &"x").unwrap();
        let whole = fs::read(&path).unwrap();
        fs::write(&path, [&whole[..], b"{\"source\": \"a"].concat()).unwrap();
        assert_eq!(RejectedSamples::new(&path, 10).unwrap().count(), 1);
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn a_list_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = RejectedSamples::new(dir.path(), 1).unwrap_err();
        assert!(matches!(&error, DataError::DatasetFile { path, .. } if path == dir.path()));
        let path = dir.path().join("absent/rejected.jsonl");
        let error = RejectedSamples::new(&path, 1).unwrap().reject("a", 0, &"x").unwrap_err();
        assert!(matches!(&error, DataError::DatasetFile { path: named, .. } if *named == path));
    }
}
