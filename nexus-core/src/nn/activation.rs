//! Activation functions: tensor -> tensor of the same shape.

use burn::tensor::{Tensor, activation};

/// `x * sigmoid(x)`.
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activation::silu(x)
}

/// `max(x, 0)`.
pub fn relu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activation::relu(x)
}

/// GELU by the error function (`torch.nn.GELU()`).
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activation::gelu(x)
}

/// GELU by its tanh approximation (`gelu_new`, `approximate="tanh"`).
///
/// Written with one exponential: `0.5 (1 + tanh u) = 1 / (1 + exp(-2u))`.
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    const MINUS_TWO_SQRT_2_OVER_PI: f64 = -1.595_769_121_605_730_7;
    let cube = x.clone() * x.clone() * x.clone();
    let inner = (x.clone() + cube * 0.044715) * MINUS_TWO_SQRT_2_OVER_PI;
    x / (inner.exp() + 1.0)
}

/// `x * sigmoid(1.702 x)`, the GELU of CLIP.
pub fn quick_gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    x.clone() * activation::sigmoid(x * 1.702)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, cpu};

    fn at(points: [f32; 4], function: fn(Tensor<1>) -> Tensor<1>) -> Tensor<1> {
        function(Tensor::from_floats(points, &cpu()))
    }

    // Expected values: torch.nn.functional.{silu,gelu} in float64 at the same points.
    const POINTS: [f32; 4] = [-3.0, -0.5, 0.75, 40.0];

    #[test]
    fn silu_and_both_gelus_match_torch() {
        assert_close(&at(POINTS, silu), &[-0.142_277_6, -0.188_770_33, 0.509_384_16, 40.0], 1e-6);
        assert_close(&at(POINTS, gelu), &[-0.004_049_694, -0.154_268_77, 0.580_029_5, 40.0], 1e-6);
        assert_close(&at(POINTS, gelu_tanh), &[-0.003_637_4, -0.154_286, 0.579_960_6, 40.0], 1e-6);
        assert_close(&at(POINTS, quick_gelu), &[-0.018_071_31, -0.149_611_37, 0.586_39, 40.0], 1e-5);
    }

    #[test]
    fn gelu_tanh_survives_large_magnitudes() {
        let values = at([-200.0, -1e4, 1e4, 0.0], gelu_tanh).into_data().try_to_vec::<f32>().unwrap();
        assert_eq!(values, [0.0, 0.0, 1e4, 0.0]);
    }
}
