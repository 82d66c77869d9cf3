//! How nexus-tiny is made: the world as a source of samples for recipes, and what the programs of the lab share.
//!
//! Data flow: a recipe's `{"world": {..}}` -> [`WorldSource`] -> conversations with their truth -> `nexus-train`.

pub mod model;
pub mod score;
mod source;
mod supervision;

pub use source::{WorldSource, trainer};
