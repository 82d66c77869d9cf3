//! Neural-network blocks shared by the models: configuration -> module -> tensors.
//!
//! Weights keep the dtype of the file and activations keep theirs: every block computes in the dtype of its input, so that
//! bf16 weights can be used with f32 activations. The kernels for CPUs read weights as they are stored, elsewhere they are
//! cast. A block belongs here when a second crate needs it.

/// Returns what the kernels for CPUs or GPUs make of a tensor; where they do not know it, they give it back.
macro_rules! kernels_first {
    ($back:pat, $cpu:expr, $gpu:expr) => {
        #[cfg(feature = "flex")]
        let $back = match $cpu {
            Ok(y) => return y,
            Err(back) => back,
        };
        #[cfg(feature = "cube")]
        let $back = match $gpu {
            Ok(y) => return y,
            Err(back) => back,
        };
    };
}

mod activation;
mod attention;
mod conv;
mod decoder_layer;
mod embedding;
mod gated_mlp;
mod join;
mod key_value;
mod linear;
mod norm;
mod quantization;
mod recomputation;
mod rotary;

#[cfg(any(feature = "flex", feature = "cube"))]
pub(crate) use activation::Function;
pub use activation::{gated_residual, gelu, gelu_tanh, gelu_tanh_mul, quick_gelu, relu, silu, silu_mul};
#[cfg(all(test, feature = "flex", feature = "train"))]
pub(crate) use attention::plain as plain_attention;
#[cfg(all(feature = "cube", feature = "train"))]
pub(crate) use attention::repeat_heads;
#[cfg(all(test, any(feature = "flex", feature = "cube")))]
pub(crate) use attention::tests::naive as naive_attention;
pub use attention::{Attention, Visibility, attention};
pub use conv::{Conv2d, Conv2dConfig, upsample_conv, upsample_nearest_2x};
pub use decoder_layer::{DecoderLayer, DecoderLayerConfig, SelfAttention};
pub use embedding::Embedding;
pub use gated_mlp::GatedMlp;
pub use join::{cat, split};
pub use key_value::KeyValue;
pub use linear::{Linear, linear};
pub use norm::{GroupNorm, LayerNorm, RmsNorm, layer_norm, modulate};
pub use recomputation::{Activation, Recomputation};
#[cfg(any(feature = "flex", feature = "cube"))]
pub(crate) use rotary::Pairs;
pub use rotary::{MultimodalRotary, RotaryTable, inverse_frequencies, rotate_half, rotate_interleaved};
#[cfg(all(test, any(feature = "flex", feature = "cube"), feature = "train"))]
pub(crate) use rotary::{plain_rotate_half, plain_rotate_interleaved};

use burn::{
    module::{Initializer, Param},
    tensor::{Device, Int, Tensor, TensorData},
};

/// Standard deviation of freshly made weight matrices, Qwen2.5-VL's `initializer_range`.
const INIT_STD: f64 = 0.02;

/// A lazy parameter with normally distributed values; nothing is allocated until it is used.
pub fn normal_param<const D: usize>(shape: [usize; D], device: &Device) -> Param<Tensor<D>> {
    Initializer::Normal { mean: 0.0, std: INIT_STD }.init(shape, device)
}

/// Token ids or positions for a lookup, in the integer dtype that the device prefers: 64 bits are not to be had on every
/// GPU.
///
/// # Panics
/// If there are not as many values as the shape holds.
pub fn index_tensor<const D: usize>(
    values: impl IntoIterator<Item = usize>,
    shape: [usize; D],
    device: &Device,
) -> Tensor<D, Int> {
    let values: Vec<i64> = values.into_iter().map(|value| value as i64).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Scores in f32 of which some, each a row and a column, are so low that a softmax over the columns leaves nothing for them and
/// gives them no gradient.
///
/// # Panics
/// If a row or a column is out of range.
pub fn without_scores(scores: Tensor<2>, excluded: impl IntoIterator<Item = (usize, usize)>) -> Tensor<2> {
    let [rows, columns] = scores.dims();
    let mut mask = vec![0f32; rows * columns];
    for (row, column) in excluded {
        assert!(row < rows && column < columns, "[{row}, {column}] of {rows} x {columns} scores");
        mask[row * columns + column] = EXCLUDED_SCORE;
    }
    let mask = Tensor::from_data(TensorData::new(mask, [rows, columns]), (&scores.device(), scores.dtype()));
    scores + mask
}

/// Added to scores that are left out: finite, so that no difference of two infinities can arise.
const EXCLUDED_SCORE: f32 = -1e30;

/// Casts only when the dtype differs, so that equal dtypes share the same memory.
pub(crate) fn cast_like<const D: usize, const E: usize>(weight: Tensor<D>, like: &Tensor<E>) -> Tensor<D> {
    if weight.dtype() == like.dtype() { weight } else { weight.cast(like.dtype()) }
}
