//! Many turns: history in, reply parts out, text and pictures in the order in which the model made them.

use nexus_data::{Image, Message, Part};
use serde::{Deserialize, Serialize};

use crate::{DrawOptions, DrawWith, EditOptions, Error, GenerateOptions, Picture, Session, TextOptions};

/// Options of [`crate::Nexus::chat`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ChatOptions {
    /// How the model reads and writes.
    pub text: TextOptions,
    /// How new pictures are drawn; its `text` and `language` are not used.
    pub generate: GenerateOptions,
    /// How changed pictures are drawn; its `text` and `decoder` are not used.
    pub edit: EditOptions,
    /// Which decoder draws.
    pub decoder: ChatDecoder,
}

/// How a conversation chooses between drawing anew and changing a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChatDecoder {
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
pub struct Chat<'a> {
    session: Session<'a>,
    options: ChatOptions,
    history: Vec<Message>,
}

/// One answer in a conversation.
#[derive(Debug, Clone)]
pub struct ChatReply {
    /// Text and pictures in order.
    pub parts: Vec<ReplyPart>,
}

/// A piece of an answer.
#[derive(Debug, Clone)]
pub enum ReplyPart {
    /// Text.
    Text(String),
    /// A picture that the model drew.
    Image(Box<Picture>),
}

impl<'a> Chat<'a> {
    pub(crate) fn new(session: Session<'a>, options: ChatOptions) -> Self {
        Self { session, options, history: vec![] }
    }

    /// What has been said so far; pictures drawn by the model are images of its messages.
    pub fn history(&self) -> &[Message] {
        &self.history
    }

    /// Adds a message and answers it. If it fails, the history is as before.
    ///
    /// # Errors
    /// As [`crate::Nexus::reply`] and [`crate::Nexus::draw`]; [`Error::NothingToEdit`] if [`ChatDecoder::Editing`] finds
    /// no picture; [`Error::Cancelled`].
    pub fn send(&mut self, message: Message) -> Result<ChatReply, Error> {
        let mut turns = self.history.clone();
        turns.push(message);
        let reply = self.session.reply(&turns, &self.options.text)?;
        let reference = self.reference(&turns)?;
        let mut pictures = vec![];
        for embeds in &reply.generation.images {
            let picture = match &reference {
                Some(image) => {
                    let reference = self.session.reference(image)?;
                    let with = DrawWith::EditingDecoder { reference: Some(&reference) };
                    self.session.draw(embeds, with, &DrawOptions::from(&self.options.edit))?
                }
                None => {
                    let draw = DrawOptions::from(&self.options.generate);
                    self.session.draw(embeds, DrawWith::GenerationDecoder, &draw)?
                }
            };
            pictures.push(picture);
        }
        let parts = split(&reply.text, pictures);
        turns.push(Message { parts: parts.iter().map(ReplyPart::as_message_part).collect(), ..Message::assistant() });
        self.history = turns;
        Ok(ChatReply { parts })
    }

    fn reference(&self, turns: &[Message]) -> Result<Option<Image>, Error> {
        let latest = |turns: &[Message]| turns.iter().rev().find_map(|turn| turn.images().last().cloned());
        match self.options.decoder {
            ChatDecoder::Generation => Ok(None),
            ChatDecoder::Editing => latest(turns).map(Some).ok_or(Error::NothingToEdit),
            ChatDecoder::Auto => Ok(latest(&turns[turns.len().saturating_sub(2)..])),
        }
    }
}

impl ReplyPart {
    fn as_message_part(&self) -> Part {
        match self {
            Self::Text(text) => Part::Text(text.clone()),
            Self::Image(picture) => Part::Image(picture.image.clone()),
        }
    }
}

/// Puts the pictures at the `<image>` marks of the text; empty texts are left out.
fn split(text: &str, pictures: Vec<Picture>) -> Vec<ReplyPart> {
    let mut parts = vec![];
    let mut pictures = pictures.into_iter();
    let mut texts = text.split(nexus_data::IMAGE_MARKER).peekable();
    while let Some(text) = texts.next() {
        if !text.is_empty() {
            parts.push(ReplyPart::Text(text.to_string()));
        }
        if texts.peek().is_some() {
            parts.extend(pictures.next().map(|picture| ReplyPart::Image(Box::new(picture))));
        }
    }
    parts.extend(pictures.map(|picture| ReplyPart::Image(Box::new(picture))));
    parts
}
