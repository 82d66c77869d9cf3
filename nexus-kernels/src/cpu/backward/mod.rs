//! The gradients of the CPU's operations, of f32 and bf16: a kernel where the forward one took the tensors.

mod attention;
mod conv;
mod elementwise;
mod linear;
mod linear_bf16;
mod norm;
mod sums;

use burn::{
    backend::{Flex, ops::FloatTensorOps},
    tensor::{Bytes, DType, Tensor},
};
use burn_flex::{FlexTensor, Layout};
use half::bf16;

use super::{
    attention::Kept,
    join::contiguous,
    stored::{narrow, widen},
};
use crate::{
    Attention, Filter, GroupNormOptions, Norm,
    activation::Function,
    backward::{self, Backward, Layer, LayerGradients, plain},
    fast::{count, fast, fast_or},
};

/// A gradient of any rank.
type Gradient = backward::Gradient<Flex>;

fn gradient<const D: usize>(tensor: Tensor<D>) -> Gradient {
    backward::gradient::<Flex, D>(tensor)
}

/// A plain tensor in another dtype, or as it is.
fn in_dtype<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype {
        tensor
    } else {
        Tensor::from_primitive::<Flex>(Flex::convert(gradient(tensor), dtype))
    }
}

fn to_f32<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    in_dtype(tensor, DType::F32)
}

impl Backward for Flex {
    type Mixing = Kept;

    /// With all threads.
    fn convert(tensor: FlexTensor, dtype: DType) -> FlexTensor {
        if ![(DType::F32, DType::BF16), (DType::BF16, DType::F32)].contains(&(tensor.dtype(), dtype)) {
            return Flex::float_cast(tensor, dtype.into());
        }
        let tensor = contiguous(tensor);
        let (layout, shape) = (tensor.layout(), tensor.layout().shape().clone());
        let values = layout.start_offset()..layout.start_offset() + shape.num_elements();
        let bytes = match dtype {
            DType::BF16 => Bytes::from_elems(narrow::<bf16>(&tensor.storage::<f32>()[values])),
            _ => Bytes::from_elems(widen(&tensor.storage::<bf16>()[values])),
        };
        FlexTensor::new(bytes, Layout::contiguous(shape), dtype)
    }

    fn linear_forward(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> (Tensor<2>, Layer) {
        linear::forward(x, weight, bias)
    }

    fn linear_backward(layer: [Option<Tensor<2>>; 2], grad: Tensor<2>, wants_bias: bool) -> LayerGradients {
        count();
        linear::backward(layer, grad, wants_bias)
    }

    fn activate_backward<const D: usize>(function: Function, x: &Tensor<D>, grad: Tensor<D>) -> Gradient {
        fast_or(elementwise::activate(function, x, grad).map(gradient), |grad| {
            plain::activate::<Self, D>(function, x, grad)
        })
    }

    fn activate_times_backward<const D: usize>(
        function: Function,
        inputs: [&Tensor<D>; 2],
        grad: Tensor<D>,
        wanted: [bool; 2],
    ) -> [Option<Gradient>; 2] {
        fast_or(elementwise::activate_times(function, inputs, grad, wanted), |grad| {
            plain::activate_times::<Self, D>(function, inputs, grad, wanted)
        })
    }

    fn gated_residual_backward(
        gate: &Tensor<3>,
        y: &Tensor<3>,
        grad: Tensor<3>,
        wanted: [bool; 3],
    ) -> [Option<Gradient>; 3] {
        fast_or(elementwise::gated_residual(gate, y, grad, wanted), |grad| {
            plain::gated_residual::<Self>(gate, y, grad, wanted)
        })
    }

    fn normalize_backward<const D: usize>(
        x: &Tensor<D>,
        norm: &Norm,
        epsilon: f64,
        grad: Tensor<D>,
        wanted: [bool; 3],
    ) -> [Option<Gradient>; 3] {
        fast(norm::normalize(x, norm, epsilon, &grad, wanted))
            .unwrap_or_else(|| plain::normalize::<Self, D>(x, norm, epsilon, grad, wanted))
    }

    fn group_norm_backward(
        x: &Tensor<4>,
        options: &GroupNormOptions,
        grad: Tensor<4>,
        wanted: [bool; 3],
    ) -> [Option<Gradient>; 3] {
        fast(norm::group_norm(x, options, &grad, wanted))
            .unwrap_or_else(|| plain::group_norm::<Self>(x, options, grad, wanted))
    }

    fn attention_forward(qkv: [&Tensor<4>; 3], options: &Attention<'_>) -> Option<(Tensor<3>, Kept)> {
        fast(attention::forward(qkv, options))
    }

    fn attention_backward(
        qkv: [&Tensor<4>; 3],
        mixed: &Tensor<3>,
        mixing: &Kept,
        grad: Tensor<3>,
        wanted: [bool; 3],
    ) -> [Option<Gradient>; 3] {
        count();
        attention::backward(qkv, mixed, mixing, grad, wanted)
    }

    fn conv2d_backward(x: &Tensor<4>, filter: &Filter, grad: Tensor<4>, wanted: [bool; 3]) -> [Option<Gradient>; 3] {
        fast(conv::backward(x, filter, &grad, wanted, false))
            .unwrap_or_else(|| plain::conv2d::<Self>(x, filter, grad, wanted))
    }

    fn upsample_conv2d_backward(
        x: &Tensor<4>,
        filter: &Filter,
        grad: Tensor<4>,
        wanted: [bool; 3],
    ) -> [Option<Gradient>; 3] {
        fast(conv::backward(x, filter, &grad, wanted, true))
            .unwrap_or_else(|| plain::upsample_conv2d::<Self>(x, filter, grad, wanted))
    }
}
