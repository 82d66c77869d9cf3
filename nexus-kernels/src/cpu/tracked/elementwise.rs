//! Activations, gated products, gated residuals and rotations with their backward passes.

use burn::tensor::Tensor;

use super::{
    super::{
        Level,
        elementwise::{self as plain, exp, normal},
        level::with_level,
        rotary,
        rows::{Rows, map_rows},
        wrap,
    },
    Operand, gradient, parents, record,
    sums::rows_and_sums,
};
use crate::{Function, Pairs};

/// `activation(x)`.
pub(in super::super) fn activate<const D: usize>(activation: Function, x: Tensor<D>) -> Result<Tensor<D>, Tensor<D>> {
    let Some(operand) = Operand::of(&x) else { return Err(x) };
    let Ok(result) = plain::activate(activation, operand.value.clone()) else { return Err(x) };
    let kept = operand.value.clone();
    Ok(record(parents![operand], result, move |upstream, _| {
        [Some(gradient(times_slope(activation, upstream, &kept, None)))]
    }))
}

/// `activation(x) * y`.
pub(in super::super) fn activate_times<const D: usize>(
    activation: Function,
    x: Tensor<D>,
    y: Tensor<D>,
) -> Result<Tensor<D>, (Tensor<D>, Tensor<D>)> {
    let (Some(of_x), Some(of_y)) = (Operand::of(&x), Operand::of(&y)) else { return Err((x, y)) };
    let values = (of_x.value.clone(), of_y.value.clone());
    let Ok(result) = plain::activate_times(activation, values.0.clone(), values.1.clone()) else { return Err((x, y)) };
    Ok(record(parents![of_x, of_y], result, move |upstream, [of_x, of_y]| {
        let (x, y) = &values;
        let slope = of_x.then(|| gradient(times_slope(activation, upstream.clone(), x, Some(y))));
        let factor = of_y.then(|| plain::activate_times(activation, x.clone(), upstream));
        [slope, factor.and_then(Result::ok).map(gradient)]
    }))
}

/// `upstream * activation'(x) * factor`.
fn times_slope<const D: usize>(
    activation: Function,
    upstream: Tensor<D>,
    x: &Tensor<D>,
    factor: Option<&Tensor<D>>,
) -> Tensor<D> {
    let (level, width) = (Level::detect(), x.dims()[D - 1]);
    let (rows, factors) = (rows_of(x), factor.map(rows_of));
    let product = map_rows(upstream, |first, values| {
        for (i, values) in values.chunks_exact_mut(width).enumerate() {
            slopes(level, activation, values, rows.row(first + i));
            if let Some(factors) = &factors {
                multiply(level, values, factors.row(first + i));
            }
        }
    });
    product.unwrap_or_else(|upstream| upstream)
}

/// Rows of a tensor that a forward kernel has read.
fn rows_of<const D: usize>(tensor: &Tensor<D>) -> Rows {
    Rows::of(tensor).unwrap_or_else(|| unreachable!("the forward kernel read it"))
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

/// Multiplies values by the slope of the activation at `x`.
fn slopes(level: Level, activation: Function, values: &mut [f32], x: &[f32]) {
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
                Function::Silu => each!(silu_slope),
                Function::Gelu => each!(gelu_slope),
                Function::GeluTanh => each!(gelu_tanh_slope),
                Function::QuickGelu => each!(quick_gelu_slope),
            }
        }
    );
}

/// Slope of `x * sigmoid(x)`.
#[inline(always)]
pub(super) fn silu_slope(x: f32) -> f32 {
    let sigmoid = 1.0 / (1.0 + exp(-x));
    sigmoid * (1.0 + x * (1.0 - sigmoid))
}

#[inline(always)]
fn quick_gelu_slope(x: f32) -> f32 {
    let sigmoid = 1.0 / (1.0 + exp(-1.702 * x));
    sigmoid * (1.0 + 1.702 * x * (1.0 - sigmoid))
}

#[inline(always)]
fn gelu_tanh_slope(x: f32) -> f32 {
    const TWO_SQRT_2_OVER_PI: f32 = 1.595_769;
    // Beyond this the slope is 0 or 1, and the cube of more would overflow.
    let x = x.clamp(-100.0, 100.0);
    let inner = (x + x * x * x * 0.044_715) * -TWO_SQRT_2_OVER_PI;
    let sigmoid = 1.0 / (1.0 + exp(inner));
    let slope = TWO_SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044_715 * x * x);
    sigmoid + x * sigmoid * (1.0 - sigmoid) * slope
}

#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    const DENSITY_AT_ZERO: f32 = 0.398_942_3;
    normal(x) + x * DENSITY_AT_ZERO * exp(-0.5 * x * x)
}

/// `x + gate * y`.
///
/// # Shapes
/// As the plain kernel's.
pub(in super::super) fn gated_residual(x: &Tensor<3>, gate: &Tensor<3>, y: Tensor<3>) -> Result<Tensor<3>, Tensor<3>> {
    let (Some(of_x), Some(of_gate), Some(of_y)) = (Operand::of(x), Operand::of(gate), Operand::of(&y)) else {
        return Err(y);
    };
    let (gate, values) = (of_gate.value.clone(), of_y.value.clone());
    let Ok(result) = plain::gated_residual(&of_x.value, &gate, values.clone()) else { return Err(y) };
    Ok(record(parents![of_x, of_gate, of_y], result, move |upstream, [of_x, of_gate, of_y]| {
        let [batch, tokens, width] = upstream.dims();
        let (level, gates, rows, slopes) = (Level::detect(), rows_of(&gate), rows_of(&values), rows_of(&upstream));
        let (scaled, sums) = match of_gate || of_y {
            true => rows_and_sums([batch * tokens, width, tokens, 1], |row, scaled, sums| {
                gate_slopes(level, scaled, sums, gates.row(row / tokens), rows.row(row), slopes.row(row));
            }),
            false => (vec![], vec![]),
        };
        [
            of_x.then(|| gradient(upstream)),
            of_gate.then(|| gradient(wrap(sums, [batch, 1, width]))),
            of_y.then(|| gradient(wrap(scaled, [batch, tokens, width]))),
        ]
    }))
}

fn gate_slopes(level: Level, scaled: &mut [f32], sums: &mut [f32], gate: &[f32], y: &[f32], slopes: &[f32]) {
    with_level!(
        level,
        fn run(scaled: &mut [f32], sums: &mut [f32], gate: &[f32], y: &[f32], slopes: &[f32]) {
            for ((scaled, gate), slope) in scaled.iter_mut().zip(gate).zip(slopes) {
                *scaled = slope * gate;
            }
            for ((sum, y), slope) in sums.iter_mut().zip(y).zip(slopes) {
                *sum += slope * y;
            }
        }
    );
}

/// Rotates pairs of features; the tables are constants.
///
/// # Shapes
/// As the plain kernel's.
pub(in super::super) fn rotate(
    x: Tensor<4>,
    cos: &Tensor<3>,
    sin: &Tensor<3>,
    pairs: Pairs,
) -> Result<Tensor<4>, Tensor<4>> {
    let (Some(of_x), Some(of_cos), Some(of_sin)) = (Operand::of(&x), Operand::of(cos), Operand::of(sin)) else {
        return Err(x);
    };
    if of_cos.tracked || of_sin.tracked {
        return Err(x);
    }
    let (cos, sin) = (of_cos.value, of_sin.value);
    let Ok(result) = rotary::rotate(of_x.value.clone(), &cos, &sin, pairs) else { return Err(x) };
    Ok(record(parents![of_x], result, move |upstream, _| {
        // The inverse of a rotation is its transpose.
        let back = rotary::rotate(upstream, &cos, &sin.clone().neg(), pairs);
        [back.ok().map(gradient)]
    }))
}

#[cfg(test)]
mod tests {
    use burn::tensor::activation;

    use super::*;
    use crate::{cpu::tracked::tests::check, testing::ramp};

    const SHAPES: [[usize; 3]; 4] = [[1, 1, 1], [2, 5, 7], [1, 13, 131], [3, 100, 67]];

    fn plain(kind: Function, x: Tensor<3>) -> Tensor<3> {
        match kind {
            Function::Silu => activation::silu(x),
            Function::Gelu => activation::gelu(x),
            Function::GeluTanh => {
                let inner = (x.clone() + x.clone().powi_scalar(3) * 0.044_715) * 0.797_884_560_802_865_4;
                x * 0.5 * (inner.tanh() + 1.0)
            }
            Function::QuickGelu => x.clone() * activation::sigmoid(x * 1.702),
        }
    }

    const KINDS: [Function; 4] = [Function::Silu, Function::Gelu, Function::GeluTanh, Function::QuickGelu];

    #[test]
    fn gradients_of_activations_and_products() {
        for kind in KINDS {
            for shape in SHAPES {
                check([shape], |[x]| activate(kind, x * 3.0).unwrap(), |[x]| plain(kind, x * 3.0));
                check(
                    [shape, shape],
                    |[x, y]| activate_times(kind, x.swap_dims(0, 1), y.swap_dims(0, 1)).unwrap(),
                    |[x, y]| plain(kind, x.swap_dims(0, 1)) * y.swap_dims(0, 1),
                );
            }
        }
    }

    #[test]
    fn slopes_far_from_zero_are_finite() {
        for slope in [silu_slope, gelu_slope, gelu_tanh_slope, quick_gelu_slope] {
            for (x, expected) in [(-1e4, 0.0), (-150.0, 0.0), (150.0, 1.0), (1e4, 1.0)] {
                assert_eq!(slope(x), expected, "at {x}");
            }
        }
        assert_eq!([gelu_tanh_slope(-1e20), gelu_tanh_slope(1e20)], [0.0, 1.0]);
    }

    #[test]
    fn gradients_of_gated_residuals() {
        for [batch, tokens, width] in SHAPES {
            check(
                [[batch, tokens, width], [batch, 1, width], [batch, tokens, width]],
                |[x, gate, y]| gated_residual(&x, &gate, y).unwrap(),
                |[x, gate, y]| x + gate * y,
            );
        }
    }

    #[test]
    fn gradients_of_rotations() {
        for [batch, tokens, heads, half] in [[1, 1, 1, 1], [2, 5, 3, 8], [1, 7, 2, 17]] {
            let angles = ramp([1, tokens, half], 9) * 4.0;
            let (cos, sin) = (Tensor::from_inner(angles.clone().cos()), Tensor::from_inner(angles.sin()));
            let table = crate::RotaryTable { cos: cos.clone(), sin: sin.clone() };
            let split = |x: Tensor<3>| -> Tensor<4> { x.reshape([batch, heads, tokens, 2 * half]).swap_dims(1, 2) };
            for (pairs, plain) in [
                (Pairs::Halves, crate::rotary::plain_rotate_half as fn(Tensor<4>, &crate::RotaryTable) -> Tensor<4>),
                (Pairs::Neighbours, crate::rotary::plain_rotate_interleaved),
            ] {
                check(
                    [[batch, heads, tokens * 2 * half]],
                    |[x]| rotate(split(x), &cos, &sin, pairs).unwrap(),
                    |[x]| plain(split(x), &table),
                );
            }
        }
    }
}
