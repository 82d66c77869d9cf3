//! Many turns: a message in, an answer out, text and pictures in the order in which the model made them.

use nexus_ar::Context;
use nexus_core::ImageEmbeds;
use nexus_data::{IMAGE_MARKER, Image, Message, Part, without_reserved_tokens};
use serde::{Deserialize, Serialize};

use crate::{DrawWith, EditOptions, Error, GenerateOptions, Nexus, Observer, Picture, Reply, TextOptions};

/// Options of [`Nexus::conversation_with`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ConversationOptions {
    /// How the model reads and writes.
    pub text: TextOptions,
    /// How new pictures are drawn; its `text` and `language` are not used.
    pub generate: GenerateOptions,
    /// How changed pictures are drawn; its `text` and `decoder` are not used.
    pub edit: EditOptions,
    /// Which decoder draws.
    pub decoder: ConversationDecoder,
}

/// How a conversation chooses between drawing anew and changing a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConversationDecoder {
    /// The editing decoder if the message brings an image or the turn before it drew one, with that as the reference;
    /// else the generation decoder.
    #[default]
    Auto,
    /// Always the generation decoder.
    Generation,
    /// Always the editing decoder, with the latest picture of the conversation as the reference.
    Editing,
}

/// A conversation.
///
/// It keeps what the model has read, so that a turn costs only what is new: the message, and the pictures that the answer
/// before it drew, which the model reads as anyone's pictures, with the text behind them. That takes memory on the device
/// for every token, until [`Conversation::unload`]. A clone goes its own way; [`Conversation::save`] keeps one in a file.
#[derive(Clone)]
pub struct Conversation {
    nexus: Nexus,
    options: ConversationOptions,
    history: Vec<Message>,
    seen: Seen,
}

/// What the model has read of a conversation.
#[derive(Clone, Default)]
struct Seen {
    context: Context,
    /// The history, with the embeddings of each picture that was encoded in its place.
    messages: Vec<Message>,
    /// What the pictures were bounded by.
    max_pixels: usize,
}

/// One answer in a conversation.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Text and pictures in order.
    pub parts: Vec<AnswerPart>,
    /// What the model wrote.
    pub reply: Reply,
}

/// A piece of an answer.
#[derive(Debug, Clone)]
pub enum AnswerPart {
    /// Text.
    Text(String),
    /// A picture that the model drew.
    Image(Box<Picture>),
}

impl Conversation {
    pub(crate) fn new(nexus: Nexus, options: ConversationOptions, history: Vec<Message>) -> Self {
        Self { nexus, options, history, seen: Seen::default() }
    }

    /// What has been said so far; pictures drawn by the model are images of its messages.
    pub fn history(&self) -> &[Message] {
        &self.history
    }

    /// How it goes on.
    pub fn options(&self) -> &ConversationOptions {
        &self.options
    }

    /// Changes how it goes on from the next turn.
    pub fn set_options(&mut self, options: ConversationOptions) {
        self.options = options;
    }

    /// Frees what is kept on the device; the next turn reads everything again.
    pub fn unload(&mut self) {
        self.seen = Seen::default();
    }

    /// Adds a message and answers it. If it fails, the conversation is as before.
    ///
    /// # Errors
    /// As [`Nexus::reply`] and [`Nexus::draw`]; [`Error::NothingToEdit`] if [`ConversationDecoder::Editing`] finds
    /// no picture; [`Error::Cancelled`].
    pub fn send(&mut self, message: Message, mut observer: impl Observer) -> Result<Answer, Error> {
        // After a panic nothing is kept of what was seen.
        let mut seen = std::mem::take(&mut self.seen);
        let turn = self.turn(message, &mut seen, &mut observer);
        if !matches!(turn, Err(Error::Read { .. } | Error::OutOfDeviceMemory { .. } | Error::DeviceLost { .. })) {
            self.seen = seen;
        }
        let Turn { answer, history } = turn?;
        self.history = history;
        Ok(answer)
    }

    fn turn(&self, message: Message, seen: &mut Seen, observer: &mut dyn Observer) -> Result<Turn, Error> {
        let max_pixels = self.options.text.max_pixels;
        let mut messages = match seen.max_pixels == max_pixels {
            true => seen.messages.clone(),
            false => vec![],
        };
        let mut history = self.history.clone();
        history.push(message);
        messages.extend_from_slice(&history[messages.len()..]);
        let input = self.nexus.prompt(&messages, &self.options.text)?;
        let (reply, images) = self.nexus.reply_in(&mut seen.context, input, &self.options.text, observer)?;
        let pictures = self.draw_all(&history, &reply, observer).inspect_err(|_| {
            seen.context.truncate(reply.generation.reused_len);
        })?;
        put_in_place(&mut messages, images);
        (seen.messages, seen.max_pixels) = (messages, max_pixels);
        let parts = split(&reply.text, pictures);
        history
            .push(Message { parts: parts.iter().map(AnswerPart::as_message_part).collect(), ..Message::assistant() });
        Ok(Turn { answer: Answer { parts, reply }, history })
    }

    /// The pictures that a reply to the last message asks for.
    fn draw_all(&self, history: &[Message], reply: &Reply, observer: &mut dyn Observer) -> Result<Vec<Picture>, Error> {
        let source = self.reference(history)?;
        let mut pictures = vec![];
        for embeds in &reply.generation.images {
            let picture = match &source {
                Some(image) => {
                    let reference = self.nexus.reference(image, &mut *observer)?;
                    let with = DrawWith::EditingDecoder { reference: Some(&reference) };
                    self.nexus.draw(embeds, with, &self.options.edit.draw, &mut *observer)?
                }
                None => {
                    let with = DrawWith::GenerationDecoder;
                    self.nexus.draw(embeds, with, &self.options.generate.draw, &mut *observer)?
                }
            };
            pictures.push(picture);
        }
        Ok(pictures)
    }

    fn reference(&self, messages: &[Message]) -> Result<Option<Image>, Error> {
        let latest = |messages: &[Message]| messages.iter().rev().find_map(|message| message.images().last().cloned());
        match self.options.decoder {
            ConversationDecoder::Generation => Ok(None),
            ConversationDecoder::Editing => latest(messages).map(Some).ok_or(Error::NothingToEdit),
            ConversationDecoder::Auto => Ok(latest(&messages[messages.len().saturating_sub(2)..])),
        }
    }
}

/// What a turn adds to a conversation.
struct Turn {
    answer: Answer,
    history: Vec<Message>,
}

impl Answer {
    /// The text of all parts.
    pub fn text(&self) -> String {
        let texts = self.parts.iter().filter_map(|part| match part {
            AnswerPart::Text(text) => Some(text.as_str()),
            AnswerPart::Image(_) => None,
        });
        texts.collect()
    }

    /// The pictures, in order.
    pub fn pictures(&self) -> impl Iterator<Item = &Picture> {
        self.parts.iter().filter_map(|part| match part {
            AnswerPart::Text(_) => None,
            AnswerPart::Image(picture) => Some(&**picture),
        })
    }
}

impl AnswerPart {
    fn as_message_part(&self) -> Part {
        match self {
            Self::Text(text) => Part::Text(without_reserved_tokens(text)),
            Self::Image(picture) => Part::Image(picture.image.clone()),
        }
    }
}

/// Puts the embeddings of all images of the messages in their places.
fn put_in_place(messages: &mut [Message], images: Vec<ImageEmbeds>) {
    let parts = messages.iter_mut().flat_map(|message| &mut message.parts);
    let places = parts.filter(|part| !matches!(part, Part::Text(_)));
    places.zip(images).for_each(|(place, embeds)| *place = Part::Embeds(embeds));
}

/// Puts the pictures at the `<image>` marks of the text; empty texts are left out.
fn split(text: &str, pictures: Vec<Picture>) -> Vec<AnswerPart> {
    let mut parts = vec![];
    let mut pictures = pictures.into_iter();
    let mut texts = text.split(IMAGE_MARKER).peekable();
    while let Some(text) = texts.next() {
        if !text.is_empty() {
            parts.push(AnswerPart::Text(text.to_string()));
        }
        if texts.peek().is_some() {
            parts.extend(pictures.next().map(|picture| AnswerPart::Image(Box::new(picture))));
        }
    }
    parts.extend(pictures.map(|picture| AnswerPart::Image(Box::new(picture))));
    parts
}
