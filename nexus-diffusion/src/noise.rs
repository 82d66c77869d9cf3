//! Start noise: a seed -> the numbers that PyTorch's CPU generator draws for it.

use std::f64::consts::TAU;

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use rand_mt::Mt;

use crate::{DiffusionError, LatentSize};

/// Numbers that PyTorch transforms together.
const BLOCK: usize = 16;

/// Where the start noise comes from.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "there is one per picture")]
pub enum Noise {
    /// Drawn by [`torch_randn`], in f32, then rounded to the compute dtype.
    Seed(u64),
    /// Given: `[batch, channels, height / 8, width / 8]`.
    Latents(Tensor<4>),
}

impl std::fmt::Debug for Noise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Seed(seed) => write!(f, "Seed({seed})"),
            Self::Latents(latents) => write!(f, "Latents({:?} {:?})", latents.dtype(), latents.dims()),
        }
    }
}

impl Noise {
    /// The start latents of one picture.
    ///
    /// # Shapes
    /// - returns: `[1, channels, size.height, size.width]` in `dtype` on `device`; given noise keeps its batch
    ///
    /// # Errors
    /// [`DiffusionError::NoiseShape`] if given noise has another shape.
    pub fn into_latents(
        self,
        channels: usize,
        size: LatentSize,
        dtype: FloatDType,
        device: &Device,
    ) -> Result<Tensor<4>, DiffusionError> {
        let shape = [1, channels, size.height, size.width];
        let latents = match self {
            Self::Seed(seed) => {
                let values = torch_randn(seed, shape.iter().product());
                Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
            }
            Self::Latents(latents) => {
                let found = latents.dims();
                if found[0] == 0 || found[1..] != shape[1..] {
                    return Err(DiffusionError::NoiseShape { found, expected: shape });
                }
                latents.to_device(device)
            }
        };
        Ok(if latents.dtype() == dtype.into() { latents } else { latents.cast(dtype) })
    }
}

/// Standard normal numbers as `torch.randn(count, generator=torch.Generator().manual_seed(seed))` draws them in f32.
///
/// Rounded to bf16 they are what PyTorch draws with `dtype=torch.bfloat16`. They agree with PyTorch to a few units in the last place: its vectorised logarithm, sine and cosine round
/// differently on different machines.
///
/// Source: PyTorch (DistributionTemplates.h, `normal_fill` and `normal_distribution`).
pub fn torch_randn(seed: u64, count: usize) -> Vec<f32> {
    let mut generator = generator(seed);
    if count < BLOCK {
        return pairs_of_doubles(&mut generator, count);
    }
    let mut uniform = || (generator.next_u32() & 0x00ff_ffff) as f32 / (1 << 24) as f32;
    let mut values: Vec<f32> = (0..count).map(|_| uniform()).collect();
    values.chunks_exact_mut(BLOCK).for_each(box_muller);
    if !count.is_multiple_of(BLOCK) {
        let tail = &mut values[count - BLOCK..];
        tail.fill_with(uniform);
        box_muller(tail);
    }
    values
}

/// PyTorch seeds its 32-bit generator with the low half of the seed.
fn generator(seed: u64) -> Mt {
    Mt::new((seed & 0xffff_ffff) as u32)
}

/// Turns eight radii and eight angles into sixteen normal numbers.
fn box_muller(block: &mut [f32]) {
    let (radii, angles) = block.split_at_mut(BLOCK / 2);
    for (first, second) in radii.iter_mut().zip(angles) {
        let radius = (-2.0 * (1.0 - *first).ln()).sqrt();
        let (sine, cosine) = (TAU as f32 * *second).sin_cos();
        (*first, *second) = (radius * cosine, radius * sine);
    }
}

/// Below one block PyTorch makes pairs from 53-bit uniform numbers.
fn pairs_of_doubles(generator: &mut Mt, count: usize) -> Vec<f32> {
    let mut uniform = || {
        let (high, low) = (u64::from(generator.next_u32()), u64::from(generator.next_u32()));
        (((high << 32) | low) & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    };
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        let (angle, tail) = (TAU * uniform(), uniform());
        let radius = (-2.0 * (-tail).ln_1p()).sqrt();
        values.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
    }
    values.truncate(count);
    values
}

#[cfg(test)]
mod tests {
    use nexus_core::testing::{cpu, ramp};

    use super::*;

    /// PyTorch's vectorised functions and ours differ by a few units in the last place.
    #[track_caller]
    fn check(seed: u64, expected: &[f32]) {
        let values = torch_randn(seed, expected.len());
        for (value, expected) in values.iter().zip(expected) {
            assert!((value - expected).abs() <= 1.5e-6, "{value} instead of {expected} in {values:?}");
        }
    }

    // Expected values: torch.randn(n, generator=torch.Generator().manual_seed(seed)), torch 2.15.0 on a CPU.

    #[test]
    fn fewer_than_sixteen_numbers_come_in_pairs() {
        check(0, &[1.540_996_1, -0.293_428_9, -2.178_789_4, 0.568_431_26, -1.084_522_4]);
    }

    #[test]
    fn one_block_of_sixteen() {
        check(
            42,
            &[
                1.926_915_3,
                1.487_284_1,
                0.900_717_2,
                -2.105_521,
                0.678_418_46,
                -1.234_544_9,
                -0.043_067_478,
                -1.604_667,
                -0.752_135_3,
                1.648_723,
                -0.392_478_64,
                -1.403_607_1,
                -0.727_881_3,
                -0.559_430_2,
                -0.768_838_9,
                0.762_445_4,
            ],
        );
    }

    #[test]
    fn an_incomplete_block_redraws_the_last_sixteen() {
        check(
            42,
            &[
                1.926_915_3,
                -0.159_597_47,
                -0.497_397_54,
                0.439_589_26,
                -0.758_131_15,
                1.078_317_6,
                0.800_801_6,
                1.680_620_6,
                0.355_859_9,
                1.296_422_8,
                0.610_466_5,
                1.334_737_8,
                -0.231_624_32,
                0.041_759_49,
                -0.251_575_3,
                0.859_858_5,
                -0.309_726_77,
            ],
        );
    }

    #[test]
    fn only_the_low_half_of_the_seed_counts() {
        check(4_294_967_301, &[-0.486_780_76, -0.603_821_6, -0.558_096_2, 0.667_524_3, -0.197_415_1]);
        assert_eq!(torch_randn(4_294_967_301, 40), torch_randn(5, 40));
        assert_ne!(torch_randn(4, 40), torch_randn(5, 40));
    }

    #[test]
    fn given_noise_must_have_the_shape_of_the_picture() {
        let size = LatentSize { height: 4, width: 6 };
        let into = |noise: Noise| noise.into_latents(2, size, FloatDType::F32, &cpu());
        assert_eq!(into(Noise::Seed(1)).unwrap().dims(), [1, 2, 4, 6]);
        assert_eq!(into(Noise::Latents(ramp([3, 2, 4, 6], 1))).unwrap().dims(), [3, 2, 4, 6]);
        let result = into(Noise::Latents(ramp([1, 2, 6, 4], 1)));
        assert!(matches!(result, Err(DiffusionError::NoiseShape { found: [1, 2, 6, 4], expected: [1, 2, 4, 6] })));
        let rounded = Noise::Seed(1).into_latents(2, size, FloatDType::BF16, &cpu()).unwrap();
        assert_eq!(rounded.dtype(), DType::BF16);
    }
}
