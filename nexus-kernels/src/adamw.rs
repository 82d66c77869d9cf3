//! One step of AdamW: a parameter, its gradient and its moments -> the parameter and the moments after it.

use burn::tensor::Tensor;

use crate::place::{at, dispatch};

/// Settings of AdamW, and which step it is.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// Decay rates of the moments.
    pub betas: [f32; 2],
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Learning rate.
    pub lr: f64,
    /// Number of the step, from one on.
    pub number: usize,
}

/// Numbers of a step in the precision in which they meet the values: `m = betas * m + rest * g`, likewise `v` with `g²`, and
/// `x = decay * x - lr * (m / corrections) / (sqrt(v / corrections) + eps)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factors {
    pub(crate) betas: [f32; 2],
    /// One minus each beta.
    pub(crate) rest: [f32; 2],
    /// Sums of the weights of all gradients in each moment.
    pub(crate) corrections: [f32; 2],
    pub(crate) eps: f32,
    pub(crate) decay: f32,
    pub(crate) lr: f32,
}

impl From<&AdamWStep> for Factors {
    fn from(step: &AdamWStep) -> Self {
        let &AdamWStep { betas, eps, weight_decay, lr, number } = step;
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

/// The parameter and its moments after a step, in the same memory where nobody else uses it; without moments they are
/// zero.
///
/// # Shapes
/// All `[values]`.
///
/// # Panics
/// If the lengths differ.
pub fn adamw(
    value: Tensor<1>,
    gradient: Tensor<1>,
    moments: Option<[Tensor<1>; 2]>,
    step: &AdamWStep,
) -> (Tensor<1>, [Tensor<1>; 2]) {
    dispatch!(&[at(&value), at(&gradient)], adamw(value, gradient, moments, &Factors::from(step)))
}

/// [`adamw`] in burn's operations.
pub(crate) fn plain(
    value: Tensor<1>,
    gradient: Tensor<1>,
    moments: Option<[Tensor<1>; 2]>,
    step: &Factors,
) -> (Tensor<1>, [Tensor<1>; 2]) {
    let [first, second] = moments.unwrap_or_else(|| [gradient.zeros_like(), gradient.zeros_like()]);
    let first = first * step.betas[0] + gradient.clone() * step.rest[0];
    let second = second * step.betas[1] + gradient.square() * step.rest[1];
    let root = (second.clone() / step.corrections[1]).sqrt() + step.eps;
    let value = value * step.decay - first.clone() / step.corrections[0] / root * step.lr;
    (value, [first, second])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close_tensors, device, input};

    #[test]
    fn steps_are_the_formulas_and_leave_shared_tensors_alone() {
        for count in [1, 18, 70_004] {
            let (mut value, mut moments) = (input([count], 1), None);
            let mut expected = (value.clone(), [(); 2].map(|()| Tensor::zeros([count], &device())));
            for number in 1..=3 {
                let gradient: Tensor<1> = input([count], 10 + number) * 0.3;
                let step = AdamWStep { betas: [0.9, 0.99], eps: 1e-6, weight_decay: 0.05, lr: 0.02, number };
                let (before, kept) = (value.clone(), value.clone() * 1.0);
                let by_burn = plain(value.clone(), gradient.clone(), moments.clone(), &Factors::from(&step));
                let (stepped, [first, second]) = adamw(value, gradient.clone(), moments, &step);
                assert_close_tensors(&before, &kept, 0.0);
                let (x, [m, v]) = expected;
                let m: Tensor<1> = m * 0.9 + gradient.clone() * 0.1;
                let v: Tensor<1> = v * 0.99 + gradient.square() * 0.01;
                let corrected = |x: &Tensor<1>, beta: f64| x.clone() / (1.0 - beta.powi(number as i32));
                let x = x * (1.0 - 0.02 * 0.05) - corrected(&m, 0.9) / (corrected(&v, 0.99).sqrt() + 1e-6) * 0.02;
                for (stepped, [first, second]) in [(&stepped, [&first, &second]), (&by_burn.0, by_burn.1.each_ref())] {
                    assert_close_tensors(stepped, &x, 1e-5);
                    assert_close_tensors(first, &m, 1e-5);
                    assert_close_tensors(second, &v, 1e-5);
                }
                (value, moments, expected) = (stepped, Some([first, second]), (x, [m, v]));
            }
        }
    }
}
