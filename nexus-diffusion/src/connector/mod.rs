//! From image embeddings to what the transformer is conditioned on: condition tokens and their positions.

mod adapter;
mod embedding_merger;
mod text_ids;

pub use adapter::Adapter;
pub use embedding_merger::{EmbeddingMerger, MERGER_BASE_GRID, Projector};
pub use text_ids::{TokenPosition, editing_text_ids, zero_text_ids};
