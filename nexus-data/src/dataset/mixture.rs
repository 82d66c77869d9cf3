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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const WEIGHTS: [f64; 5] = [0.5, 3.0, 1.25, 0.01, 2.0];

    fn endless(seed: u64) -> Mixture {
        Mixture::new(seed, &WEIGHTS.map(|weight| (weight, None))).unwrap()
    }

    #[test]
    fn any_stretch_has_the_proportions() {
        let sum: f64 = WEIGHTS.iter().sum();
        for (seed, start) in [(0, 0), (1, 0), (2, 123_456_789), (3, u64::MAX - 20_000)] {
            let mixture = endless(seed);
            let sources: Vec<usize> = (start..start + 20_000).map(|n| mixture.pick(n).source).collect();
            for length in [1, 10, 100, 5000, 20_000] {
                for window in sources.windows(length).step_by(997.min(length)) {
                    for (source, weight) in WEIGHTS.iter().enumerate() {
                        let found = window.iter().filter(|&&found| found == source).count() as f64;
                        let wanted = weight / sum * length as f64;
                        assert!((found - wanted).abs() < 3.0, "{found} of source {source} in {length}, not {wanted}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_index_of_a_source_grows_by_one() {
        for (seed, sources) in [(7, WEIGHTS.to_vec()), (8, vec![1.0]), (9, vec![1e-300, 1e300, 0.0])] {
            let mixture = Mixture::new(seed, &sources.iter().map(|&w| (w, None)).collect::<Vec<_>>()).unwrap();
            let mut next = vec![0; sources.len()];
            for n in 0..10_000 {
                let pick = mixture.pick(n);
                assert_eq!(pick.index, next[pick.source], "sample {n}");
                next[pick.source] += 1;
            }
        }
    }

    #[test]
    fn the_last_numbers_can_be_picked() {
        let mixture = endless(1);
        let (before, last) = (mixture.pick(u64::MAX - 1), mixture.pick(u64::MAX));
        assert!(before != last && before.source < 5 && last.source < 5);
        let alone = Mixture::new(1, &[(2.0, None)]).unwrap();
        assert_eq!(alone.pick(u64::MAX), Pick { source: 0, index: u64::MAX });
    }

    #[test]
    fn sources_with_an_end_are_visited_in_shuffled_rounds() {
        let mixture = Mixture::new(4, &[(1.0, Some(50)), (1.0, None), (0.5, Some(1))]).unwrap();
        let picks: Vec<Pick> = (0..5000).map(|n| mixture.pick(n)).collect();
        let of_first: Vec<u64> = picks.iter().filter(|pick| pick.source == 0).map(|pick| pick.index).collect();
        let rounds: Vec<&[u64]> = of_first.chunks_exact(50).collect();
        assert_eq!(rounds.len(), 40);
        for round in &rounds {
            assert_eq!(round.iter().copied().collect::<BTreeSet<_>>(), (0..50).collect());
        }
        assert_eq!(rounds.iter().collect::<BTreeSet<_>>().len(), 40, "each round has its own order");
        assert!(picks.iter().filter(|pick| pick.source == 2).all(|pick| pick.index == 0));
    }

    #[test]
    fn the_order_depends_on_the_seed_alone() {
        let sources = [(1.0, Some(1000)), (0.3, Some(10)), (0.7, None)];
        let order = |seed| {
            let mixture = Mixture::new(seed, &sources).unwrap();
            // Backwards: no pick depends on one before it.
            (0..200).rev().map(|n| mixture.pick(n)).collect::<Vec<_>>()
        };
        let forwards: Vec<_> = (0..200).map(|n| Mixture::new(1, &sources).unwrap().pick(n)).rev().collect();
        assert_eq!(order(1), forwards);
        assert_ne!(order(1), order(2));
    }

    #[test]
    fn sources_without_weight_are_left_out() {
        let mixture = Mixture::new(0, &[(0.0, Some(0)), (2.0, None), (0.0, None)]).unwrap();
        assert_eq!(mixture.pick(9), Pick { source: 1, index: 9 });
    }

    #[test]
    fn mixtures_of_nothing_are_refused() {
        assert!(matches!(Mixture::new(0, &[]), Err(DataError::MixtureEmpty)));
        assert!(matches!(Mixture::new(0, &[(0.0, None)]), Err(DataError::MixtureEmpty)));
        for weight in [-1.0, f64::NAN, f64::INFINITY] {
            let result = Mixture::new(0, &[(1.0, None), (weight, None)]);
            assert!(matches!(result, Err(DataError::MixtureWeight { source_index: 1, .. })), "{weight}");
        }
        let result = Mixture::new(0, &[(1.0, Some(0))]);
        assert!(matches!(result, Err(DataError::MixtureSourceEmpty { source_index: 0 })));
    }
}
