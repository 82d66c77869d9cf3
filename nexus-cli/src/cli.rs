//! The command line: subcommands, what all of them take, and the help that teaches -> a call and an exit code.

use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::{Args, Command as Parser, CommandFactory, FromArgMatches, Subcommand};

use crate::{Output, chat, devices, edit, failure, generate, inspect, understand};

/// Draws pictures, changes them, and talks about them
#[derive(clap::Parser)]
#[command(name = "nexus", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    output: OutputArgs,
    #[command(subcommand)]
    command: Command,
}

/// What every subcommand takes.
#[derive(Args)]
struct OutputArgs {
    /// Write one JSON object to standard output, and nothing else there
    #[arg(long, global = true)]
    json: bool,
    /// Show no progress and no notes
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Show what the libraries log; twice shows more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Subcommand)]
enum Command {
    /// Draw a picture of what a text describes
    Generate(Box<generate::Args>),
    /// Change a picture as an instruction says
    Edit(Box<edit::Args>),
    /// Answer a question about one or several pictures
    Understand(understand::Args),
    /// Hold a conversation of texts and pictures
    Chat(Box<chat::Args>),
    /// Show what a checkpoint holds, check it, and hash it
    Inspect(inspect::Args),
    /// List the devices of this computer and what they compute in
    Devices,
    /// Compare every stage on a device with PyTorch's results
    #[cfg(feature = "verify")]
    Verify(crate::verify::Args),
    /// Compare every stage on a device with PyTorch's results (not in this build)
    #[cfg(not(feature = "verify"))]
    Verify(Absent),
    /// Train a part of a model
    #[cfg(feature = "train")]
    Train(crate::train::Args),
    /// Train a part of a model (not in this build)
    #[cfg(not(feature = "train"))]
    Train(Absent),
    /// Time the stages on the devices of this computer
    #[cfg(feature = "bench")]
    Bench(crate::bench::Args),
    /// Time the stages on the devices of this computer (not in this build)
    #[cfg(not(feature = "bench"))]
    Bench(Absent),
}

/// The arguments of a subcommand that this build leaves out.
#[cfg(not(all(feature = "verify", feature = "train", feature = "bench")))]
#[derive(Args)]
#[command(disable_help_flag = true)]
struct Absent {
    #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
    _arguments: Vec<OsString>,
}

#[cfg(not(all(feature = "verify", feature = "train", feature = "bench")))]
impl Absent {
    fn run(&self, name: &str) -> Result<ExitCode> {
        Err(failure::usage(format!(
            "`{name}` is not in this build: build with the feature of this name, as in \
             `cargo run --release --features {name} -- {name}`"
        )))
    }
}

/// Subcommands that a build may leave out.
const OPTIONAL: [(&str, bool); 3] =
    [("verify", cfg!(feature = "verify")), ("train", cfg!(feature = "train")), ("bench", cfg!(feature = "bench"))];

const EXAMPLES: &str = "Examples:
  nexus generate \"a red circle to the left of a blue square\" -o circle.png
  nexus edit circle.png \"Colour the circle yellow.\"
  nexus understand circle.png \"Where is the circle?\"
  nexus chat
  nexus generate --help

Exit status: 0 done, 1 failed, 2 the command line cannot be carried out and nothing was begun, 130 cancelled.";

impl Cli {
    /// Parses; what cannot be parsed, and help that was asked for, is printed.
    ///
    /// # Errors
    /// The exit status, if there is nothing to run.
    pub fn from_arguments(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, ExitCode> {
        let parsed = command().try_get_matches_from(arguments).and_then(|matches| Self::from_arg_matches(&matches));
        parsed.map_err(|error| {
            // A reader that is gone is no reason to fail.
            let _ = error.print();
            ExitCode::from(error.exit_code() as u8)
        })
    }

    /// Runs the subcommand; a failure is printed, once.
    pub fn run(self) -> ExitCode {
        let OutputArgs { json, quiet, verbose } = self.output;
        let output = Output::new(json, quiet, verbose);
        let result = self.command.run(&output).and_then(|code| output.finish().map(|()| code));
        result.unwrap_or_else(|error| failure::report(&error, &output))
    }
}

impl Command {
    fn run(self, output: &Output) -> Result<ExitCode> {
        match self {
            Self::Generate(args) => generate::run(*args, output),
            Self::Edit(args) => edit::run(*args, output),
            Self::Understand(args) => understand::run(args, output),
            Self::Chat(args) => chat::run(*args, output),
            Self::Inspect(args) => inspect::run(args, output),
            Self::Devices => devices::run(output),
            #[cfg(feature = "verify")]
            Self::Verify(args) => crate::verify::run(args, output),
            #[cfg(not(feature = "verify"))]
            Self::Verify(absent) => absent.run("verify"),
            #[cfg(feature = "train")]
            Self::Train(args) => crate::train::run(args, output),
            #[cfg(not(feature = "train"))]
            Self::Train(absent) => absent.run("train"),
            #[cfg(feature = "bench")]
            Self::Bench(args) => crate::bench::run(args, output),
            #[cfg(not(feature = "bench"))]
            Self::Bench(absent) => absent.run("bench"),
        }
    }
}

/// The parser of this build.
fn command() -> Parser {
    let absent: Vec<&str> = OPTIONAL.iter().filter_map(|(name, here)| (!here).then_some(*name)).collect();
    let more = match absent.is_empty() {
        true => String::new(),
        false => format!(
            "\n\nNot in this build: {}. Each is a feature: `cargo run --release --features {} -- {} --help`.",
            absent.join(", "),
            absent.join(","),
            absent[0]
        ),
    };
    both_spellings(Cli::command()).after_help(format!("{EXAMPLES}{more}"))
}

/// Lets every option of several words be written with hyphens and with underscores.
fn both_spellings(command: Parser) -> Parser {
    let with_other = |arg: clap::Arg| {
        let mut others: Vec<String> = Vec::new();
        for name in arg.get_long().into_iter().chain(arg.get_all_aliases().into_iter().flatten()) {
            others.extend([name.replace('-', "_"), name.replace('_', "-")].into_iter().filter(|other| other != name));
        }
        // The parser keeps names for as long as the process lives.
        arg.aliases(others.into_iter().map(|other| &*other.leak()))
    };
    command.mut_args(with_other).mut_subcommands(both_spellings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parser_is_coherent() {
        command().debug_assert();
    }

    #[test]
    fn options_are_found_in_both_spellings_and_under_the_names_of_the_original() {
        for arguments in [
            "generate --prompt x --num_inference_steps 3 --negative-prompt y --cfg_scale 1.5 --embedded-guidance 2",
            "generate x --steps 3 --negative_prompt y --cfg-scale 1.5 --embedded_guidance 2 --enable_cpu_offload",
            "generate x --enable-cpu-offload --ckpt_path a --flux_path b --result_path c.png --compute_dtype f32",
            "generate x -m a -d cpu -o c.png --seed 1 --json -q",
            "edit --input_image a.png --instruction x --use_generation_decoder --max_pixels 9 --result-path b.png",
            "edit a.png x -o b.png --overwrite",
            "understand a.png b.png x --max-pixels 9",
            "understand --input_image a.png --input-image b.png --instruction x",
            "chat --result_path pictures --num-inference-steps 3",
            "inspect models --tensors",
            "inspect --ckpt-path models --manifest m",
        ] {
            let words = ["nexus"].into_iter().chain(arguments.split(' ')).map(OsString::from);
            assert!(command().try_get_matches_from(words).is_ok(), "{arguments}");
        }
    }

    #[test]
    fn arguments_that_contradict_each_other_are_refused() {
        for arguments in
            ["generate x --prompt y", "inspect a --model b", "inspect --manifest a --verify b", "draw x", ""]
        {
            let words = ["nexus"].into_iter().chain(arguments.split(' ').filter(|word| !word.is_empty()));
            let error = command().try_get_matches_from(words.map(OsString::from)).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{arguments}");
        }
    }
}
