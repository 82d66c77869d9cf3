//! Rows of activations -> panels that have rows as lanes.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::{
    super::{
        Level,
        simd::{Simd, for_simd},
    },
    tiles::{Term, panel_width},
};

/// Panels of rows, `[panels, terms, width]`; rows that are missing in the last one repeat the last row.
pub(super) fn pack<T: Term<X, W>, X: Copy + Sync, W>(level: Level, x: &[X], inputs: usize) -> Vec<T> {
    let (width, terms) = (panel_width(level), inputs.div_ceil(T::INPUTS));
    let len = (x.len() / inputs).div_ceil(width) * terms * width;
    let mut panels = Vec::<T>::with_capacity(len);
    let spare = panels.spare_capacity_mut()[..len].par_chunks_mut(terms * width);
    spare.zip(x.par_chunks(inputs * width)).for_each(|(panel, rows)| {
        for_simd!(level, pack_panel::<T, X, W>(rows: &[X], inputs: usize, width: usize, panel: &mut [MaybeUninit<T>])
            where T: Term<X, W>, X: Copy, W)
    });
    // SAFETY: there are as many panels as chunks of rows, and each was written in full.
    unsafe { panels.set_len(len) };
    panels
}

/// Writes all of a panel, `[terms, width]`.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn pack_panel<S: Simd, T: Term<X, W>, X: Copy, W>(
    rows: &[X],
    inputs: usize,
    width: usize,
    panel: &mut [MaybeUninit<T>],
) {
    /// Rows, and terms, that are turned at once.
    const SQUARE: usize = 8;
    /// Terms of a row that are taken before those of the next: of a cache line.
    const STEP: usize = 2 * SQUARE;
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

/// Terms of rows that are not packed, `[rows, stride]`; what is missing is zero.
pub(super) fn pack_rest<T: Term<X, W>, X: Copy, W>(x: &[X], inputs: usize, stride: usize) -> Vec<T> {
    let mut rest = vec![T::default(); x.len() / inputs * stride];
    for (terms, row) in rest.chunks_mut(stride).zip(x.chunks(inputs)) {
        for (term, inputs) in terms.iter_mut().zip(row.chunks(T::INPUTS)) {
            *term = T::of(inputs);
        }
    }
    rest
}

/// Bytes that come together.
pub(super) const LINE: usize = 64;

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

/// Asks the CPU to bring values near.
pub(super) fn prefetch<W>(values: &[W]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(LINE / size_of::<W>()) {
        // SAFETY: every CPU of the target has the instruction, which may be given any address.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}
