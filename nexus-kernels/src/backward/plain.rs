//! Gradients by burn's autodiff of the plain formulations: right on every device, and what the fast ones are tested against.

use burn::{
    backend::{Backend, DispatchTensor},
    tensor::{Gradients, Tensor},
};

use super::{Backward, Convertible, Gradient, gradient};
use crate::{
    Filter, GroupNormOptions, Norm,
    activation::{self, Function},
    attention, conv, norm,
};

/// Of [`Ops::activate`](crate::ops::Ops::activate).
pub(crate) fn activate<B: Backend, const D: usize>(function: Function, x: &Tensor<D>, grad: Tensor<D>) -> Gradient<B>
where
    DispatchTensor: Convertible<B>,
{
    let x = leaf(x, true);
    let mut all = chain(activation::plain(function, x.clone()), grad);
    taken(&x, &mut all).unwrap_or_else(|| unreachable!("the result depends on it"))
}

/// Of [`Ops::activate_times`](crate::ops::Ops::activate_times).
pub(crate) fn activate_times<B: Backend, const D: usize>(
    function: Function,
    [x, y]: [&Tensor<D>; 2],
    grad: Tensor<D>,
    wanted: [bool; 2],
) -> [Option<Gradient<B>>; 2]
where
    DispatchTensor: Convertible<B>,
{
    let (x, y) = (leaf(x, wanted[0]), leaf(y, wanted[1]));
    let mut all = chain(activation::plain(function, x.clone()) * y.clone(), grad);
    [taken(&x, &mut all), taken(&y, &mut all)]
}

/// Of [`Ops::gated_residual`](crate::ops::Ops::gated_residual).
pub(crate) fn gated_residual<B: Backend>(
    gate: &Tensor<3>,
    y: &Tensor<3>,
    grad: Tensor<3>,
    wanted: [bool; 3],
) -> [Option<Gradient<B>>; 3]
where
    DispatchTensor: Convertible<B>,
{
    let of_x = wanted[0].then(|| gradient(grad.clone()));
    if !wanted[1] && !wanted[2] {
        return [of_x, None, None];
    }
    let (gate, y) = (leaf(gate, wanted[1]), leaf(y, wanted[2]));
    let mut all = chain(y.clone() * gate.clone(), grad);
    [of_x, taken(&gate, &mut all), taken(&y, &mut all)]
}

/// Of [`Ops::normalize`](crate::ops::Ops::normalize).
pub(crate) fn normalize<B: Backend, const D: usize>(
    x: &Tensor<D>,
    norm: &Norm,
    epsilon: f64,
    grad: Tensor<D>,
    wanted: [bool; 3],
) -> [Option<Gradient<B>>; 3]
where
    DispatchTensor: Convertible<B>,
{
    let x = leaf(x, wanted[0]);
    let chain = |norm: Norm| chain(norm::plain(x.clone(), norm, epsilon), grad);
    match norm {
        Norm::Layer => [taken(&x, &mut chain(Norm::Layer)), None, None],
        Norm::Rms { weight } => {
            let weight = leaf(weight, wanted[1]);
            let mut all = chain(Norm::Rms { weight: weight.clone() });
            [taken(&x, &mut all), taken(&weight, &mut all), None]
        }
        Norm::Affine { weight, bias } => {
            let (weight, bias) = (leaf(weight, wanted[1]), leaf(bias, wanted[2]));
            let mut all = chain(Norm::Affine { weight: weight.clone(), bias: bias.clone() });
            [taken(&x, &mut all), taken(&weight, &mut all), taken(&bias, &mut all)]
        }
        Norm::Modulated { scale, shift } => {
            let (scale, shift) = (leaf(scale, wanted[1]), leaf(shift, wanted[2]));
            let mut all = chain(Norm::Modulated { scale: scale.clone(), shift: shift.clone() });
            [taken(&x, &mut all), taken(&scale, &mut all), taken(&shift, &mut all)]
        }
    }
}

/// Of [`Ops::group_norm`](crate::ops::Ops::group_norm).
pub(crate) fn group_norm<B: Backend>(
    x: &Tensor<4>,
    options: &GroupNormOptions,
    grad: Tensor<4>,
    wanted: [bool; 3],
) -> [Option<Gradient<B>>; 3]
where
    DispatchTensor: Convertible<B>,
{
    let (x, weight, bias) = (leaf(x, wanted[0]), leaf(&options.weight, wanted[1]), leaf(&options.bias, wanted[2]));
    let options = GroupNormOptions { weight: weight.clone(), bias: bias.clone(), ..*options };
    let mut all = chain(norm::plain_groups(x.clone(), &options), grad);
    [taken(&x, &mut all), taken(&weight, &mut all), taken(&bias, &mut all)]
}

/// Of [`Ops::attend`](crate::ops::Ops::attend) without bias.
pub(crate) fn attend<B: Backend>(
    [q, k, v]: [&Tensor<4>; 3],
    scale: f64,
    causal: bool,
    grad: Tensor<4>,
    wanted: [bool; 3],
) -> [Option<Gradient<B>>; 3]
where
    DispatchTensor: Convertible<B>,
{
    let qkv = [leaf(q, wanted[0]), leaf(k, wanted[1]), leaf(v, wanted[2])];
    let mut all = chain(attention::plain(qkv.clone(), None, scale, causal), grad);
    qkv.map(|x| taken(&x, &mut all))
}

/// Of [`Ops::conv2d`](crate::ops::Ops::conv2d).
pub(crate) fn conv2d<B: Backend>(
    x: &Tensor<4>,
    filter: &Filter,
    grad: Tensor<4>,
    wanted: [bool; 3],
) -> [Option<Gradient<B>>; 3]
where
    DispatchTensor: Convertible<B>,
{
    let (x, weight, bias) = (leaf(x, wanted[0]), leaf(&filter.weight, wanted[1]), leaf(&filter.bias, wanted[2]));
    let filter = Filter { weight: weight.clone(), bias: bias.clone(), ..*filter };
    let mut all = chain(conv::plain(x.clone(), &filter), grad);
    [taken(&x, &mut all), taken(&weight, &mut all), taken(&bias, &mut all)]
}

/// Of [`Ops::upsample_conv2d`](crate::ops::Ops::upsample_conv2d), by that of the convolution of the doubled picture.
pub(crate) fn upsample_conv2d<B: Backward>(
    x: &Tensor<4>,
    filter: &Filter,
    grad: Tensor<4>,
    wanted: [bool; 3],
) -> [Option<Gradient<B>>; 3]
where
    DispatchTensor: Convertible<B>,
{
    let [batch, channels, height, width] = x.dims();
    let [doubled, weight, bias] = B::conv2d_backward(&conv::upsample_nearest_2x(x.clone()), filter, grad, wanted);
    let summed = doubled.map(|doubled| {
        let pixels: Tensor<6> =
            Tensor::<4>::from_primitive::<B>(doubled).reshape([batch, channels, height, 2, width, 2]);
        gradient(pixels.sum_dim(5).sum_dim(3).reshape([batch, channels, height, width]))
    });
    [summed, weight, bias]
}

/// The same values on the autodiff device, tracked if a gradient is wanted.
fn leaf<const D: usize>(x: &Tensor<D>, wanted: bool) -> Tensor<D> {
    let x = Tensor::from_inner(x.clone());
    if wanted { x.require_grad() } else { x }
}

/// The gradients of everything that a tracked result with this gradient was computed from.
fn chain<const D: usize>(result: Tensor<D>, grad: Tensor<D>) -> Gradients {
    (result * Tensor::from_inner(grad)).sum().backward()
}

/// The gradient of a [`leaf`], if it was wanted.
fn taken<B: Backend, const D: usize>(leaf: &Tensor<D>, all: &mut Gradients) -> Option<Gradient<B>>
where
    DispatchTensor: Convertible<B>,
{
    leaf.grad_remove(all).map(gradient::<B, D>)
}
