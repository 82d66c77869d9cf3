//! Files of weights through the public interface: what is read, written and refused, and how modules get their weights.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test may panic")]

mod files;
mod module;
mod quantized;
mod torch;
