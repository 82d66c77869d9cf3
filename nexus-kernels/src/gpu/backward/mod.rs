//! The gradients of GPUs' operations: a kernel where the forward one took the tensors.

mod attention;
mod conv;
mod elementwise;
mod norm;
mod sums;

use std::convert::Infallible;

use burn::tensor::Tensor;
use burn_cubecl::Cube;

use crate::{
    Filter, Norm,
    activation::Function,
    backward::{self, Backward, plain, transposed},
    fast::fast,
    ops::Ops,
};

/// A gradient of any rank.
type Gradient = backward::Gradient<Cube>;

fn gradient<const D: usize>(tensor: Tensor<D>) -> Gradient {
    backward::gradient::<Cube, D>(tensor)
}

impl Backward for Cube {
    /// Attention is made of heads and parts.
    type Mixing = Infallible;

    fn matmul_backward<const D: usize>(
        [left, right]: [Option<Tensor<D>>; 2],
        grad: Tensor<D>,
    ) -> [Option<Gradient>; 2] {
        [
            right.map(|right| gradient(<Cube as Ops>::matmul(grad.clone(), transposed(right)))),
            // A matrix that was transposed, as weights are, has its gradient in the order of its memory.
            left.map(|left| gradient(transposed(<Cube as Ops>::matmul(transposed(grad), left)))),
        ]
    }

    fn activate_backward<const D: usize>(function: Function, x: &Tensor<D>, grad: Tensor<D>) -> Gradient {
        let kernel = fast(elementwise::activate(function, x, None, &grad));
        let grad_x = kernel.and_then(|[grad_x, _]| grad_x);
        grad_x.map_or_else(|| plain::activate::<Self, D>(function, x, grad), gradient)
    }

    fn activate_times_backward<const D: usize>(
        function: Function,
        inputs: [&Tensor<D>; 2],
        grad: Tensor<D>,
        wanted: [bool; 2],
    ) -> [Option<Gradient>; 2] {
        match fast(elementwise::activate(function, inputs[0], Some(inputs[1]), &grad)) {
            Some([x, y]) => [x.filter(|_| wanted[0]).map(gradient), y.filter(|_| wanted[1]).map(gradient)],
            None => plain::activate_times::<Self, D>(function, inputs, grad, wanted),
        }
    }

    fn gated_residual_backward(
        gate: &Tensor<3>,
        y: &Tensor<3>,
        grad: Tensor<3>,
        wanted: [bool; 3],
    ) -> [Option<Gradient>; 3] {
        fast(elementwise::gated_residual(gate, y, &grad, wanted))
            .unwrap_or_else(|| plain::gated_residual::<Self>(gate, y, grad, wanted))
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

    fn attention_backward(
        _: [&Tensor<4>; 3],
        _: &Tensor<3>,
        mixing: &Infallible,
        _: Tensor<3>,
        _: [bool; 3],
    ) -> [Option<Gradient>; 3] {
        match *mixing {}
    }

    fn attend_backward(
        qkv: [&Tensor<4>; 3],
        scale: f64,
        causal: bool,
        grad: Tensor<4>,
        wanted: [bool; 3],
    ) -> [Option<Gradient>; 3] {
        fast(attention::attend(qkv, scale, causal, &grad, wanted))
            .unwrap_or_else(|| plain::attend::<Self>(qkv, scale, causal, grad, wanted))
    }

    fn conv2d_backward(x: &Tensor<4>, filter: &Filter, grad: Tensor<4>, wanted: [bool; 3]) -> [Option<Gradient>; 3] {
        fast(conv::backward(x, filter, &grad, wanted)).unwrap_or_else(|| plain::conv2d::<Self>(x, filter, grad, wanted))
    }
}
