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
        Ok(Self { path, bounds })
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
            let opened = Image::open(folder.join(path));
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn picture(value: u8) -> Image {
        Image::from_rgb8(3, 2, vec![value; 18]).unwrap()
    }

    fn file_of(dir: &Path, content: &str) -> MessagesFile {
        let path = dir.join("data.jsonl");
        fs::write(&path, content).unwrap();
        MessagesFile::open(path).unwrap()
    }

    fn line(user: &str, assistant: &str, images: &str) -> String {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "{user}"}}, {{"role": "assistant", "content": "{assistant}"}}], "images": [{images}]}}"#
        )
    }

    #[test]
    fn images_go_to_the_markers_of_all_messages() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        for (name, value) in [("a.png", 1), ("b.png", 2), ("sub/c.png", 3)] {
            picture(value).save(dir.path().join(name)).unwrap();
        }
        let first = line("<image> and <image>: night", "<image>", r#""a.png", "b.png", "sub/c.png""#);
        let second = r#"{"id": 5, "messages": [{"role": "system", "content": "简短。"}, {"role": "user", "content": "猫?"}, {"role": "assistant", "content": "是\n的", "loss": true}]}"#;
        let file = file_of(dir.path(), &format!("{first}\n{second}\n"));
        assert_eq!(file.len(), 2);
        let second =
            [Message::system().with_text("简短。"), Message::text("猫?"), Message::assistant().with_text("是\n的")];
        assert_eq!(file.get(1).unwrap(), second);
        let first = [
            Message::text("<image> and <image>: night").with_image(picture(1)).with_image(picture(2)),
            Message::assistant().with_text("<image>").with_image(picture(3)),
        ];
        assert_eq!(file.get(0).unwrap(), first);
    }

    #[test]
    fn lines_end_with_or_without_a_newline() {
        let dir = tempfile::tempdir().unwrap();
        let good = line("a", "b", "");
        for (content, len) in [
            (String::new(), 0),
            ("\n \r\n".to_string(), 0),
            (good.clone(), 1),
            (format!("{good}\n"), 1),
            (format!("{good}\r\n{good}\r\n\n\n"), 2),
            (format!("{good}\n{good}\n  "), 2),
        ] {
            let file = file_of(dir.path(), &content);
            assert_eq!((file.len(), file.is_empty()), (len, len == 0), "{content:?}");
            for index in 0..len {
                assert_eq!(file.get(index).unwrap(), [Message::text("a"), Message::assistant().with_text("b")]);
            }
            for index in [len, u64::MAX] {
                let error = file.get(index).unwrap_err();
                assert!(matches!(error, DataError::SampleIndex { len: found, .. } if found == len));
            }
        }
    }

    #[test]
    fn a_bad_line_is_named_and_the_others_are_read() {
        let dir = tempfile::tempdir().unwrap();
        picture(1).save(dir.path().join("a.png")).unwrap();
        fs::write(dir.path().join("text.png"), "not an image").unwrap();
        let bad_role = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}"#;
        let content = [
            "{\"messages\": [".to_string(),
            String::new(),
            r#"{"images": []}"#.to_string(),
            r#"{"messages": [], "images": []}"#.to_string(),
            bad_role.to_string(),
            line("a", " \\n", ""),
            line("<image>", "b", ""),
            line("a", "b", r#""a.png""#),
            line("<image>", "<image>", r#""a.png", "absent.png""#),
            line("<image>", "b", r#""text.png""#),
            line("a", "b", ""),
        ];
        let file = file_of(dir.path(), &content.join("\n"));
        assert_eq!(file.len(), 11);
        let reason = |index| match file.get(index).unwrap_err() {
            DataError::Sample { path, line, source } => {
                assert_eq!((path.as_path(), line), (file.path(), index + 1));
                *source
            }
            error => panic!("{error}"),
        };
        for index in [0, 1, 2] {
            assert!(matches!(reason(index), SampleError::Json(_)));
        }
        assert!(matches!(reason(3), SampleError::NoMessages));
        assert!(matches!(reason(4), SampleError::UnknownRole { message: 1, role } if role == "tool"));
        assert!(matches!(reason(5), SampleError::EmptyAnswer { message: 1 }));
        assert!(matches!(reason(6), SampleError::ImageMarkers { markers: 1, images: 0 }));
        assert!(matches!(reason(7), SampleError::ImageMarkers { markers: 0, images: 1 }));
        let SampleError::Image { image: 1, source: DataError::ImageMissing { path } } = reason(8) else { panic!() };
        assert_eq!(path, dir.path().join("absent.png"));
        assert!(matches!(reason(9), SampleError::Image { image: 0, source: DataError::NotAnImage { .. } }));
        assert_eq!(file.get(10).unwrap().len(), 2);
        let message = file.get(8).unwrap_err().to_string();
        assert!(
            message.contains("data.jsonl, line 9: image 1: ") && message.ends_with("no such image file"),
            "{message}"
        );
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("absent.jsonl");
        let error = MessagesFile::open(&path).unwrap_err();
        assert!(matches!(&error, DataError::DatasetFile { path: named, .. } if *named == path));
    }

    #[test]
    fn what_is_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        let clear = Image::from_rgba8(1, 1, &[9, 8, 7, 6]).unwrap();
        let by_marker = vec![
            Message::text("In <image>, \"add\" a\nhat 帽子").with_image(picture(4)),
            Message::assistant().with_text("<image>").with_image(clear.clone()),
        ];
        let by_place = vec![
            Message::user().with_image(picture(5)).with_text("what?"),
            Message::assistant().with_text("a ").with_image(picture(6)).with_text(" b"),
        ];
        MessagesFile::write(&path, [&by_marker, &by_place]).unwrap();
        let file = MessagesFile::open(&path).unwrap();
        assert_eq!(file.len(), 2);
        assert_eq!(file.get(0).unwrap(), by_marker);
        let expected = [
            Message::text("<image>what?").with_image(picture(5)),
            Message::assistant().with_text("a <image> b").with_image(picture(6)),
        ];
        assert_eq!(file.get(1).unwrap(), expected);
        let json: serde_json::Value = serde_json::from_slice(&read_range(&path, 0, file.bounds[1]).unwrap()).unwrap();
        assert_eq!(json["images"], serde_json::json!(["out_images/00000000_0.png", "out_images/00000000_1.png"]));
    }

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        fs::write(&path, "before").unwrap();
        let good = [Message::text("a"), Message::assistant().with_text("b")];
        let bad = [Message::text("<image>")];
        let result = MessagesFile::write(&path, [&good[..], &bad[..]]);
        assert!(matches!(result, Err(DataError::ImageMarkers { markers: 1, images: 0 })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the file");
        let result = MessagesWriter::create(dir.path().join("absent/out.jsonl"));
        assert!(matches!(result, Err(DataError::DatasetFile { .. })));
    }
}
