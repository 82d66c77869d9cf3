//! The text encoders of FLUX: token ids -> a pooled vector (CLIP) and condition tokens (T5).
//!
//! Nothing else in this crate knows token ids.

mod clip;
mod t5;

use burn::tensor::{Device, Int, Tensor};
use nexus_kernels::index_tensor;

pub use clip::{ClipAttention, ClipEmbeddings, ClipLayer, ClipMlp, ClipTextEncoder};
pub use t5::{T5Attention, T5Block, T5Dense, T5Encoder};

use crate::DiffusionError;

/// Token ids of one text, checked: `[1, tokens]`.
fn checked_ids(
    encoder: &'static str,
    ids: &[u32],
    max_tokens: usize,
    vocab_size: usize,
    device: &Device,
) -> Result<Tensor<2, Int>, DiffusionError> {
    if ids.is_empty() || ids.len() > max_tokens {
        return Err(DiffusionError::TokenCount { encoder, tokens: ids.len(), max: max_tokens });
    }
    if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(DiffusionError::TokenOutOfVocabulary { encoder, id, vocab_size });
    }
    Ok(index_tensor(ids.iter().map(|&id| id as usize), [1, ids.len()], device))
}
