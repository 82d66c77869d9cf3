//! Fast CPU versions of the blocks in [`crate::nn`]: slices of the flex backend's tensors -> slices.
//!
//! A kernel is threaded with rayon and vectorised for the CPU that is found at run time ([`Level`]). It computes in f32:
//! bf16 and f16 tensors are widened on the way in and rounded once on the way out, but for products of bf16 where the
//! CPU has them. The plain burn formulation in `nn` is the oracle of the kernel's test, and what other backends take where
//! `cube` has no kernel for them. f32 and bf16 tensors on the autodiff device go through `tracked` (feature `train`), which gives
//! the kernels their backward passes. `unsafe` code of this crate lives here (and in the memory map), each block with the
//! condition that it relies on.
#![allow(clippy::result_large_err, reason = "the error of a kernel is its input, given back for the plain formulation")]

#[cfg(feature = "autodiff")]
pub(crate) mod adamw;
mod attention;
mod conv;
mod elementwise;
#[cfg(feature = "autodiff")]
mod gemm;
mod join;
mod level;
mod linear;
mod norm;
mod packed;
mod rotary;
mod rows;
mod simd;
mod stored;
#[cfg(feature = "autodiff")]
mod tracked;
mod view;

pub(crate) use attention::attention;
pub(crate) use conv::{conv2d, upsample_conv2d};
pub(crate) use elementwise::{activate, activate_times, gated_residual};
pub(crate) use join::cat;
pub use level::Level;
#[cfg(any(test, feature = "testing"))]
pub use level::limit_cpu;
pub(crate) use linear::linear;
pub(crate) use norm::{affine_layer_norm, group_norm, layer_norm, modulated_layer_norm, rms_norm};
pub(crate) use rotary::rotate;
#[cfg(feature = "autodiff")]
pub(crate) use tracked::split;
pub(crate) use view::{Floats, View, wrap, wrap_as};
