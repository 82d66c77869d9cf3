//! Floats in lanes of 32 bits: one f32, or two bf16 that are multiplied as such.
#![allow(unsafe_code)]

use half::bf16;

use super::{
    simd::{Simd, pair},
    stored::Stored,
};

/// A float of which lanes of 32 bits hold one or two, and what a lane does with them.
pub(super) trait Packed: Stored {
    /// Values of a lane.
    const PER_LANE: usize;
    /// `total` plus the products of what lies in the lanes.
    ///
    /// # Safety
    /// As for [`Simd::mul_add`], or for [`Simd::add_pair_products`] if a lane holds two values.
    unsafe fn multiply_add<S: Simd>(x: S, y: S, total: S) -> S;
    /// Lanes of values that are neighbours in a row.
    fn pack(row: &[Self], lanes: &mut [f32]);
    /// Lanes of values of two rows in the same column, where a lane holds two; a missing second row is zero.
    fn interleave(first: &[Self], second: &[Self], lanes: &mut [f32]);
    /// Makes lanes of values, in place, so that they fill the beginning; the values are whole vectors.
    ///
    /// # Safety
    /// As for [`Simd::store_bf16`] if a lane holds two values.
    unsafe fn round<S: Simd>(values: &mut [f32]);
}

impl Packed for f32 {
    const PER_LANE: usize = 1;
    #[inline(always)]
    unsafe fn multiply_add<S: Simd>(x: S, y: S, total: S) -> S {
        // SAFETY: the caller's condition.
        unsafe { x.mul_add(y, total) }
    }
    #[inline(always)]
    fn pack(row: &[Self], lanes: &mut [f32]) {
        lanes.copy_from_slice(row);
    }
    #[inline(always)]
    fn interleave(first: &[Self], _: &[Self], lanes: &mut [f32]) {
        lanes.copy_from_slice(first);
    }
    #[inline(always)]
    unsafe fn round<S: Simd>(_: &mut [f32]) {}
}

impl Packed for bf16 {
    const PER_LANE: usize = 2;
    #[inline(always)]
    unsafe fn multiply_add<S: Simd>(x: S, y: S, total: S) -> S {
        // SAFETY: the caller's condition.
        unsafe { x.add_pair_products(y, total) }
    }
    #[inline(always)]
    fn pack(row: &[Self], lanes: &mut [f32]) {
        for (lane, two) in lanes.iter_mut().zip(row.as_chunks::<2>().0) {
            *lane = f32::from_bits(pair(two[0], two[1]));
        }
    }
    #[inline(always)]
    fn interleave(first: &[Self], second: &[Self], lanes: &mut [f32]) {
        if second.is_empty() {
            for (lane, &first) in lanes.iter_mut().zip(first) {
                *lane = f32::from_bits(pair(first, Self::ZERO));
            }
        }
        for ((lane, &first), &second) in lanes.iter_mut().zip(first).zip(second) {
            *lane = f32::from_bits(pair(first, second));
        }
    }
    #[inline(always)]
    unsafe fn round<S: Simd>(values: &mut [f32]) {
        let from = values.as_mut_ptr();
        for start in (0..values.len()).step_by(S::LANES) {
            // SAFETY: the caller's condition; what is written ends where it was read, or before.
            unsafe { S::load(from.add(start)).store_bf16(from.cast::<Self>().add(start)) };
        }
    }
}
