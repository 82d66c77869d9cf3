//! The gradients of attention.
//!
//! Scores are made again for some heads and queries at a time, as in the forward pass; a kernel makes weights and
//! their grads of them.
//!
//! Source: Dao et al. 2022 (arXiv 2205.14135), appendix B.2.

use burn::tensor::{DType, Tensor};
use burn_cubecl::cubecl::{
    self,
    ir::ElemType,
    prelude::{Tensor as Buffer, *},
};

use super::{
    super::{
        attention::{Part, UNITS, pad, parts, row_softmax, score_bytes, visible_keys},
        contiguous, cube, element, empty_like, joined,
        matmul::product,
        norm::cube_sum,
        tensor,
    },
    Gradient, gradient,
};
use crate::backward::transposed;

/// Gradients of q, k and v, each with as many heads; `None` for tensors that are not for these kernels.
pub(super) fn attend(
    qkv: [&Tensor<4>; 3],
    scale: f64,
    causal: bool,
    grad: &Tensor<4>,
    wanted: [bool; 3],
) -> Option<[Option<Gradient>; 3]> {
    let heads = qkv.map(|x| x.dims()[1]);
    if heads != [heads[0]; 3] || qkv.iter().any(|x| x.dtype() != grad.dtype()) {
        return None;
    }
    // Two matrices of scores are there at once.
    let bytes = score_bytes(&cube(qkv[0])?) / 2;
    let mut wanted = wanted.into_iter();
    let grads = grads(bytes, qkv, grad, scale, causal)?.map(gradient);
    Some(grads.map(|grad| wanted.next().unwrap_or_default().then_some(grad)))
}

/// Gradients of q, k and v.
fn grads(
    bytes: usize,
    [q, k, v]: [&Tensor<4>; 3],
    upstream: &Tensor<4>,
    scale: f64,
    causal: bool,
) -> Option<[Tensor<4>; 3]> {
    let (dtype, keys) = (q.dtype(), k.dims()[2]);
    let (k, v) = (pad(k, q.dims()[1])?, pad(v, q.dims()[1])?);
    let mut gradients = [const { vec![] }; 3];
    for parts in parts(bytes, q.dims(), keys, causal) {
        // Sums over the parts are rounded once.
        let sums_dtype = if parts.len() == 1 { dtype } else { DType::F32 };
        let mut grad_q = vec![];
        let mut sums: [Option<Tensor<4>>; 2] = [None, None];
        for part in parts {
            let (queries, upstream, keys) = (part.queries_of(q), part.queries_of(upstream), part.keys_of(&k));
            let scores = times(queries.clone(), transposed(keys.clone()), DType::F32);
            let grad_weights = times(upstream.clone(), transposed(part.keys_of(&v)), DType::F32);
            let [weights, grad_scores] = softmax_grads(&scores, &grad_weights, &part, scale, causal, dtype)?;
            grad_q.push(times(grad_scores.clone(), keys, dtype));
            let grad_keys =
                [times(transposed(grad_scores), queries, sums_dtype), times(transposed(weights), upstream, sums_dtype)];
            for (sum, part) in sums.iter_mut().zip(grad_keys) {
                *sum = Some(match sum.take() {
                    Some(sum) => added(sum, part),
                    None => part,
                });
            }
        }
        gradients[0].push(joined(grad_q, 2));
        for (gradients, sum) in gradients[1..].iter_mut().zip(sums) {
            gradients.extend(sum.map(|sum| sum.narrow(2, 0, keys)));
        }
    }
    Some(gradients.map(|parts| joined(parts, 1)))
}

/// Sums over queries, of which later parts see more keys.
fn added(sum: Tensor<4>, part: Tensor<4>) -> Tensor<4> {
    let ([batch, heads, first, width], [_, _, keys, _]) = (sum.dims(), part.dims());
    if keys == first {
        return sum + part;
    }
    let zeros = Tensor::zeros([batch, heads, keys - first, width], (&sum.device(), sum.dtype()));
    Tensor::cat(vec![sum, zeros], 2) + part
}

/// A product of tensors of one dtype, by the kernels or by burn.
fn times(left: Tensor<4>, right: Tensor<4>, dtype: DType) -> Tensor<4> {
    match product(left.clone(), right.clone(), dtype) {
        Some(product) => product,
        None => left.cast(dtype).matmul(right.cast(dtype)),
    }
}

/// Weights, and the grads of the scores, from the scores and the grads of the weights.
fn softmax_grads(
    scores: &Tensor<4>,
    grad_weights: &Tensor<4>,
    part: &Part,
    scale: f64,
    causal: bool,
    dtype: DType,
) -> Option<[Tensor<4>; 2]> {
    let [batch, heads, queries, padded] = scores.dims();
    let (scores, grad_weights) = (contiguous(scores)?, contiguous(grad_weights)?);
    let outputs = [(); 2].map(|()| empty_like(&scores, [batch, heads, queries, padded], dtype));
    let (rows, across) = ((batch * heads * queries) as u32, 1 << 15);
    grads_kernel::launch(
        &scores.client.clone(),
        CubeCount::Static(rows.min(across), rows.div_ceil(across), 1),
        CubeDim::new_1d(UNITS as u32),
        scores.into_tensor_arg(),
        grad_weights.into_tensor_arg(),
        outputs[0].clone().into_tensor_arg(),
        outputs[1].clone().into_tensor_arg(),
        rows as usize,
        padded,
        part.keys,
        queries,
        scale as f32,
        causal,
        UNITS,
        element(dtype)?,
    );
    Some(outputs.map(tensor))
}

#[cube(launch)]
fn grads_kernel<F: Float>(
    scores: &Buffer<f32>,
    grad_weights: &Buffer<f32>,
    weights: &mut Buffer<F>,
    grad_scores: &mut Buffer<F>,
    rows: usize,
    padded: usize,
    keys: usize,
    queries: usize,
    scale: f32,
    #[comptime] causal: bool,
    #[comptime] units: usize,
    #[define(F)] _dtype: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let visible = visible_keys(row, keys, queries, causal);
    let start = row * padded;
    let mut shared = Shared::<[f32]>::new_slice(units);
    let (largest, share) = row_softmax(scores, start, visible, scale, &mut shared, units);
    let mut sum = f32::new(0.0);
    let mut column = unit;
    while column < visible {
        sum += (scores[start + column] * scale - largest).exp() * share * grad_weights[start + column];
        column += units;
    }
    let average = cube_sum(sum, &mut shared, units);
    let mut column = unit;
    while column < padded {
        let mut weight = f32::new(0.0);
        let mut grad = f32::new(0.0);
        if column < visible {
            weight = (scores[start + column] * scale - largest).exp() * share;
            grad = weight * (grad_weights[start + column] - average) * scale;
        }
        weights[start + column] = F::cast_from(weight);
        grad_scores[start + column] = F::cast_from(grad);
        column += units;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close_tensors, input};

    #[test]
    #[ignore = "needs a GPU that BURN_DEVICE names"]
    fn in_however_many_parts_the_scores_are_made_the_gradients_are_the_same() {
        const ROW: usize = 2 * 128 * size_of::<f32>();
        let [q, k, v] = [(65, 1), (70, 2), (70, 3)].map(|(tokens, seed)| input([2, 3, tokens, 8], seed));
        let grad = input([2, 3, 65, 8], 4);
        for causal in [false, true] {
            let with = |rows: usize| grads(rows * ROW, [&q, &k, &v], &grad, 0.5, causal).unwrap();
            let whole = with(3 * 65);
            let largest = whole[1].clone().abs().max().into_data().try_into_vec_as::<f32>().unwrap();
            assert!(largest[0] > 1e-2);
            for rows in [0, 3, 65] {
                for (part, whole) in with(rows).iter().zip(&whole) {
                    assert_close_tensors(part, whole, 1e-5);
                }
            }
        }
    }
}
