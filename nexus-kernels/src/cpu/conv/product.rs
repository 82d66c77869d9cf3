//! The inner loop of every convolution: a block of weights and a panel of pixels -> sums over the input channels.

use super::super::{Instructions, Level};

/// Output channels of a block of weights.
pub(super) const ROWS: usize = 8;
/// Pixels (or tiles of pixels) of a panel.
pub(super) const COLS: usize = 48;

/// `sums[row][col] = Σ weights[k][row] * panel[k][col]`, added in the order of `k`.
///
/// # Shapes
/// - `weights`: `[depth, ROWS]`
/// - `panel`: `[depth, COLS]`
/// - `sums`: `[ROWS, COLS]`, overwritten
pub(super) fn product(level: Level, weights: &[f32], panel: &[f32], sums: &mut [f32]) {
    let depth = panel.len() / COLS;
    assert!(weights.len() == depth * ROWS && panel.len() == depth * COLS && sums.len() == ROWS * COLS);
    let (weights, panel, sums) = (weights.as_ptr(), panel.as_ptr(), sums.as_mut_ptr());
    // SAFETY: the lengths were checked above, and levels come from `Level::detect`, so the CPU has the instructions.
    #[allow(unsafe_code)]
    unsafe {
        match level.instructions() {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => x86::avx512(depth, weights, panel, sums),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => x86::avx2(depth, weights, panel, sums),
            _ => all_blocks::<Portable, 4, 2>(depth, weights, panel, sums),
        }
    }
}

/// A vector register and what is done with it.
///
/// Every function may be called only where the CPU has the instructions of the implementor.
#[allow(unsafe_code)]
trait Lanes {
    type Vector: Copy;
    /// Values of a vector.
    const WIDTH: usize;
    unsafe fn zero() -> Self::Vector;
    /// Reads [`Lanes::WIDTH`] values.
    unsafe fn load(from: *const f32) -> Self::Vector;
    /// Reads one value into all lanes.
    unsafe fn splat(from: *const f32) -> Self::Vector;
    unsafe fn multiply_add(a: Self::Vector, b: Self::Vector, sum: Self::Vector) -> Self::Vector;
    /// Writes [`Lanes::WIDTH`] values.
    unsafe fn store(vector: Self::Vector, to: *mut f32);
}

/// Keeps sums of `R` rows and `N` vectors of columns in registers at a time.
///
/// # Safety
/// The CPU has the instructions of `L`; `weights`, `panel` and `sums` hold `depth * ROWS`, `depth * COLS` and
/// `ROWS * COLS` values.
#[allow(unsafe_code)]
#[inline(always)]
unsafe fn all_blocks<L: Lanes, const R: usize, const N: usize>(
    depth: usize,
    weights: *const f32,
    panel: *const f32,
    sums: *mut f32,
) {
    const { assert!(ROWS.is_multiple_of(R) && COLS.is_multiple_of(N * L::WIDTH)) }
    for col in (0..COLS).step_by(N * L::WIDTH) {
        for row in (0..ROWS).step_by(R) {
            // SAFETY: `row + R <= ROWS`, `col + N * WIDTH <= COLS` and `k < depth` keep every access inside.
            unsafe {
                let mut block = [[L::zero(); N]; R];
                for k in 0..depth {
                    let (weights, panel) = (weights.add(k * ROWS + row), panel.add(k * COLS + col));
                    let mut pixels = [L::zero(); N];
                    for (n, pixels) in pixels.iter_mut().enumerate() {
                        *pixels = L::load(panel.add(n * L::WIDTH));
                    }
                    for (r, block) in block.iter_mut().enumerate() {
                        let weight = L::splat(weights.add(r));
                        for (sum, &pixels) in block.iter_mut().zip(&pixels) {
                            *sum = L::multiply_add(weight, pixels, *sum);
                        }
                    }
                }
                for (r, block) in block.iter().enumerate() {
                    for (n, &sum) in block.iter().enumerate() {
                        L::store(sum, sums.add((row + r) * COLS + col + n * L::WIDTH));
                    }
                }
            }
        }
    }
}

/// Four values that the compiler vectorises as it can.
struct Portable;

#[allow(unsafe_code)]
impl Lanes for Portable {
    type Vector = [f32; 4];
    const WIDTH: usize = 4;
    #[inline(always)]
    unsafe fn zero() -> [f32; 4] {
        [0.0; 4]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 4] {
        // SAFETY: the caller gives room for four values; the read needs no alignment.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat(from: *const f32) -> [f32; 4] {
        // SAFETY: the caller gives a valid value.
        [unsafe { *from }; 4]
    }
    #[inline(always)]
    unsafe fn multiply_add(a: [f32; 4], b: [f32; 4], sum: [f32; 4]) -> [f32; 4] {
        [a[0] * b[0] + sum[0], a[1] * b[1] + sum[1], a[2] * b[2] + sum[2], a[3] * b[3] + sum[3]]
    }
    #[inline(always)]
    unsafe fn store(vector: [f32; 4], to: *mut f32) {
        // SAFETY: the caller gives room for four values; the write needs no alignment.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(vector) }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Lanes, all_blocks};

    /// # Safety
    /// As [`all_blocks`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(depth: usize, weights: *const f32, panel: *const f32, sums: *mut f32) {
        // SAFETY: passed on.
        unsafe { all_blocks::<Avx512, 8, 3>(depth, weights, panel, sums) }
    }

    /// # Safety
    /// As [`all_blocks`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(depth: usize, weights: *const f32, panel: *const f32, sums: *mut f32) {
        // 12 sums with the 3 vectors of pixels that they need and a weight are all 16 registers: that took 1.7 times as long.
        // SAFETY: passed on.
        unsafe { all_blocks::<Avx2, 4, 2>(depth, weights, panel, sums) }
    }

    macro_rules! lanes {
        ($name:ident, $vector:ty, $width:literal, $zero:ident, $load:ident, $splat:ident, $fma:ident, $store:ident) => {
            struct $name;

            // Whoever uses these functions vouches for the instructions and the pointers.
            impl Lanes for $name {
                type Vector = $vector;
                const WIDTH: usize = $width;
                #[inline(always)]
                unsafe fn zero() -> $vector {
                    // SAFETY: the contract of this function.
                    unsafe { $zero() }
                }
                #[inline(always)]
                unsafe fn load(from: *const f32) -> $vector {
                    // SAFETY: the contract of this function.
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn splat(from: *const f32) -> $vector {
                    // SAFETY: the contract of this function.
                    unsafe { $splat(*from) }
                }
                #[inline(always)]
                unsafe fn multiply_add(a: $vector, b: $vector, sum: $vector) -> $vector {
                    // SAFETY: the contract of this function.
                    unsafe { $fma(a, b, sum) }
                }
                #[inline(always)]
                unsafe fn store(vector: $vector, to: *mut f32) {
                    // SAFETY: the contract of this function.
                    unsafe { $store(to, vector) }
                }
            }
        };
    }
    lanes!(Avx512, __m512, 16, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_storeu_ps);
    lanes!(Avx2, __m256, 8, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_storeu_ps);
}
