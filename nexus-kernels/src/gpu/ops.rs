//! The operations of GPUs: a kernel where it takes the tensors, else the plain formulation.

use burn::tensor::Tensor;
use burn_cubecl::Cube;

use super::{adamw, attention, conv, elementwise, group_norm, matmul, norm, rotary, row_attention};
use crate::{
    Attention, Filter, GroupNormOptions, Norm, RotaryTable, Visibility,
    activation::{self, Function},
    adamw::{Factors, plain as plain_adamw},
    attention::{in_heads, plain as plain_attention},
    cast_like,
    conv::plain as plain_conv,
    fast::{count, fast},
    linear::plain as plain_linear,
    norm::{plain as plain_norm, plain_groups},
    ops::Ops,
    rotary::{Pairs, plain as plain_rotation},
};

impl Ops for Cube {
    fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
        let (weight, bias) = (cast_like(weight, &x), bias.map(|bias| cast_like(bias, &x)));
        fast(matmul::linear(&x, &weight, bias.as_ref())).unwrap_or_else(|| plain_linear(x, weight, bias))
    }

    fn matmul<const D: usize>(left: Tensor<D>, right: Tensor<D>) -> Tensor<D> {
        let dtype = left.dtype();
        fast(matmul::product(left.clone(), right.clone(), dtype)).unwrap_or_else(|| left.matmul(right))
    }

    fn activate<const D: usize>(function: Function, x: Tensor<D>) -> Tensor<D> {
        fast(elementwise::activate(function, &x, None)).unwrap_or_else(|| activation::plain(function, x))
    }

    fn activate_times<const D: usize>(function: Function, x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
        fast(elementwise::activate(function, &x, Some(&y))).unwrap_or_else(|| activation::plain(function, x) * y)
    }

    fn gated_residual(x: Tensor<3>, gate: Tensor<3>, y: Tensor<3>) -> Tensor<3> {
        fast(elementwise::gated_residual(&x, &gate, &y)).unwrap_or_else(|| x + y * gate)
    }

    fn normalize<const D: usize>(x: Tensor<D>, norm: Norm, epsilon: f64) -> Tensor<D> {
        fast(norm::normalize(&x, &norm, epsilon)).unwrap_or_else(|| plain_norm(x, norm, epsilon))
    }

    fn group_norm(x: Tensor<4>, options: &GroupNormOptions) -> Tensor<4> {
        fast(group_norm::group_norm(&x, options)).unwrap_or_else(|| plain_groups(x, options))
    }

    fn rotate(x: Tensor<4>, table: &RotaryTable, pairs: Pairs) -> Tensor<4> {
        fast(rotary::rotate(&x, table, pairs)).unwrap_or_else(|| plain_rotation(x, table, pairs))
    }

    fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &Attention<'_>) -> Tensor<3> {
        if let (None, Visibility::All | Visibility::Causal) = (&options.bias, options.visibility) {
            let scale = options.scale.unwrap_or(1.0 / (q.dims()[3] as f64).sqrt());
            let causal = options.visibility == Visibility::Causal;
            if let Some(mixed) = fast(row_attention::row_attention([&q, &k, &v], scale, causal)) {
                return mixed;
            }
        }
        in_heads::<Self>([q, k, v], options)
    }

    fn attend(qkv: [Tensor<4>; 3], bias: Option<Tensor<4>>, scale: f64, causal: bool) -> Tensor<4> {
        fast(attention::attend(qkv.each_ref(), bias.as_ref(), scale, causal))
            .unwrap_or_else(|| plain_attention(qkv, bias, scale, causal))
    }

    fn conv2d(x: Tensor<4>, filter: &Filter) -> Tensor<4> {
        fast(conv::conv2d(&x, filter)).unwrap_or_else(|| plain_conv(x, filter))
    }

    fn adamw(
        value: Tensor<1>,
        grad: Tensor<1>,
        moments: Option<[Tensor<1>; 2]>,
        step: &Factors,
    ) -> (Tensor<1>, [Tensor<1>; 2]) {
        if adamw::takes([&value, &grad]) {
            count();
            return adamw::adamw(value, &grad, moments, step);
        }
        plain_adamw(value, grad, moments, step)
    }
}
