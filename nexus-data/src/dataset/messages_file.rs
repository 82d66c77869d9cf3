//! Files of conversations, one JSON object per line: path and index -> messages with their images.
//!
//! The format is that of ms-swift: `{"messages": [{"role": "user", "content": "Draw <image> at night"}, {"role":
//! "assistant", "content": "<image>"}], "images": ["day.png", "night.png"]}`. The images go to the `<image>` markers of
//! all messages, first to first, and their paths are relative to the file.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::dataset::messages_writer::MessagesWriter;
use crate::error::{DataError, SampleError};
use crate::image::Image;
use crate::image_file::ImageLimits;
use crate::message::{Message, Part, Role};
use crate::prompt::IMAGE_MARKER;

/// A line of the file; what else the object has is not read.
#[derive(Serialize, Deserialize)]
pub(super) struct Conversation {
    pub messages: Vec<Turn>,
    #[serde(default)]
    pub images: Vec<String>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Turn {
    pub role: String,
    pub content: String,
}

/// A file of conversations that is read line by line, in any order; only the places of its lines are in memory.
#[derive(Debug, Clone)]
pub struct MessagesFile {
    path: PathBuf,
    limits: ImageLimits,
    /// Where each line begins, and where the last one ends.
    bounds: Vec<u64>,
}

impl MessagesFile {
    /// Finds the lines of a file; what is in them is looked at by [`MessagesFile::get`]. Blank lines at the end do not
    /// count.
    ///
    /// # Errors
    /// [`DataError::DatasetFile`] if the file cannot be read.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DataError> {
        let path = path.as_ref().to_path_buf();
        let bounds = line_bounds(&path).map_err(|source| DataError::DatasetFile { path: path.clone(), source })?;
        Ok(Self { path, limits: ImageLimits::default(), bounds })
    }

    /// Refuses images over these limits, instead of the default ones.
    #[must_use]
    pub fn with_limits(mut self, limits: ImageLimits) -> Self {
        self.limits = limits;
        self
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many conversations there are, good or bad.
    pub fn len(&self) -> u64 {
        self.bounds.len() as u64 - 1
    }

    /// Whether there is no conversation.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads a conversation, counted from 0, and its images.
    ///
    /// # Errors
    /// [`DataError::Sample`] with the line if the conversation or one of its images cannot be used;
    /// [`DataError::SampleIndex`] if there is no such conversation; [`DataError::DatasetFile`] if the file cannot be
    /// read.
    pub fn get(&self, index: u64) -> Result<Vec<Message>, DataError> {
        let missing = || DataError::SampleIndex { path: self.path.clone(), index, len: self.len() };
        let at = usize::try_from(index).map_err(|_| missing())?;
        let &[start, end] = self.bounds.get(at..).and_then(|rest| rest.first_chunk()).ok_or_else(missing)?;
        let line = read_range(&self.path, start, end)
            .map_err(|source| DataError::DatasetFile { path: self.path.clone(), source })?;
        self.conversation(&line).map_err(|error| DataError::Sample {
            path: self.path.clone(),
            line: index + 1,
            source: Box::new(error),
        })
    }

    fn conversation(&self, line: &[u8]) -> Result<Vec<Message>, SampleError> {
        let Conversation { messages, images } = serde_json::from_slice(line).map_err(SampleError::Json)?;
        if messages.is_empty() {
            return Err(SampleError::NoMessages);
        }
        let markers_of = |turn: &Turn| turn.content.matches(IMAGE_MARKER).count();
        let markers = messages.iter().map(markers_of).sum();
        let roles = messages.iter().enumerate().map(|(message, turn)| {
            let role = Role::from_name(&turn.role)
                .ok_or_else(|| SampleError::UnknownRole { message, role: turn.role.clone() })?;
            match role == Role::Assistant && turn.content.trim().is_empty() {
                true => Err(SampleError::EmptyAnswer { message }),
                false => Ok(role),
            }
        });
        let roles = roles.collect::<Result<Vec<_>, _>>()?;
        if markers != images.len() {
            return Err(SampleError::ImageMarkers { markers, images: images.len() });
        }
        let folder = self.path.parent().unwrap_or(Path::new(""));
        let mut opened = images.iter().enumerate().map(|(image, path)| {
            let opened = Image::open_with(folder.join(path), &self.limits);
            opened.map(Part::Image).map_err(|source| SampleError::Image { image, source })
        });
        let messages = messages.into_iter().zip(roles).map(|(turn, role)| {
            let images = opened.by_ref().take(markers_of(&turn)).collect::<Result<Vec<_>, _>>()?;
            let text = Some(turn.content).filter(|text| !text.is_empty()).map(Part::Text);
            Ok(Message { role, parts: text.into_iter().chain(images).collect() })
        });
        messages.collect()
    }

    /// Writes conversations to a file and their images as PNG files beside it: see [`MessagesWriter`].
    ///
    /// # Errors
    /// As [`MessagesWriter`].
    pub fn write<S: AsRef<[Message]>>(
        path: impl AsRef<Path>,
        conversations: impl IntoIterator<Item = S>,
    ) -> Result<(), DataError> {
        let mut writer = MessagesWriter::create(path)?;
        for conversation in conversations {
            writer.push(conversation.as_ref())?;
        }
        writer.finish()
    }
}

/// Where each line of a file begins, and where the last line that is not blank ends.
fn line_bounds(path: &Path) -> std::io::Result<Vec<u64>> {
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path)?);
    let (mut bounds, mut at, mut num_lines) = (vec![0], 0, 0);
    let mut is_blank = true;
    loop {
        let bytes = reader.fill_buf()?;
        if bytes.is_empty() {
            break;
        }
        for &byte in bytes {
            at += 1;
            is_blank &= byte.is_ascii_whitespace();
            if byte == b'\n' {
                bounds.push(at);
                num_lines = if is_blank { num_lines } else { bounds.len() - 1 };
                is_blank = true;
            }
        }
        let length = bytes.len();
        reader.consume(length);
    }
    if !is_blank {
        bounds.push(at);
        num_lines = bounds.len() - 1;
    }
    bounds.truncate(num_lines + 1);
    Ok(bounds)
}

fn read_range(path: &Path, start: u64, end: u64) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(end - start).read_to_end(&mut bytes)?;
    Ok(bytes)
}
