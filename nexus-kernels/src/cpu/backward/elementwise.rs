//! Activations, gated products, gated residuals and rotations with their backward passes.

use burn::tensor::Tensor;

use super::{
    super::{
        Level,
        elementwise::{self as forward, exp, normal},
        level::with_level,
        rows::{Rows, map_rows},
        wrap,
    },
    Gradient, gradient,
    sums::rows_and_sums,
};
use crate::activation::Function;

/// The gradient of `function(x)`.
pub(super) fn activate<const D: usize>(
    function: Function,
    x: &Tensor<D>,
    grad: Tensor<D>,
) -> Result<Tensor<D>, Tensor<D>> {
    let Some(x) = Rows::of(x).filter(|_| x.dims() == grad.dims()) else { return Err(grad) };
    times_derivative(function, grad, &x, None)
}

/// The gradients of `function(x) * y`; that of the result comes back if the kernel does not take the tensors.
pub(super) fn activate_times<const D: usize>(
    function: Function,
    [x, y]: [&Tensor<D>; 2],
    grad: Tensor<D>,
    [wants_x, wants_y]: [bool; 2],
) -> Result<[Option<Gradient>; 2], Tensor<D>> {
    let fits = x.dims() == y.dims();
    let (Some(rows), Some(factors)) = (Rows::of(x).filter(|_| fits), Rows::of(y)) else { return Err(grad) };
    let grad_x = match wants_x {
        true => Some(gradient(times_derivative(function, grad.clone(), &rows, Some(&factors))?)),
        false => None,
    };
    let grad_y = match wants_y {
        true => Some(forward::activate_times(function, x.clone(), grad).map_err(|(_, grad)| grad)?),
        false => None,
    };
    Ok([grad_x, grad_y.map(gradient)])
}

/// `grad * function'(x) * factor`.
fn times_derivative<const D: usize>(
    function: Function,
    grad: Tensor<D>,
    x: &Rows,
    factor: Option<&Rows>,
) -> Result<Tensor<D>, Tensor<D>> {
    let (level, width) = (Level::detect(), grad.dims()[D - 1]);
    map_rows(grad, |first, values| {
        for (i, values) in values.chunks_exact_mut(width).enumerate() {
            multiply_by_derivative(level, function, values, x.row(first + i));
            if let Some(factor) = factor {
                multiply(level, values, factor.row(first + i));
            }
        }
    })
}

fn multiply(level: Level, values: &mut [f32], factors: &[f32]) {
    with_level!(
        level,
        fn run(values: &mut [f32], factors: &[f32]) {
            for (value, factor) in values.iter_mut().zip(factors) {
                *value *= factor;
            }
        }
    );
}

/// Multiplies values by the derivative of the activation at `x`.
fn multiply_by_derivative(level: Level, activation: Function, values: &mut [f32], x: &[f32]) {
    with_level!(
        level,
        fn run(activation: Function, values: &mut [f32], x: &[f32]) {
            macro_rules! each {
                ($function:ident) => {
                    for (value, x) in values.iter_mut().zip(x) {
                        *value *= $function(*x);
                    }
                };
            }
            match activation {
                Function::Silu => each!(silu_derivative),
                Function::Gelu => each!(gelu_derivative),
                Function::GeluTanh => each!(gelu_tanh_derivative),
                Function::QuickGelu => each!(quick_gelu_derivative),
            }
        }
    );
}

/// Derivative of `x * sigmoid(x)`.
#[inline(always)]
pub(super) fn silu_derivative(x: f32) -> f32 {
    let sigmoid = 1.0 / (1.0 + exp(-x));
    sigmoid * (1.0 + x * (1.0 - sigmoid))
}

#[inline(always)]
fn quick_gelu_derivative(x: f32) -> f32 {
    let sigmoid = 1.0 / (1.0 + exp(-1.702 * x));
    sigmoid * (1.0 + 1.702 * x * (1.0 - sigmoid))
}

#[inline(always)]
fn gelu_tanh_derivative(x: f32) -> f32 {
    const TWO_SQRT_2_OVER_PI: f32 = 1.595_769;
    // Beyond this the derivative is 0 or 1, and the cube of more would overflow.
    let x = x.clamp(-100.0, 100.0);
    let inner = (x + x * x * x * 0.044_715) * -TWO_SQRT_2_OVER_PI;
    let sigmoid = 1.0 / (1.0 + exp(inner));
    let inner_derivative = TWO_SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044_715 * x * x);
    sigmoid + x * sigmoid * (1.0 - sigmoid) * inner_derivative
}

#[inline(always)]
fn gelu_derivative(x: f32) -> f32 {
    const DENSITY_AT_ZERO: f32 = 0.398_942_3;
    normal(x) + x * DENSITY_AT_ZERO * exp(-0.5 * x * x)
}

/// The gradients of `x + gate * y`; that of the result comes back if the kernel does not take the tensors.
///
/// # Shapes
/// - `gate`: `[batch, 1, width]`
/// - `y`, `grad`: `[batch, tokens, width]`
pub(super) fn gated_residual(
    gate: &Tensor<3>,
    y: &Tensor<3>,
    grad: Tensor<3>,
    [wants_x, wants_gate, wants_y]: [bool; 3],
) -> Result<[Option<Gradient>; 3], Tensor<3>> {
    let [batch, tokens, width] = grad.dims();
    let fits = y.dims() == grad.dims() && gate.dims() == [batch, 1, width] && !y.dims().contains(&0);
    let rows = (Rows::of(gate).filter(|_| fits), Rows::of(y), Rows::of(&grad));
    let (Some(gates), Some(rows), Some(grads)) = rows else { return Err(grad) };
    let level = Level::detect();
    let (scaled, sums) = match wants_gate || wants_y {
        true => rows_and_sums([batch * tokens, width, tokens, 1], |row, scaled, sums| {
            gate_grads(level, scaled, sums, gates.row(row / tokens), rows.row(row), grads.row(row));
        }),
        false => (vec![], vec![]),
    };
    Ok([
        wants_x.then(|| gradient(grad)),
        wants_gate.then(|| gradient(wrap(sums, [batch, 1, width]))),
        wants_y.then(|| gradient(wrap(scaled, [batch, tokens, width]))),
    ])
}

fn gate_grads(level: Level, scaled: &mut [f32], sums: &mut [f32], gate: &[f32], y: &[f32], grads: &[f32]) {
    with_level!(
        level,
        fn run(scaled: &mut [f32], sums: &mut [f32], gate: &[f32], y: &[f32], grads: &[f32]) {
            for ((scaled, gate), grad) in scaled.iter_mut().zip(gate).zip(grads) {
                *scaled = grad * gate;
            }
            for ((sum, y), grad) in sums.iter_mut().zip(y).zip(grads) {
                *sum += grad * y;
            }
        }
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derivatives_far_from_zero_are_finite() {
        for derivative in [silu_derivative, gelu_derivative, gelu_tanh_derivative, quick_gelu_derivative] {
            for (x, expected) in [(-1e4, 0.0), (-150.0, 0.0), (150.0, 1.0), (1e4, 1.0)] {
                assert_eq!(derivative(x), expected, "at {x}");
            }
        }
        assert_eq!([gelu_tanh_derivative(-1e20), gelu_tanh_derivative(1e20)], [0.0, 1.0]);
    }
}
