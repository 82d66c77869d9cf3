//! What an operation is on every device: one method each, whose own body is the plain formulation in burn's operations.
//!
//! A backend overrides the methods that it has something faster for, and calls the plain body where that does not take the
//! tensors. [`Backward`](crate::backward::Backward) has the gradients, and `grad` puts both into the graph of autodiff.
//!
//! Burn's `#[backend_extension]` generates such a dispatch, but not this one: an operation of it takes no optional tensor, as
//! a bias is, and no list of them; a device that is not named to it panics instead of taking the plain body; and its tensors
//! have neither operators nor ranks, so that plain formulations would not read as what they are. [`Place`] is the one
//! place of dispatch instead.

use burn::tensor::Tensor;

use crate::{
    Attention, Filter, GroupNormOptions, Norm, RotaryTable,
    activation::{self, Function},
    adamw::{self, Factors},
    attention, conv, join, linear, norm,
    rotary::{self, Pairs},
};

/// The operations of a backend.
pub(crate) trait Ops {
    /// [`crate::linear`] of a weight in floats.
    fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
        linear::plain(x, weight, bias)
    }

    /// [`crate::matmul`].
    fn matmul<const D: usize>(left: Tensor<D>, right: Tensor<D>) -> Tensor<D> {
        left.matmul(right)
    }

    /// The function of every value.
    fn activate<const D: usize>(function: Function, x: Tensor<D>) -> Tensor<D> {
        activation::plain(function, x)
    }

    /// The function of every value of `x`, times `y`.
    fn activate_times<const D: usize>(function: Function, x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
        activation::plain(function, x) * y
    }

    /// [`crate::gated_residual`].
    fn gated_residual(x: Tensor<3>, gate: Tensor<3>, y: Tensor<3>) -> Tensor<3> {
        x + y * gate
    }

    /// Normalises every row of the last dimension.
    fn normalize<const D: usize>(x: Tensor<D>, norm: Norm, epsilon: f64) -> Tensor<D> {
        norm::plain(x, norm, epsilon)
    }

    /// [`crate::group_norm`].
    fn group_norm(x: Tensor<4>, options: &GroupNormOptions) -> Tensor<4> {
        norm::plain_groups(x, options)
    }

    /// Rotates pairs of features.
    fn rotate(x: Tensor<4>, table: &RotaryTable, pairs: Pairs) -> Tensor<4> {
        rotary::plain(x, table, pairs)
    }

    /// [`crate::attention`].
    fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, options: &Attention<'_>) -> Tensor<3> {
        attention::in_heads::<Self>([q, k, v], options)
    }

    /// Attention with heads before tokens, in which every query sees all keys or those up to its own.
    ///
    /// # Shapes
    /// - `q`: `[batch, heads, queries, head_dim]`
    /// - `k`, `v`: `[batch, kv_heads, keys, head_dim]`
    /// - `bias`: `[1, heads, queries, keys]`
    /// - returns: as `q`
    fn attend(qkv: [Tensor<4>; 3], bias: Option<Tensor<4>>, scale: f64, causal: bool) -> Tensor<4> {
        attention::plain(qkv, bias, scale, causal)
    }

    /// [`crate::conv2d`].
    fn conv2d(x: Tensor<4>, filter: &Filter) -> Tensor<4> {
        conv::plain(x, filter)
    }

    /// [`crate::upsample_conv2d`].
    fn upsample_conv2d(x: Tensor<4>, filter: &Filter) -> Tensor<4> {
        Self::conv2d(conv::upsample_nearest_2x(x), filter)
    }

    /// [`crate::cat`].
    fn cat<const D: usize>(tensors: Vec<Tensor<D>>, dim: usize) -> Tensor<D> {
        Tensor::cat(tensors, dim)
    }

    /// [`crate::split`], for sizes that are those of the tensor together.
    fn split<const D: usize, const N: usize>(x: Tensor<D>, dim: usize, sizes: [usize; N]) -> [Tensor<D>; N] {
        join::views(&x, dim, sizes)
    }

    /// [`crate::adamw`].
    fn adamw(
        value: Tensor<1>,
        grad: Tensor<1>,
        moments: Option<[Tensor<1>; 2]>,
        step: &Factors,
    ) -> (Tensor<1>, [Tensor<1>; 2]) {
        adamw::plain(value, grad, moments, step)
    }
}

/// Every device: nothing is overridden.
pub(crate) struct Plain;

impl Ops for Plain {}
