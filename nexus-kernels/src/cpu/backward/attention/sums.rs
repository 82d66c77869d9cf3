//! The inner loops of attention's backward pass: rows and keys of one head -> sums that become their gradients.
//!
//! For a block of rows and keys the weights are computed again, and what they add to all three gradients. Lanes hold what
//! a [`Packed`] float says.
#![allow(unsafe_code)]

use std::{f32::consts::LN_2, marker::PhantomData, ops::Range};

use super::super::super::{
    attention::{Shape, pack_keys, parts},
    gemm::{Left, Right, multiply_add},
    packed::Packed,
    simd::{Simd, exp2},
};

/// Rows of a block of scores: whole register tiles, and pairs.
pub(super) const ROWS: usize = 96;
/// Keys of a block of scores: whole vectors of any level, and pairs.
pub(super) const KEYS: usize = 128;

/// What is the same for all tasks.
#[derive(Clone, Copy)]
pub(super) struct Options {
    /// Elements of a head.
    pub(super) dim: usize,
    /// Factor of the scores times log2(e): that of the forward pass, as its totals are of the same scores.
    pub(super) scale: f32,
    /// Whether the gradients of q, k and v are wanted.
    pub(super) wanted: [bool; 3],
}

/// The sums of a task, and what is read for them.
pub(super) struct Sums<'a, E> {
    options: Options,
    /// Lanes of a head.
    lanes: usize,
    /// Elements of a head, rounded up to whole vectors.
    width: usize,
    /// q: `[rows, lanes]` and `[rows / PER_LANE, width]`.
    q: [&'a mut [f32]; 2],
    /// Gradient of the mixed values, as q.
    upstream: [&'a mut [f32]; 2],
    /// `log2` of each row's sum of exponentials.
    log_totals: &'a mut [f32],
    /// Mean grad of each row's weights.
    means: &'a mut [f32],
    /// k: `[lanes, KEYS]` and `[KEYS / PER_LANE, width]`.
    k: [&'a mut [f32]; 2],
    /// `[lanes, KEYS]`.
    v: &'a mut [f32],
    /// Scores, then weights: `[ROWS, KEYS]`.
    weights: &'a mut [f32],
    /// Slopes of the weights, then of the scores: `[ROWS, KEYS]`.
    grads: &'a mut [f32],
    /// `[ROWS / PER_LANE, KEYS]`.
    pairs: &'a mut [f32],
    /// `[rows, width]`.
    grad_q: &'a mut [f32],
    /// For k and v: `[KEYS, width]`.
    grad_keys: [&'a mut [f32]; 2],
    stored: PhantomData<E>,
}

impl<'a, E: Packed> Sums<'a, E> {
    /// Zeros for so many rows, in `memory`, which grows as needed.
    pub(super) fn new<S: Simd>(memory: &'a mut Vec<f32>, options: Options, rows: usize) -> Self {
        let (lanes, width) = (options.dim / E::PER_LANE, options.dim.next_multiple_of(S::LANES));
        let [rows_len, terms_len, keys_len] = [rows * lanes, rows.div_ceil(E::PER_LANE) * width, lanes * KEYS];
        let [key_terms, pairs] = [KEYS, ROWS].map(|rows| rows / E::PER_LANE);
        #[rustfmt::skip]
        let lens = [
            rows_len, terms_len, rows_len, terms_len, rows, rows, rows * width,
            keys_len, keys_len, key_terms * width, KEYS * width, KEYS * width,
            ROWS * KEYS, ROWS * KEYS, pairs * KEYS,
        ];
        #[rustfmt::skip]
        let [
            q_rows, q_terms, upstream_rows, upstream_terms, log_totals, means, grad_q,
            k, v, k_terms, grad_k, grad_v,
            weights, grads, pairs,
        ] = parts(memory, lens);
        grad_q.fill(0.0);
        Self {
            options,
            lanes,
            width,
            q: [q_rows, q_terms],
            upstream: [upstream_rows, upstream_terms],
            log_totals,
            means,
            k: [k, k_terms],
            v,
            weights,
            grads,
            pairs,
            grad_q,
            grad_keys: [grad_k, grad_v],
            stored: PhantomData,
        }
    }

    /// Takes all rows: q, the gradient of the mixed values, those themselves, and `log2` of the sums of exponentials.
    ///
    /// # Safety
    /// The CPU has the instructions of `S`.
    #[inline(always)]
    pub(super) unsafe fn take_rows<'r, S: Simd>(
        &mut self,
        [q, upstream, mixed]: [&dyn Fn(usize) -> &'r [E]; 3],
        log_total: impl Fn(usize) -> f32,
    ) {
        for ([by_row, by_term], row) in [(&mut self.q, q), (&mut self.upstream, upstream)] {
            for (at, to) in by_row.chunks_exact_mut(self.lanes).enumerate() {
                E::pack(row(at), to);
            }
            pack_terms(self.means.len(), row, self.width, by_term);
        }
        for (at, (total, mean)) in self.log_totals.iter_mut().zip(self.means.iter_mut()).enumerate() {
            *total = log_total(at);
            // The mean of the values' grads is the grad of their mean.
            // SAFETY: the caller's condition.
            *mean = unsafe { dot::<S, E>(upstream(at), mixed(at)) };
        }
    }

    /// Takes up to [`KEYS`] keys, whose sums begin at zero.
    ///
    /// # Safety
    /// The CPU has the instructions of `S`.
    #[inline(always)]
    pub(super) unsafe fn take_keys<'r, S: Simd>(&mut self, count: usize, [k, v]: [&dyn Fn(usize) -> &'r [E]; 2]) {
        let shape = Shape { lanes: self.lanes, padded_dim: self.width, panel: KEYS };
        // SAFETY: the caller's condition.
        unsafe {
            pack_keys::<S, E>(shape, count, k, self.k[0]);
            pack_keys::<S, E>(shape, count, v, self.v);
        }
        pack_terms(count, k, self.width, self.k[1]);
        self.grad_keys.iter_mut().for_each(|sums| sums.fill(0.0));
    }

    /// Adds what up to [`ROWS`] rows, from an even one on, and the keys give, of which row `r` sees the first `visible(r)`.
    ///
    /// # Safety
    /// The CPU has the instructions of `S`, and what [`Packed`] asks for.
    #[inline(always)]
    pub(super) unsafe fn add<S: Simd, const C: usize>(&mut self, rows: Range<usize>, visible: impl Fn(usize) -> usize) {
        let (live, most) = (rows.len(), visible(rows.end - 1));
        if most == 0 {
            return;
        }
        let (lanes, width, padded) = (self.lanes, self.width, most.next_multiple_of(S::LANES));
        let (from_row, from_term) = (rows.start * lanes, rows.start / E::PER_LANE * width);
        self.weights.fill(0.0);
        self.grads.fill(0.0);
        // SAFETY: the caller's condition, here and below.
        unsafe {
            let shape = [live, padded, lanes];
            let (q, upstream) = (by_row(&self.q[0][from_row..], lanes), by_row(&self.upstream[0][from_row..], lanes));
            multiply_add::<S, E, C>(shape, q, right(self.k[0], KEYS), self.weights, KEYS);
            multiply_add::<S, E, C>(shape, upstream, right(self.v, KEYS), self.grads, KEYS);
        }
        let blocks = self.weights.chunks_exact_mut(KEYS).zip(self.grads.chunks_exact_mut(KEYS));
        for (row, (weights, grads)) in rows.clone().zip(blocks) {
            let numbers = [self.options.scale, self.log_totals[row], self.means[row]];
            // SAFETY: as above.
            unsafe { weigh::<S>(&mut weights[..padded], &mut grads[..padded], visible(row), numbers) };
        }
        let ([wants_q, wants_k, wants_v], [grad_k, grad_v]) = (self.options.wanted, &mut self.grad_keys);
        let shape = [most, width, live.div_ceil(E::PER_LANE)];
        // SAFETY: as above.
        unsafe {
            if wants_v {
                let weights = transposed(pair_rows::<S, E>([live, padded], self.weights, self.pairs));
                multiply_add::<S, E, C>(shape, weights, right(&self.upstream[1][from_term..], width), grad_v, width);
            }
            if wants_k {
                let grads = transposed(pair_rows::<S, E>([live, padded], self.grads, self.pairs));
                multiply_add::<S, E, C>(shape, grads, right(&self.q[1][from_term..], width), grad_k, width);
            }
            if wants_q {
                for row in self.grads.chunks_exact_mut(KEYS).take(live) {
                    E::round::<S>(&mut row[..padded]);
                }
                let (shape, grad_q) =
                    ([live, width, most.div_ceil(E::PER_LANE)], &mut self.grad_q[rows.start * width..]);
                multiply_add::<S, E, C>(shape, by_row(self.grads, KEYS), right(self.k[1], width), grad_q, width);
            }
        }
    }

    /// The gradient of a row of q, after all keys.
    pub(super) fn grad_row(&mut self, row: usize) -> &[f32] {
        scaled(&mut self.grad_q[row * self.width..][..self.options.dim], self.options.scale * LN_2)
    }

    /// The gradients of a key and a value, after all rows.
    pub(super) fn grad_key(&mut self, key: usize) -> [&[f32]; 2] {
        let [grad_k, grad_v] = self.grad_keys.each_mut().map(|sums| &mut sums[key * self.width..][..self.options.dim]);
        [scaled(grad_k, self.options.scale * LN_2), grad_v]
    }
}

fn scaled(values: &mut [f32], factor: f32) -> &[f32] {
    values.iter_mut().for_each(|value| *value *= factor);
    values
}

fn by_row(values: &[f32], stride: usize) -> Left<'_> {
    Left { values, strides: [stride, 1] }
}

fn transposed(values: &[f32]) -> Left<'_> {
    Left { values, strides: [1, KEYS] }
}

fn right(values: &[f32], stride: usize) -> Right<'_> {
    Right { values, stride }
}

/// Lanes of the values of neighbouring rows, `[rows / PER_LANE, width]`.
fn pack_terms<'r, E: Packed>(rows: usize, row: impl Fn(usize) -> &'r [E], width: usize, to: &mut [f32]) {
    for (first, to) in (0..rows).step_by(E::PER_LANE).zip(to.chunks_exact_mut(width)) {
        let second = if E::PER_LANE == 2 && first + 1 < rows { row(first + 1) } else { &[] };
        let first = row(first);
        E::interleave(first, second, &mut to[..first.len()]);
    }
}

/// Turns scores and grads of weights, whole vectors, into weights and grads of scores; both are zero from `visible` on.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn weigh<S: Simd>(scores: &mut [f32], grads: &mut [f32], visible: usize, [scale, log_total, mean]: [f32; 3]) {
    // SAFETY: the caller's condition; a chunk is one vector.
    unsafe {
        let (scale, log_total, mean) = (S::splat(scale), S::splat(log_total), S::splat(mean));
        for (scores, grads) in scores.chunks_exact_mut(S::LANES).zip(grads.chunks_exact_mut(S::LANES)) {
            let weight = exp2(S::load(scores.as_ptr()).mul(scale).sub(log_total));
            weight.store(scores.as_mut_ptr());
            weight.mul(S::load(grads.as_ptr()).sub(mean)).store(grads.as_mut_ptr());
        }
    }
    scores[visible..].fill(0.0);
    grads[visible..].fill(0.0);
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
