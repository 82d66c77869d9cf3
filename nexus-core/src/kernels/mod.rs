//! Fast CPU versions of the blocks in [`crate::nn`]: slices of the flex backend's tensors -> slices.
//!
//! A kernel is threaded with rayon and vectorised for the CPU that is found at run time ([`Level`]). The plain burn
//! formulation in `nn` is the default on every other backend, on autodiff devices and for dtypes that a kernel does not
//! take, and it is the oracle of the kernel's test. `unsafe` code of this crate lives here (and in the memory map),
//! each block with the condition that it relies on.

mod attention;
mod conv;
mod elementwise;
mod level;
mod linear;
mod norm;
mod rotary;
mod view;

pub(crate) use conv::{Filter, conv2d, upsample_conv2d};
pub(crate) use level::Level;
pub(crate) use view::{View, wrap};
