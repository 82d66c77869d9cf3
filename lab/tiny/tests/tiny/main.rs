//! The lab of nexus-tiny: how right the bundled model is, and training on the world.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test may panic")]

mod judged;
mod parts;
mod recipes;

/// Keeps freed memory for the next tensor, as in the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
