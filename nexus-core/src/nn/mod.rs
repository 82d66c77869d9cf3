//! Neural-network blocks shared by the models: configuration -> module -> tensors.
//!
//! Weights keep the dtype of the file and activations keep theirs: every block computes in the dtype of its input, so that
//! bf16 weights can be used with f32 activations. What they compute with is in `nexus-kernels`. A block belongs here when a
//! second crate needs it.

mod conv;
mod decoder_layer;
mod embedding;
mod gated_mlp;
mod key_value;
mod linear;
mod norm;
mod recomputation;
mod rotary;

pub use conv::{Conv2d, Conv2dConfig};
pub use decoder_layer::{DecoderLayer, DecoderLayerConfig, SelfAttention};
pub use embedding::Embedding;
pub use gated_mlp::GatedMlp;
pub use key_value::KeyValue;
pub use linear::Linear;
pub use norm::{GroupNorm, LayerNorm, RmsNorm};
pub use recomputation::{Activation, Recomputation};
pub use rotary::{MultimodalRotary, inverse_frequencies};

use burn::{
    module::{Initializer, Param},
    tensor::{Device, Tensor},
};

/// Standard deviation of freshly made weight matrices, Qwen2.5-VL's `initializer_range`.
const INIT_STD: f64 = 0.02;

/// A lazy parameter with normally distributed values; nothing is allocated until it is used.
pub fn normal_param<const D: usize>(shape: [usize; D], device: &Device) -> Param<Tensor<D>> {
    Initializer::Normal { mean: 0.0, std: INIT_STD }.init(shape, device)
}
