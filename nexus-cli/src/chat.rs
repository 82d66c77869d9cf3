//! `nexus chat`: lines of text and commands -> a conversation. A mistake in one message does not end it.

use std::{
    io::{BufRead, IsTerminal},
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Result, ensure};
use nexus::{AnswerPart, Conversation, Image, Message};
use serde::Serialize;

use crate::{
    Output,
    draw::DrawArgs,
    failure,
    interrupt::Interrupt,
    model::{ModelArgs, Place},
    paths::{check_writable, free_name, typed},
    watch::{Seconds, Watch},
};

const HELP: &str = "/image PATH  send a picture with the next message; several times for several pictures
/save PATH   keep the conversation in a file, to go on with by `nexus chat --conversation PATH`
/help        show this
/quit        end the conversation";

#[derive(clap::Args)]
#[command(after_help = "Examples:
  nexus chat
  nexus chat --model models --device cuda:0 -o pictures
  printf 'Generate an image according to the following description: a red circle\\n' | nexus chat --json

A line is a message; `/help` lists the commands. What begins with `/` is never sent to the model.
Ctrl-C stops an answer, and ends the program while it waits for a message. With --json, each message
is answered by one JSON object on a line of its own.")]
pub struct Args {
    /// Directory for drawn pictures: chat.png, chat-2.png, ...
    #[arg(short, long, alias = "result_path", value_name = "DIR", default_value = ".", help_heading = "Result")]
    output: PathBuf,
    /// Go on with a conversation that /save wrote
    #[arg(short, long, value_name = "FILE")]
    conversation: Option<PathBuf>,
    #[command(flatten)]
    draw: DrawArgs,
    #[command(flatten)]
    model: ModelArgs,
}

/// A line that was typed.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Nothing,
    Message(String),
    Help,
    Image(PathBuf),
    Save(PathBuf),
    Quit,
    /// What is no command, and why.
    Unknown(String),
}

impl Line {
    fn parse(line: &str) -> Self {
        let line = line.trim();
        let Some(command) = line.strip_prefix('/') else {
            return if line.is_empty() { Self::Nothing } else { Self::Message(line.to_string()) };
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        match (name, rest.trim()) {
            ("help" | "?", _) => Self::Help,
            ("quit" | "exit", _) => Self::Quit,
            ("image", "") => Self::Unknown("/image needs the path of a picture".to_string()),
            ("image", path) => Self::Image(typed(path)),
            ("save", "") => Self::Unknown("/save needs the path of a file".to_string()),
            ("save", path) => Self::Save(typed(path)),
            _ if typed(line).is_file() => Self::Unknown(format!("a picture is sent by `/image {line}`")),
            _ => Self::Unknown(format!("/{name} is no command")),
        }
    }
}

/// What a program reads for each message.
#[derive(Serialize)]
struct Turn {
    /// Texts and pictures in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    reply: Option<Vec<Part>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    seconds: Seconds,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Part {
    Text(String),
    Picture(PathBuf),
}

pub fn run(args: Args, output: &Output) -> Result<ExitCode> {
    let place = Place::of(args.model.model.as_deref(), output)?;
    if !args.output.is_dir() {
        return Err(failure::usage(format!("{}: no such directory; make it first", args.output.display())));
    }
    check_writable(&free_name(&args.output, "chat.png", false), false)?;
    let interrupt = Interrupt::listen()?;
    let mut watch = Watch::new(output, &interrupt);
    let nexus = args.model.load(&place, &mut watch)?;
    watch.rest();
    let mut conversation = match &args.conversation {
        Some(path) => nexus.load_conversation(path)?,
        None => nexus.conversation(),
    };
    let mut options = conversation.options().clone();
    for draw in [&mut options.generate.draw, &mut options.edit.draw] {
        args.draw.apply(draw);
    }
    conversation.set_options(options);
    let mut chat = Chat { output, watch, conversation, images: vec![], dir: &args.output };
    if std::io::stdin().is_terminal() {
        output.note("type a message, or /help");
    }
    while let Some(line) = interrupt.while_idle(|| next_line(output)) {
        let line = line.map_or_else(Line::Unknown, |line| Line::parse(&line));
        if chat.take(line)?.is_break() {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A conversation at a terminal.
struct Chat<'a> {
    output: &'a Output,
    watch: Watch<'a>,
    conversation: Conversation,
    /// Pictures that go with the next message.
    images: Vec<Image>,
    /// Where drawn pictures go.
    dir: &'a Path,
}

impl Chat<'_> {
    /// Does what a line says; breaks if it ends the conversation.
    fn take(&mut self, line: Line) -> Result<ControlFlow<()>> {
        let output = self.output;
        match line {
            Line::Nothing => {}
            Line::Quit => return Ok(ControlFlow::Break(())),
            Line::Help => output.warn(HELP),
            Line::Unknown(why) => output.warn(&format!("error: {why}; /help lists the commands")),
            Line::Image(path) => match Image::open(path) {
                Ok(image) => self.images.push(image),
                Err(error) => output.warn(&format!("error: {error}")),
            },
            Line::Save(path) => match self.save(&path) {
                Ok(()) => output.note(format!("conversation: {}", path.display())),
                Err(error) => output.warn(&format!("error: {}", failure::text(&error))),
            },
            Line::Message(text) => {
                let result = self.answer(text);
                self.show(result)?;
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn save(&self, path: &Path) -> Result<()> {
        ensure!(!path.exists(), "{}: already there; give another path", path.display());
        Ok(self.conversation.save(path)?)
    }

    /// Sends a message with the pictures that wait for it; if it fails, they wait on.
    fn answer(&mut self, text: String) -> Result<Vec<Part>> {
        let message = self.images.iter().cloned().fold(Message::user(), Message::with_image).with_text(text);
        let answer = self.conversation.send(message, self.watch.observer())?;
        self.images.clear();
        let parts = answer.parts.into_iter().map(|part| match part {
            AnswerPart::Text(text) => Ok(Part::Text(text)),
            AnswerPart::Image(picture) => {
                let path = free_name(self.dir, "chat.png", false);
                picture.save(&path)?;
                Ok(Part::Picture(path))
            }
        });
        parts.collect()
    }

    fn show(&mut self, result: Result<Vec<Part>>) -> Result<()> {
        let (output, seconds) = (self.output, self.watch.rest());
        let turn = match result {
            Ok(parts) => {
                for part in &parts {
                    match part {
                        Part::Text(text) => output.say(text),
                        Part::Picture(path) => output.say(format!("picture: {}", path.display())),
                    }
                }
                Turn { reply: Some(parts), error: None, seconds }
            }
            Err(error) => {
                let text = failure::text(&error);
                if !output.is_json() {
                    output.warn(&if failure::is_cancelled(&error) { text.clone() } else { format!("error: {text}") });
                }
                Turn { reply: None, error: Some(text), seconds }
            }
        };
        output.object(&turn)
    }
}

/// The next line of standard input; none at its end.
fn next_line(output: &Output) -> Option<Result<String, String>> {
    if std::io::stdin().is_terminal() {
        output.ask("> ");
    }
    let mut bytes = Vec::new();
    match std::io::stdin().lock().read_until(b'\n', &mut bytes) {
        Ok(0) => None,
        Ok(_) => Some(String::from_utf8(bytes).map_err(|_| "a line that is not UTF-8".to_string())),
        Err(error) => {
            output.warn(&format!("error: standard input: {error}"));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_begins_with_a_slash_is_a_command() {
        let message = |text: &str| Line::Message(text.to_string());
        for (line, expected) in [
            ("", Line::Nothing),
            ("  \n", Line::Nothing),
            ("Hello there\n", message("Hello there")),
            ("a / b", message("a / b")),
            ("/help", Line::Help),
            ("/quit\r\n", Line::Quit),
            ("/exit", Line::Quit),
            (" /image \"my cat.png\"", Line::Image("my cat.png".into())),
            ("/save cats.safetensors", Line::Save("cats.safetensors".into())),
        ] {
            assert_eq!(Line::parse(line), expected, "{line:?}");
        }
        for line in ["/image", "/save", "/", "/draw a circle", "/imagecat.png", "/ image a.png", "//", "/Help"] {
            assert!(matches!(Line::parse(line), Line::Unknown(_)), "{line:?}");
        }
    }
}
