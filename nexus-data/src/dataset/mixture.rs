//! Mixtures: the number of a sample in a run -> the source that it comes from, and its index there.
//!
//! The sources share the samples of a run one after another: the first takes its share of all, the second takes its
//! share of what is left, and so on; the last takes the rest. Of the first `m` samples that reach a source with share
//! `p`, it takes `floor(m * p + offset)` with an offset in `0..1` from the seed. So a sample belongs to the source if
//! this number grows with it, the number itself is the running index within the source, and nothing needs to be
//! remembered from one sample to the next.
//!
//! In any stretch of samples each such step is wrong by less than one sample. A source that is `k` steps down is wrong by
//! less than `1 + p(1 + ...)`, which is below `k` samples however long the stretch.

use crate::dataset::permutation::{Permutation, mixed};
use crate::error::DataError;

/// A sample of a mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pick {
    /// Number of the source, as it was given to [`Mixture::new`].
    pub source: usize,
    /// Index of the sample in the source, below its length; it grows by one with each sample if the source has no end.
    pub index: u64,
}

/// Several sources of samples, mixed by weight.
///
/// The order depends on nothing but the seed, so the cursor of a run is one number.
#[derive(Debug, Clone)]
pub struct Mixture {
    seed: u64,
    steps: Vec<Step>,
}

/// A source with a weight.
#[derive(Debug, Clone, Copy)]
struct Step {
    source: usize,
    len: Option<u64>,
    /// Share of the samples that reach this source, in units of 2^-64. The last source takes all of them.
    share: u64,
    /// Offset of the count, in units of 2^-64.
    offset: u64,
}

impl Mixture {
    /// Mixes sources of these weights and lengths; a source without length has no end.
    ///
    /// Weights are relative, and a source of weight zero is never picked. A source with an end is visited again and
    /// again, each time in another order.
    ///
    /// # Errors
    /// [`DataError::MixtureWeight`] if a weight is negative or not finite, [`DataError::MixtureSourceEmpty`] if a source
    /// with a weight has length zero, [`DataError::MixtureEmpty`] if no source has a weight.
    pub fn new(seed: u64, sources: &[(f64, Option<u64>)]) -> Result<Self, DataError> {
        for (source_index, &(weight, len)) in sources.iter().enumerate() {
            if !weight.is_finite() || weight < 0.0 {
                return Err(DataError::MixtureWeight { source_index, weight });
            }
            if weight > 0.0 && len == Some(0) {
                return Err(DataError::MixtureSourceEmpty { source_index });
            }
        }
        let largest = sources.iter().fold(0.0_f64, |largest, &(weight, _)| largest.max(weight));
        let mut left = 0.0;
        let mut steps = Vec::new();
        for (source, &(weight, len)) in sources.iter().enumerate().rev().filter(|(_, (weight, _))| *weight > 0.0) {
            // Relative to the largest, so that the sum stays finite.
            let weight = weight / largest;
            left += weight;
            let share = (weight / left * 2.0_f64.powi(64)) as u64;
            steps.push(Step { source, len, share, offset: mixed(&[seed, source as u64]) });
        }
        steps.reverse();
        if steps.is_empty() { Err(DataError::MixtureEmpty) } else { Ok(Self { seed, steps }) }
    }

    /// The sample with this number; takes time in proportion to the sources, and no memory.
    pub fn pick(&self, n: u64) -> Pick {
        let mut m = n;
        for step in &self.steps[..self.steps.len() - 1] {
            let (before, after) = (step.taken(u128::from(m)), step.taken(u128::from(m) + 1));
            if after > before {
                return self.nth_of(step, before);
            }
            m -= before;
        }
        self.nth_of(&self.steps[self.steps.len() - 1], m)
    }

    fn nth_of(&self, step: &Step, nth: u64) -> Pick {
        let index = step.len.map_or(nth, |len| {
            let key = mixed(&[self.seed, step.source as u64, nth / len]);
            Permutation::new(key, len).at(nth % len)
        });
        Pick { source: step.source, index }
    }
}

impl Step {
    /// How many of the first `m` samples that reach this source it takes, `m` up to 2^64.
    fn taken(&self, m: u128) -> u64 {
        ((m * u128::from(self.share) + u128::from(self.offset)) >> u64::BITS) as u64
    }
}
