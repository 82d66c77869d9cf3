//! Attention with its backward pass: tracked q, k, v -> mixed values.
//!
//! Backward, weights are computed again for a block of rows and keys at a time, from what the forward pass kept of their
//! sums. A task owns one key/value head of one span of keys, so no two tasks add to the same gradient. bf16 is multiplied
//! as such where the CPU does that, with weights and their slopes rounded to bf16; all else is in f32.
//!
//! Source: Dao et al. 2022 (arXiv 2205.14135), algorithm 4.
#![allow(unsafe_code)]

use std::{f32::consts::LOG2_E, ops::Range};

use burn::tensor::Tensor;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::super::simd::{Avx2, Avx512};
use super::{
    super::{
        Level,
        attention::{Attended, Halves, Output, Rowwise, Shape, Strided, attention_at, hold_pairs, pack_keys, parts},
        gemm::{Left, Right, multiply_add},
        packed::Packed,
        simd::{Portable, Simd, exp2},
        wrap,
    },
    Gradient, Operand, Parent, gradient, parents, record,
};
use crate::nn::{Attention, Visibility};

/// Rows of a block of scores: whole register tiles, and pairs.
const ROWS: usize = 96;
/// Keys of a block of scores: whole vectors of any level, and pairs.
const KEYS: usize = 128;

/// Attention without bias; with one it is left to the plain formulation.
///
/// # Shapes
/// As [`crate::nn::attention`]
pub(in super::super) fn attention(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    options: &Attention<'_>,
) -> Option<Tensor<3>> {
    if options.bias.is_some() {
        return None;
    }
    let (q, k, v) = (Operand::of(q)?, Operand::of(k)?, Operand::of(v)?);
    let level = Level::detect();
    let inputs = [&q.value, &k.value, &v.value];
    let Attended { mixed, log_totals } = attention_at(level, level.multiplies_bf16(), inputs, options)?;
    let inputs = inputs.map(Tensor::clone);
    let ([_, queries, _, head_dim], [_, keys, ..]) = (q.value.dims(), k.value.dims());
    let (spans, past) = match options.visibility {
        Visibility::All => (vec![(0..queries, 0..keys)], None),
        Visibility::Causal => (vec![(0..queries, 0..keys)], Some(keys - queries)),
        Visibility::Segments(bounds) => {
            (bounds.windows(2).map(|pair| (pair[0]..pair[1], pair[0]..pair[1])).collect(), None)
        }
    };
    let scale = options.scale.unwrap_or(1.0 / (head_dim as f64).sqrt()) as f32;
    let kept: Tensor<4> = mixed.clone().reshape(q.value.dims());
    Some(record(parents![q, k, v], mixed, move |upstream: Tensor<3>, wanted| {
        let ([q, k, v], upstream) = (&inputs, upstream.reshape(kept.dims()));
        let shared = Shared { log_totals: &log_totals, scale, past, wanted };
        if level.multiplies_bf16() && hold_pairs([q, k, v]) {
            let halves = |tensor| Halves::of(tensor).unwrap_or_else(|| unreachable!("the forward kernel took it"));
            let tensors = [q, k, v, &upstream, &kept].map(halves);
            return Call { tensors: tensors.each_ref().map(Halves::rows), shared }.run(level, &spans);
        }
        let rowwise = |tensor| Rowwise::of(tensor).unwrap_or_else(|| unreachable!("the forward kernel took it"));
        let tensors = [q, k, v, &upstream, &kept].map(rowwise);
        Call { tensors: tensors.each_ref().map(Rowwise::rows), shared }.run(level, &spans)
    }))
}

/// Queries and the keys that they may see.
type Span = (Range<usize>, Range<usize>);

/// Inputs of one call.
struct Call<'a, E> {
    /// q, k, v, the gradient of the mixed values and those: `[batch, queries or keys, heads, head_dim]`.
    tensors: [Strided<'a, E>; 5],
    shared: Shared<'a>,
}

/// What does not depend on how values are stored.
#[derive(Clone, Copy)]
struct Shared<'a> {
    /// See [`Attended`].
    log_totals: &'a [f32],
    /// Factor of the scores.
    scale: f32,
    /// Keys before the first query, if a query sees none after itself.
    past: Option<usize>,
    /// Whether the gradients of q, k and v are wanted.
    wanted: [bool; 3],
}

/// One key/value head and a span; row `r` is query `queries.start + r / group` in head `kv_head * group + r % group`.
struct Task {
    batch: usize,
    kv_head: usize,
    /// Query heads per key/value head.
    group: usize,
    queries: Range<usize>,
    keys: Range<usize>,
}

impl Task {
    fn row(&self, row: usize) -> [usize; 3] {
        [self.batch, self.queries.start + row / self.group, self.kv_head * self.group + row % self.group]
    }

    fn key(&self, key: usize) -> [usize; 3] {
        [self.batch, self.keys.start + key, self.kv_head]
    }
}

impl<'a, E: Packed> Call<'a, E> {
    fn run(&self, level: Level, spans: &[Span]) -> [Option<Gradient>; 3] {
        let [q, k, v, ..] = self.tensors;
        let ([batch, _, heads, head_dim], [_, _, kv_heads, _]) = (q.dims, k.dims);
        let mut gradients = [q, k, v].map(|input| vec![E::default(); input.dims.iter().product()]);
        let outputs = gradients.each_mut().map(|values| Output::of(values, head_dim));
        let heads_of = |batch| (0..kv_heads).map(move |kv_head| (batch, kv_head));
        let tasks: Vec<Task> = (0..batch)
            .flat_map(heads_of)
            .flat_map(|(batch, kv_head)| {
                spans.iter().map(move |(queries, keys)| Task {
                    batch,
                    kv_head,
                    group: heads / kv_heads,
                    queries: queries.clone(),
                    keys: keys.clone(),
                })
            })
            .filter(|task| !task.queries.is_empty() && !task.keys.is_empty())
            .collect();
        tasks.par_iter().for_each_init(Vec::new, |memory, task| match level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: levels come from `Level::detect`, and only pairs of bf16 need more.
            Level::Avx512 if E::PER_LANE == 1 => unsafe { self.avx512(task, memory, &outputs) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the CPU has just been asked for it.
            Level::Avx512 if level.multiplies_bf16() => unsafe { self.avx512_bf16(task, memory, &outputs) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level is in the other.
            Level::Avx512 | Level::Avx2 => unsafe { self.avx2(task, memory, &outputs) },
            // SAFETY: every CPU has what this needs.
            _ => unsafe { self.task::<Portable, 1>(task, memory, &outputs, level) },
        });
        let mut dims = [q.dims, k.dims, v.dims].into_iter().zip(self.shared.wanted);
        gradients.map(|values| {
            let (dims, wanted) = dims.next()?;
            wanted.then(|| gradient(wrap(values, dims)))
        })
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2(&self, task: &Task, memory: &mut Vec<f32>, outputs: &[Output<E>; 3]) {
        // SAFETY: this function has the instructions.
        unsafe { self.task::<Avx2, 2>(task, memory, outputs, Level::Avx2) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn avx512(&self, task: &Task, memory: &mut Vec<f32>, outputs: &[Output<E>; 3]) {
        // SAFETY: this function has the instructions.
        unsafe { self.task::<Avx512, 4>(task, memory, outputs, Level::Avx512) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn avx512_bf16(&self, task: &Task, memory: &mut Vec<f32>, outputs: &[Output<E>; 3]) {
        // SAFETY: this function has the instructions.
        unsafe { self.task::<Avx512, 4>(task, memory, outputs, Level::Avx512) }
    }

    /// # Safety
    /// The CPU has the instructions of `S` and of `level`, and what [`Packed`] asks for.
    #[inline(always)]
    unsafe fn task<S: Simd, const C: usize>(
        &self,
        task: &Task,
        memory: &mut Vec<f32>,
        outputs: &[Output<E>; 3],
        level: Level,
    ) {
        let ([q, k, v, upstream, mixed], Shared { log_totals, scale, past, wanted }) = (self.tensors, self.shared);
        let (rows, keys) = (task.queries.len() * task.group, task.keys.len());
        let (lanes, width) = (q.dims[3] / E::PER_LANE, q.dims[3].next_multiple_of(S::LANES));
        let Scratch { of_rows, means, of_q, k_by_column, v_by_column, k_by_term, of_k, of_v, weights, slopes, pairs } =
            Scratch::new::<E>(memory, rows, lanes, width);
        let [q_by_row, q_by_term, upstream_by_row, upstream_by_term] = of_rows;
        for (by_row, tensor) in [(&mut *q_by_row, q), (&mut *upstream_by_row, upstream)] {
            for (row, to) in by_row.chunks_exact_mut(lanes).enumerate() {
                E::pack(tensor.row(task.row(row)), to);
            }
        }
        pack_terms(rows, |row| q.row(task.row(row)), width, q_by_term);
        pack_terms(rows, |row| upstream.row(task.row(row)), width, upstream_by_term);
        for (row, mean) in means.iter_mut().enumerate() {
            // SAFETY: the caller's condition, here and below.
            *mean = unsafe { dot::<S, E>(upstream.row(task.row(row)), mixed.row(task.row(row))) };
        }
        fn by_row(values: &[f32], stride: usize) -> Left<'_> {
            Left { values, strides: [stride, 1] }
        }
        fn turned(values: &[f32]) -> Left<'_> {
            Left { values, strides: [1, KEYS] }
        }
        fn right(values: &[f32], stride: usize) -> Right<'_> {
            Right { values, stride }
        }
        of_q.fill(0.0);
        for start in (0..keys).step_by(KEYS) {
            let count = KEYS.min(keys - start);
            let shape = Shape { lanes, padded_dim: width, panel: KEYS };
            let row = |tensor: Strided<'a, E>| move |key| tensor.row(task.key(start + key));
            // SAFETY: as above.
            unsafe {
                pack_keys::<S, E>(shape, count, row(k), k_by_column);
                pack_keys::<S, E>(shape, count, row(v), v_by_column);
            }
            pack_terms(count, row(k), width, k_by_term);
            of_k.fill(0.0);
            of_v.fill(0.0);
            for first in (0..rows).step_by(ROWS) {
                let live = ROWS.min(rows - first);
                let visible = |row: usize| {
                    let seen = past.map_or(keys, |past| keys.min(past + (first + row) / task.group + 1));
                    seen.saturating_sub(start).min(count)
                };
                let most = visible(live - 1);
                if most == 0 {
                    continue;
                }
                let (padded, term) = (most.next_multiple_of(S::LANES), first / E::PER_LANE);
                weights.fill(0.0);
                slopes.fill(0.0);
                // SAFETY: as above.
                unsafe {
                    let (shape, from) = ([live, padded, lanes], first * lanes);
                    let left = [&q_by_row[from..], &upstream_by_row[from..]].map(|values| by_row(values, lanes));
                    multiply_add::<S, E, C>(shape, left[0], right(k_by_column, KEYS), weights, KEYS);
                    multiply_add::<S, E, C>(shape, left[1], right(v_by_column, KEYS), slopes, KEYS);
                }
                let blocks = weights.chunks_exact_mut(KEYS).zip(slopes.chunks_exact_mut(KEYS));
                for (row, (weights, slopes)) in blocks.take(live).enumerate() {
                    let log_total = log_totals[q.index(task.row(first + row))];
                    let (weights, slopes) = (&mut weights[..padded], &mut slopes[..padded]);
                    // SAFETY: as above.
                    unsafe { weigh::<S>(weights, slopes, visible(row), [scale, log_total, means[first + row]]) };
                }
                // SAFETY: as above.
                unsafe {
                    let shape = [most, width, live.div_ceil(E::PER_LANE)];
                    if wanted[2] {
                        let left = turned(pair_rows::<S, E>([live, padded], weights, pairs));
                        multiply_add::<S, E, C>(
                            shape,
                            left,
                            right(&upstream_by_term[term * width..], width),
                            of_v,
                            width,
                        );
                    }
                    if wanted[1] {
                        let left = turned(pair_rows::<S, E>([live, padded], slopes, pairs));
                        multiply_add::<S, E, C>(shape, left, right(&q_by_term[term * width..], width), of_k, width);
                    }
                    if wanted[0] {
                        for row in slopes.chunks_exact_mut(KEYS).take(live) {
                            E::round::<S>(&mut row[..padded]);
                        }
                        let (shape, of_q) = ([live, width, most.div_ceil(E::PER_LANE)], &mut of_q[first * width..]);
                        multiply_add::<S, E, C>(shape, by_row(slopes, KEYS), right(k_by_term, width), of_q, width);
                    }
                }
            }
            of_k.iter_mut().for_each(|value| *value *= scale);
            for (key, (of_k, of_v)) in of_k.chunks_exact(width).zip(of_v.chunks_exact(width)).take(count).enumerate() {
                let index = k.index(task.key(start + key));
                // SAFETY: no other task has this key in this head.
                unsafe {
                    outputs[1].write(level, index, &of_k[..k.dims[3]]);
                    outputs[2].write(level, index, &of_v[..v.dims[3]]);
                }
            }
        }
        of_q.iter_mut().for_each(|value| *value *= scale);
        for (row, of_q) in of_q.chunks_exact(width).enumerate() {
            // SAFETY: no other task has this query in this head.
            unsafe { outputs[0].write(level, q.index(task.row(row)), &of_q[..q.dims[3]]) };
        }
    }
}

/// What a task computes with, lanes.
struct Scratch<'a> {
    /// q `[rows, lanes]`, and `[rows / PER_LANE, width]`; then the gradient of the mixed values.
    of_rows: [&'a mut [f32]; 4],
    /// Mean slope of the weights of each row.
    means: &'a mut [f32],
    /// `[rows, width]`.
    of_q: &'a mut [f32],
    /// `[lanes, KEYS]`.
    k_by_column: &'a mut [f32],
    /// `[lanes, KEYS]`.
    v_by_column: &'a mut [f32],
    /// `[KEYS / PER_LANE, width]`.
    k_by_term: &'a mut [f32],
    /// `[KEYS, width]`.
    of_k: &'a mut [f32],
    /// `[KEYS, width]`.
    of_v: &'a mut [f32],
    /// `[ROWS, KEYS]`.
    weights: &'a mut [f32],
    /// `[ROWS, KEYS]`.
    slopes: &'a mut [f32],
    /// `[ROWS / PER_LANE, KEYS]`.
    pairs: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    /// Parts of `memory`, which grows as needed; their content is whatever was there.
    fn new<E: Packed>(memory: &'a mut Vec<f32>, rows: usize, lanes: usize, width: usize) -> Self {
        let [by_row, by_term, columns] = [rows * lanes, rows.div_ceil(E::PER_LANE) * width, lanes * KEYS];
        let [k_by_term, pairs] = [KEYS, ROWS].map(|rows| rows / E::PER_LANE);
        #[rustfmt::skip]
        let lens = [
            by_row, by_term, by_row, by_term, rows, rows * width,
            columns, columns, k_by_term * width, KEYS * width, KEYS * width,
            ROWS * KEYS, ROWS * KEYS, pairs * KEYS,
        ];
        #[rustfmt::skip]
        let [
            q_by_row, q_by_term, upstream_by_row, upstream_by_term, means, of_q,
            k_by_column, v_by_column, k_by_term, of_k, of_v,
            weights, slopes, pairs,
        ] = parts(memory, lens);
        let of_rows = [q_by_row, q_by_term, upstream_by_row, upstream_by_term];
        Self { of_rows, means, of_q, k_by_column, v_by_column, k_by_term, of_k, of_v, weights, slopes, pairs }
    }
}

/// Lanes of the values of neighbouring rows, `[rows / PER_LANE, width]`.
fn pack_terms<'r, E: Packed>(rows: usize, row: impl Fn(usize) -> &'r [E], width: usize, to: &mut [f32]) {
    for (first, to) in (0..rows).step_by(E::PER_LANE).zip(to.chunks_exact_mut(width)) {
        let second = if E::PER_LANE == 2 && first + 1 < rows { row(first + 1) } else { &[] };
        let first = row(first);
        E::interleave(first, second, &mut to[..first.len()]);
    }
}

/// Turns scores and slopes of weights, whole vectors, into weights and slopes of scores; both are zero from `visible` on.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn weigh<S: Simd>(scores: &mut [f32], slopes: &mut [f32], visible: usize, [scale, log_total, mean]: [f32; 3]) {
    // SAFETY: the caller's condition; a chunk is one vector.
    unsafe {
        let (scale, log_total, mean) = (S::splat(scale * LOG2_E), S::splat(log_total), S::splat(mean));
        for (scores, slopes) in scores.chunks_exact_mut(S::LANES).zip(slopes.chunks_exact_mut(S::LANES)) {
            let weight = exp2(S::load(scores.as_ptr()).mul(scale).sub(log_total));
            weight.store(scores.as_mut_ptr());
            weight.mul(S::load(slopes.as_ptr()).sub(mean)).store(slopes.as_mut_ptr());
        }
    }
    scores[visible..].fill(0.0);
    slopes[visible..].fill(0.0);
}

/// Lanes of `[rows, columns]` values of neighbouring rows, `KEYS` apart, in `to` if a lane holds two.
///
/// # Safety
/// The CPU has the instructions of `S`, and what [`Packed::round`] asks for.
#[inline(always)]
unsafe fn pair_rows<'t, S: Simd, E: Packed>(
    [rows, columns]: [usize; 2],
    values: &'t [f32],
    to: &'t mut [f32],
) -> &'t [f32] {
    if E::PER_LANE == 1 {
        return values;
    }
    for (first, to) in (0..rows).step_by(E::PER_LANE).zip(to.chunks_exact_mut(KEYS)) {
        for column in (0..columns).step_by(S::LANES) {
            // SAFETY: the caller's condition; a row has whole vectors.
            unsafe {
                let lanes = |row: usize| S::load(values[row * KEYS + column..][..S::LANES].as_ptr());
                let second = if first + 1 < rows { lanes(first + 1) } else { S::zero() };
                lanes(first).paired(second).store(to[column..][..S::LANES].as_mut_ptr());
            }
        }
    }
    to
}

/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn dot<S: Simd, E: Packed>(x: &[E], y: &[E]) -> f32 {
    let whole = x.len() - x.len() % S::LANES;
    // SAFETY: the caller's condition; reads end at `whole`.
    let mut sum = unsafe {
        let mut total = S::zero();
        for (x, y) in x.chunks_exact(S::LANES).zip(y.chunks_exact(S::LANES)) {
            total = E::load::<S>(x.as_ptr()).mul_add(E::load(y.as_ptr()), total);
        }
        total.sum()
    };
    for (x, y) in x[whole..].iter().zip(&y[whole..]) {
        sum += x.widen() * y.widen();
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{kernels::tracked::tests::check, nn::plain_attention};

    fn check_attention([batch, queries, keys, kv_heads, group, dim]: [usize; 6], options: Attention<'static>) {
        let heads = kv_heads * group;
        // Heads first, so that the inputs are read through strides.
        let split = |x: Tensor<3>, tokens: usize, heads: usize| -> Tensor<4> {
            x.reshape([batch, heads, tokens, dim]).swap_dims(1, 2)
        };
        let inputs = move |[q, k, v]: [Tensor<3>; 3]| {
            [split(q * 2.0, queries, heads), split(k * 2.0, keys, kv_heads), split(v, keys, kv_heads)]
        };
        check(
            [[batch, heads, queries * dim], [batch, kv_heads, keys * dim], [batch, kv_heads, keys * dim]],
            |tensors| {
                let [q, k, v] = inputs(tensors);
                attention(&q, &k, &v, &options).unwrap()
            },
            |tensors| {
                let [q, k, v] = inputs(tensors);
                plain_attention(q, k, v, options.clone())
            },
        );
    }

    #[test]
    fn gradients_of_full_attention() {
        for sizes in [[1, 1, 1, 1, 1, 5], [2, 5, 7, 2, 1, 8], [1, 13, 67, 2, 3, 17], [2, 31, 150, 1, 2, 32]] {
            check_attention(sizes, Attention::default());
        }
        check_attention([1, 5, 6, 2, 2, 12], Attention { scale: Some(0.7), ..Default::default() });
    }

    #[test]
    fn gradients_of_causal_attention() {
        for sizes in [[1, 1, 5, 1, 1, 6], [2, 7, 7, 2, 2, 8], [1, 29, 53, 1, 3, 16], [1, 101, 290, 1, 1, 10]] {
            check_attention(sizes, Attention { visibility: Visibility::Causal, ..Default::default() });
        }
    }

    #[test]
    fn gradients_of_segments() {
        let visibility = Visibility::Segments(&[0, 1, 18, 41]);
        check_attention([1, 41, 41, 2, 2, 8], Attention { visibility, ..Default::default() });
    }
}
