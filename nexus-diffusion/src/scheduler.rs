//! Flow-matching schedule: number of steps -> noise levels, Euler steps and training weights.
//!
//! All numbers are f32 and computed in the order of the original, so that they agree to the last bits.

use burn::tensor::Tensor;

/// Lowest noise level before the shift.
const SIGMA_MIN: f64 = 0.003 / 1.002;

/// Shift towards high noise; the same for every picture size.
const SHIFT: f32 = 3.0;

/// Timesteps of a noise level of one.
const NUM_TRAIN_TIMESTEPS: f32 = 1000.0;

/// Noise levels from high to low: `sigma` in `0..=1`, `timestep = 1000 sigma`.
///
/// The last level is still above zero; the last step goes to zero.
///
/// Source: DiffSynth (flow_match.py, `FlowMatchScheduler` with shift 3 and `extra_one_step` off).
#[derive(Debug, Clone, PartialEq)]
pub struct FlowMatchSchedule {
    sigmas: Vec<f32>,
    timesteps: Vec<f32>,
}

impl FlowMatchSchedule {
    /// A schedule of `num_steps` levels that begins at the noise level of `strength` (1: pure noise).
    ///
    /// # Panics
    /// If `num_steps` is 0.
    pub fn new(num_steps: usize, strength: f64) -> Self {
        assert!(num_steps > 0, "a schedule needs a step");
        let start = SIGMA_MIN + (1.0 - SIGMA_MIN) * strength;
        let sigmas: Vec<f32> = linspace(start as f32, SIGMA_MIN as f32, num_steps)
            .into_iter()
            .map(|sigma| SHIFT * sigma / (1.0 + (SHIFT - 1.0) * sigma))
            .collect();
        let timesteps = sigmas.iter().map(|sigma| sigma * NUM_TRAIN_TIMESTEPS).collect();
        Self { sigmas, timesteps }
    }

    /// Number of steps.
    pub fn num_steps(&self) -> usize {
        self.sigmas.len()
    }

    /// Noise levels, in `0..=1`, falling.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// Timesteps, `1000 sigma`.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// One Euler step along the velocity: from level `step` to the next one, from the last one to zero.
    ///
    /// # Shapes
    /// - `latents`, `velocity`: the same shape and dtype
    ///
    /// # Panics
    /// If `step` is not below the number of steps.
    pub fn step(&self, step: usize, latents: Tensor<4>, velocity: Tensor<4>) -> Tensor<4> {
        let next = self.sigmas.get(step + 1).copied().unwrap_or(0.0);
        latents + velocity * (next - self.sigmas[step])
    }

    /// Clean latents with the noise of level `step` mixed in: `(1 - sigma) clean + sigma noise`.
    ///
    /// # Panics
    /// If `step` is not below the number of steps.
    pub fn add_noise(&self, step: usize, clean: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        let sigma = self.sigmas[step];
        clean * (1.0 - sigma) + noise * sigma
    }

    /// Weight of the training loss at each level: a bell around the middle timestep, of mean one.
    pub fn training_weights(&self) -> Vec<f32> {
        let num_steps = self.num_steps() as f32;
        let bell = |timestep: &f32| (-2.0 * ((timestep - num_steps / 2.0) / num_steps).powi(2)).exp();
        let bells: Vec<f32> = self.timesteps.iter().map(bell).collect();
        let lowest = bells.iter().copied().fold(f32::INFINITY, f32::min);
        let total: f64 = bells.iter().map(|bell| f64::from(bell - lowest)).sum();
        bells.iter().map(|bell| (bell - lowest) * (num_steps / total as f32)).collect()
    }
}

/// `count` numbers from `start` to `end`, both included, counted from the nearer end in f32 with one rounding each.
///
/// Source: PyTorch (RangeFactoriesKernel.cpp, `linspace`).
fn linspace(start: f32, end: f32, count: usize) -> Vec<f32> {
    if count == 1 {
        return vec![start];
    }
    let step = (end - start) / (count - 1) as f32;
    let value = |i: usize| match i < count / 2 {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((count - 1 - i) as f32, end),
    };
    (0..count).map(value).collect()
}

#[cfg(test)]
mod tests {
    use nexus_core::testing::{assert_close, ramp};

    use super::*;

    #[test]
    fn levels_fall_from_one_to_almost_zero() {
        for steps in [2, 3, 30, 50] {
            let schedule = FlowMatchSchedule::new(steps, 1.0);
            assert_eq!(schedule.num_steps(), steps);
            assert_eq!(schedule.sigmas()[0], 1.0);
            assert!((schedule.sigmas()[steps - 1] - 0.008_928_6).abs() < 1e-6, "{:?}", schedule.sigmas());
            assert!(schedule.sigmas().windows(2).all(|pair| pair[0] > pair[1]));
        }
        assert_eq!(FlowMatchSchedule::new(1, 1.0).timesteps(), [1000.0]);
    }

    #[test]
    fn strength_lowers_the_first_level_only() {
        let (full, half) = (FlowMatchSchedule::new(4, 1.0), FlowMatchSchedule::new(4, 0.5));
        assert!(half.sigmas()[0] < full.sigmas()[0]);
        assert_eq!(half.sigmas()[3], full.sigmas()[3]);
    }

    #[test]
    fn steps_along_the_true_velocity_remove_all_noise() {
        let (clean, noise) = (ramp([1, 2, 2, 2], 1), ramp([1, 2, 2, 2], 2));
        let schedule = FlowMatchSchedule::new(5, 0.8);
        let mut latents = schedule.add_noise(0, clean.clone(), noise.clone());
        for step in 0..5 {
            latents = schedule.step(step, latents, noise.clone() - clean.clone());
        }
        assert_close(&latents, &clean.into_data().try_to_vec::<f32>().unwrap(), 1e-6);
    }

    #[test]
    fn training_weights_have_mean_one() {
        let weights = FlowMatchSchedule::new(1000, 1.0).training_weights();
        let mean = weights.iter().sum::<f32>() / 1000.0;
        assert!((mean - 1.0).abs() < 1e-5, "{mean}");
        assert_eq!(weights.iter().copied().fold(f32::INFINITY, f32::min), 0.0);
    }
}
