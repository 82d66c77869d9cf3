//! What went wrong -> one message on standard error, and the exit status.

use std::{backtrace::BacktraceStatus, process::ExitCode};

use anyhow::Error;

use crate::Output;

/// Exit status of a command line that cannot be carried out; nothing was begun.
const USAGE: u8 = 2;
/// Exit status of what the user stopped: 128 and the number of the interrupt signal.
const CANCELLED: u8 = 130;

/// A command line that can be parsed and not be carried out.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// An error that ends with the exit status of a wrong command line.
pub fn usage(message: impl Into<String>) -> Error {
    Usage(message.into()).into()
}

/// The exit status of what the user stopped.
pub fn cancelled() -> ExitCode {
    CANCELLED.into()
}

/// Prints an error, and says what the program ends with.
pub fn report(error: &Error, output: &Output) -> ExitCode {
    if is_cancelled(error) {
        output.warn("cancelled");
        return cancelled();
    }
    output.warn(&format!("error: {}", text(error)));
    let backtrace = error.backtrace();
    if backtrace.status() == BacktraceStatus::Captured {
        output.warn(&backtrace.to_string());
    }
    ExitCode::from(if error.is::<Usage>() { USAGE } else { 1 })
}

/// Whether the user stopped it.
pub fn is_cancelled(error: &Error) -> bool {
    matches!(error.downcast_ref(), Some(nexus::Error::Cancelled))
}

/// A message with its causes, without those that it names itself.
pub fn text(error: &Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text += &format!(": {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn a_cause_is_said_once() {
        let cause = || anyhow!("disk full");
        assert_eq!(text(&cause()), "disk full");
        assert_eq!(text(&Err::<(), _>(cause()).context("a.png").unwrap_err()), "a.png: disk full");
        assert_eq!(
            text(&Err::<(), _>(cause()).context("a.png: disk full; make room").unwrap_err()),
            "a.png: disk full; make room"
        );
    }
}
