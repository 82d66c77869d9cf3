//! Products of many rows: activations in panels, weights in blocks -> register tiles -> rows.
//!
//! Activations are packed once, with rows as lanes. A task owns some outputs: it brings a block of their weights into the
//! form that is multiplied, once for all rows, and adds its product with every panel to sums that stay in the cache.
#![allow(unsafe_code)]

use half::bf16;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::super::simd::{Avx2, Avx512};
use super::{
    super::{
        Level,
        simd::{Portable, Simd, for_simd},
        stored::{Stored, widen_slice},
    },
    Layer,
};

/// Outputs that a task computes: whole register tiles of any level.
const TASK_OUTPUTS: usize = 48;
/// Terms of a row that are multiplied while a panel stays in the nearest cache.
const BLOCK: usize = 256;
/// Rows that are written together.
pub(super) const WRITTEN_ROWS: usize = 8;

/// What a lane multiplies in one step: one f32, or two bf16.
pub(super) trait Lane: Copy + Default + Send + Sync {
    /// Adds to `sums`, `[outputs, stride]`, the products of a panel and of weights, `[outputs, BLOCK]`.
    ///
    /// # Panics
    /// If the slices are shorter than that.
    fn multiply_add(level: Level, panel: Panel<'_, Self>, weights: &[Self], sums: &mut [f32], stride: usize);
    /// `total` plus the products of what lies in the bits of the lanes.
    ///
    /// # Safety
    /// The CPU has the instructions that [`Lane::multiply_add`] chooses `S` for.
    unsafe fn step<S: Simd>(x: S, weight: S, total: S) -> S;
}

/// Inputs that a lane takes, and how they become one.
pub(super) trait Term<X, W>: Lane {
    /// Inputs in a term.
    const INPUTS: usize;
    /// The term with the first of some inputs; what is missing is zero.
    fn of(inputs: &[X]) -> Self;
    /// Terms of neighbouring weights; what is missing in the last one is zero.
    fn fill(level: Level, terms: &mut [Self], weights: &[W]);
}

impl Lane for f32 {
    fn multiply_add(level: Level, panel: Panel<'_, Self>, weights: &[Self], sums: &mut [f32], stride: usize) {
        /// # Safety
        /// As [`blocks`].
        #[inline(always)]
        unsafe fn run<S: Simd>(panel: Panel<'_, f32>, weights: &[f32], sums: &mut [f32], stride: usize) {
            // SAFETY: the caller's condition.
            unsafe { blocks::<S, f32>(panel, weights, sums, stride) }
        }
        panel.check(level, weights, sums, stride);
        for_simd!(level, run::<>(panel: Panel<'_, f32>, weights: &[f32], sums: &mut [f32], stride: usize) where)
    }
    #[inline(always)]
    unsafe fn step<S: Simd>(x: S, weight: S, total: S) -> S {
        // SAFETY: the caller's condition.
        unsafe { x.mul_add(weight, total) }
    }
}

impl<W: Stored> Term<f32, W> for f32 {
    const INPUTS: usize = 1;
    #[inline(always)]
    fn of(inputs: &[f32]) -> Self {
        inputs[0]
    }
    fn fill(level: Level, terms: &mut [Self], weights: &[W]) {
        widen_slice(level, weights, terms);
    }
}

/// Two neighbouring inputs in bf16, the first in the low bits.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(super) struct Pair(u32);

impl Term<bf16, bf16> for Pair {
    const INPUTS: usize = 2;
    #[inline(always)]
    fn of(inputs: &[bf16]) -> Self {
        let second = inputs.get(1).map_or(0, |second| second.to_bits());
        Self(u32::from(second) << 16 | u32::from(inputs[0].to_bits()))
    }
    fn fill(_: Level, terms: &mut [Self], weights: &[bf16]) {
        let (pairs, rest) = weights.as_chunks::<2>();
        for (term, pair) in terms.iter_mut().zip(pairs) {
            *term = Self::of(pair);
        }
        if !rest.is_empty() {
            terms[pairs.len()] = Self::of(rest);
        }
    }
}

impl Lane for Pair {
    fn multiply_add(level: Level, panel: Panel<'_, Self>, weights: &[Self], sums: &mut [f32], stride: usize) {
        panel.check(level, weights, sums, stride);
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2(panel: Panel<'_, Pair>, weights: &[Pair], sums: &mut [f32], stride: usize) {
            // SAFETY: this function has the instructions, and the slices have been checked.
            unsafe { blocks::<Avx2, Pair>(panel, weights, sums, stride) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
        fn avx512(panel: Panel<'_, Pair>, weights: &[Pair], sums: &mut [f32], stride: usize) {
            // SAFETY: as above.
            unsafe { blocks::<Avx512, Pair>(panel, weights, sums, stride) }
        }
        match level {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the CPU has just been asked.
            Level::Avx512 if level.multiplies_bf16() => unsafe { avx512(panel, weights, sums, stride) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: levels come from `Level::detect`, so the CPU has these instructions.
            Level::Avx2 => unsafe { avx2(panel, weights, sums, stride) },
            // SAFETY: every CPU has what this needs.
            _ => unsafe { blocks::<Portable, Self>(panel, weights, sums, stride) },
        }
    }
    #[inline(always)]
    unsafe fn step<S: Simd>(x: S, weight: S, total: S) -> S {
        // SAFETY: the caller's condition.
        unsafe { x.add_pair_products(weight, total) }
    }
}

/// A block of a panel: terms of rows that are lanes.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a, T> {
    /// `[terms, width]`.
    values: &'a [T],
    /// Rows of a whole panel.
    width: usize,
    /// Rows that are wanted of it.
    rows: usize,
}

impl<T> Panel<'_, T> {
    fn check(&self, level: Level, weights: &[T], sums: &[f32], stride: usize) {
        assert!(self.width == panel_width(level) && self.values.len().is_multiple_of(self.width));
        assert!(self.values.len() / self.width <= BLOCK && self.rows <= self.width && self.width <= stride);
        assert!(weights.len() == TASK_OUTPUTS * BLOCK && sums.len() >= (TASK_OUTPUTS - 1) * stride + self.width);
    }
}

/// Rows of a panel: those of a register tile, which is of 3 vectors of 16, or of 2 vectors of 8.
fn panel_width(level: Level) -> usize {
    match level {
        Level::Avx512 => 48,
        Level::Avx2 | Level::Portable => 16,
    }
}

/// `x Wᵀ + b`, stored as `Y`.
///
/// - `x`: `[rows, inputs]`
/// - `weight`: `[outputs, inputs]`
/// - returns: `[rows, outputs]`
pub(super) fn tiles<T, X, W, Y>(layer: &Layer<'_>, x: &[X], weight: &[W], level: Level) -> Vec<Y>
where
    T: Term<X, W>,
    X: Copy + Sync,
    W: Copy + Sync,
    Y: Stored,
{
    let &Layer { rows, inputs, outputs, bias } = layer;
    assert!(x.len() == rows * inputs && weight.len() == outputs * inputs && bias.len() == outputs);
    let width = panel_width(level);
    let terms = inputs.div_ceil(T::INPUTS);
    let panels = pack::<T, X, W>(x, [rows, inputs], width);
    let padded_rows = rows.next_multiple_of(width);
    let mut y = Vec::<Y>::with_capacity(rows * outputs);
    let out = Columns { to: y.as_mut_ptr(), rows, outputs };
    (0..outputs.div_ceil(TASK_OUTPUTS)).into_par_iter().for_each_init(
        || (vec![T::default(); TASK_OUTPUTS * BLOCK], vec![0.0; TASK_OUTPUTS * padded_rows]),
        |(block, sums), task| {
            let first = task * TASK_OUTPUTS;
            let count = TASK_OUTPUTS.min(outputs - first);
            sums.fill(0.0);
            for start in (0..terms).step_by(BLOCK) {
                let end = terms.min(start + BLOCK);
                for (row, output) in block.chunks_mut(BLOCK).zip(first..first + count) {
                    let stored = &weight[output * inputs..(output + 1) * inputs];
                    T::fill(level, row, &stored[start * T::INPUTS..inputs.min(end * T::INPUTS)]);
                }
                for (index, values) in panels.chunks(width * terms).enumerate() {
                    let values = &values[start * width..end * width];
                    let panel = Panel { values, width, rows: (rows - index * width).min(width) };
                    T::multiply_add(level, panel, block, &mut sums[index * width..], padded_rows);
                }
            }
            out.write(level, first, &bias[first..first + count], sums, padded_rows);
        },
    );
    // SAFETY: the tasks cover all outputs, and each wrote its outputs of every row.
    unsafe { y.set_len(rows * outputs) };
    y
}

/// Panels of `width` rows, `[panels, terms, width]`; rows that are missing in the last one are zero.
fn pack<T: Term<X, W>, X: Copy + Sync, W>(x: &[X], [rows, inputs]: [usize; 2], width: usize) -> Vec<T> {
    /// Terms of a row that are taken at a time, so that what is written stays in the cache.
    const STEP: usize = 16;
    let terms = inputs.div_ceil(T::INPUTS);
    let mut panels = vec![T::default(); rows.div_ceil(width) * terms * width];
    panels.par_chunks_mut(terms * width).zip(x.par_chunks(inputs * width)).for_each(|(panel, rows)| {
        for (step, panel) in panel.chunks_mut(STEP * width).enumerate() {
            for (lane, row) in rows.chunks(inputs).enumerate() {
                let row = &row[step * STEP * T::INPUTS..];
                for (lanes, inputs) in panel.chunks_mut(width).zip(row.chunks(T::INPUTS)) {
                    lanes[lane] = T::of(inputs);
                }
            }
        }
    });
    panels
}

/// See [`Lane::multiply_add`].
///
/// # Safety
/// The CPU has the instructions of `S` and `T`, and the slices are as [`Panel::check`] wants them.
#[inline(always)]
unsafe fn blocks<S: Simd, T: Lane>(panel: Panel<'_, T>, weights: &[T], sums: &mut [f32], stride: usize) {
    macro_rules! tiles {
        ($outputs:literal: $($vectors:literal)*) => {
            for output in (0..TASK_OUTPUTS).step_by($outputs) {
                match panel.rows.div_ceil(S::LANES) {
                    // SAFETY: the caller's condition; `$outputs` divides `TASK_OUTPUTS`.
                    $($vectors => unsafe { tile::<S, T, $vectors, $outputs>(panel, weights, sums, stride, output) },)*
                    _ => unreachable!("no more vectors than a panel has"),
                }
            }
        };
    }
    // As many accumulators as the registers hold beside the operands: 24 of 32, or 12 of 16.
    if S::LANES == 16 { tiles!(8: 1 2 3) } else { tiles!(6: 1 2) }
}

/// The first `VECTORS` vectors of rows times `OUTPUTS` rows of weights from `output` on.
///
/// # Safety
/// As [`blocks`], with `VECTORS * S::LANES <= panel.width` and `output + OUTPUTS <= TASK_OUTPUTS`.
#[inline(always)]
unsafe fn tile<S: Simd, T: Lane, const VECTORS: usize, const OUTPUTS: usize>(
    panel: Panel<'_, T>,
    weights: &[T],
    sums: &mut [f32],
    stride: usize,
    output: usize,
) {
    let terms = panel.values.len() / panel.width;
    // Whatever a term is, its bits travel in the lanes of floats.
    let values = panel.values.as_ptr().cast::<f32>();
    let weights = weights[output * BLOCK..].as_ptr().cast::<f32>();
    let sums = sums[output * stride..].as_mut_ptr();
    // SAFETY: terms have four bytes; reads of `values` stay below `terms * width`, those of `weights` below
    // `OUTPUTS * BLOCK`, and `sums` is accessed below `(OUTPUTS - 1) * stride + width`.
    unsafe {
        let mut totals = [[S::zero(); VECTORS]; OUTPUTS];
        for (output, totals) in totals.iter_mut().enumerate() {
            for (vector, total) in totals.iter_mut().enumerate() {
                *total = S::load(sums.add(output * stride + vector * S::LANES));
            }
        }
        for term in 0..terms {
            let mut x = [S::zero(); VECTORS];
            for (vector, x) in x.iter_mut().enumerate() {
                *x = S::load(values.add(term * panel.width + vector * S::LANES));
            }
            for (output, totals) in totals.iter_mut().enumerate() {
                let weight = S::splat(*weights.add(output * BLOCK + term));
                for (total, x) in totals.iter_mut().zip(x) {
                    *total = T::step(x, weight, *total);
                }
            }
        }
        for (output, totals) in totals.iter().enumerate() {
            for (vector, total) in totals.iter().enumerate() {
                total.store(sums.add(output * stride + vector * S::LANES));
            }
        }
    }
}

/// The output, `[rows, outputs]`, written by tasks that own different columns.
pub(super) struct Columns<Y> {
    pub(super) to: *mut Y,
    pub(super) rows: usize,
    pub(super) outputs: usize,
}

// SAFETY: the pointer is only used by `put`, whose callers own different elements.
unsafe impl<Y: Send> Sync for Columns<Y> {}

impl<Y: Stored> Columns<Y> {
    /// Writes the columns from `first` on, one for each bias: `sums` is `[TASK_OUTPUTS, padded_rows]`.
    fn write(&self, level: Level, first: usize, bias: &[f32], sums: &[f32], padded_rows: usize) {
        assert!(first + bias.len() <= self.outputs && self.rows <= padded_rows);
        let mut lines = [[0.0; TASK_OUTPUTS]; WRITTEN_ROWS];
        for start in (0..self.rows).step_by(WRITTEN_ROWS) {
            turn(level, &sums[start..], padded_rows, &mut lines);
            for (row, line) in (start..self.rows).zip(&mut lines) {
                let line = &mut line[..bias.len()];
                for (value, bias) in line.iter_mut().zip(bias) {
                    *value += bias;
                }
                // SAFETY: no other task writes these columns.
                unsafe { self.put(level, row, first, line) };
            }
        }
    }

    /// Rounds and writes a row of the columns from `first` on.
    ///
    /// # Safety
    /// `to` points to `rows * outputs` elements, and nobody else uses these meanwhile.
    pub(super) unsafe fn put(&self, level: Level, row: usize, first: usize, line: &[f32]) {
        assert!(row < self.rows && first + line.len() <= self.outputs);
        let mut narrow = [Y::default(); TASK_OUTPUTS];
        for (values, column) in line.chunks(TASK_OUTPUTS).zip((first..).step_by(TASK_OUTPUTS)) {
            let narrow = &mut narrow[..values.len()];
            Y::narrow_slice(level, values, narrow);
            // SAFETY: the row and the columns are inside of what `to` points to, and the caller owns them.
            unsafe { narrow.as_ptr().copy_to_nonoverlapping(self.to.add(row * self.outputs + column), values.len()) };
        }
    }
}

/// Makes lines of the first [`WRITTEN_ROWS`] sums of every output.
fn turn(level: Level, sums: &[f32], stride: usize, lines: &mut [[f32; TASK_OUTPUTS]; WRITTEN_ROWS]) {
    assert!(sums.len() >= (TASK_OUTPUTS - 1) * stride + WRITTEN_ROWS);
    for_simd!(level, turn_with::<>(
        sums: &[f32], stride: usize, lines: &mut [[f32; TASK_OUTPUTS]; WRITTEN_ROWS]
    ) where)
}

/// # Safety
/// The CPU has the instructions of `S`, and there are [`WRITTEN_ROWS`] sums of every output.
#[inline(always)]
unsafe fn turn_with<S: Simd>(sums: &[f32], stride: usize, lines: &mut [[f32; TASK_OUTPUTS]; WRITTEN_ROWS]) {
    let to = lines.as_flattened_mut().as_mut_ptr();
    for output in (0..TASK_OUTPUTS).step_by(8) {
        // SAFETY: the caller's condition; eight outputs are written from `output` on in each of eight lines.
        unsafe {
            let rows = std::array::from_fn(|i| sums.as_ptr().add((output + i) * stride));
            S::transpose_8x8(rows, to.add(output), TASK_OUTPUTS);
        }
    }
}
