//! The program as people and other programs run it: arguments and typed lines -> files, words and exit status.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test fails by panicking")]

mod certificate;
mod chat;
mod command_line;
mod measuring;
mod page;
mod pictures;
mod training;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// What the program did.
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code().unwrap(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// The one JSON object that standard output is.
    #[track_caller]
    fn json(&self) -> serde_json::Value {
        assert_eq!(self.code, 0, "{}", self.stderr);
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {:?}", self.stdout))
    }

    /// Fails unless it ended so, with nothing but one error.
    #[track_caller]
    fn assert_error(&self, code: i32, text: &str) {
        assert_eq!(self.code, code, "{}", self.stderr);
        assert!(self.stderr.contains(text), "`{text}` is not in {:?}", self.stderr);
        // Drivers of GPUs say why they are not there, each in its own way.
        let said = self.stderr.lines().filter(|line| !line.contains("XDG_RUNTIME_DIR") && !line.contains("EGL"));
        assert_eq!(said.map(|line| line.matches("error:").count()).sum::<usize>(), 1, "{:?}", self.stderr);
        assert_eq!(self.stdout, "");
    }
}

/// The program in a directory, without what the tests themselves were told by variables.
fn command(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nexus"));
    command.args(arguments).current_dir(dir).env_remove("RUST_BACKTRACE").env_remove("RUST_LIB_BACKTRACE");
    command
}

fn nexus(dir: &Path, arguments: &[&str]) -> Ran {
    Ran::of(command(dir, arguments).stdin(Stdio::null()).output().unwrap())
}

/// The program with these lines typed.
fn typing(dir: &Path, arguments: &[&str], lines: &[u8]) -> Ran {
    let mut command = command(dir, arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines).unwrap();
    Ran::of(child.wait_with_output().unwrap())
}

/// The clone of the repository.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn tiny_dir() -> PathBuf {
    root().join("assets/nexus-tiny")
}

/// Width and height that the header of a PNG says.
fn png_size(path: &Path) -> (u32, u32) {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(bytes[..8], *b"\x89PNG\r\n\x1a\n", "{}", path.display());
    let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    (number(16), number(20))
}
