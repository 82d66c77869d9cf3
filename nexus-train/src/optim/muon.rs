//! Muon: a matrix, its gradient and its momentum -> a step whose directions are all equally long.

use std::collections::BTreeMap;

use burn::optim::{
    AdjustLrFn, Muon as Step, MuonConfig, Optimizer as _, decay::WeightDecayConfig, momentum::MomentumConfig,
};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::NamePattern;

/// Which matrices take steps of Muon instead of AdamW.
///
/// The gradient's momentum is replaced by the nearest matrix whose singular values are about one, and scaled so that
/// its numbers are as large as those of AdamW's steps: learning rate and weight decay mean the same for both.
///
/// Source: Muon (Jordan et al. 2024), scaled as in "Muon is Scalable for LLM Training" (arXiv 2502.16982).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MuonOptions {
    /// Names of parameters; those that are no matrices stay with AdamW, as should embeddings and output layers.
    pub matrices: Vec<NamePattern>,
    /// Decay of the momentum, which is Nesterov's.
    #[serde(default = "momentum_default")]
    pub momentum: f32,
}

fn momentum_default() -> f32 {
    0.95
}

/// Steps of the chosen matrices, with their momentum by name.
pub(super) struct Muon {
    options: MuonOptions,
    step: Step,
    pub(super) velocities: BTreeMap<String, Tensor<1>>,
}

impl Muon {
    pub(super) fn new(options: MuonOptions, weight_decay: f32) -> Self {
        // The momentum is kept here, because burn's is closed to saving.
        let none = MomentumConfig { momentum: 0.0, dampening: 0.0, nesterov: false };
        let config = MuonConfig::new()
            .with_momentum(none)
            .with_weight_decay(Some(WeightDecayConfig::new(weight_decay)))
            .with_adjust_lr_fn(AdjustLrFn::MatchRmsAdamW);
        Self { options, step: config.build(), velocities: BTreeMap::new() }
    }

    /// Whether a matrix of this name is one of its own.
    pub(super) fn takes(&self, name: &str) -> bool {
        self.options.matrices.iter().any(|pattern| pattern.matches(name))
    }

    /// One step of a matrix.
    ///
    /// # Shapes
    /// - `value`, `gradient`: `[rows * cols]`
    pub(super) fn update(
        &mut self,
        name: String,
        [rows, cols]: [usize; 2],
        lr: f64,
        value: Tensor<1>,
        gradient: Tensor<1>,
    ) -> Tensor<1> {
        let decay = self.options.momentum;
        let mixed = |old: Tensor<1>, new: Tensor<1>| old * decay + new * (1.0 - decay);
        let velocity = match self.velocities.remove(&name) {
            Some(velocity) => mixed(velocity, gradient.clone()),
            None => gradient.clone() * (1.0 - decay),
        };
        let direction = mixed(velocity.clone(), gradient);
        self.velocities.insert(name, velocity);
        let (value, _) = self.step.step(lr, value.reshape([rows, cols]), direction.reshape([rows, cols]), None);
        value.reshape([rows * cols])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nexus_core::testing::{assert_close_tensors, cpu, ramp};

    fn muon(momentum: f32) -> Muon {
        Muon::new(MuonOptions { matrices: vec![NamePattern("*.weight".into())], momentum }, 0.1)
    }

    #[test]
    fn all_directions_of_a_step_are_about_equally_long() {
        let value: Tensor<1> = ramp([6 * 4], 1);
        // Columns of different lengths, 1, 1/2, 1/4 and 1/8, nearly at right angles.
        let mut gradient: Vec<f32> = ramp::<1>([24], 2).into_data().try_into_vec_as().unwrap();
        for (index, value) in gradient.iter_mut().enumerate() {
            let (row, column) = (index / 4, index % 4);
            *value = 0.02 * *value + if row == column { 0.5f32.powi(column as i32) } else { 0.0 };
        }
        let gradient = Tensor::<1>::from_floats(gradient.as_slice(), &cpu());
        let stepped = muon(0.95).update("a.weight".into(), [6, 4], 0.01, value.clone(), gradient);
        let step = (value * (1.0 - 0.01 * 0.1) - stepped).reshape([6, 4]) / (0.01 * 0.2 * 6f64.sqrt());
        let gram = step.clone().transpose().matmul(step);
        let values: Vec<f32> = gram.into_data().try_into_vec_as().unwrap();
        for (index, value) in values.into_iter().enumerate() {
            let range = if index % 5 == 0 { 0.4..1.4 } else { -0.2..0.2 };
            assert!(range.contains(&value), "{index}: {value}");
        }
    }

    #[test]
    fn momentum_is_nesterovs() {
        let (first, second): (Tensor<1>, Tensor<1>) = (ramp([12], 3), ramp([12], 4));
        let value: Tensor<1> = ramp([12], 5);
        let mut with = muon(0.8);
        let once = with.update("a.weight".into(), [3, 4], 0.01, value, first.clone());
        let twice = with.update("a.weight".into(), [3, 4], 0.01, once.clone(), second.clone());
        let velocity = first * 0.2 * 0.8 + second.clone() * 0.2;
        assert_close_tensors(&with.velocities["a.weight"], &velocity, 1e-6);
        let expected = muon(0.0).update("a.weight".into(), [3, 4], 0.01, once, velocity * 0.8 + second * 0.2);
        assert_close_tensors(&twice, &expected, 1e-5);
    }
}
