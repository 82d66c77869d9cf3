//! Factors of a product, as stored or transposed -> panels that have rows as lanes, and blocks of weights.
#![allow(unsafe_code)]

use std::{mem::MaybeUninit, ops::Range};

use rayon::prelude::*;

use super::{
    super::{
        Level,
        simd::{Simd, for_simd},
    },
    tiles::{BLOCK, Term, panel_width},
};

/// Rows, and terms, that are transposed at once.
const SQUARE: usize = 8;
/// Bytes that come together.
pub(super) const LINE: usize = 64;

/// Rows of inputs, wherever they lie.
pub(in super::super) trait Factor: Sync {
    /// `[rows, inputs]`.
    fn dims(&self) -> [usize; 2];
}

/// A factor whose rows become lanes.
pub(in super::super) trait Panels<T>: Factor {
    /// The first rows, `[panels, terms, width]`; rows that are missing in the last panel repeat the last row.
    fn panels(&self, level: Level, rows: usize) -> Vec<T>;
    /// Rows from `first` on, `[rows, stride]`; what is missing is zero.
    fn rest(&self, first: usize, stride: usize) -> Vec<T>;
}

/// A factor that is multiplied block by block.
pub(in super::super) trait Blocks<T>: Factor {
    /// Writes some terms of some rows to a block, `[rows, BLOCK]`; what is missing in these rows of it is zero.
    fn fill(&self, level: Level, rows: Range<usize>, terms: Range<usize>, block: &mut [T]);
    /// Asks the CPU to bring a part of what will be filled near: `part` of `parts`.
    fn prefetch(&self, rows: Range<usize>, terms: Range<usize>, part: usize, parts: usize);
}

/// `[rows, inputs]`, as stored.
pub(in super::super) struct RowMajor<'a, E> {
    pub(in super::super) values: &'a [E],
    pub(in super::super) inputs: usize,
}

impl<E> RowMajor<'_, E> {
    /// What some terms of a row are made of.
    fn inputs_of<T: Term<E>>(&self, row: usize, terms: Range<usize>) -> &[E] {
        &self.values[row * self.inputs..][..self.inputs]
            [terms.start * T::INPUTS..self.inputs.min(terms.end * T::INPUTS)]
    }
}

impl<E: Sync> Factor for RowMajor<'_, E> {
    fn dims(&self) -> [usize; 2] {
        [self.values.len() / self.inputs, self.inputs]
    }
}

impl<T: Term<E>, E: Copy + Sync> Panels<T> for RowMajor<'_, E> {
    fn panels(&self, level: Level, rows: usize) -> Vec<T> {
        let (inputs, width) = (self.inputs, panel_width(level));
        let each = |(panel, rows): (&mut [MaybeUninit<T>], &[E])| {
            for_simd!(level, pack::<T, E>(rows: &[E], inputs: usize, width: usize, panel: &mut [MaybeUninit<T>])
                where T: Term<E>, E: Copy)
        };
        let panel = inputs.div_ceil(T::INPUTS) * width;
        let chunks = self.values[..rows * inputs].par_chunks(inputs * width);
        // SAFETY: there are as many panels as chunks of rows, and `pack` writes all of each.
        unsafe { collect(rows.div_ceil(width) * panel, |all| all.par_chunks_mut(panel).zip(chunks).for_each(each)) }
    }

    fn rest(&self, first: usize, stride: usize) -> Vec<T> {
        let rows = self.values[first * self.inputs..].chunks(self.inputs);
        let mut rest = vec![T::default(); rows.len() * stride];
        for (terms, row) in rest.chunks_mut(stride).zip(rows) {
            for (term, inputs) in terms.iter_mut().zip(row.chunks(T::INPUTS)) {
                *term = T::of(inputs);
            }
        }
        rest
    }
}

impl<T: Term<E>, E: Sync> Blocks<T> for RowMajor<'_, E> {
    fn fill(&self, level: Level, rows: Range<usize>, terms: Range<usize>, block: &mut [T]) {
        for (to, row) in block.chunks_mut(BLOCK).zip(rows) {
            T::fill(level, to, self.inputs_of::<T>(row, terms.clone()));
            to[terms.len()..].fill(T::default());
        }
    }

    fn prefetch(&self, rows: Range<usize>, terms: Range<usize>, part: usize, parts: usize) {
        for row in share(rows, part, parts) {
            prefetch(self.inputs_of::<T>(row, terms.clone()));
        }
    }
}

/// `[inputs, rows]` as stored: a factor that is transposed.
#[cfg(any(test, feature = "autodiff"))]
pub(in super::super) struct ColumnMajor<'a> {
    pub(in super::super) values: &'a [f32],
    pub(in super::super) rows: usize,
}

#[cfg(any(test, feature = "autodiff"))]
impl Factor for ColumnMajor<'_> {
    fn dims(&self) -> [usize; 2] {
        [self.rows, self.values.len() / self.rows]
    }
}

#[cfg(any(test, feature = "autodiff"))]
impl Panels<f32> for ColumnMajor<'_> {
    fn panels(&self, level: Level, rows: usize) -> Vec<f32> {
        /// Panels that are made of the same part of what is stored.
        const TOGETHER: usize = 4;
        let ([stride, inputs], width) = (self.dims(), panel_width(level));
        let each = |(group, panels): (usize, &mut [MaybeUninit<f32>])| {
            for (term, values) in self.values.chunks_exact(stride).enumerate() {
                let values = &values[group * TOGETHER * width..rows];
                for (panel, values) in panels.chunks_mut(inputs * width).zip(values.chunks(width)) {
                    let (to, missing) = panel[term * width..][..width].split_at_mut(values.len());
                    to.write_copy_of_slice(values);
                    missing.fill(MaybeUninit::new(values[values.len() - 1]));
                }
            }
        };
        let len = rows.div_ceil(width) * inputs * width;
        // SAFETY: each group writes every term of its panels.
        unsafe { collect(len, |all| all.par_chunks_mut(TOGETHER * inputs * width).enumerate().for_each(each)) }
    }

    fn rest(&self, first: usize, stride: usize) -> Vec<f32> {
        let mut rest = vec![0.0; (self.rows - first) * stride];
        for (term, values) in self.values.chunks_exact(self.rows).enumerate() {
            for (row, value) in values[first..].iter().enumerate() {
                rest[row * stride + term] = *value;
            }
        }
        rest
    }
}

#[cfg(any(test, feature = "autodiff"))]
impl Blocks<f32> for ColumnMajor<'_> {
    fn fill(&self, level: Level, rows: Range<usize>, terms: Range<usize>, block: &mut [f32]) {
        let (values, stride) = (&self.values[terms.start * self.rows + rows.start..], self.rows);
        let dims = [rows.len(), terms.len()];
        for_simd!(level, turn::<>(values: &[f32], stride: usize, dims: [usize; 2], block: &mut [f32]) where);
        for to in block.chunks_mut(BLOCK).take(rows.len()) {
            to[terms.len()..].fill(0.0);
        }
    }

    fn prefetch(&self, rows: Range<usize>, terms: Range<usize>, part: usize, parts: usize) {
        for term in share(terms, part, parts) {
            prefetch(&self.values[term * self.rows..][rows.clone()]);
        }
    }
}

/// A vector of `len` elements that `write` writes.
///
/// # Safety
/// `write` writes all of them.
unsafe fn collect<T>(len: usize, write: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut all = Vec::with_capacity(len);
    write(&mut all.spare_capacity_mut()[..len]);
    // SAFETY: the caller's condition.
    unsafe { all.set_len(len) };
    all
}

/// Writes all of a panel, `[terms, width]`, of rows.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn pack<S: Simd, T: Term<E>, E: Copy>(rows: &[E], inputs: usize, width: usize, panel: &mut [MaybeUninit<T>]) {
    /// Terms of a row that are taken before those of the next: of a cache line.
    const STEP: usize = 2 * SQUARE;
    const { assert!(size_of::<T>() == size_of::<f32>() && size_of::<E>() * T::INPUTS == size_of::<f32>()) };
    let last = rows.len() / inputs - 1;
    let row = |row: usize| &rows[row.min(last) * inputs..][..inputs];
    assert!(panel.len() == inputs.div_ceil(T::INPUTS) * width && width.is_multiple_of(SQUARE));
    // Those whose inputs are all there.
    let whole = inputs / T::INPUTS / SQUARE * SQUARE;
    for step in (0..whole).step_by(STEP) {
        for first in (0..width).step_by(SQUARE) {
            let from: [*const f32; SQUARE] = std::array::from_fn(|i| row(first + i).as_ptr().cast());
            for term in (step..whole.min(step + STEP)).step_by(SQUARE) {
                let to = &mut panel[term * width + first..][..(SQUARE - 1) * width + SQUARE];
                // SAFETY: the caller's condition. A term has the bits of its inputs in the four bytes of an f32; each row
                // has eight of them from `term` on, and `to` ends with the eighth column.
                unsafe { S::transpose_8x8(from.map(|row| row.add(term)), to.as_mut_ptr().cast(), width) };
            }
        }
    }
    for (term, lanes) in panel.chunks_exact_mut(width).enumerate().skip(whole) {
        for (i, lane) in lanes.iter_mut().enumerate() {
            lane.write(T::of(&row(i)[term * T::INPUTS..]));
        }
    }
}

/// Writes columns, `[terms, rows]` with terms `stride` apart, to the rows of a block.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[cfg(any(test, feature = "autodiff"))]
#[inline(always)]
unsafe fn turn<S: Simd>(values: &[f32], stride: usize, [rows, terms]: [usize; 2], block: &mut [f32]) {
    assert!(terms <= BLOCK && block.len() >= rows * BLOCK);
    let [whole_rows, whole_terms] = [rows, terms].map(|all| all / SQUARE * SQUARE);
    for term in (0..whole_terms).step_by(SQUARE) {
        let lines: [&[f32]; SQUARE] = std::array::from_fn(|i| &values[(term + i) * stride..][..rows]);
        for row in (0..whole_rows).step_by(SQUARE) {
            let to = &mut block[row * BLOCK + term..][..(SQUARE - 1) * BLOCK + SQUARE];
            // SAFETY: the caller's condition; each line has eight rows from `row` on, and `to` ends with the eighth column.
            unsafe { S::transpose_8x8(lines.map(|line| line.as_ptr().add(row)), to.as_mut_ptr(), BLOCK) };
        }
    }
    for term in 0..terms {
        let first = if term < whole_terms { whole_rows } else { 0 };
        for row in first..rows {
            block[row * BLOCK + term] = values[term * stride + row];
        }
    }
}

/// A part of a range.
fn share(all: Range<usize>, part: usize, parts: usize) -> Range<usize> {
    let bound = |part| all.start + all.len() * part / parts;
    bound(part)..bound(part + 1)
}

/// Asks the CPU to bring the line of an address into the nearest cache.
#[inline(always)]
pub(super) fn prefetch_line<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every CPU of the target has the instruction, which may be given any address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks the CPU to bring values into the second cache.
fn prefetch<E>(values: &[E]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(LINE / size_of::<E>()) {
        // SAFETY: every CPU of the target has the instruction, which may be given any address.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}
