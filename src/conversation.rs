//! Many turns: a message in, an answer out, text and pictures in the order in which the model made them.

use nexus_data::{Image, Message, Part};
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
pub struct Conversation {
    nexus: Nexus,
    options: ConversationOptions,
    history: Vec<Message>,
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
    pub(crate) fn new(nexus: Nexus, options: ConversationOptions) -> Self {
        Self { nexus, options, history: vec![] }
    }

    /// What has been said so far; pictures drawn by the model are images of its messages.
    pub fn history(&self) -> &[Message] {
        &self.history
    }

    /// How it goes on; may be changed between turns.
    pub fn options_mut(&mut self) -> &mut ConversationOptions {
        &mut self.options
    }

    /// Adds a message and answers it. If it fails, the conversation is as before.
    ///
    /// # Errors
    /// As [`Nexus::reply`] and [`Nexus::draw`]; [`Error::NothingToEdit`] if [`ConversationDecoder::Editing`] finds
    /// no picture; [`Error::Cancelled`].
    pub fn send(&mut self, message: Message, mut observer: impl Observer) -> Result<Answer, Error> {
        let observer: &mut dyn Observer = &mut observer;
        let mut messages = self.history.clone();
        messages.push(message);
        let reply = self.nexus.reply(&messages, &self.options.text, &mut *observer)?;
        let reference = self.reference(&messages)?;
        let mut pictures = vec![];
        for embeds in &reply.generation.images {
            let picture = match &reference {
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
        let parts = split(&reply.text, pictures);
        messages
            .push(Message { parts: parts.iter().map(AnswerPart::as_message_part).collect(), ..Message::assistant() });
        self.history = messages;
        Ok(Answer { parts, reply })
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
            Self::Text(text) => Part::Text(text.clone()),
            Self::Image(picture) => Part::Image(picture.image.clone()),
        }
    }
}

/// Puts the pictures at the `<image>` marks of the text; empty texts are left out.
fn split(text: &str, pictures: Vec<Picture>) -> Vec<AnswerPart> {
    let mut parts = vec![];
    let mut pictures = pictures.into_iter();
    let mut texts = text.split(nexus_data::IMAGE_MARKER).peekable();
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
