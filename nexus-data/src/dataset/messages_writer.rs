//! Writing files of conversations: messages -> one line of JSON each, and PNG files beside.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::dataset::messages_file::{Conversation, Turn};
use crate::error::DataError;
use crate::message::{Message, Part};
use crate::prompt::IMAGE_MARKER;

/// Writes a file that [`MessagesFile`](crate::MessagesFile) reads. The images go to the folder `<name>_images` beside it.
///
/// The file appears whole, when [`MessagesWriter::finish`] is called, or not at all; images that were written before
/// then stay.
#[derive(Debug)]
pub struct MessagesWriter {
    path: PathBuf,
    unfinished: PathBuf,
    images: String,
    lines: BufWriter<File>,
    num_written: u64,
}

impl MessagesWriter {
    /// Starts a file.
    ///
    /// # Errors
    /// [`DataError::DatasetFile`] if it cannot be written.
    pub fn create(path: impl AsRef<Path>) -> Result<Self, DataError> {
        let path = path.as_ref().to_path_buf();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let unfinished = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
        let images = format!("{}_images", path.file_stem().unwrap_or_default().to_string_lossy());
        let file = File::create(&unfinished).map_err(|source| DataError::DatasetFile { path: path.clone(), source })?;
        Ok(Self { path, unfinished, images, lines: BufWriter::new(file), num_written: 0 })
    }

    /// Adds a conversation.
    ///
    /// # Errors
    /// [`DataError::ImageMarkers`] if a message has `<image>` markers but not as many images; [`DataError::PixelsMissing`]
    /// if it has embeddings; [`DataError::ImageWrite`] or [`DataError::DatasetFile`] if something cannot be written.
    pub fn push(&mut self, messages: &[Message]) -> Result<(), DataError> {
        let turns = messages.iter().enumerate().map(|(index, message)| {
            Ok(Turn { role: message.role.as_str().to_string(), content: content_with_markers(index, message)? })
        });
        let messages_written = turns.collect::<Result<Vec<_>, DataError>>()?;
        let images = messages.iter().flat_map(Message::images).enumerate().map(|(i, image)| {
            let folder = self.path.with_file_name(&self.images);
            fs::create_dir_all(&folder).map_err(|source| DataError::DatasetFile { path: folder.clone(), source })?;
            let name = format!("{:08}_{i}.png", self.num_written);
            image.save(folder.join(&name))?;
            // With a slash on every system, so that the files can be moved to another.
            Ok(format!("{}/{name}", self.images))
        });
        let conversation =
            Conversation { images: images.collect::<Result<_, DataError>>()?, messages: messages_written };
        let written = serde_json::to_writer(&mut self.lines, &conversation).map_err(std::io::Error::from);
        let written = written.and_then(|()| self.lines.write_all(b"\n"));
        written.map_err(|source| DataError::DatasetFile { path: self.path.clone(), source })?;
        self.num_written += 1;
        Ok(())
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// [`DataError::DatasetFile`] if it cannot be written.
    pub fn finish(mut self) -> Result<(), DataError> {
        let written = self.lines.flush().and_then(|()| self.lines.get_ref().sync_all());
        let written = written.and_then(|()| fs::rename(&self.unfinished, &self.path));
        written.map_err(|source| DataError::DatasetFile { path: self.path.clone(), source })
    }
}

impl Drop for MessagesWriter {
    fn drop(&mut self) {
        // After `finish` there is no such file any more.
        fs::remove_file(&self.unfinished).ok();
    }
}

/// The text of the message of this index, with a marker where each image stands.
fn content_with_markers(index: usize, message: &Message) -> Result<String, DataError> {
    let images = message.num_images();
    if images != message.images().count() {
        return Err(DataError::PixelsMissing { message: index });
    }
    let markers: usize = message.texts().map(|text| text.matches(IMAGE_MARKER).count()).sum();
    if markers > 0 && markers != images {
        return Err(DataError::ImageMarkers { markers, images });
    }
    let pieces = message.parts.iter().map(|part| match part {
        Part::Text(text) => text,
        Part::Image(_) | Part::Embeds(_) if markers > 0 => "",
        Part::Image(_) | Part::Embeds(_) => IMAGE_MARKER,
    });
    Ok(pieces.collect())
}
