//! The operations of the CPU: a kernel where it takes the tensors, else the plain formulation.

use burn::{backend::Flex, tensor::Tensor};

use super::{adamw, attention, conv, elementwise, join, linear, norm, rotary};
use crate::{
    Attention, Filter, GroupNormOptions, Norm, RotaryTable,
    activation::{self, Function},
    adamw::{Factors, plain as plain_adamw},
    attention::in_heads,
    conv::{plain as plain_conv, upsample_nearest_2x},
    fast::{count, fast, fast_or},
    linear::plain as plain_linear,
    norm::{plain as plain_norm, plain_groups},
    ops::Ops,
    rotary::{Pairs, plain as plain_rotation},
};

impl Ops for Flex {
    fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
        fast(linear::linear(&x, &weight, bias.as_ref())).unwrap_or_else(|| plain_linear(x, weight, bias))
    }

    fn activate<const D: usize>(function: Function, x: Tensor<D>) -> Tensor<D> {
        fast_or(elementwise::activate(function, x), |x| activation::plain(function, x))
    }

    fn activate_times<const D: usize>(function: Function, x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
        fast_or(elementwise::activate_times(function, x, y), |(x, y)| activation::plain(function, x) * y)
    }

    fn gated_residual(x: Tensor<3>, gate: Tensor<3>, y: Tensor<3>) -> Tensor<3> {
        fast_or(elementwise::gated_residual(&x, &gate, y), |y| x + y * gate)
    }

    fn normalize<const D: usize>(x: Tensor<D>, norm: Norm, epsilon: f64) -> Tensor<D> {
        fast_or(norm::normalize(x, &norm, epsilon), |x| plain_norm(x, norm, epsilon))
    }

    fn group_norm(x: Tensor<4>, options: &GroupNormOptions) -> Tensor<4> {
        fast_or(norm::group_norm(x, options), |x| plain_groups(x, options))
    }

    fn rotate(x: Tensor<4>, table: &RotaryTable, pairs: Pairs) -> Tensor<4> {
        fast_or(rotary::rotate(x, table, pairs), |x| plain_rotation(x, table, pairs))
    }

    fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &Attention<'_>) -> Tensor<3> {
        fast(attention::attention([&q, &k, &v], options)).unwrap_or_else(|| in_heads::<Self>([q, k, v], options))
    }

    fn conv2d(x: Tensor<4>, filter: &Filter) -> Tensor<4> {
        fast(conv::conv2d(&x, filter)).unwrap_or_else(|| plain_conv(x, filter))
    }

    fn upsample_conv2d(x: Tensor<4>, filter: &Filter) -> Tensor<4> {
        fast(conv::upsample_conv2d(&x, filter)).unwrap_or_else(|| Self::conv2d(upsample_nearest_2x(x), filter))
    }

    fn cat<const D: usize>(tensors: Vec<Tensor<D>>, dim: usize) -> Tensor<D> {
        fast(join::cat(&tensors, dim)).unwrap_or_else(|| Tensor::cat(tensors, dim))
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
