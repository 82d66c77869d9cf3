//! One step of AdamW as a kernel takes it: settings and the number of the step -> what meets the values.

use burn::tensor::Tensor;

use super::AdamWOptions;

/// A parameter, its gradient, and its moments if it has any yet -> the parameter and its moments after a step.
pub(crate) type AdamWKernel =
    fn(Tensor<1>, &Tensor<1>, Option<[Tensor<1>; 2]>, &AdamWStep) -> (Tensor<1>, [Tensor<1>; 2]);

/// Numbers of a step in the precision in which they meet the values: `m = betas * m + rest * g`, likewise `v` with `g²`, and
/// `x = decay * x - lr * (m / corrections) / (sqrt(v / corrections) + eps)`.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(any(feature = "flex", feature = "cube")), expect(dead_code, reason = "read by kernels"))]
pub(crate) struct AdamWStep {
    pub(crate) betas: [f32; 2],
    /// One minus each beta.
    pub(crate) rest: [f32; 2],
    /// Sums of the weights of all gradients in each moment.
    pub(crate) corrections: [f32; 2],
    pub(crate) eps: f32,
    pub(crate) decay: f32,
    pub(crate) lr: f32,
}

impl AdamWStep {
    /// The step of a number, from one on.
    pub(crate) fn new(options: AdamWOptions, lr: f64, number: usize) -> Self {
        let AdamWOptions { betas, eps, weight_decay } = options;
        let number = i32::try_from(number).unwrap_or(i32::MAX);
        Self {
            betas,
            rest: betas.map(|beta| 1.0 - beta),
            corrections: betas.map(|beta| 1.0 - beta.powi(number)),
            eps,
            decay: (1.0 - lr * f64::from(weight_decay)) as f32,
            lr: lr as f32,
        }
    }
}
