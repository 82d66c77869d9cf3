//! Vectors of f32 for kernels that auto-vectorisation does not serve: one trait, one implementation per level.
#![allow(unsafe_code)]

use half::{bf16, f16};

/// A vector of f32 lanes.
///
/// The methods compile to single instructions when they are inlined into a function with the level's target features;
/// elsewhere they are slow but right.
///
/// # Safety
/// Callers of any method guarantee that the CPU has the instructions of the level, and that `LANES` elements may be read
/// from, or written to, the pointer.
pub(crate) trait Simd: Copy {
    /// Number of lanes.
    const LANES: usize;
    /// All lanes zero.
    unsafe fn zero() -> Self;
    /// All lanes `value`.
    unsafe fn splat(value: f32) -> Self;
    /// Reads lanes, unaligned.
    unsafe fn load(from: *const f32) -> Self;
    /// Reads lanes and widens them.
    unsafe fn load_bf16(from: *const bf16) -> Self;
    /// Reads lanes and widens them.
    unsafe fn load_f16(from: *const f16) -> Self;
    /// Writes lanes, unaligned.
    unsafe fn store(self, to: *mut f32);
    /// `self * factor + addend`.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Lane-wise sum.
    unsafe fn add(self, other: Self) -> Self;
    /// Lane-wise difference.
    unsafe fn sub(self, other: Self) -> Self;
    /// Lane-wise product.
    unsafe fn mul(self, other: Self) -> Self;
    /// Lane-wise maximum; `other` where either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// The lowest nine bits of each lane as sign and exponent of a float without fraction.
    unsafe fn low_bits_as_exponent(self) -> Self;
    /// `addend` plus both products of the pairs of bf16 that the lanes of `self` and `factors` hold.
    ///
    /// # Safety
    /// As for the trait; for [`Avx512`] the CPU also has AVX512_BF16.
    unsafe fn add_pair_products(self, factors: Self, addend: Self) -> Self;

    /// Rounds lanes to bf16 and writes them, unaligned.
    ///
    /// # Safety
    /// As for the trait; for [`Avx512`] the CPU also has AVX512_BF16.
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16) {
        let mut lanes = [0.0; 16];
        // SAFETY: no level has more than 16 lanes; the caller vouches for the pointer.
        unsafe {
            self.store(lanes.as_mut_ptr());
            for (lane, value) in lanes.iter().enumerate().take(Self::LANES) {
                to.add(lane).write_unaligned(bf16::from_f32(*value));
            }
        }
    }

    /// Lanes rounded to bf16 as pairs with those of `second`.
    ///
    /// # Safety
    /// As for the trait; for [`Avx512`] the CPU also has AVX512_BF16.
    #[cfg(feature = "autodiff")]
    #[inline(always)]
    unsafe fn paired(self, second: Self) -> Self {
        let mut lanes = [[0.0; 16]; 2];
        // SAFETY: no level has more than 16 lanes.
        unsafe {
            self.store(lanes[0].as_mut_ptr());
            second.store(lanes[1].as_mut_ptr());
            let [first, second] = lanes.map(|lanes| lanes.map(bf16::from_f32));
            let pairs: [f32; 16] = std::array::from_fn(|lane| f32::from_bits(pair(first[lane], second[lane])));
            Self::load(pairs.as_ptr())
        }
    }

    /// Writes eight rows of eight elements, unaligned, as columns, which begin `stride` elements apart.
    ///
    /// # Safety
    /// As for the trait, with eight elements behind each pointer and at each column.
    #[inline(always)]
    unsafe fn transpose_8x8(rows: [*const f32; 8], to: *mut f32, stride: usize) {
        for (lane, row) in rows.into_iter().enumerate() {
            for column in 0..8 {
                // SAFETY: the caller's condition.
                unsafe { to.add(column * stride + lane).write_unaligned(row.add(column).read_unaligned()) };
            }
        }
    }

    /// Sum of all lanes, always in the same order.
    ///
    /// # Safety
    /// As for the trait.
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut lanes = [0.0; 16];
        // SAFETY: no level has more than 16 lanes.
        unsafe { self.store(lanes.as_mut_ptr()) };
        let mut width = Self::LANES;
        while width > 1 {
            width /= 2;
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }

    /// Largest of all lanes that are not NaN, or negative infinity.
    ///
    /// # Safety
    /// As for the trait.
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 16];
        // SAFETY: no level has more than 16 lanes.
        unsafe { self.max(Self::splat(f32::NEG_INFINITY)).store(lanes.as_mut_ptr()) };
        let mut width = Self::LANES;
        while width > 1 {
            width /= 2;
            for lane in 0..width {
                lanes[lane] = if lanes[lane] > lanes[lane + width] { lanes[lane] } else { lanes[lane + width] };
            }
        }
        lanes[0]
    }
}

/// What a lane holds for [`Simd::add_pair_products`]: two bf16, the first in the low bits.
#[inline(always)]
pub(crate) fn pair(first: bf16, second: bf16) -> u32 {
    u32::from(second.to_bits()) << 16 | u32::from(first.to_bits())
}

/// `2^x` for `x` that is not positive; zero below -127, NaN for NaN.
///
/// # Safety
/// The CPU has the instructions of `S`.
///
/// Source: Cephes (single/exp2f.c), the polynomial.
#[inline(always)]
pub(crate) unsafe fn exp2<S: Simd>(x: S) -> S {
    /// Added to `n`, this leaves `n + 127` in the lowest bits.
    const MAGIC: f32 = 12_582_912.0 + 127.0;
    const POLYNOMIAL: [f32; 6] = [1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_7e-1, 6.931_472e-1, 1.0];
    // SAFETY: the caller's condition.
    unsafe {
        let x = S::splat(-127.0).max(x);
        let shifted = x.add(S::splat(MAGIC));
        let fraction = x.sub(shifted.sub(S::splat(MAGIC)));
        let mut value = S::splat(1.535_336_2e-4);
        for coefficient in POLYNOMIAL {
            value = value.mul_add(fraction, S::splat(coefficient));
        }
        value.mul(shifted.low_bits_as_exponent())
    }
}

/// Eight lanes that any CPU can do.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

impl Simd for Portable {
    const LANES: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; 8])
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for eight elements.
        Self(std::array::from_fn(|lane| unsafe { from.add(lane).read_unaligned() }))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: as in `load`.
        Self(std::array::from_fn(|lane| unsafe { from.add(lane).read_unaligned().to_f32() }))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: as in `load`.
        Self(std::array::from_fn(|lane| unsafe { from.add(lane).read_unaligned().to_f32() }))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        for (lane, value) in self.0.into_iter().enumerate() {
            // SAFETY: the caller vouches for eight elements.
            unsafe { to.add(lane).write_unaligned(value) };
        }
    }
    // Not fused: without the instruction, `f32::mul_add` is a function call.
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] * factor.0[lane] + addend.0[lane]))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] - other.0[lane]))
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] * other.0[lane]))
    }
    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| if self.0[lane] > other.0[lane] { self.0[lane] } else { other.0[lane] }))
    }
    #[inline(always)]
    unsafe fn low_bits_as_exponent(self) -> Self {
        Self(self.0.map(|lane| f32::from_bits(lane.to_bits() << 23)))
    }
    #[inline(always)]
    unsafe fn add_pair_products(self, factors: Self, addend: Self) -> Self {
        let first = |lane: f32| f32::from_bits(lane.to_bits() << 16);
        let second = |lane: f32| f32::from_bits(lane.to_bits() & 0xffff_0000);
        Self(std::array::from_fn(|lane| {
            let (x, y) = (self.0[lane], factors.0[lane]);
            addend.0[lane] + second(x) * second(y) + first(x) * first(y)
        }))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

/// Calls a function for the vectors of a level, compiled with its instructions.
///
/// `for_simd!(level, name::<G>(arg: Type, ..) -> Out where G: Bound)` calls `name::<Vectors, G>(arg, ..)`.
macro_rules! for_simd {
    ($level:expr, $name:ident::<$($generic:ident),*>($($arg:ident: $ty:ty),*) $(-> $out:ty)? where $($bound:tt)*) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<$($bound)*>($($arg: $ty),*) $(-> $out)? {
            // SAFETY: this function has the instructions, and the caller has checked the arguments.
            unsafe { $name::<$crate::cpu::simd::Avx2, $($generic),*>($($arg),*) }
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<$($bound)*>($($arg: $ty),*) $(-> $out)? {
            // SAFETY: as above.
            unsafe { $name::<$crate::cpu::simd::Avx512, $($generic),*>($($arg),*) }
        }
        let level: $crate::cpu::Level = $level;
        match level.instructions() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a level has only instructions of this CPU.
            $crate::cpu::Instructions::Avx512 => unsafe { avx512::<$($generic),*>($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            $crate::cpu::Instructions::Avx2 => unsafe { avx2::<$($generic),*>($($arg),*) },
            // SAFETY: every CPU has what this needs.
            _ => unsafe { $name::<$crate::cpu::simd::Portable, $($generic),*>($($arg),*) },
        }
    }};
}
pub(crate) use for_simd;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Simd, bf16, f16};

    /// Eight lanes of AVX2.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256);

    /// Sixteen lanes of AVX-512.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    // SAFETY of every method below: the contract of the trait is that of the instruction.
    impl Simd for Avx2 {
        const LANES: usize = 8;
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm256_setzero_ps()) }
        }
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm256_set1_ps(value)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm256_loadu_ps(from)) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: the contract of this function.
            unsafe {
                let halves = _mm_loadu_si128(from.cast());
                Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves))))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm256_cvtph_ps(_mm_loadu_si128(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the contract of this function.
            unsafe { _mm256_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm256_fmadd_ps(self.0, factor.0, addend.0)) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm256_add_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm256_sub_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm256_mul_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm256_max_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn low_bits_as_exponent(self) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(self.0)))) }
        }
        #[inline(always)]
        unsafe fn add_pair_products(self, factors: Self, addend: Self) -> Self {
            // SAFETY: the contract of this function.
            unsafe {
                let mask = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
                let first = |lanes| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(lanes)));
                let second = |lanes| _mm256_and_ps(lanes, mask);
                let sum = _mm256_fmadd_ps(second(self.0), second(factors.0), addend.0);
                Self(_mm256_fmadd_ps(first(self.0), first(factors.0), sum))
            }
        }
        #[inline(always)]
        unsafe fn transpose_8x8(rows: [*const f32; 8], to: *mut f32, stride: usize) {
            // SAFETY: the contract of this function.
            unsafe {
                let [a, b, c, d, e, f, g, h] = rows.map(|row| _mm256_loadu_ps(row));
                let pairs = |a, b| (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let ((ab0, ab1), (cd0, cd1)) = (pairs(a, b), pairs(c, d));
                let ((ef0, ef1), (gh0, gh1)) = (pairs(e, f), pairs(g, h));
                let low = |ab, cd| _mm256_shuffle_ps::<0x44>(ab, cd);
                let high = |ab, cd| _mm256_shuffle_ps::<0xee>(ab, cd);
                let first = [low(ab0, cd0), high(ab0, cd0), low(ab1, cd1), high(ab1, cd1)];
                let second = [low(ef0, gh0), high(ef0, gh0), low(ef1, gh1), high(ef1, gh1)];
                for (column, (first, second)) in first.into_iter().zip(second).enumerate() {
                    _mm256_storeu_ps(to.add(column * stride), _mm256_permute2f128_ps::<0x20>(first, second));
                    _mm256_storeu_ps(to.add((column + 4) * stride), _mm256_permute2f128_ps::<0x31>(first, second));
                }
            }
        }
    }

    impl Simd for Avx512 {
        const LANES: usize = 16;
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm512_setzero_ps()) }
        }
        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm512_set1_ps(value)) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm512_loadu_ps(from)) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: the contract of this function.
            unsafe {
                let halves = _mm256_loadu_si256(from.cast());
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves))))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the contract of this function.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm512_fmadd_ps(self.0, factor.0, addend.0)) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm512_add_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm512_sub_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn mul(self, other: Self) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm512_mul_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn max(self, other: Self) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm512_max_ps(self.0, other.0)) }
        }
        #[inline(always)]
        unsafe fn low_bits_as_exponent(self) -> Self {
            // SAFETY: the contract of this function.
            unsafe { Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(self.0)))) }
        }
        #[inline(always)]
        unsafe fn add_pair_products(self, factors: Self, addend: Self) -> Self {
            // SAFETY: the contract of this function.
            unsafe {
                // Registers of 16 floats and of 32 bf16 are the same.
                let pairs = |lanes: __m512| std::mem::transmute::<__m512, __m512bh>(lanes);
                Self(_mm512_dpbf16_ps(addend.0, pairs(self.0), pairs(factors.0)))
            }
        }
        #[inline(always)]
        unsafe fn store_bf16(self, to: *mut bf16) {
            // SAFETY: the contract of this function.
            unsafe { to.cast::<__m256bh>().write_unaligned(_mm512_cvtneps_pbh(self.0)) }
        }
        #[cfg(feature = "autodiff")]
        #[inline(always)]
        unsafe fn paired(self, second: Self) -> Self {
            // SAFETY: both types are 256 bits that may be anything.
            let wide = |lanes: Self| unsafe {
                _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(lanes.0)))
            };
            // SAFETY: the contract of this function.
            unsafe { Self(_mm512_castsi512_ps(_mm512_or_si512(wide(self), _mm512_slli_epi32::<16>(wide(second))))) }
        }
        #[inline(always)]
        unsafe fn transpose_8x8(rows: [*const f32; 8], to: *mut f32, stride: usize) {
            // SAFETY: the contract of this function.
            unsafe { Avx2::transpose_8x8(rows, to, stride) }
        }
    }
}
