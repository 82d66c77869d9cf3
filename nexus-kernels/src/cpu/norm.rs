//! Normalisations, fused with what follows them: tensors -> tensor of the same shape.

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{
    Floats, Level, View,
    elementwise::silu,
    level::with_level,
    rows::{Rows, map_rows},
};
use crate::{GroupNormOptions, Norm};

/// Partial sums of a row, so that its values are added in vectors and with little rounding.
const LANES: usize = 32;
/// Values of a group whose mean and deviation are taken at a time.
const BLOCK: usize = 4096;

/// A norm of rows; the tensor comes back if the kernel does not take it.
pub(super) fn normalize<const D: usize>(x: Tensor<D>, norm: &Norm, epsilon: f64) -> Result<Tensor<D>, Tensor<D>> {
    match norm {
        Norm::Rms { weight } => rms_norm(x, weight, epsilon),
        Norm::Layer => layer_norm(x, epsilon),
        Norm::Affine { weight, bias } => affine_layer_norm(x, weight, bias, epsilon),
        Norm::Modulated { scale, shift } => modulated_layer_norm(x, shift, scale, epsilon),
    }
}

/// `weight * (x * rsqrt(mean x² + eps))` over the last dimension.
fn rms_norm<const D: usize>(x: Tensor<D>, weight: &Tensor<1>, epsilon: f64) -> Result<Tensor<D>, Tensor<D>> {
    let Some(weight) = values_of(weight, x.dims()[D - 1]) else { return Err(x) };
    let level = Level::detect();
    map_rows(x, |_, values| rms_norm_rows(level, values, &weight, epsilon))
}

fn rms_norm_rows(level: Level, values: &mut [f32], weight: &[f32], epsilon: f64) {
    with_level!(
        level,
        fn run(values: &mut [f32], weight: &[f32], epsilon: f64) {
            for row in values.chunks_exact_mut(weight.len()) {
                let mean_square = sum(row, |x| x * x) / row.len() as f32;
                let inverse = 1.0 / (mean_square + epsilon as f32).sqrt();
                for (value, weight) in row.iter_mut().zip(weight) {
                    *value = *value * inverse * weight;
                }
            }
        }
    );
}

/// `(x - mean) / sqrt(variance + eps)` over the last dimension.
fn layer_norm<const D: usize>(x: Tensor<D>, epsilon: f64) -> Result<Tensor<D>, Tensor<D>> {
    let (level, width) = (Level::detect(), x.dims()[D - 1]);
    map_rows(x, |_, values| {
        for row in values.chunks_exact_mut(width) {
            layer_norm_row(level, row, epsilon, None);
        }
    })
}

/// `layer_norm(x) * weight + bias`.
fn affine_layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: &Tensor<1>,
    bias: &Tensor<1>,
    epsilon: f64,
) -> Result<Tensor<D>, Tensor<D>> {
    let width = x.dims()[D - 1];
    let (Some(weight), Some(bias)) = (values_of(weight, width), values_of(bias, width)) else { return Err(x) };
    let level = Level::detect();
    map_rows(x, |_, values| {
        for row in values.chunks_exact_mut(width) {
            layer_norm_row(level, row, epsilon, Some((&weight, &bias)));
        }
    })
}

/// `layer_norm(x) * (1 + scale) + shift`.
///
/// # Shapes
/// - `x`: `[batch, tokens, width]`
/// - `shift`, `scale`: `[batch, 1, width]`
fn modulated_layer_norm<const D: usize>(
    x: Tensor<D>,
    shift: &Tensor<3>,
    scale: &Tensor<3>,
    epsilon: f64,
) -> Result<Tensor<D>, Tensor<D>> {
    let &[batch, tokens, width] = &x.dims()[..] else { return Err(x) };
    let fits = [shift.dims(), scale.dims()] == [[batch, 1, width]; 2];
    let (Some(shift), Some(scale)) = (Rows::of(shift).filter(|_| fits), Rows::of(scale)) else { return Err(x) };
    let factors: Vec<Vec<f32>> = (0..batch).map(|i| scale.row(i).iter().map(|scale| scale + 1.0).collect()).collect();
    let level = Level::detect();
    map_rows(x, |first, values| {
        for (i, row) in values.chunks_exact_mut(width).enumerate() {
            let batch = (first + i) / tokens;
            layer_norm_row(level, row, epsilon, Some((&factors[batch], shift.row(batch))));
        }
    })
}

fn layer_norm_row(level: Level, row: &mut [f32], epsilon: f64, affine: Option<(&[f32], &[f32])>) {
    with_level!(
        level,
        fn run(row: &mut [f32], epsilon: f64, affine: Option<(&[f32], &[f32])>) {
            let (mean, squares) = mean_and_squares(row);
            let inverse = 1.0 / (squares / row.len() as f32 + epsilon as f32).sqrt();
            match affine {
                Some((factors, addends)) => {
                    for ((value, factor), addend) in row.iter_mut().zip(factors).zip(addends) {
                        *value = (*value - mean) * inverse * factor + addend;
                    }
                }
                None => {
                    for value in row.iter_mut() {
                        *value = (*value - mean) * inverse;
                    }
                }
            }
        }
    );
}

/// Group normalisation of a picture of features `[batch, channels, height, width]`.
pub(crate) fn group_norm(x: Tensor<4>, options: &GroupNormOptions) -> Result<Tensor<4>, Tensor<4>> {
    let GroupNormOptions { weight, bias, num_groups, epsilon, silu } = options;
    let [_, channels, height, width] = x.dims();
    let (Some(weight), Some(bias)) = (values_of(weight, channels), values_of(bias, channels)) else { return Err(x) };
    let Some(floats) = Floats::of(&x) else { return Err(x) };
    let level = Level::detect();
    let group_channels = channels / *num_groups;
    let Some(statistics) = group_statistics(level, floats, group_channels * height * width, *epsilon) else {
        return Err(x);
    };
    map_rows(x, |first, values| {
        for (i, row) in values.chunks_exact_mut(width).enumerate() {
            let plane = (first + i) / height;
            let (mean, inverse) = statistics[plane / group_channels];
            let (factor, addend) = (inverse * weight[plane % channels], bias[plane % channels]);
            scale_row(level, row, [mean, factor, addend], *silu);
        }
    })
}

/// Mean and reciprocal standard deviation of every group of `size` values.
pub(super) fn group_statistics(level: Level, floats: Floats, size: usize, epsilon: f64) -> Option<Vec<(f32, f32)>> {
    let floats = floats.into_contiguous();
    let statistics = |group: &[f32]| {
        let (mut count, mut mean, mut squares) = (0.0, 0.0, 0.0);
        for block in group.chunks(BLOCK) {
            let (block_mean, block_squares) = with_level!(
                level,
                fn run(block: &[f32]) -> (f32, f32) {
                    mean_and_squares(block)
                }
            );
            // Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances.
            let (block_count, difference) = (block.len() as f64, f64::from(block_mean) - mean);
            let total = count + block_count;
            mean += difference * block_count / total;
            squares += f64::from(block_squares) + difference * difference * count * block_count / total;
            count = total;
        }
        (mean as f32, (1.0 / (squares / count + epsilon).sqrt()) as f32)
    };
    let values = floats.contiguous()?;
    if size == 0 || values.len() <= BLOCK {
        return Some(values.chunks_exact(size.max(1)).map(statistics).collect());
    }
    Some(values.par_chunks_exact(size).map(statistics).collect())
}

fn scale_row(level: Level, row: &mut [f32], [mean, factor, addend]: [f32; 3], with_silu: bool) {
    with_level!(
        level,
        fn run(row: &mut [f32], mean: f32, factor: f32, addend: f32, with_silu: bool) {
            if with_silu {
                for value in row.iter_mut() {
                    *value = silu((*value - mean) * factor + addend);
                }
            } else {
                for value in row.iter_mut() {
                    *value = (*value - mean) * factor + addend;
                }
            }
        }
    );
}

/// Weights in f32; `None` if there are not `count` or if they are not floats on the CPU.
fn values_of(weight: &Tensor<1>, count: usize) -> Option<Vec<f32>> {
    if weight.dims() != [count] {
        return None;
    }
    View::of(weight)?.into_f32()
}

/// The mean of some values, and the sum of the squares of their differences to it.
#[inline(always)]
pub(super) fn mean_and_squares(values: &[f32]) -> (f32, f32) {
    let count = values.len() as f32;
    let rough = sum(values, |x| x) / count;
    // What rounding took from the mean shows in the differences.
    let mean = rough + sum(values, |x| x - rough) / count;
    (mean, sum(values, |x| (x - mean) * (x - mean)))
}

#[inline(always)]
pub(super) fn sum(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += term(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += term(*value);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ramp, relative_drift};

    const WIDTHS: [usize; 10] = [1, 7, 16, 17, 31, 32, 80, 1280, 3001, 20_011];
    const EPSILON: f64 = 1e-6;

    /// Rows of several sizes of values, one of them far from zero.
    fn rows(width: usize) -> Vec<f32> {
        let value = |i: usize| (((i * 7919 + 17) % 2003) as f32 - 1001.0) / 1001.0;
        let row = |r: usize, [scale, offset]: [f32; 2]| (0..width).map(move |i| value(r * width + i) * scale + offset);
        let kinds = [[1.0, 0.0], [1e-4, 0.0], [1e6, 0.0], [1.0, 10.0]];
        kinds.into_iter().enumerate().flat_map(|(r, kind)| row(r, kind)).collect()
    }

    /// Mean and variance in f64.
    fn moments(values: &[f32]) -> (f64, f64) {
        let mean =
            |term: &dyn Fn(f64) -> f64| values.iter().map(|x| term(f64::from(*x))).sum::<f64>() / values.len() as f64;
        let average = mean(&|x| x);
        (average, mean(&|x| (x - average) * (x - average)))
    }

    fn check(actual: &[f32], expected: &[f64], what: &str) {
        let expected: Vec<f32> = expected.iter().map(|x| *x as f32).collect();
        let drift = relative_drift(actual, &expected);
        assert!(drift <= 2e-6, "{what}: drift {drift:e}");
    }

    #[test]
    fn rows_are_normalised_at_every_level() {
        for level in Level::available() {
            for width in WIDTHS {
                let (factors, addends) = (&rows(width)[..width], &rows(width)[width..2 * width]);
                let x = rows(width);
                let mut by_root = x.clone();
                rms_norm_rows(level, &mut by_root, factors, EPSILON);
                for (row, by_root) in x.chunks_exact(width).zip(by_root.chunks_exact(width)) {
                    let (mean, variance) = moments(row);
                    let root = (mean * mean + variance + EPSILON).sqrt();
                    let expected: Vec<f64> =
                        row.iter().zip(factors).map(|(x, w)| f64::from(*x) / root * f64::from(*w)).collect();
                    check(by_root, &expected, &format!("rms {level:?} {width}"));

                    let deviation = (variance + EPSILON).sqrt();
                    let mut centred = row.to_vec();
                    layer_norm_row(level, &mut centred, EPSILON, None);
                    let mut expected: Vec<f64> = row.iter().map(|x| (f64::from(*x) - mean) / deviation).collect();
                    check(&centred, &expected, &format!("layer {level:?} {width}"));

                    let mut affine = row.to_vec();
                    layer_norm_row(level, &mut affine, EPSILON, Some((factors, addends)));
                    for ((value, factor), addend) in expected.iter_mut().zip(factors).zip(addends) {
                        *value = *value * f64::from(*factor) + f64::from(*addend);
                    }
                    check(&affine, &expected, &format!("affine {level:?} {width}"));
                }
            }
        }
    }

    #[test]
    fn groups_are_normalised_at_every_level() {
        for level in Level::available() {
            for size in [1, 80, BLOCK, 3 * BLOCK + 17] {
                let x = ramp([1, 2, 1, size], 5) * 3.0 + 10.0;
                let values = x.to_data().try_into_vec_as::<f32>().unwrap();
                let statistics = group_statistics(level, Floats::of(&x).unwrap(), size, EPSILON).unwrap();
                assert_eq!(statistics.len(), 2);
                for (group, (mean, inverse)) in values.chunks_exact(size).zip(statistics) {
                    let (expected, variance) = moments(group);
                    check(&[mean], &[expected], &format!("mean {level:?} {size}"));
                    check(&[inverse], &[1.0 / (variance + EPSILON).sqrt()], &format!("deviation {level:?} {size}"));

                    let mut scaled = group.to_vec();
                    scale_row(level, &mut scaled, [mean, 0.5, 0.25], false);
                    let expected: Vec<f64> =
                        group.iter().map(|x| (f64::from(*x) - f64::from(mean)) * 0.5 + 0.25).collect();
                    check(&scaled, &expected, &format!("scaled {level:?} {size}"));

                    let mut activated = group.to_vec();
                    scale_row(level, &mut activated, [mean, 0.5, 0.25], true);
                    let expected: Vec<f64> = expected.iter().map(|x| x / (1.0 + (-x).exp())).collect();
                    check(&activated, &expected, &format!("silu {level:?} {size}"));
                }
            }
        }
    }
}
