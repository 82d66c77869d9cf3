//! Activations, gated products and gated residuals: tensors -> tensor of the same shape.
//!
//! The functions of one value have no branches, so that loops over them are vectorised, and give the same bits at every
//! [`Level`].

use burn::tensor::Tensor;

use super::{
    Level,
    level::with_level,
    rows::{Rows, map_rows},
};
use crate::activation::Function;

/// Runs `$run!(function)` with the function of one value for a [`Function`], chosen outside of the loop.
macro_rules! choose {
    ($activation:expr, $run:ident) => {
        match $activation {
            Function::Silu => $run!(silu),
            Function::Gelu => $run!(gelu),
            Function::GeluTanh => $run!(gelu_tanh),
            Function::QuickGelu => $run!(quick_gelu),
        }
    };
}

/// `activation(x)`.
pub(crate) fn activate<const D: usize>(activation: Function, x: Tensor<D>) -> Result<Tensor<D>, Tensor<D>> {
    let level = Level::detect();
    map_rows(x, |_, values| activate_slice(level, activation, values))
}

/// `activation(x) * y`; the tensors come back if the kernel does not take them.
pub(crate) fn activate_times<const D: usize>(
    activation: Function,
    x: Tensor<D>,
    y: Tensor<D>,
) -> Result<Tensor<D>, (Tensor<D>, Tensor<D>)> {
    let width = x.dims()[D - 1];
    let Some(rows) = Rows::of(&y).filter(|_| x.dims() == y.dims()) else { return Err((x, y)) };
    let level = Level::detect();
    let product = map_rows(x, |first, values| {
        for (i, values) in values.chunks_exact_mut(width).enumerate() {
            activate_times_slice(level, activation, values, rows.row(first + i));
        }
    });
    product.map_err(|x| (x, y))
}

/// `x + gate * y`; `y` comes back if the kernel does not take the tensors.
///
/// # Shapes
/// - `x`, `y`: `[batch, tokens, width]`
/// - `gate`: `[batch, 1, width]`
pub(crate) fn gated_residual(x: &Tensor<3>, gate: &Tensor<3>, y: Tensor<3>) -> Result<Tensor<3>, Tensor<3>> {
    let [batch, tokens, width] = y.dims();
    let fits = x.dims() == y.dims() && gate.dims() == [batch, 1, width];
    let (Some(x), Some(gate)) = (Rows::of(x).filter(|_| fits), Rows::of(gate)) else { return Err(y) };
    let level = Level::detect();
    map_rows(y, |first, values| {
        for (i, values) in values.chunks_exact_mut(width).enumerate() {
            add_gated_slice(level, values, gate.row((first + i) / tokens), x.row(first + i));
        }
    })
}

fn add_gated_slice(level: Level, values: &mut [f32], gate: &[f32], x: &[f32]) {
    with_level!(
        level,
        fn run(values: &mut [f32], gate: &[f32], x: &[f32]) {
            for ((value, gate), x) in values.iter_mut().zip(gate).zip(x) {
                *value = x + gate * *value;
            }
        }
    );
}

fn activate_slice(level: Level, activation: Function, values: &mut [f32]) {
    with_level!(
        level,
        fn run(activation: Function, values: &mut [f32]) {
            // A `for` loop: `for_each` would not always be inlined here, and then not be compiled for the level.
            macro_rules! each {
                ($function:ident) => {
                    for value in values.iter_mut() {
                        *value = $function(*value);
                    }
                };
            }
            choose!(activation, each)
        }
    );
}

fn activate_times_slice(level: Level, activation: Function, values: &mut [f32], factors: &[f32]) {
    with_level!(
        level,
        fn run(activation: Function, values: &mut [f32], factors: &[f32]) {
            macro_rules! each {
                ($function:ident) => {
                    for (value, factor) in values.iter_mut().zip(factors) {
                        *value = $function(*value) * factor;
                    }
                };
            }
            choose!(activation, each)
        }
    );
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

#[inline(always)]
pub(super) fn quick_gelu(x: f32) -> f32 {
    x / (1.0 + exp(-1.702 * x))
}

/// `0.5 (1 + tanh u) = 1 / (1 + exp(-2u))`.
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> f32 {
    const MINUS_TWO_SQRT_2_OVER_PI: f32 = -1.595_769;
    let inner = (x + x * x * x * 0.044_715) * MINUS_TWO_SQRT_2_OVER_PI;
    x / (exp(inner) + 1.0)
}

#[inline(always)]
pub(super) fn gelu(x: f32) -> f32 {
    x * normal(x)
}

/// The probability that a normal variable is under `x`: `(1 + erf(x / sqrt 2)) / 2`, to `8e-8`.
///
/// It is `1/2 + x q(x²)` around zero and `exp(-z²/2) t p(t)` with `t = 1 / (1 + z/4)` at `z = -x` from 1 on; `q` and
/// `p` are fitted at Chebyshev nodes, `p` up to 14.5, where the exponential has vanished.
#[inline(always)]
pub(super) fn normal(x: f32) -> f32 {
    const Q: [f32; 6] = [-7.660_538e-6, 0.000_113_502_3, -0.001_186_344, 0.009_973_328, -0.066_490_36, 0.398_942_3];
    const P: [f32; 8] = [
        -0.046_874_255,
        0.109_883_611,
        -0.023_563_777,
        0.093_424_29,
        0.072_939_99,
        0.094_792_51,
        0.099_626_01,
        0.099_739_27,
    ];
    let z = x.abs();
    let near = 0.5 + x * polynomial(&Q, x * x);
    let t = 1.0 / (1.0 + 0.25 * z);
    let tail = exp(-0.5 * z * z) * t * polynomial(&P, t);
    let far = if x < 0.0 { tail } else { 1.0 - tail };
    if z < 1.0 { near } else { far }
}

/// `e^x` to one unit in the last place, with subnormal results, infinity and NaN.
///
/// `e^x = 2^n e^r` with `|r| <= ln 2 / 2`, and `e^r = 1 + r + r² p(r)`; `p` is fitted at Chebyshev nodes to `2e-10`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const P: [f32; 6] = [0.000_198_909_91, 0.001_393_365, 0.008_333_311, 0.041_666_465, 0.166_666_67, 0.5];
    /// Adding it rounds to a whole number, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// The high part has few bits: its product with `n` is exact.
    const LN_2: (f32, f32) = (0.693_359_4, -0.000_212_194_44);
    // Not `clamp`, `min` or `max`: these two comparisons leave NaN as it is in one instruction each.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -105.0 { -105.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2.0) - n * LN_2.1;
    let power = 1.0 + (r + r * r * polynomial(&P, r));
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    // In two steps, because 2^n alone can be out of range where e^x is not.
    let half = n >> 1;
    power * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// Highest power first.
#[inline(always)]
fn polynomial<const N: usize>(coefficients: &[f32; N], x: f32) -> f32 {
    let mut sum = coefficients[0];
    for coefficient in &coefficients[1..] {
        sum = sum * x + coefficient;
    }
    sum
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, TensorData};

    use super::*;
    use crate::testing::cpu;

    const LENGTHS: [usize; 7] = [0, 1, 7, 16, 17, 80, 1283];

    fn points(count: usize, largest: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 / (count - 1).max(1) as f32 * 2.0 - 1.0) * largest).collect()
    }

    #[test]
    fn exp_is_right_to_one_unit_in_the_last_place() {
        for x in points(1_000_003, 88.7) {
            let (actual, expected) = (exp(x), f64::from(x).exp());
            let unit = f64::from(f32::EPSILON) * expected;
            assert!((f64::from(actual) - expected).abs() <= unit.max(1.5e-45), "exp({x}) = {actual}, not {expected}");
        }
        let limits = [f32::INFINITY, 1e30, 88.8, -150.0, -1e30, f32::NEG_INFINITY].map(exp);
        assert_eq!(limits, [f32::INFINITY, f32::INFINITY, f32::INFINITY, 0.0, 0.0, 0.0]);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(-100.0), (-100.0f64).exp() as f32);
    }

    #[test]
    fn normal_is_right() {
        let points = points(200_002, 15.0);
        // Its product with x is the GELU, which the backend has in f64.
        let x = points.iter().map(|&x| f64::from(x)).collect();
        let x = Tensor::<1>::from_data(TensorData::new(x, [points.len()]), (&cpu(), DType::F64));
        let products = crate::gelu(x).into_data().try_to_vec::<f64>().unwrap();
        for (x, product) in points.into_iter().zip(products) {
            let (actual, expected) = (f64::from(normal(x)), product / f64::from(x));
            assert!((actual - expected).abs() <= 8e-8, "{x}: {actual}, not {expected}");
        }
    }

    #[test]
    fn activations_are_right_and_have_the_same_bits_at_every_level() {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let tanh = |x: f64| (0.797_884_560_802_865_4 * (x + 0.044_715 * x * x * x)).tanh();
        for level in Level::available() {
            for count in LENGTHS {
                let x = points(count, 11.0);
                let run = |activation| {
                    let (mut alone, mut product) = (x.clone(), x.clone());
                    activate_slice(level, activation, &mut alone);
                    activate_times_slice(level, activation, &mut product, &x);
                    for ((alone, product), x) in alone.iter().zip(product).zip(&x) {
                        assert_eq!(alone * x, product, "{activation:?} {level:?}");
                    }
                    alone
                };
                let check = |activation, oracle: &dyn Fn(f64) -> f64| {
                    for (x, y) in x.iter().zip(run(activation)) {
                        let expected = oracle(f64::from(*x));
                        let error = (f64::from(y) - expected).abs();
                        assert!(
                            error <= 3e-7 * expected.abs().max(0.1),
                            "{activation:?} {level:?} {x}: {y}, {expected}"
                        );
                    }
                };
                check(Function::Silu, &|x| x * sigmoid(x));
                check(Function::QuickGelu, &|x| x * sigmoid(1.702 * x));
                check(Function::GeluTanh, &|x| 0.5 * x * (1.0 + tanh(x)));
                assert_eq!(run(Function::Gelu), x.iter().map(|x| gelu(*x)).collect::<Vec<_>>());
                assert_eq!(run(Function::Silu), x.iter().map(|x| silu(*x)).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn gated_residuals_are_right_at_every_level() {
        for level in Level::available() {
            for count in LENGTHS {
                let (x, gate, y) = (points(count, 3.0), points(count, 0.7), points(count, -2.0));
                let mut sum = y.clone();
                add_gated_slice(level, &mut sum, &gate, &x);
                let expected: Vec<f32> = (0..count).map(|i| x[i] + gate[i] * y[i]).collect();
                assert_eq!(sum, expected, "{level:?}");
            }
        }
    }
}
