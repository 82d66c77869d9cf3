//! The program `nexus`: parses the command line and calls the subcommand.

use std::process::ExitCode;

use nexus_cli::Cli;

/// Keeps freed memory for the next tensor; the system's allocator gives every large one back at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match Cli::from_arguments(std::env::args_os()) {
        Ok(cli) => cli.run(),
        Err(code) => code,
    }
}
