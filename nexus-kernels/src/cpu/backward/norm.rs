//! Normalisations with their backward passes; the statistics are computed again, which is cheaper than keeping them.

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{
    super::{
        Floats, Level, View,
        level::with_level,
        norm::{group_statistics, mean_and_squares, sum},
        rows::Rows,
        wrap,
    },
    Gradient,
    elementwise::silu_derivative,
    gradient,
    sums::rows_and_sums,
    to_f32,
};
use crate::{GroupNormOptions, Norm};

/// Partial sums, so that products are added in vectors.
const LANES: usize = 32;

/// The gradients of a norm of rows: of the rows, the factors and the addends; `None` if the kernel does not take the tensors.
pub(super) fn normalize<const D: usize>(
    x: &Tensor<D>,
    norm: &Norm,
    epsilon: f64,
    grad: &Tensor<D>,
    wanted: [bool; 3],
) -> Option<[Option<Gradient>; 3]> {
    let (dims, width) = (x.dims(), x.dims()[D - 1]);
    if dims.contains(&0) || grad.dims() != dims {
        return None;
    }
    let count = x.shape().num_elements() / width;
    let rows = [Rows::of(x)?, Rows::of(grad)?];
    match norm {
        Norm::Rms { weight } => {
            let factors = values_of(weight, width)?;
            let ([x, grads], level) = (&rows, Level::detect());
            let (grad_x, sums) = rows_and_sums([count, width, count, 1], |row, to, sums| {
                rms_norm_row(level, to, sums, x.row(row), grads.row(row), &factors, epsilon as f32);
            });
            let grad_weight = wanted[1].then(|| gradient(wrap(sums, [width])));
            Some([wanted[0].then(|| gradient(wrap(grad_x, dims))), grad_weight, None])
        }
        Norm::Layer => {
            let (grad_x, _) = layer_norm_grads(&rows, [count, width], None, count, epsilon);
            Some([wanted[0].then(|| gradient(wrap(grad_x, dims))), None, None])
        }
        Norm::Affine { weight, bias } if weight.dims() == bias.dims() => {
            let factors = values_of(weight, width)?;
            let (grad_x, sums) = layer_norm_grads(&rows, [count, width], Some(&factors), count, epsilon);
            Some(wanted_of(wanted, wrap(grad_x, dims), &sums, width, [width]))
        }
        Norm::Modulated { scale, shift } if scale.dims() == shift.dims() => {
            let &[batch, tokens, _] = &dims[..] else { return None };
            let scales = Rows::of(scale).filter(|_| scale.dims() == [batch, 1, width])?;
            let factors: Vec<f32> = (0..batch).flat_map(|i| scales.row(i).iter().map(|scale| scale + 1.0)).collect();
            let (grad_x, sums) = layer_norm_grads(&rows, [count, width], Some(&factors), tokens, epsilon);
            Some(wanted_of(wanted, wrap(grad_x, dims), &sums, width, [batch, 1, width]))
        }
        _ => None,
    }
}

/// The values of a vector of this length.
fn values_of(vector: &Tensor<1>, width: usize) -> Option<Vec<f32>> {
    (vector.dims() == [width]).then(|| Rows::of(vector)).flatten().map(|rows| rows.row(0).to_vec())
}

fn rms_norm_row(
    level: Level,
    to: &mut [f32],
    sums: &mut [f32],
    x: &[f32],
    grads: &[f32],
    factors: &[f32],
    epsilon: f32,
) {
    with_level!(
        level,
        fn run(to: &mut [f32], sums: &mut [f32], x: &[f32], grads: &[f32], factors: &[f32], epsilon: f32) {
            let count = x.len() as f32;
            let inverse = 1.0 / (sum(x, |x| x * x) / count + epsilon).sqrt();
            for ((to, grad), factor) in to.iter_mut().zip(grads).zip(factors) {
                *to = grad * factor;
            }
            for ((sum, grad), x) in sums.iter_mut().zip(grads).zip(x) {
                *sum += grad * (x * inverse);
            }
            let along = product(to, x, 0.0) / count * inverse * inverse;
            for (to, x) in to.iter_mut().zip(x) {
                *to = (*to - x * along) * inverse;
            }
        }
    );
}

/// Gradients of rows, factors and addends; `sums` is `[groups, 2, width]`.
fn wanted_of<const D: usize, const W: usize>(
    [wants_x, wants_factors, wants_addends]: [bool; 3],
    rows: Tensor<D>,
    sums: &[f32],
    width: usize,
    shape: [usize; W],
) -> [Option<Gradient>; 3] {
    let part = |index: usize| -> Vec<f32> {
        sums.chunks_exact(2 * width).flat_map(|sums| &sums[index * width..(index + 1) * width]).copied().collect()
    };
    [
        wants_x.then(|| gradient(rows)),
        wants_factors.then(|| gradient(wrap(part(0), shape))),
        wants_addends.then(|| gradient(wrap(part(1), shape))),
    ]
}

/// Gradients of the rows, and of factors and addends, `[rows / group, 2, width]`; `factors` is `[rows / group, width]`.
fn layer_norm_grads(
    [x, grads]: &[Rows; 2],
    [count, width]: [usize; 2],
    factors: Option<&[f32]>,
    group: usize,
    epsilon: f64,
) -> (Vec<f32>, Vec<f32>) {
    let level = Level::detect();
    let sums = if factors.is_some() { 2 } else { 0 };
    rows_and_sums([count, width, group, sums], |row, to, sums| {
        let factors = factors.map(|factors| &factors[row / group * width..][..width]);
        layer_norm_row(level, to, sums, x.row(row), grads.row(row), factors, epsilon as f32);
    })
}

fn layer_norm_row(
    level: Level,
    to: &mut [f32],
    sums: &mut [f32],
    x: &[f32],
    grads: &[f32],
    factors: Option<&[f32]>,
    epsilon: f32,
) {
    with_level!(
        level,
        fn run(to: &mut [f32], sums: &mut [f32], x: &[f32], grads: &[f32], factors: Option<&[f32]>, epsilon: f32) {
            let count = x.len() as f32;
            let (mean, squares) = mean_and_squares(x);
            let inverse = 1.0 / (squares / count + epsilon).sqrt();
            match factors {
                Some(factors) => {
                    for ((to, grad), factor) in to.iter_mut().zip(grads).zip(factors) {
                        *to = grad * factor;
                    }
                    let (grad_factors, grad_addends) = sums.split_at_mut(x.len());
                    for ((sum, grad), x) in grad_factors.iter_mut().zip(grads).zip(x) {
                        *sum += grad * ((x - mean) * inverse);
                    }
                    for (sum, grad) in grad_addends.iter_mut().zip(grads) {
                        *sum += grad;
                    }
                }
                None => to.copy_from_slice(grads),
            }
            let average = sum(to, |grad| grad) / count;
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

/// The gradients of a group norm: of the picture, the weight and the bias; `None` if the kernel does not take the tensors.
pub(super) fn group_norm(
    x: &Tensor<4>,
    options: &GroupNormOptions,
    grad: &Tensor<4>,
    [wants_x, wants_weight, wants_bias]: [bool; 3],
) -> Option<[Option<Gradient>; 3]> {
    let dims = x.dims();
    let [batch, channels, height, width] = dims;
    if dims.contains(&0) || grad.dims() != dims || !channels.is_multiple_of(options.num_groups) {
        return None;
    }
    let (level, plane, group_channels) = (Level::detect(), height * width, channels / options.num_groups);
    let size = group_channels * plane;
    let (weights, biases) = (values_of(&options.weight, channels)?, values_of(&options.bias, channels)?);
    let x = to_f32(x.clone());
    let views = [x.clone(), to_f32(grad.clone())].map(|tensor| View::f32(&tensor).map(View::into_contiguous));
    let [x_view, grad_view] = views.each_ref();
    let (x_values, grads) = (x_view.as_ref()?.contiguous::<f32>()?, grad_view.as_ref()?.contiguous::<f32>()?);
    let statistics = group_statistics(level, Floats::of(&x)?, size, options.epsilon)?;
    let mut grad_values = vec![0.0; x_values.len()];
    // Sums over each plane of its grads, and of its grads times its normalised values.
    let mut sums = vec![[0.0f32; 2]; batch * channels];
    let groups = grad_values.par_chunks_exact_mut(size).zip(sums.par_chunks_exact_mut(group_channels)).enumerate();
    groups.for_each(|(group, (grad_values, sums))| {
        let (mean, inverse) = statistics[group];
        let first_channel = group % options.num_groups * group_channels;
        let (x, grads) = (&x_values[group * size..][..size], &grads[group * size..][..size]);
        let mut totals = [0.0f64; 2];
        for (i, sums) in sums.iter_mut().enumerate() {
            let (weight, bias, span) =
                (weights[first_channel + i], biases[first_channel + i], i * plane..(i + 1) * plane);
            let (to, x, grads) = (&mut grad_values[span.clone()], &x[span.clone()], &grads[span]);
            *sums = plane_grads(level, to, x, grads, [mean, inverse, weight, bias], options.silu);
            for (total, sum) in totals.iter_mut().zip(*sums) {
                *total += f64::from(sum) * f64::from(weight);
            }
        }
        let [average, along] = totals.map(|total| (total / size as f64) as f32);
        for (i, (to, x)) in grad_values.chunks_exact_mut(plane).zip(x.chunks_exact(plane)).enumerate() {
            centre_plane(level, to, x, [mean, inverse, weights[first_channel + i]], [average, along]);
        }
    });
    let sum_of = |part: usize| -> Vec<f32> {
        (0..channels).map(|channel| (0..batch).map(|i| sums[i * channels + channel][part]).sum()).collect()
    };
    Some([
        wants_x.then(|| gradient(wrap(grad_values, dims))),
        wants_weight.then(|| gradient(wrap(sum_of(1), [channels]))),
        wants_bias.then(|| gradient(wrap(sum_of(0), [channels]))),
    ])
}

/// Slopes before the activation, and their sums, plain and times the normalised values.
fn plane_grads(level: Level, to: &mut [f32], x: &[f32], grads: &[f32], numbers: [f32; 4], with_silu: bool) -> [f32; 2] {
    with_level!(
        level,
        fn run(to: &mut [f32], x: &[f32], grads: &[f32], numbers: [f32; 4], with_silu: bool) -> [f32; 2] {
            let [mean, inverse, weight, bias] = numbers;
            if with_silu {
                for ((to, x), grad) in to.iter_mut().zip(x).zip(grads) {
                    *to = grad * silu_derivative((x - mean) * inverse * weight + bias);
                }
            } else {
                to.copy_from_slice(grads);
            }
            let total = sum(to, |grad| grad);
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
