//! Training through the public interface: recipes, runs that are killed and go on, steps, every part, and losses against PyTorch.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test may panic")]

mod case;
mod objectives;
mod recipes;
mod rejected;
mod runs;
mod sources;
mod starts;
mod steps;

/// Keeps freed memory for the next tensor, as in the programs.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
