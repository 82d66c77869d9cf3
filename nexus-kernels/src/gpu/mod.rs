//! Kernels for GPUs, written once in CubeCL for CUDA, Vulkan, WebGPU, Metal and ROCm: tensors of burn's cube backend ->
//! tensors.
//!
//! burn's own operations remain the formulation that these are tested against, and what other backends take. Here every
//! chain of them that reads its input once is one kernel with f32 inside, and products choose their algorithm by rules
//! instead of by trying dozens at first use, which takes minutes. `ops` says which kernel an operation takes, `backward` has
//! the gradients.

mod adamw;
mod attention;
#[cfg(feature = "autodiff")]
mod backward;
mod conv;
mod elementwise;
mod group_norm;
mod matmul;
mod memory;
mod norm;
mod ops;
mod rotary;
mod row_attention;
mod rows;

use std::any::Any;

use burn::{
    backend::DispatchDevice,
    tensor::{DType, Shape, Tensor},
};
use burn_cubecl::{
    Cube,
    cubecl::ir::{ElemType, FloatKind},
    kernel::into_contiguous,
    ops::numeric::empty_device_contiguous_dtype,
    tensor::CubeTensor,
};

pub(crate) use memory::device_memory;

/// The tensor as the backend has it; `None` if it is on another backend, tracked by autodiff, empty, or not of floats that
/// kernels know.
fn cube<const D: usize>(x: &Tensor<D>) -> Option<CubeTensor> {
    let known = matches!(x.device().as_dispatch(), DispatchDevice::Cube(_)) && element(x.dtype()).is_some();
    if !known || x.shape().num_elements() == 0 {
        return None;
    }
    // With burn's feature `fusion`, which a crate beside this one may turn on, its tensors are others: kernels leave them alone.
    downcast(x.clone().try_into_primitive::<Cube>().ok()?)
}

fn downcast<T: Any, U: Any>(x: T) -> Option<U> {
    (Box::new(x) as Box<dyn Any>).downcast().ok().map(|x| *x)
}

/// [`cube`] with its values in row-major order, copied if they do not lie so.
fn contiguous<const D: usize>(x: &Tensor<D>) -> Option<CubeTensor> {
    Some(into_contiguous(cube(x)?))
}

fn tensor<const D: usize>(x: CubeTensor) -> Tensor<D> {
    Tensor::from_primitive::<Cube>(downcast(x).expect("a tensor that came from this backend"))
}

/// Parts of a tensor one behind the other; a single one as it is.
fn joined(mut parts: Vec<Tensor<4>>, dim: usize) -> Tensor<4> {
    if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(parts, dim) }
}

/// Room for values in row-major order on the device of another tensor.
fn empty_like(x: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), shape.into(), dtype)
}

fn element(dtype: DType) -> Option<ElemType> {
    let kind = match dtype {
        DType::F32 => FloatKind::F32,
        DType::F16 => FloatKind::F16,
        DType::BF16 => FloatKind::BF16,
        _ => return None,
    };
    Some(ElemType::Float(kind))
}
