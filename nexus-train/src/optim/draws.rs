//! Random numbers of a training run: (seed, purpose, index) -> numbers that depend on nothing else.
//!
//! A draw is named by what it is for and by the number of the sample, so that a run that was killed draws the same
//! numbers again without saving the state of a generator.

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{Rng, RngExt, SeedableRng, rngs::ChaCha8Rng};
use rand_distr::{Distribution, StandardNormal};

/// A stream of random numbers for one purpose and index.
pub struct Draws {
    rng: ChaCha8Rng,
}

impl Draws {
    /// The stream of this seed, purpose and index.
    pub fn new(seed: u64, purpose: &str, index: u64) -> Self {
        // FNV-1a, which no release of a library changes.
        let purpose = purpose
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut key = [0; 32];
        for (part, number) in key.chunks_exact_mut(8).zip([seed, purpose, index, 0]) {
            part.copy_from_slice(&number.to_le_bytes());
        }
        Self { rng: ChaCha8Rng::from_seed(key) }
    }

    /// A number below `bound`, uniform; 0 if `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        if bound == 0 { 0 } else { self.rng.random_range(0..bound) }
    }

    /// A number in `0.0..1.0`, uniform.
    pub fn unit(&mut self) -> f32 {
        self.rng.random()
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.rng.next_u64()
    }

    /// Standard normal numbers.
    pub fn normal_values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| StandardNormal.sample(&mut self.rng)).collect()
    }

    /// A tensor of standard normal numbers in f32.
    pub fn normal<const D: usize>(&mut self, shape: [usize; D], device: &Device) -> Tensor<D> {
        let values = self.normal_values(shape.iter().product());
        Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_depends_on_its_name_alone() {
        let draw = |seed, purpose, index| Draws::new(seed, purpose, index).normal_values(3);
        assert_eq!(draw(1, "noise", 5), draw(1, "noise", 5));
        for other in [draw(2, "noise", 5), draw(1, "steps", 5), draw(1, "noise", 6)] {
            assert_ne!(draw(1, "noise", 5), other);
        }
    }

    #[test]
    fn numbers_have_the_moments_of_their_distributions() {
        let mut draws = Draws::new(7, "moments", 0);
        let normal = draws.normal_values(40_000);
        let mean = normal.iter().sum::<f32>() / 40_000.0;
        let square = normal.iter().map(|x| x * x).sum::<f32>() / 40_000.0;
        assert!(mean.abs() < 0.02 && (square - 1.0).abs() < 0.03, "{mean} {square}");
        let below: Vec<usize> = (0..3_000).map(|_| draws.below(3)).collect();
        for value in 0..3 {
            let count = below.iter().filter(|&&x| x == value).count();
            assert!((850..1150).contains(&count), "{value}: {count}");
        }
        assert_eq!(draws.below(0), 0);
        assert!((0..1000).all(|_| (0.0..1.0).contains(&draws.unit())));
    }
}
