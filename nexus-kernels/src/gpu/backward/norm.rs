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
        norm::{Kind, cube_sum, units_of},
        rows::Rows,
        tensor,
    },
    Gradient, gradient,
    sums::{Factor, sums},
};
use crate::Norm;

/// Gradients of the rows, the factors and the addends of a norm; `None` for tensors that are not for these kernels.
pub(super) fn normalize<const D: usize>(
    x: &Tensor<D>,
    norm: &Norm,
    epsilon: f64,
    grad: &Tensor<D>,
    wanted: [bool; 3],
) -> Option<[Option<Gradient>; 3]> {
    if grad.dims() != x.dims() {
        return None;
    }
    match norm {
        Norm::Layer => {
            let (grad_x, _) = grads::<D, 1>(x, grad, None, Kind::Layer, epsilon)?;
            Some([wanted[0].then(|| gradient(grad_x)), None, None])
        }
        Norm::Rms { weight } => affine([x, grad], weight, Kind::Rms, epsilon, wanted),
        Norm::Affine { weight, .. } => affine([x, grad], weight, Kind::Affine, epsilon, wanted),
        Norm::Modulated { scale, .. } => affine([x, grad], scale, Kind::Modulated, epsilon, wanted),
    }
}

/// Of a norm with factors and, or not, addends of their shape.
fn affine<const D: usize, const F: usize>(
    [x, grad]: [&Tensor<D>; 2],
    factors: &Tensor<F>,
    kind: Kind,
    epsilon: f64,
    [wants_x, wants_factors, wants_addends]: [bool; 3],
) -> Option<[Option<Gradient>; 3]> {
    if factors.dims()[F - 1] != x.dims()[D - 1] {
        return None;
    }
    let (grad_x, statistics) = grads(x, grad, Some(factors), kind, epsilon)?;
    let grad_x = wants_x.then(|| gradient(grad_x));
    if !wants_factors && !wants_addends {
        return Some([grad_x, None, None]);
    }
    let rows_per_factor = x.shape().num_elements() / factors.shape().num_elements();
    let (products, plain) = sums(grad, Factor::Normed(x, &statistics), rows_per_factor, wants_addends)?;
    let shaped = |sums: Tensor<2>| gradient::<F>(sums.reshape(factors.shape()));
    Some([grad_x, wants_factors.then(|| shaped(products)), plain.map(shaped)])
}

/// Gradients of the rows, and of each row its mean and the inverse of its deviation, `[rows, 2]`.
fn grads<const D: usize, const F: usize>(
    values: &Tensor<D>,
    upstream: &Tensor<D>,
    factors: Option<&Tensor<F>>,
    kind: Kind,
    epsilon: f64,
) -> Option<(Tensor<D>, CubeTensor)> {
    let (x, upstream) = (Rows::of(cube(values)?), contiguous(upstream)?);
    let factors = match factors {
        Some(factors) => Rows::of(cube(factors)?),
        None => Rows::of(cube(values)?),
    };
    let batch = if kind == Kind::Modulated { factors.count } else { 1 };
    let vector = x.vector().min(factors.vector());
    let (client, units) = (upstream.client.clone(), units_of(x.width));
    let output = empty_like(&upstream, values.shape(), values.dtype());
    let statistics = empty_like(&upstream, [x.count, 2], DType::F32);
    let dtypes = [element(upstream.dtype)?, element(x.tensor.dtype)?, element(factors.tensor.dtype)?];
    let (count, across) = (x.count as u32, 1 << 15);
    grad_kernel::launch(
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
    Some((tensor(output), statistics))
}

#[cube(launch)]
fn grad_kernel<G: Float, F: Float, W: Float, N: Size>(
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
        let grad = Vector::<f32, N>::cast_from(upstream[row * width + column])
            * factor_at::<W, N>(factors, factor_start + column, kind);
        squares += centred * centred;
        along += centred * grad;
        total += grad;
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
        let grad = Vector::<f32, N>::cast_from(upstream[row * width + column])
            * factor_at::<W, N>(factors, factor_start + column, kind);
        let y = (grad - Vector::new(average) - centred * Vector::new(along)) * Vector::new(inverse);
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
