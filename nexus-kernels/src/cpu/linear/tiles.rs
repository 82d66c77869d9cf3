//! Products of many rows: activations in panels, weights in blocks -> register tiles -> rows.
//!
//! Activations are packed once, with rows as lanes. A task owns some outputs of some rows: it brings a block of their weights
//! into the form that is multiplied, once for all these rows, and adds its product with every panel to sums that stay in the
//! cache. A few rows that would leave most of a vector empty stay rows, for dot products.
#![allow(unsafe_code)]

use half::bf16;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::super::simd::{Avx2, Avx512};
use super::{
    super::{
        Instructions, Level,
        simd::{Portable, Simd, for_simd, pair},
        stored::{Stored, widen_slice},
    },
    Layer,
    columns::Columns,
    factors::{Blocks, LINE, Panels, prefetch_line},
};

/// Outputs that a task computes: whole cache lines of any dtype, and a divisor of what widths usually are.
pub(super) const TASK_OUTPUTS: usize = 64;
/// Most rows of a task, whose sums stay in the second cache.
const TASK_ROWS: usize = 1392;
/// Fewest panels of a task, which pay for its copy of the weights.
const MIN_PANELS: usize = 2;
/// So many tasks for each thread keep all threads busy to the end.
const TASKS: usize = 4;
/// Terms of a row that are multiplied while a panel stays in the nearest cache.
pub(super) const BLOCK: usize = 256;
/// Up to so many rows that do not fill a vector are multiplied as rows.
const MAX_REST: usize = 4;

/// What a lane multiplies in one step: one f32, or two bf16.
pub(in super::super) trait Lane: Copy + Default + Send + Sync {
    /// Inputs of a lane.
    const INPUTS: usize;
    /// Adds to `sums`, `[outputs, stride]`, the products of some rows and of weights, `[outputs, BLOCK]`.
    ///
    /// # Panics
    /// If the slices are shorter than that.
    fn multiply_add(level: Level, rows: Rows<'_, Self>, weights: &[Self], sums: &mut [f32], stride: usize);
    /// `total` plus the products of what lies in the bits of the lanes.
    ///
    /// # Safety
    /// The CPU has the instructions that [`Lane::multiply_add`] chooses `S` for.
    unsafe fn step<S: Simd>(x: S, weight: S, total: S) -> S;
}

/// Inputs that a lane takes, and how they become one.
pub(super) trait Term<E>: Lane {
    /// The term with the first of some inputs; what is missing is zero.
    fn of(inputs: &[E]) -> Self;
    /// Terms of neighbouring inputs; what is missing in the last one is zero.
    fn fill(level: Level, terms: &mut [Self], inputs: &[E]);
}

impl Lane for f32 {
    const INPUTS: usize = 1;
    fn multiply_add(level: Level, rows: Rows<'_, Self>, weights: &[Self], sums: &mut [f32], stride: usize) {
        /// # Safety
        /// As [`blocks`].
        #[inline(always)]
        unsafe fn run<S: Simd>(rows: Rows<'_, f32>, weights: &[f32], sums: &mut [f32], stride: usize) {
            // SAFETY: the caller's condition.
            unsafe { blocks::<S, f32>(rows, weights, sums, stride) }
        }
        rows.check(level, weights, sums, stride);
        for_simd!(level, run::<>(rows: Rows<'_, f32>, weights: &[f32], sums: &mut [f32], stride: usize) where)
    }
    #[inline(always)]
    unsafe fn step<S: Simd>(x: S, weight: S, total: S) -> S {
        // SAFETY: the caller's condition.
        unsafe { x.mul_add(weight, total) }
    }
}

impl<E: Stored> Term<E> for f32 {
    #[inline(always)]
    fn of(inputs: &[E]) -> Self {
        inputs[0].widen()
    }
    fn fill(level: Level, terms: &mut [Self], inputs: &[E]) {
        widen_slice(level, inputs, terms);
    }
}

/// Two neighbouring inputs in bf16, the first in the low bits.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(super) struct Pair(u32);

impl Term<bf16> for Pair {
    #[inline(always)]
    fn of(inputs: &[bf16]) -> Self {
        Self(pair(inputs[0], inputs.get(1).copied().unwrap_or(bf16::ZERO)))
    }
    fn fill(_: Level, terms: &mut [Self], inputs: &[bf16]) {
        let (pairs, rest) = inputs.as_chunks::<2>();
        for (term, pair) in terms.iter_mut().zip(pairs) {
            *term = Self::of(pair);
        }
        if !rest.is_empty() {
            terms[pairs.len()] = Self::of(rest);
        }
    }
}

impl Lane for Pair {
    const INPUTS: usize = 2;
    fn multiply_add(level: Level, rows: Rows<'_, Self>, weights: &[Self], sums: &mut [f32], stride: usize) {
        rows.check(level, weights, sums, stride);
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2(rows: Rows<'_, Pair>, weights: &[Pair], sums: &mut [f32], stride: usize) {
            // SAFETY: this function has the instructions, and the slices have been checked.
            unsafe { blocks::<Avx2, Pair>(rows, weights, sums, stride) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
        fn avx512(rows: Rows<'_, Pair>, weights: &[Pair], sums: &mut [f32], stride: usize) {
            // SAFETY: as above.
            unsafe { blocks::<Avx512, Pair>(rows, weights, sums, stride) }
        }
        match level.instructions() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the CPU has just been asked.
            Instructions::Avx512 if level.multiplies_bf16() => unsafe { avx512(rows, weights, sums, stride) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a level has only instructions of this CPU.
            Instructions::Avx2 => unsafe { avx2(rows, weights, sums, stride) },
            // SAFETY: every CPU has what this needs.
            _ => unsafe { blocks::<Portable, Self>(rows, weights, sums, stride) },
        }
    }
    #[inline(always)]
    unsafe fn step<S: Simd>(x: S, weight: S, total: S) -> S {
        // SAFETY: the caller's condition.
        unsafe { x.add_pair_products(weight, total) }
    }
}

/// Some terms of some rows.
#[derive(Clone, Copy)]
pub(in super::super) enum Rows<'a, T> {
    /// Rows that are lanes.
    Panel {
        /// `[terms, width]`.
        values: &'a [T],
        /// Rows of a whole panel.
        width: usize,
        /// What is multiplied after it.
        next: &'a [T],
        /// Rows that are wanted of it.
        rows: usize,
    },
    /// Terms that are lanes.
    Rest {
        /// `[rows, stride]`, from the first term on.
        values: &'a [T],
        stride: usize,
        /// A whole number of vectors.
        terms: usize,
        rows: usize,
    },
}

impl<T> Rows<'_, T> {
    fn check(&self, level: Level, weights: &[T], sums: &[f32], to: usize) {
        let columns = match *self {
            Self::Panel { values, width, rows, .. } => {
                assert!(width == panel_width(level) && values.len().is_multiple_of(width) && rows <= width);
                assert!(values.len() / width <= BLOCK);
                width
            }
            Self::Rest { values, stride, terms, rows } => {
                assert!(terms.is_multiple_of(lanes(level)) && terms <= BLOCK && (1..=MAX_REST).contains(&rows));
                assert!(values.len() >= (rows - 1) * stride + terms);
                rows
            }
        };
        assert!(columns <= to && weights.len() == TASK_OUTPUTS * BLOCK);
        assert!(sums.len() >= (TASK_OUTPUTS - 1) * to + columns);
    }
}

/// Floats of a vector.
fn lanes(level: Level) -> usize {
    match level.instructions() {
        Instructions::Avx512 => 16,
        Instructions::Avx2 | Instructions::Portable => 8,
    }
}

/// Rows of a panel: those of a register tile, which is of 3 vectors of 16, or of 2 vectors of 8.
pub(super) fn panel_width(level: Level) -> usize {
    match level.instructions() {
        Instructions::Avx512 => 48,
        Instructions::Avx2 | Instructions::Portable => 16,
    }
}

/// `x Wᵀ + b`, stored as `Y`.
///
/// - `x`: `[rows, inputs]`
/// - `weight`: `[outputs, inputs]`
/// - returns: `[rows, outputs]`
pub(in super::super) fn tiles<T: Lane, Y: Stored>(
    layer: &Layer<'_>,
    x: &impl Panels<T>,
    weight: &impl Blocks<T>,
    level: Level,
) -> Vec<Y> {
    let &Layer { rows, inputs, outputs, bias } = layer;
    assert!(x.dims() == [rows, inputs] && weight.dims() == [outputs, inputs] && bias.len() == outputs);
    let (width, terms) = (panel_width(level), inputs.div_ceil(T::INPUTS));
    let rest = Some(rows % lanes(level)).filter(|&rest| rest <= MAX_REST && rest < rows).unwrap_or(0);
    let in_panels = rows - rest;
    let panels = x.panels(level, in_panels);
    let rest_stride = terms.next_multiple_of(lanes(level));
    let rest_values = x.rest(in_panels, rest_stride);
    let panel_count = in_panels.div_ceil(width);
    let blocks = outputs.div_ceil(TASK_OUTPUTS);
    let for_threads = (TASKS * rayon::current_num_threads()).div_ceil(blocks).min(panel_count / MIN_PANELS);
    let most = (panel_count / for_threads.max(1)).min(TASK_ROWS / width);
    let group = panel_count.div_ceil(panel_count.div_ceil(most));
    let groups = panel_count.div_ceil(group);
    let padded_rows = (group * width + rest).next_multiple_of(width);
    let mut y = Vec::<Y>::with_capacity(rows * outputs);
    let out = Columns::of(&mut y, [rows, outputs]);
    (0..blocks * groups).into_par_iter().for_each_init(
        || (vec![T::default(); TASK_OUTPUTS * BLOCK], vec![0.0; TASK_OUTPUTS * padded_rows]),
        |(block, sums), task| {
            let columns = task / groups * TASK_OUTPUTS..outputs.min((task / groups + 1) * TASK_OUTPUTS);
            let first = task % groups * group;
            let last = panel_count.min(first + group);
            sums.fill(0.0);
            for start in (0..terms).step_by(BLOCK) {
                let end = terms.min(start + BLOCK);
                weight.fill(level, columns.clone(), start..end, block);
                let (next, from) = if end < terms { (columns.clone(), end) } else { (columns.end..outputs, 0) };
                let next = next.start..next.end.min(next.start + TASK_OUTPUTS);
                for index in first..last {
                    weight.prefetch(next.clone(), from..terms.min(from + BLOCK), index - first, last - first);
                    let values = &panels[(index * terms + start) * width..(index * terms + end) * width];
                    let next = match index + 1 {
                        next if next < last => next * terms + start,
                        _ if end < terms => first * terms + end,
                        next => next % panel_count * terms,
                    };
                    let (next, rows) = (&panels[next * width..], (in_panels - index * width).min(width));
                    let rows = Rows::Panel { values, width, next, rows };
                    T::multiply_add(level, rows, block, &mut sums[(index - first) * width..], padded_rows);
                }
                if rest > 0 && last == panel_count {
                    let (values, stride) = (&rest_values[start..], rest_stride);
                    let rows = Rows::Rest { values, stride, terms: BLOCK.min(stride - start), rows: rest };
                    T::multiply_add(level, rows, block, &mut sums[in_panels - first * width..], padded_rows);
                }
            }
            let rows = first * width..if last == panel_count { rows } else { last * width };
            out.write(level, rows, columns.start, &bias[columns], sums, padded_rows);
        },
    );
    // SAFETY: the tasks cover all outputs of all rows, and each wrote its own.
    unsafe { y.set_len(rows * outputs) };
    y
}

/// See [`Lane::multiply_add`].
///
/// # Safety
/// The CPU has the instructions of `S` and `T`, and the slices are as [`Rows::check`] wants them.
#[inline(always)]
unsafe fn blocks<S: Simd, T: Lane>(rows: Rows<'_, T>, weights: &[T], sums: &mut [f32], stride: usize) {
    let (values, width, next, rows) = match rows {
        Rows::Panel { values, width, next, rows } => (values, width, next.as_ptr(), rows),
        Rows::Rest { values, stride: from, terms, rows } => {
            macro_rules! dots {
                ($($count:literal)*) => {
                    match rows {
                        // SAFETY: the caller's condition.
                        $($count => unsafe { dots::<S, T, $count>(values, from, terms, weights, sums, stride) },)*
                        _ => unreachable!("no more than {MAX_REST} rows"),
                    }
                };
            }
            return dots!(1 2 3 4);
        }
    };
    macro_rules! tiles {
        ($outputs:literal in $range:expr; $($vectors:literal)*) => {
            for output in $range.step_by($outputs) {
                match rows.div_ceil(S::LANES) {
                    // SAFETY: the caller's condition; `$outputs` divides the range, which is of a task's outputs.
                    $($vectors => unsafe {
                        tile::<S, T, $vectors, $outputs>(values, width, next, weights, sums, stride, output)
                    },)*
                    _ => unreachable!("no more vectors than a panel has"),
                }
            }
        };
    }
    // As many accumulators as the registers hold beside the operands: 24 of 32, or 12 of 16.
    if S::LANES == 16 {
        tiles!(8 in (0..TASK_OUTPUTS); 1 2 3);
    } else {
        const SIXES: usize = TASK_OUTPUTS / 6 * 6;
        tiles!(6 in (0..SIXES); 1 2);
        tiles!(4 in (SIXES..TASK_OUTPUTS); 1 2);
    }
}

/// `ROWS` rows, `stride` apart, times all rows of weights.
///
/// # Safety
/// As [`blocks`].
#[inline(always)]
unsafe fn dots<S: Simd, T: Lane, const ROWS: usize>(
    values: &[T],
    stride: usize,
    terms: usize,
    weights: &[T],
    sums: &mut [f32],
    to: usize,
) {
    let values = values.as_ptr().cast::<f32>();
    for (weights, sums) in weights.chunks(BLOCK).zip(sums.chunks_mut(to)) {
        let weights = weights.as_ptr().cast::<f32>();
        // SAFETY: terms have four bytes; reads of `values` stay below `(ROWS - 1) * stride + terms`, those of `weights`
        // below `terms`, which is a whole number of vectors and no more than `BLOCK`.
        let totals = unsafe {
            let mut totals = [S::zero(); ROWS];
            for term in (0..terms).step_by(S::LANES) {
                let weight = S::load(weights.add(term));
                for (row, total) in totals.iter_mut().enumerate() {
                    *total = T::step(S::load(values.add(row * stride + term)), weight, *total);
                }
            }
            totals
        };
        for (sum, total) in sums.iter_mut().zip(totals) {
            // SAFETY: the caller's condition.
            *sum += unsafe { total.sum() };
        }
    }
}

/// The first `VECTORS` vectors of rows times `OUTPUTS` rows of weights from `output` on. Meanwhile a share of what is
/// multiplied `next` comes near, and the sums of the next outputs.
///
/// # Safety
/// As [`blocks`], with `values` `[terms, width]`, `VECTORS * S::LANES <= width` and `output + OUTPUTS <= TASK_OUTPUTS`.
#[inline(always)]
unsafe fn tile<S: Simd, T: Lane, const VECTORS: usize, const OUTPUTS: usize>(
    values: &[T],
    width: usize,
    next: *const T,
    weights: &[T],
    sums: &mut [f32],
    stride: usize,
    output: usize,
) {
    /// Terms for each line of the next panel, which the tiles of a task bring near together.
    const TERMS_PER_LINE: usize = 8;
    // A panel of rows of 16 lanes fills the nearest cache alone: what came there too early would drive it out.
    let ahead = S::LANES < 16;
    let terms = values.len() / width;
    let next = next.wrapping_byte_add(output / OUTPUTS * terms.div_ceil(TERMS_PER_LINE) * LINE);
    // Whatever a term is, its bits travel in the lanes of floats.
    let values = values.as_ptr().cast::<f32>();
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
        if ahead {
            for output in OUTPUTS..2 * OUTPUTS {
                prefetch_line(sums.wrapping_add(output * stride));
            }
        }
        for term in 0..terms {
            if ahead && term.is_multiple_of(TERMS_PER_LINE) {
                prefetch_line(next.wrapping_byte_add(term / TERMS_PER_LINE * LINE));
            }
            let mut x = [S::zero(); VECTORS];
            for (vector, x) in x.iter_mut().enumerate() {
                *x = S::load(values.add(term * width + vector * S::LANES));
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
