//! Samples that cannot be used: source, index and reason -> a line of a file, until there are too many.

use std::fmt::Display;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::DataError;
use crate::image_file::write_whole;

/// A list of samples that were set aside, one JSON object with `source`, `index` and `reason` per line.
///
/// A bad sample does not stop a run unless there are more than a limit.
#[derive(Debug)]
pub struct RejectedSamples {
    path: PathBuf,
    limit: u64,
    count: u64,
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
        let mut list = Self { path: path.as_ref().to_path_buf(), limit, count: 0 };
        let lines = list.read()?;
        list.count = num_lines(&lines);
        list.keep(&lines, list.count)?;
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
        self.count = count;
        Ok(self)
    }

    /// How many samples were set aside.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Sets a sample aside.
    ///
    /// # Errors
    /// [`DataError::TooManyRejected`] if there are more than the limit now, this one being in the list;
    /// [`DataError::DatasetFile`] if the file cannot be written.
    pub fn reject(&mut self, source: &str, index: u64, reason: &dyn Display) -> Result<(), DataError> {
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

    /// Makes the file the first `count` of these lines, if they are not all of it.
    fn keep(&self, lines: &[u8], count: u64) -> Result<(), DataError> {
        let kept: usize = lines.split_inclusive(|&byte| byte == b'\n').take(count as usize).map(<[u8]>::len).sum();
        if kept == lines.len() {
            return Ok(());
        }
        write_whole(&self.path, &lines[..kept]).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: std::io::Error) -> DataError {
        DataError::DatasetFile { path: self.path.clone(), source }
    }
}

fn num_lines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|&&byte| byte == b'\n').count() as u64
}
