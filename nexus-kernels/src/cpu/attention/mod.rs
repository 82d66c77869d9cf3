//! Attention without a score matrix in memory: strided q, k, v -> mixed values.
//!
//! A task is a block of queries of all heads that share one key/value head. It walks over tiles of keys, packs each once
//! for all its rows, and keeps a running softmax, so that a row's result does not depend on how rows are divided into
//! tasks. That is so for finite values: those of a key that only the next few rows see are read with a weight of zero.
#![allow(unsafe_code)]

mod tile;

use std::ops::Range;

use burn::tensor::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

pub(super) use self::tile::Shape;
use self::tile::{KEYS, ROWS, Rows, Scratch, Tile};
#[cfg(feature = "autodiff")]
pub(super) use self::tile::{pack_keys, parts};
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::{
    Floats, Instructions, Level, View,
    packed::Packed,
    simd::{Portable, Simd},
    stored::Stored,
    wrap, wrap_as,
};
use crate::{Attention, Visibility};

/// Elements of queries that a task keeps in the cache.
const TASK_ELEMENTS: usize = 65_536;
/// A task of fewer rows would pack more than it computes.
const MIN_TASK_ROWS: usize = 48;

/// Attention, or `None` if the tensors are not floats on the CPU or their shapes ask for what is not supported.
///
/// Sums and the softmax are of f32. bf16 is multiplied as such where the CPU does that, with weights rounded to bf16; all
/// else is widened.
///
/// # Shapes
/// As [`crate::attention`]
pub(super) fn attention(qkv: [&Tensor<4>; 3], options: &Attention<'_>) -> Option<Tensor<3>> {
    let level = Level::detect();
    Some(attention_at(level, level.multiplies_bf16(), qkv, options)?.mixed)
}

/// What attention gives.
pub(super) struct Attended {
    /// `[batch, queries, heads * head_dim]`.
    pub(super) mixed: Tensor<3>,
    #[cfg_attr(not(feature = "autodiff"), expect(dead_code, reason = "for the backward pass"))]
    pub(super) kept: Kept,
}

/// What it takes to compute the weights again.
#[cfg_attr(not(feature = "autodiff"), expect(dead_code, reason = "for the backward pass"))]
pub(crate) struct Kept {
    /// `log2(sum(exp(scores)))` of every query, `[batch, queries, heads]`.
    pub(super) log_totals: Vec<f32>,
    /// Queries and the keys that they may see.
    pub(super) spans: Vec<(Range<usize>, Range<usize>)>,
    /// Keys before the first query, if a query sees none after itself.
    pub(super) past: Option<usize>,
    /// Factor of the scores times log2(e).
    pub(super) scale: f32,
}

/// Whether q, k and v hold pairs of bf16 for [`Packed`].
pub(super) fn hold_pairs(tensors: [&Tensor<4>; 3]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::BF16 && tensor.dims()[3].is_multiple_of(bf16::PER_LANE))
}

/// [`attention`] with the instructions of `level`, which multiplies bf16 as `pairs` says.
pub(super) fn attention_at(
    level: Level,
    pairs: bool,
    [q, k, v]: [&Tensor<4>; 3],
    options: &Attention<'_>,
) -> Option<Attended> {
    let [batch, queries, heads, head_dim] = q.dims();
    let [_, keys, kv_heads, _] = k.dims();
    let fits = k.dims() == v.dims() && k.dims() == [batch, keys, kv_heads, head_dim];
    let empty = [batch, queries, heads, head_dim, keys, kv_heads].contains(&0);
    if !fits || empty || !heads.is_multiple_of(kv_heads) {
        return None;
    }
    if options.bias.as_ref().is_some_and(|bias| bias.dims() != [1, heads, queries, keys]) {
        return None;
    }
    let (spans, past) = match options.visibility {
        Visibility::All => (vec![(0..queries, 0..keys)], None),
        Visibility::Causal => (vec![(0..queries, 0..keys)], Some(keys.checked_sub(queries)?)),
        Visibility::Segments(_) if options.bias.is_some() || queries != keys => return None,
        Visibility::Segments(bounds) => {
            let covered = bounds.first() == Some(&0) && bounds.last() == Some(&queries) && bounds.is_sorted();
            let segment = |pair: &[usize]| (pair[0]..pair[1], pair[0]..pair[1]);
            (covered.then(|| bounds.windows(2).map(segment).collect())?, None)
        }
    };
    let bias = match &options.bias {
        Some(bias) => Some(Rowwise::of(bias)?),
        None => None,
    };
    let scale = (options.scale.unwrap_or(1.0 / (head_dim as f64).sqrt()) * std::f64::consts::LOG2_E) as f32;
    let shared = Shared { bias: bias.as_ref().map(Rowwise::rows), scale, past, group: heads / kv_heads };
    let (dtype, shape) = (q.dtype(), [batch, queries, heads * head_dim]);
    if pairs && hold_pairs([q, k, v]) {
        let (q, k, v) = (Halves::of(q)?, Halves::of(k)?, Halves::of(v)?);
        let (mixed, log_totals) = Call { q: q.rows(), k: k.rows(), v: v.rows(), shared }.run(&spans, level);
        return Some(Attended { mixed: wrap(mixed, shape), kept: Kept { log_totals, spans, past, scale } });
    }
    let (q, k, v) = (Rowwise::of(q)?, Rowwise::of(k)?, Rowwise::of(v)?);
    let (mixed, log_totals) = Call { q: q.rows(), k: k.rows(), v: v.rows(), shared }.run(&spans, level);
    Some(Attended { mixed: wrap_as(dtype, mixed, shape), kept: Kept { log_totals, spans, past, scale } })
}

/// A tensor, widened, whose last dimension lies in one piece.
pub(super) struct Rowwise {
    floats: Floats,
    dims: [usize; 4],
}

impl Rowwise {
    pub(super) fn of(tensor: &Tensor<4>) -> Option<Self> {
        let floats = Floats::of(tensor)?;
        let floats = if has_rows(floats.strides()) { floats } else { floats.into_contiguous() };
        Some(Self { floats, dims: tensor.dims() })
    }

    pub(super) fn rows(&self) -> Strided<'_> {
        Strided::new(self.floats.values(), self.dims, self.floats.strides())
    }
}

/// A tensor of bf16 whose last dimension lies in one piece.
pub(super) struct Halves {
    view: View,
    dims: [usize; 4],
}

impl Halves {
    pub(super) fn of(tensor: &Tensor<4>) -> Option<Self> {
        let view = View::of(tensor)?;
        let view = if has_rows(view.strides()) { view } else { view.into_contiguous() };
        Some(Self { view, dims: tensor.dims() })
    }

    pub(super) fn rows(&self) -> Strided<'_, bf16> {
        Strided::new(self.view.values(), self.dims, self.view.strides())
    }
}

/// Whether neighbours along the last dimension are neighbours, and nothing lies backwards.
fn has_rows(strides: &[isize]) -> bool {
    strides[3] == 1 && strides.iter().all(|&stride| stride >= 0)
}

/// Rows of a tensor of four dimensions.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a, E = f32> {
    values: &'a [E],
    pub(super) dims: [usize; 4],
    strides: [usize; 3],
}

impl<'a, E> Strided<'a, E> {
    fn new(values: &'a [E], dims: [usize; 4], strides: &[isize]) -> Self {
        Self { values, dims, strides: std::array::from_fn(|dim| strides[dim] as usize) }
    }

    /// Where a row is among the rows of a tensor in one piece.
    #[inline(always)]
    pub(super) fn index(&self, [batch, token, head]: [usize; 3]) -> usize {
        (batch * self.dims[1] + token) * self.dims[2] + head
    }

    #[inline(always)]
    pub(super) fn row(&self, index: [usize; 3]) -> &'a [E] {
        let start: usize = index.iter().zip(self.strides).map(|(index, stride)| index * stride).sum();
        &self.values[start..start + self.dims[3]]
    }
}

/// Inputs of one call.
struct Call<'a, E> {
    /// `[batch, queries, heads, head_dim]`.
    q: Strided<'a, E>,
    /// `[batch, keys, kv_heads, head_dim]`.
    k: Strided<'a, E>,
    /// `[batch, keys, kv_heads, head_dim]`.
    v: Strided<'a, E>,
    shared: Shared<'a>,
}

/// What does not depend on how values are stored.
#[derive(Clone, Copy)]
struct Shared<'a> {
    /// `[1, heads, queries, keys]`.
    bias: Option<Strided<'a>>,
    /// Factor of the scores times log2(e).
    scale: f32,
    /// Keys before the first query, if a query sees none after itself.
    past: Option<usize>,
    /// Query heads per key/value head.
    group: usize,
}

/// Queries and the keys that they may see, in all heads of a group.
///
/// Row `r` is query `queries.start + r / group` in head `kv_head * group + r % group`.
struct Task {
    batch: usize,
    kv_head: usize,
    queries: Range<usize>,
    keys: Range<usize>,
}

impl<E: Packed> Call<'_, E> {
    fn tasks(&self, spans: &[(Range<usize>, Range<usize>)]) -> Vec<Task> {
        let ([batch, queries, heads, head_dim], [_, _, kv_heads, _]) = (self.q.dims, self.k.dims);
        let fair = (batch * queries * heads).div_ceil(4 * rayon::current_num_threads());
        let most = (TASK_ELEMENTS / head_dim).min(fair).max(MIN_TASK_ROWS).div_ceil(self.shared.group);
        let mut tasks = vec![];
        for (batch, kv_head) in (0..batch).flat_map(|batch| (0..kv_heads).map(move |kv_head| (batch, kv_head))) {
            for (queries, keys) in spans.iter().filter(|(queries, _)| !queries.is_empty()) {
                let parts = queries.len().div_ceil(most);
                let step = queries.len().div_ceil(parts).next_multiple_of(ROWS);
                for start in queries.clone().step_by(step) {
                    let queries = start..queries.end.min(start + step);
                    tasks.push(Task { batch, kv_head, queries, keys: keys.clone() });
                }
            }
        }
        tasks
    }

    /// The mixed values and [`Kept::log_totals`].
    fn run(&self, spans: &[(Range<usize>, Range<usize>)], level: Level) -> (Vec<E>, Vec<f32>) {
        let [batch, queries, heads, head_dim] = self.q.dims;
        let mut values = vec![E::default(); batch * queries * heads * head_dim];
        let mut log_totals = vec![f32::NEG_INFINITY; batch * queries * heads];
        let outputs = (Output::of(&mut values, head_dim), Output::of(&mut log_totals, 1));
        self.tasks(spans).par_iter().for_each_init(Vec::new, |scratch, task| match level.instructions() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a level has only instructions of this CPU, and only pairs of bf16 need more.
            Instructions::Avx512 if E::PER_LANE == 1 => unsafe { self.avx512(level, task, scratch, &outputs) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the CPU has just been asked for it.
            Instructions::Avx512 if level.multiplies_bf16() => unsafe {
                self.avx512_bf16(level, task, scratch, &outputs)
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this level is in the other.
            Instructions::Avx512 | Instructions::Avx2 => unsafe { self.avx2(level, task, scratch, &outputs) },
            // SAFETY: every CPU has what this needs.
            _ => unsafe { self.block::<Portable, 1>(task, scratch, &outputs, level) },
        });
        (values, log_totals)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2(&self, level: Level, task: &Task, scratch: &mut Vec<f32>, outputs: &(Output<E>, Output<f32>)) {
        // SAFETY: this function has the instructions.
        unsafe { self.block::<Avx2, 2>(task, scratch, outputs, level.at_most(Instructions::Avx2)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn avx512(&self, level: Level, task: &Task, scratch: &mut Vec<f32>, outputs: &(Output<E>, Output<f32>)) {
        // SAFETY: this function has the instructions.
        unsafe { self.block::<Avx512, 4>(task, scratch, outputs, level) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn avx512_bf16(&self, level: Level, task: &Task, scratch: &mut Vec<f32>, outputs: &(Output<E>, Output<f32>)) {
        // SAFETY: this function has the instructions.
        unsafe { self.block::<Avx512, 4>(task, scratch, outputs, level) }
    }

    /// One task, with register tiles of [`ROWS`] rows by `C` vectors.
    ///
    /// # Safety
    /// The CPU has the instructions of `S` and of `level`, and what [`Packed`] asks for.
    #[inline(always)]
    unsafe fn block<S: Simd, const C: usize>(
        &self,
        task: &Task,
        scratch: &mut Vec<f32>,
        outputs: &(Output<E>, Output<f32>),
        level: Level,
    ) {
        let (head_dim, Shared { scale, past, group, .. }) = (self.q.dims[3], self.shared);
        let (lanes, padded_dim) = (head_dim / E::PER_LANE, head_dim.next_multiple_of(S::LANES));
        let shape = Shape { lanes, padded_dim, panel: C * S::LANES };
        let rows = task.queries.len() * group;
        let Scratch { queries, keys, values, scores, largest, total, mixed } = Scratch::new(scratch, shape, rows);
        self.pack_queries(task, queries);
        largest.fill(f32::MIN);
        total.fill(0.0);
        mixed.fill(0.0);
        let seen = |query: usize| past.map_or(task.keys.end, |past| task.keys.end.min(past + query + 1));
        for start in (task.keys.start..seen(task.queries.end - 1)).step_by(KEYS) {
            let count = KEYS.min(seen(task.queries.end - 1) - start);
            let key = |index: usize| self.k.row([task.batch, start + index, task.kv_head]);
            // SAFETY: the caller's condition.
            unsafe { tile::pack_keys::<S, E>(shape, count, key, keys) };
            self.pack_values(task, start..start + count, shape, values);
            let tile = Tile { keys, values };
            for first in (0..rows).step_by(ROWS) {
                let live = ROWS.min(rows - first);
                let query = |row: usize| task.queries.start + (first + row.min(live - 1)) / group;
                let visible = std::array::from_fn(|row| seen(query(row)).saturating_sub(start).min(count));
                let most = visible[live - 1];
                if most == 0 {
                    continue;
                }
                let mut rows = Rows {
                    queries: &queries[first * lanes..][..live * lanes],
                    largest: &mut largest[first..first + live],
                    total: &mut total[first..first + live],
                    mixed: &mut mixed[first * padded_dim..][..live * padded_dim],
                };
                let add_bias = |scores: &mut [f32]| self.add_bias(task, first, &visible[..live], start, scores);
                macro_rules! step {
                    ($($count:literal)*) => {
                        match live {
                            $($count => {
                                tile::scores::<S, E, C, $count>(shape, rows.queries, tile, most, scale, scores);
                                add_bias(scores);
                                let factors = tile::softmax::<S, E, $count>(&mut rows, scores, &visible, most);
                                tile::mix::<S, E, C, $count>(shape, scores, &factors, tile, most, rows.mixed);
                            })*
                            _ => unreachable!("no more than {ROWS} rows"),
                        }
                    };
                }
                // SAFETY: the caller's condition.
                unsafe { step!(1 2 3 4 5 6) };
            }
        }
        for (row, (mixed, total)) in mixed.chunks_mut(padded_dim).zip(total.iter()).enumerate() {
            let (query, head) = (task.queries.start + row / group, task.kv_head * group + row % group);
            let index = self.q.index([task.batch, query, head]);
            for value in mixed.iter_mut() {
                *value /= total;
            }
            // SAFETY: no two tasks have the same query in the same head.
            unsafe {
                outputs.0.write(level, index, &mixed[..head_dim]);
                outputs.1.write(level, index, &[largest[row] + total.log2()]);
            }
        }
    }

    /// See [`Rows::queries`].
    #[inline(always)]
    fn pack_queries(&self, task: &Task, packed: &mut [f32]) {
        let group = self.shared.group;
        let heads = task.kv_head * group..(task.kv_head + 1) * group;
        let rows = task.queries.clone().flat_map(|query| heads.clone().map(move |head| [task.batch, query, head]));
        for (packed, index) in packed.chunks_mut(self.q.dims[3] / E::PER_LANE).zip(rows) {
            E::pack(self.q.row(index), packed);
        }
    }

    /// See [`Tile::values`].
    #[inline(always)]
    fn pack_values(&self, task: &Task, keys: Range<usize>, shape: Shape, packed: &mut [f32]) {
        let row = |key| self.v.row([task.batch, key, task.kv_head]);
        for (term, key) in keys.clone().step_by(E::PER_LANE).enumerate() {
            let (first, second) = (row(key), if key + 1 < keys.end { row(key + 1) } else { &[] });
            for start in (0..first.len()).step_by(shape.panel) {
                let width = shape.panel.min(shape.padded_dim - start);
                let columns = start..first.len().min(start + shape.panel);
                let lanes = &mut packed[start * KEYS / E::PER_LANE + term * width..][..columns.len()];
                E::interleave(&first[columns.clone()], second.get(columns).unwrap_or_default(), lanes);
            }
        }
    }

    /// Adds the bias of the rows from `first` on and the keys from `start` on.
    #[inline(always)]
    fn add_bias(&self, task: &Task, first: usize, visible: &[usize], start: usize, scores: &mut [f32]) {
        let Shared { bias: Some(bias), group, .. } = self.shared else { return };
        for ((row, visible), scores) in (first..).zip(visible).zip(scores.chunks_mut(KEYS)) {
            let (query, head) = (task.queries.start + row / group, task.kv_head * group + row % group);
            let bias = &bias.row([0, head, query])[start..start + visible];
            for (score, bias) in scores.iter_mut().zip(bias) {
                *score += bias * std::f32::consts::LOG2_E;
            }
        }
    }
}

/// What tasks that own different rows write, rows of `len` elements.
pub(super) struct Output<E> {
    to: *mut E,
    rows: usize,
    len: usize,
}

// SAFETY: the pointer is only used by `write`, whose callers own different rows.
unsafe impl<E: Send> Sync for Output<E> {}

impl<E: Stored> Output<E> {
    pub(super) fn of(values: &mut [E], len: usize) -> Self {
        Self { to: values.as_mut_ptr(), rows: values.len() / len, len }
    }

    /// Rounds and writes a row.
    ///
    /// # Safety
    /// No other task writes this row, and nobody else uses the values meanwhile.
    #[inline(always)]
    pub(super) unsafe fn write(&self, level: Level, row: usize, values: &[f32]) {
        assert!(row < self.rows && self.len == values.len());
        // SAFETY: the row is inside of the values, and the caller's condition.
        let to = unsafe { std::slice::from_raw_parts_mut(self.to.add(row * self.len), self.len) };
        E::narrow_slice(level, values, to);
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::{
        attention::tests::naive,
        testing::{assert_close, cpu, ramp},
    };

    fn qkv([batch, queries, keys, kv_heads, group, dim]: [usize; 6]) -> [Tensor<4>; 3] {
        [
            ramp([batch, queries, kv_heads * group, dim], 1),
            ramp([batch, keys, kv_heads, dim], 2),
            ramp([batch, keys, kv_heads, dim], 3),
        ]
    }

    fn check([q, k, v]: [&Tensor<4>; 3], options: &Attention<'_>, expected: &[f32]) {
        for level in Level::available() {
            assert_close(&attention_at(level, false, [q, k, v], options).unwrap().mixed, expected, 2e-6);
        }
    }

    fn check_visibility(
        [q, k, v]: [&Tensor<4>; 3],
        visibility: Visibility<'_>,
        visible: impl Fn(usize, usize) -> bool,
    ) {
        let expected = naive([q, k, v], visible, |_, _, _| 0.0, 1.0 / (q.dims()[3] as f64).sqrt());
        check([q, k, v], &Attention { visibility, ..Default::default() }, &expected);
    }

    #[test]
    fn every_key_is_seen_at_odd_sizes() {
        for sizes in [
            [1, 1, 1, 1, 1, 6],
            [2, 2, 3, 2, 1, 12],
            [1, 3, 17, 1, 2, 16],
            [1, 17, 63, 2, 1, 20],
            [2, 63, 64, 1, 2, 80],
            [1, 64, 65, 1, 1, 128],
            [1, 65, 130, 1, 7, 20],
            [1, 130, 2, 2, 1, 80],
        ] {
            let [q, k, v] = qkv(sizes);
            check_visibility([&q, &k, &v], Visibility::All, |_, _| true);
        }
    }

    #[test]
    fn causal_queries_are_the_last_of_the_sequence() {
        for sizes in [
            [1, 1, 130, 2, 7, 128],
            [2, 2, 2, 1, 1, 6],
            [1, 3, 65, 1, 2, 12],
            [1, 17, 80, 1, 7, 16],
            [1, 130, 130, 1, 1, 20],
        ] {
            let [q, k, v] = qkv(sizes);
            let past = sizes[2] - sizes[1];
            check_visibility([&q, &k, &v], Visibility::Causal, |i, j| j <= past + i);
        }
    }

    #[test]
    fn segments_of_any_length() {
        let bounds = [0, 1, 4, 4, 68, 133];
        let segment = |i: usize| bounds.iter().rposition(|&start| start <= i);
        let [q, k, v] = qkv([2, 133, 133, 2, 1, 20]);
        check_visibility([&q, &k, &v], Visibility::Segments(&bounds), |i, j| segment(i) == segment(j));
    }

    #[test]
    fn views_are_read_with_their_strides() {
        let (heads, dim) = (2, 12);
        let fused = ramp([2, 70, 3 * heads, dim], 5);
        let part = |index| fused.clone().narrow(2, index * heads, heads).narrow(1, 3, 66);
        check_visibility([&part(0), &part(1), &part(2)], Visibility::All, |_, _| true);
        let heads_first = |seed| ramp([2, heads, 66, dim], seed).swap_dims(1, 2);
        check_visibility([&heads_first(1), &heads_first(2), &part(2)], Visibility::Causal, |i, j| j <= i);
        let dim_first = ramp([2, 66, dim, heads], 4).swap_dims(2, 3);
        check_visibility([&dim_first, &part(1), &dim_first], Visibility::All, |_, _| true);
    }

    #[test]
    fn halves_are_mixed_in_f32_and_rounded_once() {
        for dtype in [DType::BF16, DType::F16] {
            let [q, k, v] = qkv([2, 9, 70, 2, 2, 12]).map(|tensor| tensor.cast(dtype));
            // As from a cache: a part of something longer.
            let [k, v] = [k, v].map(|tensor| tensor.narrow(1, 3, 50));
            let wide = [&q, &k, &v].map(|tensor| tensor.clone().cast(DType::F32));
            for level in Level::available() {
                let options = Attention { visibility: Visibility::Causal, ..Default::default() };
                let mixed = attention_at(level, false, [&q, &k, &v], &options).unwrap().mixed;
                let expected = attention_at(level, false, wide.each_ref(), &options).unwrap().mixed;
                assert_eq!(mixed.into_data(), expected.cast(dtype).into_data(), "{level:?}");
            }
        }
    }

    /// What pairs of bf16 give at every level, beside the same in f64.
    fn check_pairs([q, k, v]: [&Tensor<4>; 3], options: &Attention<'_>, expected: &[f32], most: f32) {
        for level in Level::available() {
            let mixed = attention_at(level, true, [q, k, v], options).unwrap().mixed;
            assert_eq!(mixed.dtype(), DType::BF16);
            assert_close(&mixed.cast(DType::F32), expected, most);
        }
    }

    #[test]
    fn pairs_of_bf16_differ_by_the_rounding_of_weights_and_results() {
        for sizes in [
            [1, 1, 1, 1, 1, 6],
            [2, 2, 3, 2, 1, 12],
            [1, 3, 17, 1, 2, 16],
            [2, 63, 64, 1, 2, 80],
            [1, 65, 129, 1, 7, 20],
            [1, 130, 131, 2, 1, 128],
        ] {
            let [q, k, v] = qkv(sizes).map(|tensor| tensor.cast(DType::BF16));
            let wide = [&q, &k, &v].map(|tensor| tensor.clone().cast(DType::F32));
            let past = sizes[2] - sizes[1];
            for visibility in [Visibility::All, Visibility::Causal] {
                let visible = |i, j| matches!(visibility, Visibility::All) || j <= past + i;
                let expected = naive(wide.each_ref(), visible, |_, _, _| 0.0, 1.0 / (sizes[5] as f64).sqrt());
                check_pairs([&q, &k, &v], &Attention { visibility, ..Default::default() }, &expected, 6e-3);
            }
        }
    }

    #[test]
    fn pairs_of_bf16_are_exact_where_weights_are() {
        // Queries of zero weigh all keys alike: the mean, of integers that bf16 has.
        let [_, k, _] = qkv([1, 7, 65, 1, 1, 12]).map(|tensor| tensor.cast(DType::BF16));
        let q = Tensor::zeros([1, 7, 2, 12], (&cpu(), DType::BF16));
        let integers: Vec<f32> = (0..65 * 12).map(|n| (n / 12 % 5 * 3 * (n % 12)) as f32).collect();
        let v = Tensor::<4>::from_data(TensorData::new(integers, [1, 65, 1, 12]), &cpu()).cast(DType::BF16);
        let mean: Vec<f32> = (0..7 * 2 * 12).map(|n| (6 * (n % 12)) as f32).collect();
        check_pairs([&q, &k, &v], &Attention::default(), &mean, 0.0);
        // With a bias that leaves one key, that key's values.
        let bias: Vec<f32> = (0..2 * 7 * 65).map(|n| if n % 65 == n / 65 % 7 * 9 { 0.0 } else { -1e4 }).collect();
        let bias = Tensor::from_data(TensorData::new(bias, [1, 2, 7, 65]), &cpu());
        let one: Vec<f32> = (0..7 * 2 * 12).map(|n| (n / 24 * 9 % 5 * 3 * (n % 12)) as f32).collect();
        check_pairs([&q, &k, &v], &Attention { bias: Some(bias), ..Default::default() }, &one, 0.0);
    }

    #[test]
    fn pairs_of_bf16_are_read_with_their_strides() {
        let fused = ramp([2, 70, 6, 12], 5).cast(DType::BF16);
        let part = |index: usize| fused.clone().narrow(2, index * 2, 2).narrow(1, 3, 65);
        let dim_first = ramp([2, 65, 12, 2], 4).cast(DType::BF16).swap_dims(2, 3);
        let wide = [part(0), part(1), dim_first.clone()].map(|tensor| tensor.cast(DType::F32));
        let expected = naive(wide.each_ref(), |_, _| true, |_, _, _| 0.0, 1.0 / 12f64.sqrt());
        check_pairs([&part(0), &part(1), &dim_first], &Attention::default(), &expected, 6e-3);
    }

    #[test]
    fn an_odd_head_of_bf16_is_widened() {
        let [q, k, v] = qkv([1, 9, 20, 1, 1, 7]).map(|tensor| tensor.cast(DType::BF16));
        let options = Attention::default();
        let mixed =
            [true, false].map(|pairs| attention_at(Level::detect(), pairs, [&q, &k, &v], &options).unwrap().mixed);
        let [one, other] = mixed.map(Tensor::into_data);
        assert_eq!(one, other);
    }

    #[test]
    fn bias_and_scale_enter_the_scores() {
        let [q, k, v] = qkv([2, 17, 70, 2, 2, 16]);
        let bias = |h: usize, i: usize, j: usize| (h as f64 + 1.0) * (i as f64 - j as f64) * 0.25;
        let values: Vec<f32> = (0..4 * 17 * 70).map(|n| bias(n / 1190, n / 70 % 17, n % 70) as f32).collect();
        let tensor = Tensor::from_data(TensorData::new(values, [1, 4, 17, 70]), &cpu());
        let options = Attention { bias: Some(tensor), scale: Some(0.5), ..Default::default() };
        check([&q, &k, &v], &options, &naive([&q, &k, &v], |_, _| true, bias, 0.5));
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let [_, _, v] = qkv([1, 1, 130, 1, 1, 12]);
        let keys: Vec<f32> = (0..130 * 12).map(|n| (n / 12) as f32 - 65.0).collect();
        let k = Tensor::from_data(TensorData::new(keys, [1, 130, 1, 12]), &cpu());
        for sign in [1e4, -1e4] {
            check_visibility([&Tensor::full([1, 3, 1, 12], sign, &cpu()), &k, &v], Visibility::All, |_, _| true);
        }
    }

    #[test]
    fn not_a_number_reaches_the_rows_that_read_it() {
        let poison = |x: &Tensor<4>, token, head| {
            let dim = x.dims()[3];
            let nan = Tensor::full([1, 1, 1, dim], f32::NAN, &cpu());
            x.clone().slice_assign([0..1, token..token + 1, head..head + 1, 0..dim], nan)
        };
        let [q, k, v] = qkv([1, 9, 70, 2, 2, 8]);
        // Query head `h` of a token reads key/value head `h / 2`.
        for level in Level::available() {
            for pairs in [false, true] {
                let nan_rows = |q: &Tensor<4>, k: &Tensor<4>, v: &Tensor<4>| -> Vec<usize> {
                    let stored = [q, k, v].map(|x| if pairs { x.clone().cast(DType::BF16) } else { x.clone() });
                    let mixed = attention_at(level, pairs, stored.each_ref(), &Attention::default()).unwrap().mixed;
                    let values = mixed.cast(DType::F32).into_data().try_into_vec::<f32>().unwrap();
                    let rows = values.chunks(8).enumerate();
                    rows.filter(|(_, row)| row.iter().all(|value| value.is_nan())).map(|(row, _)| row).collect()
                };
                let second_group: Vec<usize> = (0..36).filter(|row| row % 4 >= 2).collect();
                assert!(nan_rows(&q, &k, &v).is_empty());
                assert_eq!(nan_rows(&poison(&q, 5, 1), &k, &v), [21]);
                assert_eq!(nan_rows(&q, &poison(&k, 66, 1), &v), second_group);
                assert_eq!(nan_rows(&q, &k, &poison(&v, 3, 1)), second_group);
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_rows_beside_it() {
        let [q, k, v] = qkv([1, 100, 100, 2, 3, 20]);
        let options = Attention { visibility: Visibility::Causal, ..Default::default() };
        for level in Level::available() {
            for dtype in [DType::F32, DType::BF16] {
                let [q, k, v] = [&q, &k, &v].map(|tensor| tensor.clone().cast(dtype));
                let whole = attention_at(level, true, [&q, &k, &v], &options).unwrap().mixed;
                for (start, end) in [(0, 1), (41, 42), (7, 80), (95, 100)] {
                    let past = |x: &Tensor<4>| x.clone().narrow(1, 0, end);
                    let q = q.clone().narrow(1, start, end - start);
                    let part = attention_at(level, true, [&q, &past(&k), &past(&v)], &options).unwrap().mixed;
                    assert_eq!(part.into_data(), whole.clone().narrow(1, start, end - start).into_data());
                }
            }
        }
    }
}
