//! Products of matrices that lie in the cache: left rows with any strides, right rows of whole vectors -> sums.
//!
//! Inner elements are lanes, which hold what a [`Packed`] float says, in the bits of an f32.
#![allow(unsafe_code)]

use super::{packed::Packed, simd::Simd};

/// Rows of sums that are computed together.
const ROWS: usize = 6;

/// The left matrix; element `(row, inner)` is at `row * strides[0] + inner * strides[1]`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) strides: [usize; 2],
}

/// The right matrix; its rows are `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) stride: usize,
}

/// Adds the product of `left`, `[m, k]`, and `right`, `[k, n]`, to `sums`, `[m, n]` with rows `stride` apart.
///
/// `C` is how many vectors of columns are computed together; `n` is whole vectors.
///
/// # Safety
/// The CPU has the instructions of `S`, and what [`Packed::multiply_add`] asks for.
#[inline(always)]
pub(crate) unsafe fn multiply_add<S: Simd, E: Packed, const C: usize>(
    [m, n, k]: [usize; 3],
    left: Left<'_>,
    right: Right<'_>,
    sums: &mut [f32],
    stride: usize,
) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(n.is_multiple_of(S::LANES));
    assert!((m - 1) * left.strides[0] + (k - 1) * left.strides[1] < left.values.len());
    assert!((k - 1) * right.stride + n <= right.values.len() && (m - 1) * stride + n <= sums.len());
    let mut column = 0;
    while column < n {
        let vectors = ((n - column) / S::LANES).min(C);
        for row in (0..m).step_by(ROWS) {
            macro_rules! tiles {
                ($vectors:literal: $($rows:literal)*) => {
                    match (m - row).min(ROWS) {
                        $($rows => panel::<S, E, $vectors, $rows>([row, column, k], left, right, sums, stride),)*
                        _ => unreachable!("between one and {ROWS} rows"),
                    }
                };
            }
            // SAFETY: the asserts above, for rows below `m`, columns below `n` and inner elements below `k`.
            unsafe {
                match vectors {
                    4 => tiles!(4: 1 2 3 4 5 6),
                    2 | 3 => tiles!(2: 1 2 3 4 5 6),
                    _ => tiles!(1: 1 2 3 4 5 6),
                }
            }
        }
        column += S::LANES * if vectors == 3 { 2 } else { vectors };
    }
}

/// One register tile of `R` rows and `C` vectors from `(row, column)` on.
///
/// # Safety
/// As [`multiply_add`], and the tile is inside of the matrices.
#[inline(always)]
unsafe fn panel<S: Simd, E: Packed, const C: usize, const R: usize>(
    [row, column, k]: [usize; 3],
    left: Left<'_>,
    right: Right<'_>,
    sums: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's condition.
    unsafe {
        let sums = sums.as_mut_ptr().add(row * stride + column);
        let mut a = left.values.as_ptr().add(row * left.strides[0]);
        let mut b = right.values.as_ptr().add(column);
        let mut totals = [[S::zero(); C]; R];
        for (i, totals) in totals.iter_mut().enumerate() {
            for (j, total) in totals.iter_mut().enumerate() {
                *total = S::load(sums.add(i * stride + j * S::LANES));
            }
        }
        for _ in 0..k {
            let mut lanes = [S::zero(); C];
            for (j, lanes) in lanes.iter_mut().enumerate() {
                *lanes = S::load(b.add(j * S::LANES));
            }
            for (i, totals) in totals.iter_mut().enumerate() {
                let factor = S::splat(*a.add(i * left.strides[0]));
                for (total, lanes) in totals.iter_mut().zip(lanes) {
                    *total = E::multiply_add(factor, lanes, *total);
                }
            }
            a = a.wrapping_add(left.strides[1]);
            b = b.wrapping_add(right.stride);
        }
        for (i, totals) in totals.iter().enumerate() {
            for (j, total) in totals.iter().enumerate() {
                total.store(sums.add(i * stride + j * S::LANES));
            }
        }
    }
}
