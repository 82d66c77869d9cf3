//! Attention with its backward pass: tracked q, k, v -> mixed values.
//!
//! Backward, weights are computed again for a block of rows and keys at a time, from what the forward pass kept of their
//! sums. A task owns one key/value head of one span of keys, so no two tasks add to the same gradient. bf16 is multiplied
//! as such where the CPU does that, with weights and their gradients rounded to bf16; all else is in f32.
//!
//! Source: Dao et al. 2022 (arXiv 2205.14135), algorithm 4.
#![allow(unsafe_code)]

mod sums;

use std::ops::Range;

use burn::tensor::Tensor;
use rayon::prelude::*;

use self::sums::{KEYS, Options, ROWS, Sums};
#[cfg(target_arch = "x86_64")]
use super::super::simd::{Avx2, Avx512};
use super::{
    super::{
        Instructions, Level,
        attention::{Attended, Halves, Kept, Output, Rowwise, Strided, attention_at, hold_pairs},
        packed::Packed,
        simd::{Portable, Simd},
        wrap,
    },
    Gradient, gradient,
};
use crate::Attention;

/// Attention and what its backward pass needs; `None` if the kernel does not take the tensors.
pub(super) fn forward(qkv: [&Tensor<4>; 3], options: &Attention<'_>) -> Option<(Tensor<3>, Kept)> {
    let level = Level::detect();
    let Attended { mixed, kept } = attention_at(level, level.multiplies_bf16(), qkv, options)?;
    Some((mixed, kept))
}

/// The gradients of q, k and v, from what [`forward`] made.
pub(super) fn backward(
    [q, k, v]: [&Tensor<4>; 3],
    mixed: &Tensor<3>,
    weights: &Kept,
    grad: Tensor<3>,
    wanted: [bool; 3],
) -> [Option<Gradient>; 3] {
    let level = Level::detect();
    let (grad, mixed): (Tensor<4>, Tensor<4>) = (grad.reshape(q.dims()), mixed.clone().reshape(q.dims()));
    let options = Options { dim: q.dims()[3], scale: weights.scale, wanted };
    if level.multiplies_bf16() && hold_pairs([q, k, v]) {
        let halves = |tensor| Halves::of(tensor).unwrap_or_else(|| unreachable!("the forward kernel took it"));
        let tensors = [q, k, v, &grad, &mixed].map(halves);
        return Call { tensors: tensors.each_ref().map(Halves::rows), weights, options }.run(level);
    }
    let rowwise = |tensor| Rowwise::of(tensor).unwrap_or_else(|| unreachable!("the forward kernel took it"));
    let tensors = [q, k, v, &grad, &mixed].map(rowwise);
    Call { tensors: tensors.each_ref().map(Rowwise::rows), weights, options }.run(level)
}

/// Inputs of one call.
struct Call<'a, E> {
    /// q, k, v, the gradient of the mixed values and those: `[batch, queries or keys, heads, head_dim]`.
    tensors: [Strided<'a, E>; 5],
    weights: &'a Kept,
    options: Options,
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
    fn run(&self, level: Level) -> [Option<Gradient>; 3] {
        let [q, k, v, ..] = self.tensors;
        let ([batch, _, heads, head_dim], [_, _, kv_heads, _]) = (q.dims, k.dims);
        let mut gradients = [q, k, v].map(|input| vec![E::default(); input.dims.iter().product()]);
        let outputs = gradients.each_mut().map(|values| Output::of(values, head_dim));
        let heads_of = |batch| (0..kv_heads).map(move |kv_head| (batch, kv_head));
        let tasks: Vec<Task> = (0..batch)
            .flat_map(heads_of)
            .flat_map(|(batch, kv_head)| {
                self.weights.spans.iter().map(move |(queries, keys)| Task {
                    batch,
                    kv_head,
                    group: heads / kv_heads,
                    queries: queries.clone(),
                    keys: keys.clone(),
                })
            })
            .filter(|task| !task.queries.is_empty() && !task.keys.is_empty())
            .collect();
        tasks.par_iter().for_each_init(Vec::new, |memory, task| match level.instructions() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a level has only instructions of this CPU, and only pairs of bf16 need more.
            Instructions::Avx512 if E::PER_LANE == 1 => unsafe { self.avx512(level, task, memory, &outputs) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the CPU has just been asked for it.
            Instructions::Avx512 if level.multiplies_bf16() => unsafe {
                self.avx512_bf16(level, task, memory, &outputs)
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level is in the other.
            Instructions::Avx512 | Instructions::Avx2 => unsafe { self.avx2(level, task, memory, &outputs) },
            // SAFETY: every CPU has what this needs.
            _ => unsafe { self.task::<Portable, 1>(task, memory, &outputs, level) },
        });
        let mut dims = [q.dims, k.dims, v.dims].into_iter().zip(self.options.wanted);
        gradients.map(|values| {
            let (dims, wanted) = dims.next()?;
            wanted.then(|| gradient(wrap(values, dims)))
        })
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2(&self, level: Level, task: &Task, memory: &mut Vec<f32>, outputs: &[Output<E>; 3]) {
        // SAFETY: this function has the instructions.
        unsafe { self.task::<Avx2, 2>(task, memory, outputs, level.at_most(Instructions::Avx2)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn avx512(&self, level: Level, task: &Task, memory: &mut Vec<f32>, outputs: &[Output<E>; 3]) {
        // SAFETY: this function has the instructions.
        unsafe { self.task::<Avx512, 4>(task, memory, outputs, level) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn avx512_bf16(&self, level: Level, task: &Task, memory: &mut Vec<f32>, outputs: &[Output<E>; 3]) {
        // SAFETY: this function has the instructions.
        unsafe { self.task::<Avx512, 4>(task, memory, outputs, level) }
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
        let ([q, k, v, upstream, mixed], Kept { log_totals, past, .. }) = (self.tensors, self.weights);
        let (rows, keys) = (task.queries.len() * task.group, task.keys.len());
        let mut sums = Sums::<E>::new::<S>(memory, self.options, rows);
        let row = |tensor: Strided<'a, E>| move |row| tensor.row(task.row(row));
        // SAFETY: the caller's condition, here and below.
        unsafe {
            sums.take_rows::<S>([&row(q), &row(upstream), &row(mixed)], |row| log_totals[q.index(task.row(row))]);
        }
        for start in (0..keys).step_by(KEYS) {
            let count = KEYS.min(keys - start);
            let key = |tensor: Strided<'a, E>| move |key| tensor.row(task.key(start + key));
            let visible = |row: usize| {
                let seen = past.map_or(keys, |past| keys.min(past + row / task.group + 1));
                seen.saturating_sub(start).min(count)
            };
            // SAFETY: as above.
            unsafe {
                sums.take_keys::<S>(count, [&key(k), &key(v)]);
                for first in (0..rows).step_by(ROWS) {
                    sums.add::<S, C>(first..rows.min(first + ROWS), visible);
                }
            }
            for at in 0..count {
                let (index, [grad_k, grad_v]) = (k.index(task.key(start + at)), sums.grad_key(at));
                // SAFETY: no other task has this key in this head.
                unsafe {
                    outputs[1].write(level, index, grad_k);
                    outputs[2].write(level, index, grad_v);
                }
            }
        }
        for at in 0..rows {
            // SAFETY: no other task has this query in this head.
            unsafe { outputs[0].write(level, q.index(task.row(at)), sums.grad_row(at)) };
        }
    }
}
