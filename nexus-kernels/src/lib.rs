//! The operations of the models: tensors -> tensors, on every device, in the dtype of their first tensor.
//!
//! Each has a plain formulation in burn's operations, which is right on every device and what the fast ones are tested
//! against; kernels for CPUs (feature `cpu`) and GPUs (feature `gpu`) take the tensors that they know. With the feature
//! `autodiff` the fast ones have backward passes. Weights are read as they are stored; elsewhere they are cast.
//!
//! Nothing here knows a model or a file.

mod activation;
mod adamw;
mod attention;
#[cfg(all(feature = "autodiff", any(feature = "cpu", feature = "gpu")))]
mod backward;
mod conv;
#[cfg(feature = "cpu")]
mod cpu;
#[cfg(any(feature = "cpu", feature = "gpu"))]
mod fast;
#[cfg(feature = "gpu")]
mod gpu;
#[cfg(all(feature = "autodiff", any(feature = "cpu", feature = "gpu")))]
mod grad;
mod index;
mod join;
mod linear;
mod memory;
mod norm;
mod ops;
mod place;
mod rotary;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use activation::{gated_residual, gelu, gelu_tanh, gelu_tanh_mul, quick_gelu, relu, silu, silu_mul};
pub use adamw::{AdamWStep, adamw};
pub use attention::{Attention, Visibility, attention};
pub use conv::{Filter, conv2d, upsample_conv2d, upsample_nearest_2x};
pub use index::{index_tensor, without_scores};
pub use join::{cat, split};
pub use linear::{linear, matmul};
pub use memory::{DeviceMemory, device_memory};
pub(crate) use norm::Norm;
pub use norm::{GroupNormOptions, affine_layer_norm, group_norm, layer_norm, modulate, rms_norm};
pub use rotary::{RotaryTable, rotate_half, rotate_interleaved};

use burn::tensor::Tensor;

/// Casts only when the dtype differs, so that equal dtypes share the same memory.
pub(crate) fn cast_like<const D: usize, const E: usize>(weight: Tensor<D>, like: &Tensor<E>) -> Tensor<D> {
    if weight.dtype() == like.dtype() { weight } else { weight.cast(like.dtype()) }
}
