//! Tests of the facade from outside, in one program; those that must be alone in a process are beside this folder.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, missing_docs, reason = "a test may panic and print")]

mod ar;
mod bad_input;
mod conversation;
mod device_inputs;
mod house;
mod pipeline;
mod released_layout;
mod saved_conversation;
mod threads;
mod within_reach;

/// Keeps freed memory for the next tensor, as programs do.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
