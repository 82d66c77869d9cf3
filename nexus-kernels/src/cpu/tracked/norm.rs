//! Normalisations with their backward passes; the statistics are computed again, which is cheaper than keeping them.

use burn::tensor::{DType, Tensor};
use rayon::prelude::*;

use super::{
    super::{
        Floats, Level, View,
        level::with_level,
        norm::{self as plain, group_statistics, mean_and_squares, sum},
        rows::Rows,
        wrap,
    },
    Gradient, Operand,
    elementwise::silu_slope,
    gradient, in_dtype, parents, record,
    sums::rows_and_sums,
};
use crate::GroupNormOptions;

/// Partial sums, so that products are added in vectors.
const LANES: usize = 32;

/// `weight * (x * rsqrt(mean x² + eps))` over the last dimension.
pub(in super::super) fn rms_norm<const D: usize>(
    x: Tensor<D>,
    weight: &Tensor<1>,
    epsilon: f64,
) -> Result<Tensor<D>, Tensor<D>> {
    let (Some(of_x), Some(of_weight)) = (Operand::of(&x), Operand::of(weight)) else { return Err(x) };
    let (values, weight) = (of_x.value.clone(), of_weight.value.clone());
    let Ok(result) = plain::rms_norm(values.clone(), &weight, epsilon) else { return Err(x) };
    Ok(record(parents![of_x, of_weight], result, move |upstream, [of_x, of_weight]| {
        let (dims, width) = (values.dims(), values.dims()[D - 1]);
        let rows = values.shape().num_elements() / width;
        let (level, factors, x, slopes) = (Level::detect(), rows_of(&weight), rows_of(&values), rows_of(&upstream));
        let (of_rows, sums) = rows_and_sums([rows, width, rows, 1], |row, to, sums| {
            rms_norm_slopes(level, to, sums, x.row(row), slopes.row(row), factors.row(0), epsilon as f32);
        });
        [of_x.then(|| gradient(wrap(of_rows, dims))), of_weight.then(|| gradient(wrap(sums, [width])))]
    }))
}

fn rms_norm_slopes(
    level: Level,
    to: &mut [f32],
    sums: &mut [f32],
    x: &[f32],
    slopes: &[f32],
    factors: &[f32],
    epsilon: f32,
) {
    with_level!(
        level,
        fn run(to: &mut [f32], sums: &mut [f32], x: &[f32], slopes: &[f32], factors: &[f32], epsilon: f32) {
            let count = x.len() as f32;
            let inverse = 1.0 / (sum(x, |x| x * x) / count + epsilon).sqrt();
            for ((to, slope), factor) in to.iter_mut().zip(slopes).zip(factors) {
                *to = slope * factor;
            }
            for ((sum, slope), x) in sums.iter_mut().zip(slopes).zip(x) {
                *sum += slope * (x * inverse);
            }
            let along = product(to, x, 0.0) / count * inverse * inverse;
            for (to, x) in to.iter_mut().zip(x) {
                *to = (*to - x * along) * inverse;
            }
        }
    );
}

/// `(x - mean) / sqrt(variance + eps)` over the last dimension.
pub(in super::super) fn layer_norm<const D: usize>(x: Tensor<D>, epsilon: f64) -> Result<Tensor<D>, Tensor<D>> {
    let Some(of_x) = Operand::of(&x) else { return Err(x) };
    let values = of_x.value.clone();
    let Ok(result) = plain::layer_norm(values.clone(), epsilon) else { return Err(x) };
    Ok(record(parents![of_x], result, move |upstream, _| {
        let rows = values.shape().num_elements() / values.dims()[D - 1];
        let (of_rows, _) = layer_norm_slopes(&values, &upstream, None, rows, epsilon);
        [Some(gradient(of_rows))]
    }))
}

/// `layer_norm(x) * weight + bias`.
pub(in super::super) fn affine_layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: &Tensor<1>,
    bias: &Tensor<1>,
    epsilon: f64,
) -> Result<Tensor<D>, Tensor<D>> {
    let (Some(of_x), Some(of_weight), Some(of_bias)) = (Operand::of(&x), Operand::of(weight), Operand::of(bias)) else {
        return Err(x);
    };
    let (values, weight) = (of_x.value.clone(), of_weight.value.clone());
    let Ok(result) = plain::affine_layer_norm(values.clone(), &weight, &of_bias.value, epsilon) else { return Err(x) };
    Ok(record(parents![of_x, of_weight, of_bias], result, move |upstream, wanted| {
        let width = values.dims()[D - 1];
        let rows = values.shape().num_elements() / width;
        let factors = rows_of(&weight).row(0).to_vec();
        let (of_rows, sums) = layer_norm_slopes(&values, &upstream, Some(&factors), rows, epsilon);
        wanted_of(wanted, of_rows, &sums, width, [width])
    }))
}

/// `layer_norm(x) * (1 + scale) + shift`.
///
/// # Shapes
/// As the plain kernel's.
pub(in super::super) fn modulated_layer_norm(
    x: Tensor<3>,
    shift: &Tensor<3>,
    scale: &Tensor<3>,
    epsilon: f64,
) -> Result<Tensor<3>, Tensor<3>> {
    let (Some(of_x), Some(of_scale), Some(of_shift)) = (Operand::of(&x), Operand::of(scale), Operand::of(shift)) else {
        return Err(x);
    };
    let (values, scale) = (of_x.value.clone(), of_scale.value.clone());
    let Ok(result) = plain::modulated_layer_norm(values.clone(), &of_shift.value, &scale, epsilon) else {
        return Err(x);
    };
    Ok(record(parents![of_x, of_scale, of_shift], result, move |upstream, wanted| {
        let [batch, tokens, width] = values.dims();
        let scales = rows_of(&scale);
        let factors: Vec<f32> = (0..batch).flat_map(|i| scales.row(i).iter().map(|scale| scale + 1.0)).collect();
        let (of_rows, sums) = layer_norm_slopes(&values, &upstream, Some(&factors), tokens, epsilon);
        wanted_of(wanted, of_rows, &sums, width, [batch, 1, width])
    }))
}

/// Gradients of rows, factors and addends; `sums` is `[groups, 2, width]`.
fn wanted_of<const D: usize, const W: usize>(
    [of_x, of_factors, of_addends]: [bool; 3],
    rows: Tensor<D>,
    sums: &[f32],
    width: usize,
    shape: [usize; W],
) -> [Option<Gradient>; 3] {
    let part = |index: usize| -> Vec<f32> {
        sums.chunks_exact(2 * width).flat_map(|sums| &sums[index * width..(index + 1) * width]).copied().collect()
    };
    [
        of_x.then(|| gradient(rows)),
        of_factors.then(|| gradient(wrap(part(0), shape))),
        of_addends.then(|| gradient(wrap(part(1), shape))),
    ]
}

/// Gradients of the rows, and of factors and addends, `[rows / group, 2, width]`; `factors` is `[rows / group, width]`.
fn layer_norm_slopes<const D: usize>(
    values: &Tensor<D>,
    upstream: &Tensor<D>,
    factors: Option<&[f32]>,
    group: usize,
    epsilon: f64,
) -> (Tensor<D>, Vec<f32>) {
    let (dims, width) = (values.dims(), values.dims()[D - 1]);
    let rows = values.shape().num_elements() / width;
    let (level, x, slopes) = (Level::detect(), rows_of(values), rows_of(upstream));
    let sums = if factors.is_some() { 2 } else { 0 };
    let (of_rows, sums) = rows_and_sums([rows, width, group, sums], |row, to, sums| {
        let factors = factors.map(|factors| &factors[row / group * width..][..width]);
        layer_norm_row(level, to, sums, x.row(row), slopes.row(row), factors, epsilon as f32);
    });
    (wrap(of_rows, dims), sums)
}

fn layer_norm_row(
    level: Level,
    to: &mut [f32],
    sums: &mut [f32],
    x: &[f32],
    slopes: &[f32],
    factors: Option<&[f32]>,
    epsilon: f32,
) {
    with_level!(
        level,
        fn run(to: &mut [f32], sums: &mut [f32], x: &[f32], slopes: &[f32], factors: Option<&[f32]>, epsilon: f32) {
            let count = x.len() as f32;
            let (mean, squares) = mean_and_squares(x);
            let inverse = 1.0 / (squares / count + epsilon).sqrt();
            match factors {
                Some(factors) => {
                    for ((to, slope), factor) in to.iter_mut().zip(slopes).zip(factors) {
                        *to = slope * factor;
                    }
                    let (of_factors, of_addends) = sums.split_at_mut(x.len());
                    for ((sum, slope), x) in of_factors.iter_mut().zip(slopes).zip(x) {
                        *sum += slope * ((x - mean) * inverse);
                    }
                    for (sum, slope) in of_addends.iter_mut().zip(slopes) {
                        *sum += slope;
                    }
                }
                None => to.copy_from_slice(slopes),
            }
            let average = sum(to, |slope| slope) / count;
            for to in to.iter_mut() {
                *to -= average;
            }
            let along = product(to, x, mean) / count * inverse * inverse;
            for (to, x) in to.iter_mut().zip(x) {
                *to = (*to - (x - mean) * along) * inverse;
            }
        }
    );
}

/// Sum of the products of `left` and what `right` is above `offset`.
#[inline(always)]
fn product(left: &[f32], right: &[f32], offset: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (lefts, rights) = (left.chunks_exact(LANES), right.chunks_exact(LANES));
    let rest = lefts.remainder().iter().zip(rights.remainder());
    for (left, right) in lefts.zip(rights) {
        for ((lane, left), right) in lanes.iter_mut().zip(left).zip(right) {
            *lane += left * (right - offset);
        }
    }
    for (lane, (left, right)) in lanes.iter_mut().zip(rest) {
        *lane += left * (right - offset);
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

fn rows_of<const D: usize>(tensor: &Tensor<D>) -> Rows {
    Rows::of(tensor).unwrap_or_else(|| unreachable!("the forward kernel read it"))
}

/// Group normalisation of a picture of features `[batch, channels, height, width]`.
pub(in super::super) fn group_norm(x: Tensor<4>, options: &GroupNormOptions) -> Result<Tensor<4>, Tensor<4>> {
    let GroupNormOptions { weight, bias, num_groups, epsilon, silu } = options;
    let (Some(of_x), Some(of_weight), Some(of_bias)) = (Operand::of(&x), Operand::of(weight), Operand::of(bias)) else {
        return Err(x);
    };
    let of_x = of_x.widened();
    let inner = GroupNormOptions {
        weight: of_weight.value.clone(),
        bias: of_bias.value.clone(),
        num_groups: *num_groups,
        epsilon: *epsilon,
        silu: *silu,
    };
    let values = of_x.value.clone();
    let Ok(result) = plain::group_norm(values.clone(), &inner) else { return Err(x) };
    Ok(record(parents![of_x, of_weight, of_bias], result, move |upstream, [of_x, of_weight, of_bias]| {
        let (of_values, of_weights, of_biases) = group_norm_slopes(&values, &in_dtype(upstream, DType::F32), &inner);
        let channels = [of_weights.len()];
        [
            of_x.then(|| gradient(wrap(of_values, values.dims()))),
            of_weight.then(|| gradient(wrap(of_weights, channels))),
            of_bias.then(|| gradient(wrap(of_biases, channels))),
        ]
    }))
}

/// Gradients of the picture, the weight and the bias.
fn group_norm_slopes(
    values: &Tensor<4>,
    upstream: &Tensor<4>,
    options: &GroupNormOptions,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let [batch, channels, height, width] = values.dims();
    let (level, plane, group_channels) = (Level::detect(), height * width, channels / options.num_groups);
    let size = group_channels * plane;
    let (weights, biases) = (rows_of(&options.weight).row(0).to_vec(), rows_of(&options.bias).row(0).to_vec());
    let view = |tensor: &Tensor<4>| View::f32(tensor).map(View::into_contiguous);
    let (x, slopes) = (view(values), view(upstream));
    let statistics = Floats::of(values).and_then(|floats| group_statistics(level, floats, size, options.epsilon));
    let (Some(x), Some(slopes), Some(statistics)) = (
        x.as_ref().and_then(|view| view.contiguous::<f32>()),
        slopes.as_ref().and_then(|view| view.contiguous::<f32>()),
        statistics,
    ) else {
        unreachable!("the forward kernel read tensors of this kind")
    };
    let mut of_values = vec![0.0; x.len()];
    // Sums over each plane of its slopes, and of its slopes times its normalised values.
    let mut sums = vec![[0.0f32; 2]; batch * channels];
    let groups = of_values.par_chunks_exact_mut(size).zip(sums.par_chunks_exact_mut(group_channels)).enumerate();
    groups.for_each(|(group, (of_values, sums))| {
        let (mean, inverse) = statistics[group];
        let first_channel = group % options.num_groups * group_channels;
        let (x, slopes) = (&x[group * size..][..size], &slopes[group * size..][..size]);
        let mut totals = [0.0f64; 2];
        for (i, sums) in sums.iter_mut().enumerate() {
            let (weight, bias, span) =
                (weights[first_channel + i], biases[first_channel + i], i * plane..(i + 1) * plane);
            let (to, x, slopes) = (&mut of_values[span.clone()], &x[span.clone()], &slopes[span]);
            *sums = plane_slopes(level, to, x, slopes, [mean, inverse, weight, bias], options.silu);
            for (total, sum) in totals.iter_mut().zip(*sums) {
                *total += f64::from(sum) * f64::from(weight);
            }
        }
        let [average, along] = totals.map(|total| (total / size as f64) as f32);
        for (i, (to, x)) in of_values.chunks_exact_mut(plane).zip(x.chunks_exact(plane)).enumerate() {
            centre_plane(level, to, x, [mean, inverse, weights[first_channel + i]], [average, along]);
        }
    });
    let of_channel = |part: usize| -> Vec<f32> {
        (0..channels).map(|channel| (0..batch).map(|i| sums[i * channels + channel][part]).sum()).collect()
    };
    let (of_biases, of_weights) = (of_channel(0), of_channel(1));
    (of_values, of_weights, of_biases)
}

/// Slopes before the activation, and their sums, plain and times the normalised values.
fn plane_slopes(
    level: Level,
    to: &mut [f32],
    x: &[f32],
    slopes: &[f32],
    numbers: [f32; 4],
    with_silu: bool,
) -> [f32; 2] {
    with_level!(
        level,
        fn run(to: &mut [f32], x: &[f32], slopes: &[f32], numbers: [f32; 4], with_silu: bool) -> [f32; 2] {
            let [mean, inverse, weight, bias] = numbers;
            if with_silu {
                for ((to, x), slope) in to.iter_mut().zip(x).zip(slopes) {
                    *to = slope * silu_slope((x - mean) * inverse * weight + bias);
                }
            } else {
                to.copy_from_slice(slopes);
            }
            let total = sum(to, |slope| slope);
            [total, product(to, x, mean) * inverse]
        }
    )
}

fn centre_plane(level: Level, to: &mut [f32], x: &[f32], numbers: [f32; 3], sums: [f32; 2]) {
    with_level!(
        level,
        fn run(to: &mut [f32], x: &[f32], numbers: [f32; 3], sums: [f32; 2]) {
            let ([mean, inverse, weight], [average, along]) = (numbers, sums);
            for (to, x) in to.iter_mut().zip(x) {
                *to = (*to * weight - average - (x - mean) * inverse * along) * inverse;
            }
        }
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::tracked::tests::check;

    const SHAPES: [[usize; 3]; 4] = [[1, 1, 2], [2, 5, 7], [1, 13, 131], [3, 100, 67]];
    const EPSILON: f64 = 1e-3;

    fn plain_norm(x: Tensor<3>) -> Tensor<3> {
        let centred = x.clone() - x.mean_dim(2);
        let deviation = (centred.clone().square().mean_dim(2) + EPSILON).sqrt();
        centred / deviation
    }

    #[test]
    fn gradients_of_rms_norms() {
        for [batch, tokens, width] in SHAPES {
            check(
                [[batch, tokens, width], [1, 1, width]],
                |[x, weight]| rms_norm(x.swap_dims(0, 1), &weight.reshape([width]), EPSILON).unwrap(),
                |[x, weight]| {
                    let x = x.swap_dims(0, 1);
                    x.clone() / (x.square().mean_dim(2) + EPSILON).sqrt() * weight
                },
            );
        }
    }

    #[test]
    fn gradients_of_layer_norms() {
        for [batch, tokens, width] in SHAPES {
            check([[batch, tokens, width]], |[x]| layer_norm(x, EPSILON).unwrap(), |[x]| plain_norm(x));
            check(
                [[batch, tokens, width], [1, 1, width], [1, 1, width]],
                |[x, weight, bias]| {
                    affine_layer_norm(x, &weight.reshape([width]), &bias.reshape([width]), EPSILON).unwrap()
                },
                |[x, weight, bias]| plain_norm(x) * weight + bias,
            );
            check(
                [[batch, tokens, width], [batch, 1, width], [batch, 1, width]],
                |[x, shift, scale]| modulated_layer_norm(x, &shift, &scale, EPSILON).unwrap(),
                |[x, shift, scale]| plain_norm(x) * (scale + 1.0) + shift,
            );
        }
    }

    #[test]
    fn gradients_of_group_norms() {
        for ([batch, channels, height, width], num_groups) in
            [([1, 1, 1, 2], 1), ([2, 6, 3, 5], 3), ([1, 4, 37, 29], 2)]
        {
            for silu in [false, true] {
                check(
                    [[batch, channels, height * width], [1, 1, channels], [1, 1, channels]],
                    |[x, weight, bias]| {
                        let (weight, bias) = (weight.reshape([channels]), bias.reshape([channels]));
                        let options = GroupNormOptions { weight, bias, num_groups, epsilon: EPSILON, silu };
                        group_norm(x.reshape([batch, channels, height, width]), &options).unwrap()
                    },
                    |[x, weight, bias]| {
                        let grouped = x.reshape([batch, num_groups, channels / num_groups * height * width]);
                        let normed = plain_norm(grouped).reshape([batch, channels, height * width]);
                        let y = normed * weight.swap_dims(1, 2) + bias.swap_dims(1, 2);
                        let y = if silu { burn::tensor::activation::silu(y) } else { y };
                        y.reshape([batch, channels, height, width])
                    },
                );
            }
        }
    }
}
