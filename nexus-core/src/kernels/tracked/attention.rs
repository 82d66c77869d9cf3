//! Attention with its backward pass: tracked q, k, v -> mixed values.
//!
//! Backward, the softmax is computed again for a block of queries at a time. A task owns one key/value head of one
//! span of keys, so no two tasks add to the same gradient.
#![allow(unsafe_code)]

use std::ops::Range;

use burn::tensor::Tensor;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::super::simd::{Avx2, Avx512};
use super::{
    super::{
        Level,
        attention::{Rowwise, Strided, attention as plain_kernel},
        elementwise::exp,
        gemm::{Left, Right, multiply_add},
        simd::{Portable, Simd},
        wrap,
    },
    Operand, Parent, gradient, parents, record,
};
use crate::nn::{Attention, Visibility};

/// Elements of a block of scores, which stays in the cache.
const BLOCK_SCORES: usize = 16 * 1024;
/// Most rows of a block.
const MAX_ROWS: usize = 96;
/// Rows of a register tile; blocks are multiples of it.
const TILE_ROWS: usize = 6;

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
    let mixed = plain_kernel(&q.value, &k.value, &v.value, options)?;
    let ([_, queries, _, head_dim], [_, keys, ..]) = (q.value.dims(), k.value.dims());
    let (spans, past) = match options.visibility {
        Visibility::All => (vec![(0..queries, 0..keys)], None),
        Visibility::Causal => (vec![(0..queries, 0..keys)], Some(keys - queries)),
        Visibility::Segments(bounds) => {
            (bounds.windows(2).map(|pair| (pair[0]..pair[1], pair[0]..pair[1])).collect(), None)
        }
    };
    let scale = options.scale.unwrap_or(1.0 / (head_dim as f64).sqrt()) as f32;
    let inputs = [q.value.clone(), k.value.clone(), v.value.clone()];
    Some(record(parents![q, k, v], mixed, move |upstream, wanted| {
        backward(Level::detect(), &inputs, upstream, (&spans, past, scale), wanted)
    }))
}

/// Queries and the keys that they may see.
type Span = (Range<usize>, Range<usize>);

fn backward(
    level: Level,
    [q, k, v]: &[Tensor<4>; 3],
    upstream: Tensor<3>,
    (spans, past, scale): (&[Span], Option<usize>, f32),
    wanted: [bool; 3],
) -> [Option<super::Gradient>; 3] {
    let ([batch, _, heads, _], [_, _, kv_heads, _]) = (q.dims(), k.dims());
    let upstream: Tensor<4> = upstream.reshape(q.dims());
    let (rowwise_q, rowwise_k) = (Rowwise::of(q), Rowwise::of(k));
    let (rowwise_v, rowwise_upstream) = (Rowwise::of(v), Rowwise::of(&upstream));
    let (Some(rows_q), Some(rows_k), Some(rows_v), Some(rows_upstream)) =
        (&rowwise_q, &rowwise_k, &rowwise_v, &rowwise_upstream)
    else {
        unreachable!("the forward kernel read tensors of this kind")
    };
    let call = Call {
        q: rows_q.rows(),
        k: rows_k.rows(),
        v: rows_v.rows(),
        upstream: rows_upstream.rows(),
        scale,
        past,
        group: heads / kv_heads,
        wanted,
    };
    let mut gradients = [q, k, v].map(|input| vec![0.0f32; input.shape().num_elements()]);
    let outputs = gradients.each_mut().map(|values| Output { to: values.as_mut_ptr(), len: values.len() });
    let tasks: Vec<(usize, usize, &Span)> = (0..batch)
        .flat_map(|batch| (0..kv_heads).flat_map(move |head| spans.iter().map(move |span| (batch, head, span))))
        .filter(|(_, _, (queries, keys))| !queries.is_empty() && !keys.is_empty())
        .collect();
    tasks.par_iter().for_each_init(Vec::new, |memory, &(batch, kv_head, span)| {
        let task = Task { batch, kv_head, queries: span.0.clone(), keys: span.1.clone() };
        match level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: levels come from `Level::detect`, so the CPU has these instructions.
            Level::Avx512 => unsafe { call.avx512(&task, memory, &outputs) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Level::Avx2 => unsafe { call.avx2(&task, memory, &outputs) },
            // SAFETY: every CPU has what this needs.
            _ => unsafe { call.run::<Portable, 1>(&task, memory, &outputs) },
        }
    });
    let [of_q, of_k, of_v] = gradients;
    [
        wanted[0].then(|| gradient(wrap(of_q, q.dims()))),
        wanted[1].then(|| gradient(wrap(of_k, k.dims()))),
        wanted[2].then(|| gradient(wrap(of_v, v.dims()))),
    ]
}

/// Inputs of one call.
struct Call<'a> {
    /// `[batch, queries, heads, head_dim]`.
    q: Strided<'a>,
    /// `[batch, keys, kv_heads, head_dim]`.
    k: Strided<'a>,
    /// As `k`.
    v: Strided<'a>,
    /// Gradient of the mixed values; as `q`.
    upstream: Strided<'a>,
    /// Factor of the scores.
    scale: f32,
    /// Keys before the first query, if a query sees none after itself.
    past: Option<usize>,
    /// Query heads per key/value head.
    group: usize,
    /// Whether the gradients of q, k and v are wanted.
    wanted: [bool; 3],
}

/// One key/value head and a span; row `r` is query `queries.start + r / group` in head `kv_head * group + r % group`.
struct Task {
    batch: usize,
    kv_head: usize,
    queries: Range<usize>,
    keys: Range<usize>,
}

/// A gradient, written by tasks that own different rows.
struct Output {
    to: *mut f32,
    len: usize,
}

// SAFETY: the pointer is only used by `write`, whose callers own different rows.
unsafe impl Sync for Output {}

impl Output {
    /// # Safety
    /// No other task writes this row, and the memory is borrowed from its owner.
    #[inline(always)]
    unsafe fn write(&self, row: usize, values: &[f32], factor: f32) {
        assert!((row + 1) * values.len() <= self.len);
        // SAFETY: inside of the allocation, and the caller's condition.
        let to = unsafe { std::slice::from_raw_parts_mut(self.to.add(row * values.len()), values.len()) };
        for (to, value) in to.iter_mut().zip(values) {
            *to = value * factor;
        }
    }
}

impl Call<'_> {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2(&self, task: &Task, memory: &mut Vec<f32>, outputs: &[Output; 3]) {
        // SAFETY: this function has the instructions.
        unsafe { self.run::<Avx2, 2>(task, memory, outputs) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn avx512(&self, task: &Task, memory: &mut Vec<f32>, outputs: &[Output; 3]) {
        // SAFETY: this function has the instructions.
        unsafe { self.run::<Avx512, 4>(task, memory, outputs) }
    }

    /// # Safety
    /// The CPU has the instructions of `S`.
    #[inline(always)]
    unsafe fn run<S: Simd, const C: usize>(&self, task: &Task, memory: &mut Vec<f32>, outputs: &[Output; 3]) {
        let dim = self.q.dims[3];
        let (width, keys) = (dim.next_multiple_of(S::LANES), task.keys.len());
        let columns = keys.next_multiple_of(S::LANES);
        let rows = task.queries.len() * self.group;
        let block = (BLOCK_SCORES / columns).clamp(TILE_ROWS, MAX_ROWS) / TILE_ROWS * TILE_ROWS;
        let lens = [
            rows * width,
            rows * width,
            keys * width,
            dim * columns,
            dim * columns,
            block * columns,
            block * columns,
            block * width,
            keys * width,
            keys * width,
        ];
        memory.clear();
        memory.resize(lens.iter().sum(), 0.0);
        let mut rest = &mut memory[..];
        let [queries, upstream, keys_by_row, keys_by_column, values_by_column, weights, slopes, of_q, of_k, of_v] =
            lens.map(|len| {
                let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
                rest = after;
                part
            });
        let place = |row: usize| {
            [task.batch, task.queries.start + row / self.group, task.kv_head * self.group + row % self.group]
        };
        for row in 0..rows {
            for (to, value) in queries[row * width..].iter_mut().zip(self.q.row(place(row))) {
                *to = value * self.scale;
            }
            upstream[row * width..][..dim].copy_from_slice(self.upstream.row(place(row)));
        }
        for key in 0..keys {
            let at = [task.batch, task.keys.start + key, task.kv_head];
            keys_by_row[key * width..][..dim].copy_from_slice(self.k.row(at));
            for (element, value) in self.k.row(at).iter().enumerate() {
                keys_by_column[element * columns + key] = *value;
            }
            for (element, value) in self.v.row(at).iter().enumerate() {
                values_by_column[element * columns + key] = *value;
            }
        }
        let seen = |row: usize| match self.past {
            Some(past) => keys.min(past + row / self.group + 1),
            None => keys,
        };
        for first in (0..rows).step_by(block) {
            let count = block.min(rows - first);
            let most = seen(first + count - 1);
            let padded = most.next_multiple_of(S::LANES);
            let right = |values, stride| Right { values, stride };
            let queries = &queries[first * width..];
            let upstream = &upstream[first * width..];
            weights.fill(0.0);
            slopes.fill(0.0);
            of_q.fill(0.0);
            let by_row = |values, stride| Left { values, strides: [stride, 1] };
            // SAFETY: the caller's condition, here and below.
            unsafe {
                let shape = [count, padded, dim];
                multiply_add::<S, C>(shape, by_row(queries, width), right(keys_by_column, columns), weights, columns);
                multiply_add::<S, C>(shape, by_row(upstream, width), right(values_by_column, columns), slopes, columns);
            }
            let blocks = weights.chunks_exact_mut(columns).zip(slopes.chunks_exact_mut(columns));
            for (row, (weights, slopes)) in blocks.take(count).enumerate() {
                let visible = seen(first + row);
                // SAFETY: the caller's condition.
                unsafe {
                    softmax::<S>(&mut weights[..padded], visible);
                    if self.wanted[0] || self.wanted[1] {
                        // Slopes become those of the scores; the weights are needed for the values.
                        scale_slopes::<S>(&weights[..padded], &mut slopes[..padded]);
                    }
                }
            }
            let turned = |values| Left { values, strides: [1, columns] };
            // SAFETY: the caller's condition.
            unsafe {
                if self.wanted[0] {
                    let left = by_row(&*slopes, columns);
                    multiply_add::<S, C>([count, width, most], left, right(keys_by_row, width), of_q, width);
                }
                if self.wanted[1] {
                    multiply_add::<S, C>([most, width, count], turned(&*slopes), right(queries, width), of_k, width);
                }
                if self.wanted[2] {
                    multiply_add::<S, C>([most, width, count], turned(&*weights), right(upstream, width), of_v, width);
                }
            }
            if self.wanted[0] {
                for row in 0..count {
                    let [batch, query, head] = place(first + row);
                    let index = (batch * self.q.dims[1] + query) * self.q.dims[2] + head;
                    // SAFETY: no other task has this query in this head.
                    unsafe { outputs[0].write(index, &of_q[row * width..][..dim], self.scale) };
                }
            }
        }
        for key in 0..keys {
            let index = (task.batch * self.k.dims[1] + task.keys.start + key) * self.k.dims[2] + task.kv_head;
            // SAFETY: no other task has this key in this head.
            unsafe {
                outputs[1].write(index, &of_k[key * width..][..dim], 1.0);
                outputs[2].write(index, &of_v[key * width..][..dim], 1.0);
            }
        }
    }
}

/// Turns scores, whole vectors, into weights; those from `visible` on become zero.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn softmax<S: Simd>(scores: &mut [f32], visible: usize) {
    scores[visible..].fill(f32::MIN);
    // SAFETY: the caller's condition; a chunk is one vector.
    unsafe {
        let mut largest = S::splat(f32::MIN);
        for chunk in scores.chunks_exact(S::LANES) {
            largest = S::load(chunk.as_ptr()).max(largest);
        }
        let largest = largest.largest();
        for score in scores.iter_mut() {
            *score = exp(*score - largest);
        }
        let mut total = S::zero();
        for chunk in scores.chunks_exact(S::LANES) {
            total = total.add(S::load(chunk.as_ptr()));
        }
        let inverse = 1.0 / total.sum();
        for score in scores {
            *score *= inverse;
        }
    }
}

/// Turns the slopes of weights into those of the scores; both are whole vectors.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn scale_slopes<S: Simd>(weights: &[f32], slopes: &mut [f32]) {
    // SAFETY: the caller's condition; a chunk is one vector.
    unsafe {
        let mut total = S::zero();
        for (weights, slopes) in weights.chunks_exact(S::LANES).zip(slopes.chunks_exact(S::LANES)) {
            total = S::load(weights.as_ptr()).mul_add(S::load(slopes.as_ptr()), total);
        }
        let mean = total.sum();
        for (weight, slope) in weights.iter().zip(slopes) {
            *slope = weight * (*slope - mean);
        }
    }
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
        for sizes in [[1, 1, 5, 1, 1, 6], [2, 7, 7, 2, 2, 8], [1, 29, 53, 1, 3, 16]] {
            check_attention(sizes, Attention { visibility: Visibility::Causal, ..Default::default() });
        }
    }

    #[test]
    fn gradients_of_segments() {
        let visibility = Visibility::Segments(&[0, 1, 18, 41]);
        check_attention([1, 41, 41, 2, 2, 8], Attention { visibility, ..Default::default() });
    }
}
