//! The operations of tracked tensors, for every backend that has backward passes.

use burn::{
    backend::{Autodiff, DispatchTensor},
    tensor::Tensor,
};

use super::{Operand, Parent, record, record_with, split};
use crate::{
    Attention, Filter, GroupNormOptions, Norm, RotaryTable,
    activation::Function,
    attention,
    backward::{Backward, Convertible, gradient},
    ops::Ops,
    rotary::{self, Pairs},
};

impl<B: Backward> Ops for Autodiff<B>
where
    DispatchTensor: Convertible<B>,
{
    fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
        let (x, weight, bias) = (Operand::of::<B>(x), Operand::of::<B>(weight), bias.map(Operand::of::<B>));
        let ([outputs, inputs], shape) = (weight.value.dims(), x.value.dims());
        let rows: Tensor<2> = x.value.clone().reshape([shape.iter().product::<usize>() / inputs.max(1), inputs]);
        let addends = bias.as_ref().map(|bias| bias.value.clone());
        let (result, [kept_x, kept_weight]) = B::linear_forward(rows, weight.value.clone(), addends);
        let (kept_x, kept_weight) = (weight.tracked.then_some(kept_x), x.tracked.then_some(kept_weight));
        let mut result_shape = shape;
        result_shape[D - 1] = outputs;
        let result = result.reshape(result_shape);
        let backward = move |grad: Tensor<D>, [wants_x, wants_weight, wants_bias]: [bool; 3]| {
            let count = grad.shape().num_elements() / outputs.max(1);
            let layer = [kept_x.clone().filter(|_| wants_weight), kept_weight.clone().filter(|_| wants_x)];
            let (x, weight, bias) = B::linear_backward(layer, grad.reshape([count, outputs]), wants_bias);
            [x.map(|x| gradient::<B, D>(x.reshape(shape))), weight.map(gradient), bias.map(gradient)]
        };
        record_with::<B, D>([x.into(), weight.into()], bias.map(Parent::from), result, backward)
    }

    fn matmul<const D: usize>(left: Tensor<D>, right: Tensor<D>) -> Tensor<D> {
        if left.dims()[..D - 2] != right.dims()[..D - 2] {
            return left.matmul(right);
        }
        let (left, right) = (Operand::of::<B>(left), Operand::of::<B>(right));
        let result = B::matmul(left.value.clone(), right.value.clone());
        // What nobody needs for a gradient is freed.
        let kept_left = right.tracked.then(|| left.value.clone());
        let kept_right = left.tracked.then(|| right.value.clone());
        record::<B, 2, D>([left.into(), right.into()], result, move |grad, [wants_left, wants_right]| {
            let kept = [kept_left.clone().filter(|_| wants_right), kept_right.clone().filter(|_| wants_left)];
            B::matmul_backward(kept, grad)
        })
    }

    fn activate<const D: usize>(function: Function, x: Tensor<D>) -> Tensor<D> {
        let x = Operand::of::<B>(x);
        let values = x.value.clone();
        let result = B::activate(function, values.clone());
        record::<B, 1, D>([x.into()], result, move |grad, _| [Some(B::activate_backward(function, &values, grad))])
    }

    fn activate_times<const D: usize>(function: Function, x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
        let (x, y) = (Operand::of::<B>(x), Operand::of::<B>(y));
        let values = [x.value.clone(), y.value.clone()];
        let result = B::activate_times(function, x.value.clone(), y.value.clone());
        record::<B, 2, D>([x.into(), y.into()], result, move |grad, wanted| {
            B::activate_times_backward(function, values.each_ref(), grad, wanted)
        })
    }

    fn gated_residual(x: Tensor<3>, gate: Tensor<3>, y: Tensor<3>) -> Tensor<3> {
        let (x, gate, y) = (Operand::of::<B>(x), Operand::of::<B>(gate), Operand::of::<B>(y));
        let result = B::gated_residual(x.value.clone(), gate.value.clone(), y.value.clone());
        let (gates, values) = (gate.value.clone(), y.value.clone());
        record::<B, 3, 3>([x.into(), gate.into(), y.into()], result, move |grad, wanted| {
            B::gated_residual_backward(&gates, &values, grad, wanted)
        })
    }

    fn normalize<const D: usize>(x: Tensor<D>, norm: Norm, epsilon: f64) -> Tensor<D> {
        let x = Operand::of::<B>(x);
        let (norm, factors, addends) = match norm {
            Norm::Layer => (Norm::Layer, None, None),
            Norm::Rms { weight } => {
                let weight = Operand::of::<B>(weight);
                (Norm::Rms { weight: weight.value.clone() }, Some(weight.into()), None)
            }
            Norm::Affine { weight, bias } => {
                let (weight, bias) = (Operand::of::<B>(weight), Operand::of::<B>(bias));
                let norm = Norm::Affine { weight: weight.value.clone(), bias: bias.value.clone() };
                (norm, Some(Parent::from(weight)), Some(Parent::from(bias)))
            }
            Norm::Modulated { scale, shift } => {
                let (scale, shift) = (Operand::of::<B>(scale), Operand::of::<B>(shift));
                let norm = Norm::Modulated { scale: scale.value.clone(), shift: shift.value.clone() };
                (norm, Some(Parent::from(scale)), Some(Parent::from(shift)))
            }
        };
        let values = x.value.clone();
        let result = B::normalize(values.clone(), norm.clone(), epsilon);
        let backward = move |grad, wanted| B::normalize_backward(&values, &norm, epsilon, grad, wanted);
        match factors {
            Some(factors) => record_with::<B, D>([x.into(), factors], addends, result, backward),
            None => record::<B, 1, D>([x.into()], result, move |grad, [wants_x]| {
                let [x, ..] = backward(grad, [wants_x, false, false]);
                [x]
            }),
        }
    }

    fn group_norm(x: Tensor<4>, options: &GroupNormOptions) -> Tensor<4> {
        let (weight, bias) = (Operand::of::<B>(options.weight.clone()), Operand::of::<B>(options.bias.clone()));
        let x = Operand::of::<B>(x);
        let inner = GroupNormOptions { weight: weight.value.clone(), bias: bias.value.clone(), ..*options };
        let values = x.value.clone();
        let result = B::group_norm(values.clone(), &inner);
        record::<B, 3, 4>([x.into(), weight.into(), bias.into()], result, move |grad, wanted| {
            B::group_norm_backward(&values, &inner, grad, wanted)
        })
    }

    /// The tables are constants; where they are not, burn's operations rotate.
    fn rotate(x: Tensor<4>, table: &RotaryTable, pairs: Pairs) -> Tensor<4> {
        let (cos, sin) = (Operand::of::<B>(table.cos.clone()), Operand::of::<B>(table.sin.clone()));
        if cos.tracked || sin.tracked {
            return rotary::plain(x, table, pairs);
        }
        let (x, table) = (Operand::of::<B>(x), RotaryTable { cos: cos.value, sin: sin.value });
        let result = B::rotate(x.value.clone(), &table, pairs);
        record::<B, 1, 4>([x.into()], result, move |grad, _| {
            // The inverse of a rotation is its transpose.
            let back = RotaryTable { cos: table.cos.clone(), sin: table.sin.clone().neg() };
            [Some(gradient(B::rotate(grad, &back, pairs)))]
        })
    }

    fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &Attention<'_>) -> Tensor<3> {
        if options.bias.is_some() {
            return attention::in_heads::<Self>([q, k, v], options);
        }
        let operands = [&q, &k, &v].map(|x| Operand::of::<B>(x.clone()));
        let inputs = operands.each_ref().map(|operand| operand.value.clone());
        let Some((mixed, mixing)) = B::attention_forward(inputs.each_ref(), options) else {
            return attention::in_heads::<Self>([q, k, v], options);
        };
        let kept = mixed.clone();
        record::<B, 3, 3>(operands.map(Parent::from), mixed, move |grad, wanted| {
            B::attention_backward(inputs.each_ref(), &kept, &mixing, grad, wanted)
        })
    }

    fn attend(qkv: [Tensor<4>; 3], bias: Option<Tensor<4>>, scale: f64, causal: bool) -> Tensor<4> {
        if bias.is_some() {
            return attention::plain(qkv, bias, scale, causal);
        }
        let heads = qkv[0].dims()[1];
        let [q, k, v] = qkv;
        // The gradient of a key/value head is the sum over the heads that it serves.
        let [k, v] = [k, v].map(|x| attention::repeat_heads(x, heads));
        let operands = [q, k, v].map(Operand::of::<B>);
        let inputs = operands.each_ref().map(|operand| operand.value.clone());
        let result = B::attend(inputs.clone(), None, scale, causal);
        record::<B, 3, 4>(operands.map(Parent::from), result, move |grad, wanted| {
            B::attend_backward(inputs.each_ref(), scale, causal, grad, wanted)
        })
    }

    fn conv2d(x: Tensor<4>, filter: &Filter) -> Tensor<4> {
        convolve::<B>(x, filter, <B as Ops>::conv2d, B::conv2d_backward)
    }

    fn upsample_conv2d(x: Tensor<4>, filter: &Filter) -> Tensor<4> {
        convolve::<B>(x, filter, <B as Ops>::upsample_conv2d, B::upsample_conv2d_backward)
    }

    /// Two tensors; more are left to burn.
    fn cat<const D: usize>(tensors: Vec<Tensor<D>>, dim: usize) -> Tensor<D> {
        let [x, y] = match <[Tensor<D>; 2]>::try_from(tensors) {
            Ok(tensors) => tensors.map(Operand::of::<B>),
            Err(tensors) => return Tensor::cat(tensors, dim),
        };
        let sizes = [x.value.dims()[dim], y.value.dims()[dim]];
        let result = B::cat(vec![x.value.clone(), y.value.clone()], dim);
        record::<B, 2, D>([x.into(), y.into()], result, move |grad, [wants_x, wants_y]| {
            let part = |start, size| gradient(grad.clone().narrow(dim, start, size));
            [wants_x.then(|| part(0, sizes[0])), wants_y.then(|| part(sizes[0], sizes[1]))]
        })
    }

    fn split<const D: usize, const N: usize>(x: Tensor<D>, dim: usize, sizes: [usize; N]) -> [Tensor<D>; N] {
        split::split::<B, D, N>(x, dim, sizes)
    }
}

/// The gradients of a convolution.
type ConvolutionBackward<B> =
    fn(&Tensor<4>, &Filter, Tensor<4>, [bool; 3]) -> [Option<crate::backward::Gradient<B>>; 3];

fn convolve<B: Backward>(
    x: Tensor<4>,
    filter: &Filter,
    forward: fn(Tensor<4>, &Filter) -> Tensor<4>,
    backward: ConvolutionBackward<B>,
) -> Tensor<4>
where
    DispatchTensor: Convertible<B>,
{
    let (weight, bias) = (Operand::of::<B>(filter.weight.clone()), Operand::of::<B>(filter.bias.clone()));
    let x = Operand::of::<B>(x);
    let inner = Filter { weight: weight.value.clone(), bias: bias.value.clone(), ..*filter };
    let values = x.value.clone();
    let result = forward(values.clone(), &inner);
    record::<B, 3, 4>([x.into(), weight.into(), bias.into()], result, move |grad, wanted| {
        backward(&values, &inner, grad, wanted)
    })
}
