//! TeaCache: how much a step's input changed -> whether its blocks can be skipped.

use burn::tensor::{DType, Tensor};

use crate::DiffusionError;

/// Polynomial from the relative change of the modulated input to that of the output, highest power first.
const COEFFICIENTS: [f64; 5] = [498.651_651, -283.781_631, 55.855_438_2, -3.820_214_01, 0.264_230_861];

/// Skips all blocks of a step whose input hardly changed, and reuses what the blocks last added.
///
/// One cache serves one sequence of steps: one branch of the classifier-free guidance, and one tile. The first and
/// the last step are always computed.
///
/// Differs: the original lets both branches share one cache, so that they use each other's residuals.
///
/// Source: DiffSynth (flux_image.py, `TeaCache`).
#[derive(Debug, Clone)]
pub struct TeaCache {
    num_steps: usize,
    threshold: f64,
    step: usize,
    accumulated: f64,
    skipped: bool,
    previous_input: Option<Tensor<3>>,
    residual: Option<Tensor<3>>,
}

impl TeaCache {
    /// A cache for a run of `num_steps` steps; a higher `threshold` skips more of them.
    ///
    /// # Errors
    /// [`DiffusionError::Option`] if the threshold is negative or not a number.
    pub fn new(num_steps: usize, threshold: f64) -> Result<Self, DiffusionError> {
        if threshold.is_nan() || threshold < 0.0 {
            return Err(DiffusionError::option("tea_cache_threshold", threshold, "a number of at least 0"));
        }
        Ok(Self {
            num_steps,
            threshold,
            step: 0,
            accumulated: 0.0,
            skipped: false,
            previous_input: None,
            residual: None,
        })
    }

    /// Sees the next step's input and says whether its blocks can be skipped.
    ///
    /// # Shapes
    /// - `input`: `[batch, image tokens, dim]`, modulated as the first block does
    pub fn skips(&mut self, input: Tensor<3>) -> bool {
        let edge = self.step == 0 || self.step + 1 >= self.num_steps;
        let compute = match (&self.previous_input, &self.residual) {
            (Some(previous), Some(_)) if !edge => {
                self.accumulated += polynomial(relative_change(&input, previous));
                // A change that is not a number must not be skipped.
                !matches!(self.accumulated.partial_cmp(&self.threshold), Some(std::cmp::Ordering::Less))
            }
            _ => true,
        };
        if compute {
            self.accumulated = 0.0;
        }
        self.previous_input = Some(input);
        self.step += 1;
        self.skipped = !compute;
        self.skipped
    }

    /// Whether the blocks of the latest step were skipped.
    pub fn has_skipped(&self) -> bool {
        self.skipped
    }

    /// Keeps what the blocks added in a computed step.
    pub fn store(&mut self, residual: Tensor<3>) {
        self.residual = Some(residual);
    }

    /// What the blocks added in the last computed step.
    pub fn residual(&self) -> Option<&Tensor<3>> {
        self.residual.as_ref()
    }
}

/// `mean |new - old| / mean |old|`; NaN if the device fails, which whoever reads the result will learn.
fn relative_change(new: &Tensor<3>, old: &Tensor<3>) -> f64 {
    let mean = |x: Tensor<3>| x.abs().cast(DType::F32).mean().try_into_scalar::<f32>().map_or(f64::NAN, f64::from);
    mean(new.clone() - old.clone()) / mean(old.clone())
}

fn polynomial(x: f64) -> f64 {
    COEFFICIENTS.iter().fold(0.0, |value, coefficient| value * x + coefficient)
}

#[cfg(test)]
mod tests {
    use nexus_core::testing::{cpu, ramp};

    use super::*;

    fn decisions(cache: &mut TeaCache, changes: &[f64]) -> Vec<bool> {
        let mut input = ramp([1, 4, 4], 3);
        let mut skipped = vec![];
        for change in changes {
            input = input * (1.0 + *change);
            let skip = cache.skips(input.clone());
            if !skip {
                cache.store(input.clone());
            }
            skipped.push(skip);
        }
        skipped
    }

    #[test]
    fn the_polynomial_is_that_of_the_original() {
        assert!((polynomial(0.0) - 0.264_230_861).abs() < 1e-12);
        assert!((polynomial(0.1) - 0.206_847_376).abs() < 1e-9, "{}", polynomial(0.1));
    }

    #[test]
    fn unchanged_inputs_are_skipped_until_the_sum_reaches_the_threshold() {
        // Every unchanged step adds 0.264: two are under 0.6, the third is over.
        let mut cache = TeaCache::new(8, 0.6).unwrap();
        assert_eq!(decisions(&mut cache, &[0.0; 8]), [false, true, true, false, true, true, false, false]);
    }

    #[test]
    fn the_change_is_measured_from_the_skipped_step() {
        // 0.1 and 0.1 give 0.2068 + 0.2068; measured from the first step the second change would be 0.21.
        let mut cache = TeaCache::new(6, 0.42).unwrap();
        assert_eq!(decisions(&mut cache, &[0.0, 0.1, 0.1, 0.1, 0.0, 0.0]), [false, true, true, false, true, false]);
    }

    #[test]
    fn first_and_last_step_are_computed_and_a_threshold_of_zero_skips_none() {
        for steps in 1..4 {
            let skipped = decisions(&mut TeaCache::new(steps, f64::INFINITY).unwrap(), &vec![0.0; steps]);
            assert!(!skipped[0] && !skipped[steps - 1], "{skipped:?}");
        }
        assert_eq!(decisions(&mut TeaCache::new(5, 0.0).unwrap(), &[0.0; 5]), [false; 5]);
        assert!(TeaCache::new(5, f64::NAN).is_err() && TeaCache::new(5, -0.1).is_err());
    }

    #[test]
    fn zero_inputs_are_not_skipped() {
        let mut cache = TeaCache::new(4, 0.6).unwrap();
        let zeros = Tensor::zeros([1, 2, 2], &cpu());
        assert!(!cache.skips(zeros.clone()));
        cache.store(zeros.clone());
        assert!(!cache.skips(zeros));
    }
}
