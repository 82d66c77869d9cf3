//! The gradients of every operation: inputs and the gradient of the result -> the gradients of the inputs.
//!
//! As with [`Ops`], the body of a method is right on every device: it is what burn's autodiff makes of the plain
//! formulation, or made of other operations.

pub(crate) mod plain;

use burn::{
    backend::{Autodiff, Backend, DispatchKindConversion, DispatchTensor},
    tensor::{DType, Tensor},
};

use crate::{Attention, Filter, GroupNormOptions, Norm, activation::Function, ops::Ops};

/// A plain tensor of any rank.
pub(crate) type Gradient<B> = <B as burn::backend::BackendTypes>::FloatTensorPrimitive;

/// Tensors of a backend and tracked ones of it can be taken out of burn's and put back.
pub(crate) trait Convertible<B: Backend>:
    DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>
{
}

impl<B: Backend, T: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>> Convertible<B> for T {}

/// A plain tensor as a gradient.
pub(crate) fn gradient<B: Backend, const D: usize>(tensor: Tensor<D>) -> Gradient<B>
where
    DispatchTensor: Convertible<B>,
{
    tensor.try_into_primitive::<B>().unwrap_or_else(|_| unreachable!("a gradient is a plain tensor"))
}

/// Matrices that the backward pass of a linear layer reads: `[rows, in]` and `[out, in]`.
pub(crate) type Layer = [Tensor<2>; 2];

/// Gradients of the rows, the weight and the bias of a linear layer, of those that are wanted.
pub(crate) type LayerGradients = (Option<Tensor<2>>, Option<Tensor<2>>, Option<Tensor<1>>);

/// The backward passes of a backend. `grad` has the shape and dtype of the result; `wanted` says whose gradients to give.
pub(crate) trait Backward: Ops + Backend
where
    DispatchTensor: Convertible<Self>,
{
    /// What attention keeps from its forward pass for its backward pass.
    type Mixing: Send + Sync + 'static;

    /// The same values in another dtype.
    fn convert(tensor: Gradient<Self>, dtype: DType) -> Gradient<Self> {
        Self::float_cast(tensor, dtype.into())
    }

    /// [`Ops::linear`] of rows, `[rows, in]`, with the matrices in the dtype in which they are multiplied.
    fn linear_forward(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> (Tensor<2>, Layer) {
        let weight = crate::cast_like(weight, &x);
        (<Self as Ops>::linear(x.clone(), weight.clone(), bias), [x, weight])
    }

    /// From the matrices of [`Backward::linear_forward`], of which there are those that the wanted gradients need.
    fn linear_backward(layer: [Option<Tensor<2>>; 2], grad: Tensor<2>, wants_bias: bool) -> LayerGradients {
        let [x, weight] = layer;
        let outputs = grad.dims()[1];
        (
            weight.map(|weight| Self::matmul(grad.clone(), weight)),
            x.map(|x| Self::matmul(grad.clone().transpose(), x)),
            wants_bias.then(|| grad.sum_dim(0).reshape([outputs])),
        )
    }

    /// Of matrices, or batches of as many on either side.
    fn matmul_backward<const D: usize>(
        [left, right]: [Option<Tensor<D>>; 2],
        grad: Tensor<D>,
    ) -> [Option<Gradient<Self>>; 2] {
        [
            right.map(|right| gradient(Self::matmul(grad.clone(), transposed(right)))),
            left.map(|left| gradient(Self::matmul(transposed(left), grad))),
        ]
    }

    /// Of [`Ops::activate`].
    fn activate_backward<const D: usize>(function: Function, x: &Tensor<D>, grad: Tensor<D>) -> Gradient<Self> {
        plain::activate(function, x, grad)
    }

    /// Of [`Ops::activate_times`].
    fn activate_times_backward<const D: usize>(
        function: Function,
        inputs: [&Tensor<D>; 2],
        grad: Tensor<D>,
        wanted: [bool; 2],
    ) -> [Option<Gradient<Self>>; 2] {
        plain::activate_times(function, inputs, grad, wanted)
    }

    /// Of [`Ops::gated_residual`]: of `x`, whose values it does not need, the gate and `y`.
    fn gated_residual_backward(
        gate: &Tensor<3>,
        y: &Tensor<3>,
        grad: Tensor<3>,
        wanted: [bool; 3],
    ) -> [Option<Gradient<Self>>; 3] {
        plain::gated_residual(gate, y, grad, wanted)
    }

    /// Of [`Ops::normalize`]: of the rows, the factors (weight or scale) and the addends (bias or shift).
    fn normalize_backward<const D: usize>(
        x: &Tensor<D>,
        norm: &Norm,
        epsilon: f64,
        grad: Tensor<D>,
        wanted: [bool; 3],
    ) -> [Option<Gradient<Self>>; 3] {
        plain::normalize(x, norm, epsilon, grad, wanted)
    }

    /// Of [`Ops::group_norm`]: of the picture, the weight and the bias.
    fn group_norm_backward(
        x: &Tensor<4>,
        options: &GroupNormOptions,
        grad: Tensor<4>,
        wanted: [bool; 3],
    ) -> [Option<Gradient<Self>>; 3] {
        plain::group_norm(x, options, grad, wanted)
    }

    /// [`Ops::attention`] as one step; `None` if it is made of [`Ops::attend`].
    fn attention_forward(qkv: [&Tensor<4>; 3], options: &Attention<'_>) -> Option<(Tensor<3>, Self::Mixing)> {
        let _ = (qkv, options);
        None
    }

    /// Of [`Backward::attention_forward`].
    fn attention_backward(
        qkv: [&Tensor<4>; 3],
        mixed: &Tensor<3>,
        mixing: &Self::Mixing,
        grad: Tensor<3>,
        wanted: [bool; 3],
    ) -> [Option<Gradient<Self>>; 3];

    /// Of [`Ops::attend`] without bias.
    fn attend_backward(
        qkv: [&Tensor<4>; 3],
        scale: f64,
        causal: bool,
        grad: Tensor<4>,
        wanted: [bool; 3],
    ) -> [Option<Gradient<Self>>; 3] {
        plain::attend(qkv, scale, causal, grad, wanted)
    }

    /// Of [`Ops::conv2d`]: of the picture, the weight and the bias.
    fn conv2d_backward(
        x: &Tensor<4>,
        filter: &Filter,
        grad: Tensor<4>,
        wanted: [bool; 3],
    ) -> [Option<Gradient<Self>>; 3] {
        plain::conv2d(x, filter, grad, wanted)
    }

    /// Of [`Ops::upsample_conv2d`], as [`Backward::conv2d_backward`].
    fn upsample_conv2d_backward(
        x: &Tensor<4>,
        filter: &Filter,
        grad: Tensor<4>,
        wanted: [bool; 3],
    ) -> [Option<Gradient<Self>>; 3] {
        plain::upsample_conv2d(x, filter, grad, wanted)
    }
}

/// A matrix, or a batch of them, with rows as columns.
pub(crate) fn transposed<const D: usize>(matrix: Tensor<D>) -> Tensor<D> {
    matrix.swap_dims(D - 2, D - 1)
}
