//! Conversations in files: what was said and the options, not what the model has read of it.
//!
//! One safetensors file: its metadata hold the messages as JSON, its tensors the pictures and embeddings in them. Keys and
//! values are many times larger and belong to one model and device, so a conversation that was loaded is read once more.

use std::{collections::HashMap, path::Path};

use burn::tensor::{DType, Tensor, TensorData};
use nexus_checkpoint::{Checkpoint, write_safetensors};
use nexus_core::{GridThw, ImageEmbeds};
use nexus_data::{Image, Message, Part, Role};
use serde::{Deserialize, Serialize};

use crate::{Conversation, ConversationOptions, Error, Nexus, error::read_data};

/// Key of the metadata.
const KEY: &str = "nexus_conversation";
/// Changes when older readers cannot read what is written.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    options: ConversationOptions,
    messages: Vec<SavedMessage>,
}

#[derive(Serialize, Deserialize)]
struct SavedMessage {
    role: Role,
    parts: Vec<SavedPart>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SavedPart {
    Text(String),
    /// Name of a tensor: `[height, width, 3 or 4]` bytes.
    Image(String),
    /// Name of a tensor: `[1, tokens, hidden]`.
    Embeds {
        values: String,
        grid: GridThw,
    },
}

impl Conversation {
    /// Writes what was said and the options to a file, for [`Nexus::load_conversation`].
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the file cannot be written (no partial file is left), [`Error::ConversationFile`] if the
    /// options have latents for noise, and the device's errors for embeddings in messages.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let mut tensors = vec![];
        let messages = self.history().iter().map(|message| {
            let parts = message.parts.iter().map(|part| save_part(part, &mut tensors)).collect::<Result<_, _>>()?;
            Ok(SavedMessage { role: message.role, parts })
        });
        let messages = messages.collect::<Result<_, Error>>()?;
        let saved = Saved { version: VERSION, options: self.options().clone(), messages };
        let json = serde_json::to_string(&saved).map_err(|error| unusable(path, error))?;
        Ok(write_safetensors(path, tensors, Some(HashMap::from([(KEY.to_string(), json)])))?)
    }
}

impl Nexus {
    /// Goes on with a conversation that [`Conversation::save`] wrote, with any model.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the file is absent or malformed, [`Error::ConversationFile`] if it holds no conversation.
    pub fn load_conversation(&self, path: impl AsRef<Path>) -> Result<Conversation, Error> {
        let path = path.as_ref();
        let file = Checkpoint::open(path)?;
        let json = file.metadata().get(KEY).ok_or_else(|| unusable(path, "it has no messages"))?;
        let Saved { version, options, messages } = serde_json::from_str(json).map_err(|error| unusable(path, error))?;
        if version != VERSION {
            return Err(unusable(path, format!("its version is {version}, and only {VERSION} can be read")));
        }
        let messages = messages.into_iter().map(|SavedMessage { role, parts }| {
            let parts = parts.into_iter().map(|part| self.load_part(part, &file)).collect::<Result<_, _>>()?;
            Ok(Message { role, parts })
        });
        Ok(Conversation::new(self.clone(), options, messages.collect::<Result<_, Error>>()?))
    }

    fn load_part(&self, part: SavedPart, file: &Checkpoint) -> Result<Part, Error> {
        match part {
            SavedPart::Text(text) => Ok(Part::Text(text)),
            SavedPart::Image(name) => {
                let data = file.data(&name)?;
                let (&[height, width, channels], DType::U8) = (data.shape().as_slice(), data.dtype()) else {
                    return Err(unusable(file.path(), format!("`{name}` is no picture")));
                };
                Ok(Part::Image(match channels {
                    4 => Image::from_rgba8(width, height, data.as_bytes())?,
                    _ => Image::from_rgb8(width, height, data.as_bytes().to_vec())?,
                }))
            }
            SavedPart::Embeds { values: name, grid: GridThw { t, h, w } } => {
                let data = file.data(&name)?;
                if data.rank() != 3 || !data.dtype().is_float() {
                    return Err(unusable(file.path(), format!("`{name}` is no embeddings")));
                }
                let (device, dtype) = self.device();
                let values = Tensor::from_data(data, (device, DType::from(dtype)));
                Ok(Part::Embeds(ImageEmbeds::new(values, GridThw::new(t, h, w)?)?))
            }
        }
    }
}

fn save_part(part: &Part, tensors: &mut Vec<(String, TensorData)>) -> Result<SavedPart, Error> {
    let name = format!("part.{}", tensors.len());
    match part {
        Part::Text(text) => Ok(SavedPart::Text(text.clone())),
        Part::Image(image) => {
            let pixels = match image.alpha() {
                None => TensorData::new(image.rgb().to_vec(), [image.height_px(), image.width_px(), 3]),
                Some(alpha) => {
                    let rgba = image.rgb().chunks_exact(3).zip(alpha).flat_map(|(rgb, a)| [rgb[0], rgb[1], rgb[2], *a]);
                    TensorData::new(rgba.collect::<Vec<u8>>(), [image.height_px(), image.width_px(), 4])
                }
            };
            tensors.push((name.clone(), pixels));
            Ok(SavedPart::Image(name))
        }
        Part::Embeds(embeds) => {
            tensors.push((name.clone(), read_data(embeds.values.clone())?));
            Ok(SavedPart::Embeds { values: name, grid: embeds.grid })
        }
    }
}

fn unusable(path: &Path, reason: impl ToString) -> Error {
    Error::ConversationFile { path: path.to_path_buf(), reason: reason.to_string() }
}
