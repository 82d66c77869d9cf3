//! Phases of a recipe: data, steps, learning rates and optimizer, with the settings of the part that is trained.

use crate::optim::{AdamWOptions, MuonOptions, NamePattern};
use nexus_core::config::ConfigError;
use serde::{Deserialize, Serialize};

use super::{DataRecipe, one, positive, settings::Settings};

/// One phase of a recipe; each begins with a fresh optimizer and the averaged weights of the one before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase<S> {
    /// Name for progress and metrics.
    pub name: String,
    /// Optimizer steps.
    pub steps: usize,
    /// Samples of one forward pass.
    pub batch_size: usize,
    /// Forward passes of one step; their gradients are averaged.
    #[serde(default = "one")]
    pub accumulation: usize,
    /// Sources and their shares.
    pub data: Vec<DataRecipe>,
    /// Number of samples that are seen again and again; frozen parts encode them once and keep that in memory. Without
    /// it, every sample is new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distinct_samples: Option<u64>,
    /// Parameters that stay as they are, by their names in the released files.
    #[serde(default)]
    pub frozen: Vec<NamePattern>,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Steps over which the learning rate rises from zero.
    #[serde(default)]
    pub warmup_steps: usize,
    /// What it does afterwards.
    #[serde(default)]
    pub schedule: Schedule,
    /// Settings of AdamW.
    #[serde(default)]
    pub optimizer: AdamWOptions,
    /// Matrices that Muon steps instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub muon: Option<MuonOptions>,
    /// Largest norm of all gradients together; longer ones are scaled down to it.
    #[serde(default)]
    pub max_grad_norm: Option<f64>,
    /// Decay of the averaged weights, which are exported instead of the last ones.
    #[serde(default)]
    pub ema_decay: Option<f64>,
    /// Dtype of the activations; the weights of the optimizer are f32 always.
    #[serde(default)]
    pub compute_dtype: ComputeDType,
    /// What the part of the model needs beside this.
    #[serde(default)]
    pub settings: S,
}

/// Course of the learning rate after warming up.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// Stays.
    #[default]
    Constant,
    /// Falls along half a cosine to this share of the highest rate.
    Cosine {
        /// Share that is left at the end, in `0..=1`.
        end: f64,
    },
}

/// Dtype of the activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeDType {
    /// 32 bits.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
}

impl From<ComputeDType> for burn::tensor::FloatDType {
    fn from(dtype: ComputeDType) -> Self {
        match dtype {
            ComputeDType::F32 => Self::F32,
            ComputeDType::Bf16 => Self::BF16,
        }
    }
}

impl<S> Phase<S> {
    /// Learning rate of a step, counted from 0.
    pub fn learning_rate_at(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        match self.schedule {
            Schedule::Constant => self.learning_rate,
            Schedule::Cosine { end } => {
                let length = (self.steps - self.warmup_steps).max(1) as f64;
                let done = (step - self.warmup_steps) as f64 / length;
                let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos());
                self.learning_rate * (end + (1.0 - end) * cosine)
            }
        }
    }

    /// Samples of one step.
    pub(crate) fn samples_per_step(&self) -> usize {
        self.batch_size * self.accumulation
    }

    /// Whether a parameter of this name stays as it is.
    pub(crate) fn freezes(&self, name: &str) -> bool {
        self.frozen.iter().any(|pattern| pattern.matches(name))
    }
}

/// Checks the fields of a phase against each other.
pub(super) fn validate<S: Settings>(phase: &Phase<S>) -> Result<(), ConfigError> {
    let wrong = |field, reason: String| Err(ConfigError::incoherent(field, reason));
    positive("steps", phase.steps)?;
    positive("batch_size", phase.batch_size)?;
    positive("accumulation", phase.accumulation)?;
    positive("data", phase.data.len())?;
    if phase.data.iter().any(|data| !(data.weight.is_finite() && data.weight > 0.0)) {
        return wrong("weight", "every source needs a positive share".to_string());
    }
    if !(phase.learning_rate.is_finite() && phase.learning_rate > 0.0) {
        return wrong("learning_rate", format!("{} must be positive", phase.learning_rate));
    }
    if phase.warmup_steps > phase.steps {
        return wrong("warmup_steps", format!("{} are more than the {} steps", phase.warmup_steps, phase.steps));
    }
    if let Schedule::Cosine { end } = phase.schedule
        && !(0.0..=1.0).contains(&end)
    {
        return wrong("schedule", format!("the end {end} must lie in 0..=1"));
    }
    let AdamWOptions { betas, eps, weight_decay } = phase.optimizer;
    if betas.iter().any(|beta| !(0.0..1.0).contains(beta)) || eps.is_nan() || eps <= 0.0 || weight_decay < 0.0 {
        return wrong("optimizer", "betas must lie in 0..1, eps above 0, weight_decay not below 0".to_string());
    }
    if phase.muon.as_ref().is_some_and(|muon| !(0.0..1.0).contains(&muon.momentum)) {
        return wrong("muon", "momentum must lie in 0..1".to_string());
    }
    if phase.max_grad_norm.is_some_and(|norm| norm.is_nan() || norm <= 0.0) {
        return wrong("max_grad_norm", "must be positive; leave it out for no limit".to_string());
    }
    if phase.ema_decay.is_some_and(|decay| !(0.0..1.0).contains(&decay)) {
        return wrong("ema_decay", "must lie in 0..1".to_string());
    }
    if phase.distinct_samples == Some(0) {
        return wrong("distinct_samples", "must be positive; leave it out for no limit".to_string());
    }
    phase.settings.validate()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::AutoencoderSettings;

    #[test]
    fn learning_rates_rise_and_fall() {
        let phase = |schedule| {
            let phase = json!({
                "name": "", "steps": 110, "batch_size": 1, "data": [], "learning_rate": 2.0, "warmup_steps": 10,
                "schedule": schedule,
            });
            serde_json::from_value::<Phase<AutoencoderSettings>>(phase).unwrap()
        };
        let cosine = phase(json!({"cosine": {"end": 0.1}}));
        let expected = [
            (0, 0.2),
            (4, 1.0),
            (9, 2.0),
            (10, 2.0),
            (35, 2.0 * (0.1 + 0.9 * 0.5 * (1.0 + 0.5f64.sqrt()))),
            (60, 1.1),
            (85, 2.0 * (0.1 + 0.9 * 0.5 * (1.0 - 0.5f64.sqrt()))),
            (110, 0.2),
            (200, 0.2),
        ];
        for (step, rate) in expected {
            assert!((cosine.learning_rate_at(step) - rate).abs() < 1e-12, "{step}: {}", cosine.learning_rate_at(step));
        }
        let constant = phase(json!("constant"));
        assert_eq!([0, 4, 9, 10, 60, 109].map(|step| constant.learning_rate_at(step)), [0.2, 1.0, 2.0, 2.0, 2.0, 2.0]);
    }
}
