//! Where words go: results to standard output, notes and warnings to standard error. Nobody has to listen: what cannot be
//! written never ends the work.

use std::{
    cell::RefCell,
    fmt::Display,
    io::{ErrorKind, Write},
    sync::Mutex,
};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use serde::Serialize;

/// The bar that is on the terminal; what is said while it is there is written above it.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// What a subcommand says.
pub struct Output {
    json: bool,
    quiet: bool,
    /// Why results could not be written.
    lost: RefCell<Option<std::io::Error>>,
}

impl Output {
    /// Also shows what the libraries log: warnings, with `verbose` more.
    pub fn new(json: bool, quiet: bool, verbose: u8) -> Self {
        let level = match (quiet, verbose) {
            (true, _) => log::LevelFilter::Error,
            (false, 0) => log::LevelFilter::Warn,
            (false, 1) => log::LevelFilter::Info,
            (false, _) => log::LevelFilter::Debug,
        };
        // Tests make several; the first one stays.
        if log::set_logger(&Log).is_ok() {
            log::set_max_level(level);
        }
        Self { json, quiet, lost: RefCell::new(None) }
    }

    /// Whether a program reads.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Whether nobody wants to see more than results.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// A line of the result for a person.
    pub fn say(&self, line: impl Display) {
        if !self.json {
            self.write(&format!("{line}\n"));
        }
    }

    /// A result for a person, without the end of a line.
    pub fn ask(&self, text: &str) {
        if !self.json {
            self.write(text);
        }
    }

    /// The result for a program: one line.
    pub fn object(&self, object: &impl Serialize) -> Result<()> {
        if self.json {
            self.write(&format!("{}\n", serde_json::to_string(object)?));
        }
        Ok(())
    }

    /// What a person may want to know besides.
    pub fn note(&self, line: impl Display) {
        if !self.quiet {
            write_error(&line.to_string());
        }
    }

    /// What a person has to know.
    pub fn warn(&self, line: &str) {
        write_error(line);
    }

    /// Fails if results could not be written, unless their reader went away.
    pub fn finish(&self) -> Result<()> {
        self.lost.take().map_or(Ok(()), Err).context("writing to standard output")
    }

    fn write(&self, text: &str) {
        let mut lost = self.lost.borrow_mut();
        if lost.is_none() {
            let mut stdout = std::io::stdout().lock();
            let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
            *lost = written.err().filter(|error| error.kind() != ErrorKind::BrokenPipe);
        }
    }
}

/// Puts a bar on the terminal, or takes it away.
pub fn show_bar(bar: Option<ProgressBar>) {
    *BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = bar;
}

fn write_error(line: &str) {
    let write = || {
        let _ = writeln!(std::io::stderr().lock(), "{line}");
    };
    match &*BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// Writes what the libraries log.
struct Log;

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        let level = match record.level() {
            log::Level::Error => "error",
            log::Level::Warn => "warning",
            log::Level::Info => "info",
            log::Level::Debug | log::Level::Trace => "debug",
        };
        if self.enabled(record.metadata()) {
            write_error(&format!("{level}: {}", record.args()));
        }
    }

    fn flush(&self) {}
}
