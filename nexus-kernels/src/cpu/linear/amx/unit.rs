//! The matrix unit of the CPU (AMX): tiles of weights and of activations -> tiles of sums.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::{arch::asm, marker::PhantomData};

use bytemuck::{Pod, Zeroable};

/// Rows of a tile, and columns of four bytes.
pub(super) const SIDE: usize = 16;
/// Inputs of one product of tiles: two for each column.
pub(super) const DEPTH: usize = 2 * SIDE;

/// What a register of the unit holds: [`SIDE`] rows of 64 bytes, each in a cache line of its own.
///
/// - weights: a row for each output, of [`DEPTH`] inputs in bf16
/// - activations: a row for each pair of inputs, of [`SIDE`] pairs of bf16, one for each row of the activations
/// - sums: a row for each output, of [`SIDE`] f32, one for each row of the activations
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in super::super) struct Tile(pub(super) [u32; SIDE * SIDE]);

// SAFETY: nothing but integers, for which zero is a value.
unsafe impl Zeroable for Tile {}
// SAFETY: the size is a multiple of the alignment, so there is no padding.
unsafe impl Pod for Tile {}

/// What multiplies tiles, set up in this thread for as long as the value lives.
pub(in super::super) trait Unit {
    /// Sets the unit up.
    ///
    /// # Safety
    /// The CPU has the unit, and no other value of the type lives in this thread.
    unsafe fn open() -> Self;
    /// Adds the products of all steps to `sums`, or puts them there if nothing `is_there`.
    ///
    /// # Shapes
    /// - `weights`: `[steps]`, two tiles of outputs each
    /// - `x`: `[steps]`, two tiles of rows each
    /// - `sums`: `[tiles of outputs, tiles of rows]`
    ///
    /// # Panics
    /// If the numbers of steps differ, or are zero.
    fn multiply(&mut self, weights: &[[Tile; 2]], x: &[[Tile; 2]], sums: &mut [Tile; 4], is_there: bool);
}

/// The unit itself. Its registers belong to the thread, so the value stays there.
#[cfg(target_arch = "x86_64")]
pub(in super::super) struct Amx(PhantomData<*const ()>);

#[cfg(target_arch = "x86_64")]
impl Unit for Amx {
    unsafe fn open() -> Self {
        /// As `ldtilecfg` reads it.
        #[repr(C, align(64))]
        struct Configuration {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut all = Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        all.row_bytes[..8].fill(64);
        all.rows[..8].fill(SIDE as u8);
        // SAFETY: the caller's condition; 64 bytes are read, of which the reserved ones are zero.
        unsafe { asm!("ldtilecfg [{all}]", all = in(reg) &raw const all, options(nostack, preserves_flags, readonly)) };
        Self(PhantomData)
    }

    fn multiply(&mut self, weights: &[[Tile; 2]], x: &[[Tile; 2]], sums: &mut [Tile; 4], is_there: bool) {
        assert!(weights.len() == x.len() && !x.is_empty());
        // SAFETY: `self` was opened where the CPU has the unit, and all tiles are set up. Each of the steps reads two tiles
        // behind either pointer, as many as the slices have; the sums are four tiles.
        unsafe {
            asm!(
                "test {is_there:e}, {is_there:e}",
                "jz 2f",
                "tileloadd tmm0, [{sums} + {stride}*1]",
                "tileloadd tmm1, [{sums} + {stride}*1 + 1024]",
                "tileloadd tmm2, [{sums} + {stride}*1 + 2048]",
                "tileloadd tmm3, [{sums} + {stride}*1 + 3072]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "3:",
                "tileloadd tmm4, [{weights} + {stride}*1]",
                "tileloadd tmm6, [{x} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{x} + {stride}*1 + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{weights} + {stride}*1 + 1024]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {weights}, 2048",
                "add {x}, 2048",
                "dec {steps}",
                "jnz 3b",
                "tilestored [{sums} + {stride}*1], tmm0",
                "tilestored [{sums} + {stride}*1 + 1024], tmm1",
                "tilestored [{sums} + {stride}*1 + 2048], tmm2",
                "tilestored [{sums} + {stride}*1 + 3072], tmm3",
                is_there = in(reg) u32::from(is_there),
                sums = in(reg) sums.as_mut_ptr(),
                stride = in(reg) 64_usize,
                weights = inout(reg) weights.as_ptr() => _,
                x = inout(reg) x.as_ptr() => _,
                steps = inout(reg) x.len() => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Amx {
    fn drop(&mut self) {
        // SAFETY: the CPU has the unit, as it was opened; no register of it is in use after this.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
    }
}

/// What the unit does, step by step, for CPUs that have none.
#[cfg(test)]
pub(in super::super) struct Imitated;

#[cfg(test)]
impl Unit for Imitated {
    unsafe fn open() -> Self {
        Self
    }

    fn multiply(&mut self, weights: &[[Tile; 2]], x: &[[Tile; 2]], sums: &mut [Tile; 4], is_there: bool) {
        assert!(weights.len() == x.len() && !x.is_empty());
        if !is_there {
            sums.fill(Tile::zeroed());
        }
        for (weights, x) in weights.iter().zip(x) {
            for (index, sums) in sums.iter_mut().enumerate() {
                add_products(sums, &weights[index / 2], &x[index % 2]);
            }
        }
    }
}

/// As Intel's manual describes TDPBF16PS: the first and the second inputs of the pairs are summed apart.
#[cfg(test)]
fn add_products(sums: &mut Tile, weights: &Tile, x: &Tile) {
    let first = |pair: u32| f32::from_bits(pair << 16);
    let second = |pair: u32| f32::from_bits(pair & 0xffff_0000);
    for output in 0..SIDE {
        for row in 0..SIDE {
            let (mut firsts, mut seconds) = (0.0, 0.0);
            for pair in 0..SIDE {
                let (weight, x) = (weights.0[output * SIDE + pair], x.0[pair * SIDE + row]);
                firsts += first(weight) * first(x);
                seconds += second(weight) * second(x);
            }
            let sum = &mut sums.0[output * SIDE + row];
            *sum = (f32::from_bits(*sum) + (firsts + seconds)).to_bits();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cpu::Level, testing::ramp};

    /// Numbers with few digits, of which all sums are exact in any order.
    fn tiles(seed: usize, steps: usize) -> Vec<[Tile; 2]> {
        let values = ramp([steps, 4 * SIDE * SIDE], seed).into_data().try_into_vec_as::<f32>().unwrap();
        let halves: Vec<u16> = values.into_iter().map(|x| half::bf16::from_f32((x * 8.0).round()).to_bits()).collect();
        let words: Vec<u32> = halves.chunks(2).map(|pair| u32::from(pair[1]) << 16 | u32::from(pair[0])).collect();
        let mut tiles = vec![[Tile::zeroed(); 2]; steps];
        bytemuck::cast_slice_mut::<_, u32>(&mut tiles).copy_from_slice(&words);
        tiles
    }

    /// The first or the second number of a pair, for an even or odd input.
    fn half_of(word: u32, input: usize) -> f32 {
        f32::from_bits(word >> (16 * (input % 2)) << 16)
    }

    fn check<U: Unit>(name: &str) {
        // SAFETY: the callers know that the CPU has it, and this thread has no other.
        let mut unit = unsafe { U::open() };
        for steps in [1, 2, 5] {
            let (weights, x) = (tiles(1, steps), tiles(2, steps));
            let mut sums = [Tile([f32::NAN.to_bits(); SIDE * SIDE]); 4];
            for times in [1.0, 2.0] {
                unit.multiply(&weights, &x, &mut sums, times > 1.0);
                for (output, row) in (0..2 * SIDE).flat_map(|output| (0..2 * SIDE).map(move |row| (output, row))) {
                    let product = |input: usize| {
                        let (weights, x) = (&weights[input / DEPTH][output / SIDE], &x[input / DEPTH][row / SIDE]);
                        let pair = input % DEPTH / 2;
                        let weight = half_of(weights.0[output % SIDE * SIDE + pair], input);
                        weight * half_of(x.0[pair * SIDE + row % SIDE], input)
                    };
                    let expected: f32 = (0..steps * DEPTH).map(product).sum();
                    let sum = sums[output / SIDE * 2 + row / SIDE].0[output % SIDE * SIDE + row % SIDE];
                    assert_eq!(f32::from_bits(sum), times * expected, "{name}: {steps} steps, {output}, {row}");
                }
            }
        }
    }

    #[test]
    fn two_by_two_tiles_are_the_sums_of_products_of_pairs() {
        check::<Imitated>("imitated");
        let has_unit = Level::detect().multiplies_bf16_tiles();
        println!("AMX: {has_unit}");
        #[cfg(target_arch = "x86_64")]
        if has_unit {
            check::<Amx>("AMX");
        }
    }
}
