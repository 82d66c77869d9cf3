//! Activation functions: tensor -> tensor of the same shape.

use burn::tensor::{Tensor, activation};

use crate::place::{at, dispatch};

/// A function of one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Function {
    /// `x * sigmoid(x)`.
    Silu,
    /// By the error function.
    Gelu,
    /// By the tanh approximation.
    GeluTanh,
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
}

/// `x * sigmoid(x)`.
pub fn silu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activate(Function::Silu, x)
}

/// `max(x, 0)`.
pub fn relu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activation::relu(x)
}

/// GELU by the error function (`torch.nn.GELU()`).
pub fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activate(Function::Gelu, x)
}

/// GELU by its tanh approximation (`gelu_new`, `approximate="tanh"`).
pub fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activate(Function::GeluTanh, x)
}

/// `x * sigmoid(1.702 x)`, the GELU of CLIP.
pub fn quick_gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    activate(Function::QuickGelu, x)
}

/// `silu(gate) * up`, the gate of the Qwen models.
///
/// # Shapes
/// `gate` and `up` have one shape, that of the result.
pub fn silu_mul<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    activate_times(Function::Silu, gate, up)
}

/// `gelu_tanh(gate) * up`, the gate of T5.
///
/// # Shapes
/// `gate` and `up` have one shape, that of the result.
pub fn gelu_tanh_mul<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    activate_times(Function::GeluTanh, gate, up)
}

/// `x + gate * y`, the gated residual of diffusion transformers.
///
/// # Shapes
/// - `x`, `y`: `[batch, tokens, width]`
/// - `gate`: `[batch, 1, width]`
pub fn gated_residual(x: Tensor<3>, gate: Tensor<3>, y: Tensor<3>) -> Tensor<3> {
    dispatch!(&[at(&x), at(&gate), at(&y)], gated_residual(x, gate, y))
}

fn activate<const D: usize>(function: Function, x: Tensor<D>) -> Tensor<D> {
    dispatch!(&[at(&x)], activate(function, x))
}

fn activate_times<const D: usize>(function: Function, x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
    dispatch!(&[at(&x), at(&y)], activate_times(function, x, y))
}

/// The function of every value in burn's operations.
pub(crate) fn plain<const D: usize>(function: Function, x: Tensor<D>) -> Tensor<D> {
    match function {
        Function::Silu => activation::silu(x),
        Function::Gelu => activation::gelu(x),
        Function::GeluTanh => {
            // Written with one exponential: `0.5 (1 + tanh u) = 1 / (1 + exp(-2u))`.
            const MINUS_TWO_SQRT_2_OVER_PI: f64 = -1.595_769_121_605_730_7;
            let cube = x.clone() * x.clone() * x.clone();
            let inner = (x.clone() + cube * 0.044715) * MINUS_TWO_SQRT_2_OVER_PI;
            x / (inner.exp() + 1.0)
        }
        Function::QuickGelu => x.clone() * activation::sigmoid(x * 1.702),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_close_tensors, cpu, device, input, ramp};

    fn at(points: [f32; 4], function: fn(Tensor<1>) -> Tensor<1>) -> Tensor<1> {
        function(Tensor::from_floats(points, &device()))
    }

    // Expected values: torch.nn.functional.{silu,gelu} in float64 at the same points.
    const POINTS: [f32; 4] = [-3.0, -0.5, 0.75, 40.0];

    const FUNCTIONS: [Function; 4] = [Function::Silu, Function::Gelu, Function::GeluTanh, Function::QuickGelu];

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

    #[test]
    fn activations_match_the_plain_formulation() {
        for function in FUNCTIONS {
            let (fast, plain) = (|x: Tensor<3>| activate(function, x), |x: Tensor<3>| plain(function, x));
            for shape in [[1, 1, 1], [1, 3, 7], [2, 5, 17], [1, 13, 1280], [3, 50, 301]] {
                let x = input(shape, 3) * 9.0;
                assert_close_tensors(&fast(x.clone()), &plain(x.clone()), 2e-6);
                let permuted = x.clone().swap_dims(0, 1);
                assert_close_tensors(&fast(permuted.clone()), &plain(permuted), 2e-6);
                let width = shape[2].div_ceil(2);
                let narrowed = x.narrow(2, shape[2] - width, width);
                assert_close_tensors(&fast(narrowed.clone()), &plain(narrowed), 2e-6);
            }
        }
    }

    #[test]
    fn values_that_are_not_finite_stay_what_they_are_in_the_plain_formulation() {
        let points = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30, 100.0, -100.0, 0.0, -0.0, 1e-40];
        let x = Tensor::<1>::from_floats(points, &cpu());
        let values = |y: Tensor<1>| y.into_data().try_to_vec::<f32>().unwrap();
        for function in FUNCTIONS {
            let (fast, plain) = (values(activate(function, x.clone())), values(plain(function, x.clone())));
            for ((x, fast), plain) in points.iter().zip(fast).zip(plain) {
                let same = fast.is_nan() && plain.is_nan() || fast == plain || (fast - plain).abs() < 1e-36;
                assert!(same, "at {x}: {fast}, plain {plain}");
            }
        }
    }

    #[test]
    fn products_and_residuals_match_the_plain_formulation() {
        for [batch, tokens, width] in [[1, 1, 1], [1, 1, 3584], [2, 7, 17], [3, 11, 80], [2, 9, 2100]] {
            let x = input([batch, tokens, width], 1);
            let y = input([batch, tokens + 2, width + 3], 2).narrow(1, 1, tokens).narrow(2, 2, width);
            assert_close_tensors(
                &silu_mul(x.clone(), y.clone()),
                &(plain(Function::Silu, x.clone()) * y.clone()),
                2e-6,
            );
            assert_close_tensors(
                &gelu_tanh_mul(y.clone(), x.clone()),
                &(plain(Function::GeluTanh, y.clone()) * x.clone()),
                2e-6,
            );
            let gate = input([batch, 1, 3 * width], 3).narrow(2, width, width);
            let expected = y.clone() + x.clone() * gate.clone();
            assert_close_tensors(&gated_residual(y, gate, x), &expected, 2e-6);
        }
    }

    #[test]
    fn other_dtypes_and_autodiff_take_the_plain_formulation() {
        use burn::tensor::DType;
        let x = ramp([1, 2, 5], 1);
        let half = silu_mul(x.clone().cast(DType::BF16), x.clone().cast(DType::BF16));
        assert_eq!(half.dtype(), DType::BF16);
        assert_close_tensors(&half.cast(DType::F32), &silu_mul(x.clone(), x.clone()), 2e-2);
        let tracked = Tensor::<3>::from_data(x.to_data(), &cpu().autodiff()).require_grad();
        let gradients =
            gated_residual(tracked.clone(), tracked.clone().narrow(1, 0, 1), silu(tracked.clone())).sum().backward();
        assert!(tracked.grad(&gradients).is_some());
    }
}
