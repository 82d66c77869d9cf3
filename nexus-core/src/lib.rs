//! Shared words of the nexus crates: image embeddings, configuration files and neural-network blocks.
//!
//! Data flow: files -> [`nexus_checkpoint::Checkpoint`] -> modules built from [`nn`] -> [`ImageEmbeds`], the one type that
//! crosses every wall between the stages. Nothing here is a model, reads a prompt or an image file, prints, or uses
//! the network.
//!
//! All tensors are burn tensors whose device and dtype the caller chooses; no backend is named here.

pub mod config;
mod embeds;
mod failure;
pub mod nn;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use embeds::{EmbedsError, GridThw, ImageEmbeds, MERGE_SIZE, PATCH_SIZE_PX};
pub use failure::{OutOfMemory, check_arrived, failure_reason, mib};

/// Whether this crate, and with it most likely everything below it, was built with optimisation.
pub const IS_OPTIMIZED: bool = !matches!(env!("NEXUS_OPT_LEVEL").as_bytes(), b"0");
