//! Fast operations for CPUs: slices of the flex backend's tensors -> slices.
//!
//! A kernel is threaded with rayon and vectorised for the CPU that is found at run time ([`Level`]). It computes in f32:
//! bf16 and f16 tensors are widened on the way in and rounded once on the way out, but for products of bf16 where the
//! CPU has them. `ops` says which kernel an operation takes, `backward` has the gradients. `unsafe` code of this crate
//! lives here, each block with the condition that it relies on.
#![allow(clippy::result_large_err, reason = "the error of a kernel is its input, given back for the plain formulation")]

mod adamw;
mod attention;
#[cfg(feature = "autodiff")]
mod backward;
mod conv;
mod elementwise;
#[cfg(feature = "autodiff")]
mod gemm;
mod join;
mod level;
mod linear;
mod norm;
mod ops;
mod packed;
mod rotary;
mod rows;
mod simd;
mod stored;
mod view;

pub use level::Instructions;
pub(crate) use level::Level;
#[cfg(any(test, feature = "testing"))]
pub use level::limit_cpu;
pub(crate) use view::{Floats, View, wrap, wrap_as};
