//! The program `nexus`: command line -> requests to the library -> pictures, texts and tables.
//!
//! One module per subcommand, and what they share. This is a library so that the program's own tests and benches can reach
//! inside; what embeds the model uses the crate `nexus`.
#![allow(missing_docs, reason = "nothing outside of this package is meant to use it")]

#[cfg(feature = "bench")]
pub mod bench;
mod chat;
mod cli;
mod devices;
mod draw;
mod edit;
mod failure;
mod generate;
mod inspect;
mod interrupt;
mod model;
mod output;
mod paths;
#[cfg(feature = "train")]
pub mod train;
mod understand;
#[cfg(feature = "verify")]
pub mod verify;
mod watch;

pub use cli::Cli;
pub use output::Output;
