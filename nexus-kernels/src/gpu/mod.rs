//! Kernels for GPUs, written once in CubeCL for CUDA, Vulkan, WebGPU, Metal and ROCm: tensors of burn's cube backend ->
//! tensors.
//!
//! burn's own operations remain the formulation that these are tested against, and what other backends take. Here every
//! chain of them that reads its input once is one kernel with f32 inside, and products choose their algorithm by rules
//! instead of by trying dozens at first use, which takes minutes. Tensors on the autodiff device go through `tracked`
//! (feature `train`), which gives the kernels their backward passes.
#![allow(clippy::result_large_err, reason = "the error of a kernel is its input, given back for burn's operations")]

#[cfg(feature = "autodiff")]
pub(crate) mod adamw;
mod attention;
mod conv;
mod elementwise;
mod group_norm;
mod matmul;
mod memory;
mod norm;
mod rotary;
mod row_attention;
mod rows;
#[cfg(feature = "autodiff")]
mod tracked;

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

pub(crate) use attention::attention;
pub(crate) use conv::conv2d;
pub(crate) use elementwise::{activate, activate_times, gated_residual};
pub(crate) use group_norm::group_norm;
pub(crate) use matmul::{linear, matmul};
pub(crate) use memory::device_memory;
pub(crate) use norm::{Norm, normalize};
pub(crate) use rotary::rotate;
pub(crate) use row_attention::row_attention;
#[cfg(feature = "autodiff")]
pub(crate) use tracked::split;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Function, Pairs,
        testing::{cpu, device, input},
    };

    /// Whether each kernel takes tensors that `of` makes of those of the device.
    fn taken(of: impl Fn(Tensor<4>) -> Tensor<4>) -> [bool; 6] {
        let x = || of(input([1, 3, 2, 8], 1));
        let rows = || x().flatten::<3>(1, 2);
        let (gate, weight) = (rows().narrow(1, 0, 1), rows().squeeze_dim::<2>(0));
        let table = x().narrow(2, 0, 1).narrow(3, 0, 4).squeeze_dim::<3>(2);
        [
            linear(&rows(), &weight, None).is_some(),
            attention(&x(), &x(), &x(), None, 1.0, true).is_some(),
            activate_times(Function::Gelu, rows(), rows()).is_ok(),
            gated_residual(&rows(), &gate, rows()).is_ok(),
            normalize(rows(), Norm::Modulated { scale: &gate, shift: &gate }, 1e-6).is_ok(),
            rotate(x(), &table, &table, Pairs::Halves).is_ok(),
        ]
    }

    #[test]
    fn kernels_take_tensors_of_a_gpu_and_no_others() {
        assert_eq!(taken(|x| x), [device() != cpu(); 6]);
        assert_eq!(taken(|x| x.to_device(&cpu())), [false; 6]);
        let tracked = |x: Tensor<4>| Tensor::<4>::from_data(x.into_data(), &device().autodiff()).require_grad();
        // Rotary tables are constants.
        let with_backward = cfg!(feature = "autodiff") && device() != cpu();
        assert_eq!(taken(tracked), std::array::from_fn(|kernel| with_backward && kernel != 5));
    }
}
