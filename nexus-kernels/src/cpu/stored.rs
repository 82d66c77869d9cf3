//! Floats as tensors store them: bf16, f16 and f32 slices -> f32 slices, and back.
#![allow(unsafe_code)]

use std::{cell::Cell, mem::MaybeUninit};

use burn::tensor::Element;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::{
    Level,
    level::with_level,
    simd::{Simd, for_simd},
};

/// Values that a thread converts at a time.
const CHUNK: usize = 32 * 1024;

thread_local! {
    /// What [`Stored::in_f32`] widens into.
    static WIDE: Cell<Vec<f32>> = const { Cell::new(vec![]) };
}

/// A float that tensors store.
pub(crate) trait Stored: Element + bytemuck::Pod + Default + Send + Sync {
    /// Reads and widens lanes.
    ///
    /// # Safety
    /// As for [`Simd::load`].
    unsafe fn load<S: Simd>(from: *const Self) -> S;
    /// The value.
    fn widen(self) -> f32;
    /// Rounds to the nearest, ties to even.
    fn narrow_slice(level: Level, from: &[f32], to: &mut [Self]);

    /// [`narrow()`] of values that nobody else needs.
    fn narrow(values: Vec<f32>) -> Vec<Self> {
        narrow(&values)
    }

    /// Lets a function change values as f32.
    fn in_f32(level: Level, values: &mut [Self], function: impl FnOnce(&mut [f32])) {
        // Taken, not borrowed: whatever the function does, nobody else has this memory.
        let mut wide = WIDE.take();
        wide.resize(wide.len().max(values.len()), 0.0);
        widen_slice(level, values, &mut wide);
        function(&mut wide[..values.len()]);
        Self::narrow_slice(level, &wide[..values.len()], values);
        WIDE.set(wide);
    }
}

impl Stored for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S {
        // SAFETY: the caller's contract.
        unsafe { S::load(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    fn narrow_slice(_: Level, from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
    fn narrow(values: Vec<f32>) -> Vec<Self> {
        values
    }
    fn in_f32(_: Level, values: &mut [Self], function: impl FnOnce(&mut [f32])) {
        function(values);
    }
}

impl Stored for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S {
        // SAFETY: the caller's contract.
        unsafe { S::load_bf16(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow_slice(level: Level, from: &[f32], to: &mut [Self]) {
        with_level!(
            level,
            fn run(from: &[f32], to: &mut [bf16]) {
                for (to, from) in to.iter_mut().zip(from) {
                    let bits = from.to_bits();
                    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
                    // NaN stays NaN, quiet, whatever its low bits are.
                    let bits = if from.is_nan() { bits | 0x0040_0000 } else { rounded };
                    *to = bf16::from_bits((bits >> 16) as u16);
                }
            }
        );
    }
}

impl Stored for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S {
        // SAFETY: the caller's contract.
        unsafe { S::load_f16(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow_slice(_: Level, from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

/// The values rounded to what is stored, by all threads if there are many.
pub(crate) fn narrow<E: Stored>(values: &[f32]) -> Vec<E> {
    let level = Level::detect();
    converted(values, |from, to| E::narrow_slice(level, from, to))
}

/// The values as f32, by all threads if there are many.
pub(crate) fn widen<E: Stored>(values: &[E]) -> Vec<f32> {
    let level = Level::detect();
    converted(values, |from, to| widen_slice(level, from, to))
}

/// What `convert` makes of the values, in memory that is not cleared before.
fn converted<X: Sync, Y: Copy + Default + Send>(values: &[X], convert: impl Fn(&[X], &mut [Y]) + Sync) -> Vec<Y> {
    /// Values that are converted in the nearest cache.
    const NEAR: usize = 1024;
    let mut all = Vec::<Y>::with_capacity(values.len());
    let each = |(to, from): (&mut [MaybeUninit<Y>], &[X])| {
        let mut near = [Y::default(); NEAR];
        for (to, from) in to.chunks_mut(NEAR).zip(from.chunks(NEAR)) {
            convert(from, &mut near[..from.len()]);
            to.write_copy_of_slice(&near[..from.len()]);
        }
    };
    let spare = &mut all.spare_capacity_mut()[..values.len()];
    if values.len() <= CHUNK {
        each((spare, values));
    } else {
        spare.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(each);
    }
    // SAFETY: as many chunks of the same lengths were converted, and each was written in full.
    unsafe { all.set_len(values.len()) };
    all
}

/// Widens as many values as are stored.
///
/// # Panics
/// If `wide` is shorter than `stored`.
pub(crate) fn widen_slice<E: Stored>(level: Level, stored: &[E], wide: &mut [f32]) {
    assert!(stored.len() <= wide.len());
    for_simd!(level, widen_with::<E>(stored: &[E], wide: &mut [f32]) where E: Stored)
}

/// # Safety
/// The CPU has the instructions of `S`, and `wide` is no shorter than `stored`.
#[inline(always)]
unsafe fn widen_with<S: Simd, E: Stored>(stored: &[E], wide: &mut [f32]) {
    let whole = stored.len() - stored.len() % S::LANES;
    for index in (0..whole).step_by(S::LANES) {
        // SAFETY: reads and writes end at or before `whole`, which is inside of both slices.
        unsafe { E::load::<S>(stored.as_ptr().add(index)).store(wide.as_mut_ptr().add(index)) };
    }
    for (wide, stored) in wide[whole..].iter_mut().zip(&stored[whole..]) {
        *wide = stored.widen();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of all sizes, with ties between neighbours in bf16, and what is no number.
    fn numbers() -> Vec<f32> {
        let special = [0.0, -0.0, 1e-40, 1e-45, 65504.0, 65520.0, 3.4e38, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        let bits = (0..40_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9) & 0xffff_8000));
        special.into_iter().chain([f32::from_bits(0x7f80_0001), f32::from_bits(0xff80_ffff)]).chain(bits).collect()
    }

    fn check<E: Stored + PartialEq>(convert: impl Fn(f32) -> E, back: impl Fn(E) -> f32) {
        let numbers = numbers();
        for level in Level::available() {
            for len in [0, 1, 15, 17, numbers.len()] {
                let numbers = &numbers[..len];
                let mut stored = vec![E::default(); len];
                E::narrow_slice(level, numbers, &mut stored);
                let mut wide = vec![7.0; len + 1];
                widen_slice(level, &stored, &mut wide);
                assert_eq!(wide[len], 7.0);
                for ((number, stored), wide) in numbers.iter().zip(&stored).zip(&wide) {
                    let expected = convert(*number);
                    let same = *stored == expected || number.is_nan() && back(*stored).is_nan();
                    assert!(same, "{level:?}: {number:e} is {stored:?}, not {expected:?}");
                    assert!(back(*stored).to_bits() == wide.to_bits() || number.is_nan() && wide.is_nan());
                }
            }
        }
    }

    #[test]
    fn numbers_are_rounded_and_widened_as_half_does_it() {
        check(bf16::from_f32, bf16::to_f32);
        check(f16::from_f32, f16::to_f32);
        check(|number| number, |number| number);
    }

    #[test]
    fn all_threads_convert_what_one_does() {
        let numbers: Vec<f32> = numbers().into_iter().filter(|number| !number.is_nan()).cycle().take(100_001).collect();
        let stored = bf16::narrow(numbers.clone());
        assert!(numbers.iter().zip(&stored).all(|(number, stored)| *stored == bf16::from_f32(*number)));
        assert_eq!(widen(&stored), stored.iter().map(|stored| stored.to_f32()).collect::<Vec<_>>());
    }

    #[test]
    fn a_function_changes_values_as_f32_also_inside_of_another() {
        let mut outer = [bf16::from_f32(1.5); 40];
        bf16::in_f32(Level::detect(), &mut outer, |wide| {
            assert_eq!(wide, [1.5; 40]);
            let mut inner = [f16::from_f32(2.0); 3];
            f16::in_f32(Level::detect(), &mut inner, |wide| wide.fill(3.0));
            assert_eq!(inner, [f16::from_f32(3.0); 3]);
            wide.fill(4.0);
        });
        assert_eq!(outer, [bf16::from_f32(4.0); 40]);
    }
}
