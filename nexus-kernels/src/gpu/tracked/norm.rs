//! Normalisations with their backward passes; the statistics are computed again, which is cheaper than keeping them.

use burn::tensor::{DType, Tensor};
use burn_cubecl::{
    cubecl::{
        self,
        ir::ElemType,
        prelude::{Tensor as Buffer, *},
    },
    tensor::CubeTensor,
};

use super::{
    super::{
        contiguous, cube, element, empty_like,
        norm::{self as plain, Kind, Norm, cube_sum, units_of},
        rows::Rows,
        tensor,
    },
    Operand, gradient, parents, record,
    sums::{Factor, sums},
};
use crate::graph::record_affine;

/// Normalises every row of the last dimension.
pub(in super::super) fn normalize<const D: usize>(x: &Tensor<D>, norm: Norm<'_>, epsilon: f64) -> Option<Tensor<D>> {
    match norm {
        Norm::Layer => {
            let x = Operand::of(x)?;
            let values = x.value.clone();
            let result = plain::normalize(values.clone(), Norm::Layer, epsilon).ok()?;
            Some(record(parents![x], result, move |upstream, _| {
                let (slopes, _) = slopes::<D, 1>(&values, &upstream, None, Kind::Layer, epsilon);
                [Some(gradient(slopes))]
            }))
        }
        Norm::Rms { weight } => affine(x, weight, None, Kind::Rms, epsilon, |weight, _| Norm::Rms { weight }),
        Norm::Affine { weight, bias } => affine(x, weight, Some(bias), Kind::Affine, epsilon, |weight, bias| {
            Norm::Affine { weight, bias: bias.unwrap_or(weight) }
        }),
        Norm::Modulated { scale, shift } => affine(x, scale, Some(shift), Kind::Modulated, epsilon, |scale, shift| {
            Norm::Modulated { scale, shift: shift.unwrap_or(scale) }
        }),
    }
}

/// A norm with factors and, or not, addends.
fn affine<const D: usize, const F: usize>(
    x: &Tensor<D>,
    factors: &Tensor<F>,
    addends: Option<&Tensor<F>>,
    kind: Kind,
    epsilon: f64,
    norm: impl for<'a> Fn(&'a Tensor<F>, Option<&'a Tensor<F>>) -> Norm<'a>,
) -> Option<Tensor<D>> {
    let (x, factors) = (Operand::of(x)?, Operand::of(factors)?);
    let addends = match addends {
        Some(addends) => Some(Operand::of(addends)?),
        None => None,
    };
    let (values, kept) = (x.value.clone(), factors.value.clone());
    let norm = norm(&kept, addends.as_ref().map(|addends| &addends.value));
    let result = plain::normalize(values.clone(), norm, epsilon).ok()?;
    Some(record_affine(x, factors, addends, result, move |upstream, [of_x, of_factors, of_addends]| {
        let (slopes, statistics) = slopes(&values, &upstream, Some(&kept), kind, epsilon);
        let x = of_x.then(|| gradient(slopes));
        if !of_factors && !of_addends {
            return [x, None, None];
        }
        let rows_per_factor = values.shape().num_elements() / kept.shape().num_elements();
        let (products, plain) = sums(&upstream, Factor::Normed(&values, &statistics), rows_per_factor, of_addends);
        let shaped = |sums: Tensor<2>| gradient::<F>(sums.reshape(kept.shape()));
        [x, of_factors.then(|| shaped(products)), plain.map(shaped)]
    }))
}

/// Gradients of the rows, and of each row its mean and the inverse of its deviation, `[rows, 2]`.
fn slopes<const D: usize, const F: usize>(
    values: &Tensor<D>,
    upstream: &Tensor<D>,
    factors: Option<&Tensor<F>>,
    kind: Kind,
    epsilon: f64,
) -> (Tensor<D>, CubeTensor) {
    let rows = |tensor| Rows::of(tensor_of(cube(tensor)));
    let (x, upstream) = (rows(values), tensor_of(contiguous(upstream)));
    let factors = match factors {
        Some(factors) => Rows::of(tensor_of(cube(factors))),
        None => rows(values),
    };
    let batch = if kind == Kind::Modulated { factors.count } else { 1 };
    let vector = x.vector().min(factors.vector());
    let (client, units) = (upstream.client.clone(), units_of(x.width));
    let output = empty_like(&upstream, values.shape(), values.dtype());
    let statistics = empty_like(&upstream, [x.count, 2], DType::F32);
    let dtypes = [upstream.dtype, x.tensor.dtype, factors.tensor.dtype]
        .map(|dtype| element(dtype).unwrap_or_else(|| unreachable!("the forward kernel took it")));
    let (count, across) = (x.count as u32, 1 << 15);
    slopes_kernel::launch(
        &client,
        CubeCount::Static(count.min(across), count.div_ceil(across), 1),
        CubeDim::new_1d(units as u32),
        vector,
        x.tensor.into_tensor_arg(),
        upstream.into_tensor_arg(),
        factors.tensor.into_tensor_arg(),
        output.clone().into_tensor_arg(),
        statistics.clone().into_tensor_arg(),
        x.count,
        x.width / vector,
        x.inner,
        x.inner_stride / vector,
        x.outer_stride / vector,
        x.count / batch,
        factors.inner_stride / vector,
        1.0 / x.width as f32,
        epsilon as f32,
        kind,
        units,
        dtypes,
    );
    (tensor(output), statistics)
}

/// A tensor that the forward kernel took, or a gradient of one.
fn tensor_of(tensor: Option<CubeTensor>) -> CubeTensor {
    tensor.unwrap_or_else(|| unreachable!("a tensor that the forward kernel took"))
}

#[cube(launch)]
fn slopes_kernel<G: Float, F: Float, W: Float, N: Size>(
    x: &Buffer<Vector<F, N>>,
    upstream: &Buffer<Vector<G, N>>,
    factors: &Buffer<Vector<W, N>>,
    output: &mut Buffer<Vector<F, N>>,
    statistics: &mut Buffer<f32>,
    count: usize,
    width: usize,
    inner: usize,
    inner_stride: usize,
    outer_stride: usize,
    rows_of_batch: usize,
    factor_stride: usize,
    share: f32,
    epsilon: f32,
    #[comptime] kind: Kind,
    #[comptime] units: usize,
    #[define(G, F, W)] _dtypes: [ElemType; 3],
) {
    let row = CUBE_POS;
    if row >= count {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let start = row / inner * outer_stride + row % inner * inner_stride;
    let factor_start = row / rows_of_batch * factor_stride;
    let mut shared = Shared::<[f32]>::new_slice(units);
    let mut mean = 0.0f32;
    if comptime!(kind != Kind::Rms) {
        let mut sum = Vector::<f32, N>::new(0.0f32);
        let mut column = unit;
        while column < width {
            sum += Vector::cast_from(x[start + column]);
            column += units;
        }
        mean = cube_sum(sum.vector_sum(), &mut shared, units) * share;
    }
    let mut squares = Vector::<f32, N>::new(0.0f32);
    let mut along = Vector::<f32, N>::new(0.0f32);
    let mut total = Vector::<f32, N>::new(0.0f32);
    let mut column = unit;
    while column < width {
        let centred = Vector::<f32, N>::cast_from(x[start + column]) - Vector::new(mean);
        let slope = Vector::<f32, N>::cast_from(upstream[row * width + column])
            * factor_at::<W, N>(factors, factor_start + column, kind);
        squares += centred * centred;
        along += centred * slope;
        total += slope;
        column += units;
    }
    let inverse = (cube_sum(squares.vector_sum(), &mut shared, units) * share + epsilon).inverse_sqrt();
    let along = cube_sum(along.vector_sum(), &mut shared, units) * share * inverse * inverse;
    let mut average = 0.0f32;
    if comptime!(kind != Kind::Rms) {
        average = cube_sum(total.vector_sum(), &mut shared, units) * share;
    }
    let mut column = unit;
    while column < width {
        let centred = Vector::<f32, N>::cast_from(x[start + column]) - Vector::new(mean);
        let slope = Vector::<f32, N>::cast_from(upstream[row * width + column])
            * factor_at::<W, N>(factors, factor_start + column, kind);
        let y = (slope - Vector::new(average) - centred * Vector::new(along)) * Vector::new(inverse);
        output[row * width + column] = Vector::cast_from(y);
        column += units;
    }
    if unit == 0 {
        statistics[2 * row] = mean;
        statistics[2 * row + 1] = inverse;
    }
}

/// What the normalised value of a column is multiplied by.
#[cube]
fn factor_at<W: Float, N: Size>(factors: &Buffer<Vector<W, N>>, at: usize, #[comptime] kind: Kind) -> Vector<f32, N> {
    match kind {
        Kind::Layer => Vector::new(1.0f32),
        Kind::Modulated => Vector::<f32, N>::cast_from(factors[at]) + Vector::new(1.0f32),
        _ => Vector::<f32, N>::cast_from(factors[at]),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::check, *};

    /// As the kernels have it, without factors.
    fn normed(x: Tensor<3>, centred: bool) -> Tensor<3> {
        let x = if centred { x.clone() - x.mean_dim(2) } else { x };
        let inverse = (x.clone().square().mean_dim(2) + 1e-6).sqrt().recip();
        x * inverse
    }

    const SHAPES: [[usize; 3]; 5] = [[1, 1, 5], [2, 5, 7], [3, 70, 40], [1, 3, 1028], [2, 33, 64]];

    #[test]
    fn gradients_of_norms_of_rows() {
        for [batch, tokens, width] in SHAPES {
            let shape = [batch, tokens, width];
            check([shape], |[x]| normalize(&x, Norm::Layer, 1e-6), |[x]| normed(x, true));
            let flat = |x: Tensor<3>| -> Tensor<1> { x.reshape([width]) };
            check(
                [shape, [1, 1, width]],
                |[x, weight]| normalize(&x, Norm::Rms { weight: &flat(weight) }, 1e-6),
                |[x, weight]| normed(x, false) * weight,
            );
            check(
                [shape, [1, 1, width], [1, 1, width]],
                |[x, weight, bias]| normalize(&x, Norm::Affine { weight: &flat(weight), bias: &flat(bias) }, 1e-6),
                |[x, weight, bias]| normed(x, true) * weight + bias,
            );
            check(
                [shape, [batch, 1, width], [batch, 1, width]],
                |[x, scale, shift]| normalize(&x, Norm::Modulated { scale: &scale, shift: &shift }, 1e-6),
                |[x, scale, shift]| normed(x, true) * (scale + 1.0) + shift,
            );
        }
    }

    #[test]
    fn gradients_of_heads_where_they_lie() {
        let heads = |x: Tensor<3>| -> Tensor<4> { x.reshape([2, 9, 15, 16]).narrow(2, 5, 5) };
        check(
            [[2, 9, 15 * 16], [1, 1, 16]],
            |[x, weight]| normalize(&heads(x), Norm::Rms { weight: &weight.reshape([16]) }, 1e-6),
            |[x, weight]| {
                let x = heads(x);
                let inverse = (x.clone().square().mean_dim(3) + 1e-6).sqrt().recip();
                x * inverse * weight.unsqueeze_dim::<4>(0)
            },
        );
    }
}
