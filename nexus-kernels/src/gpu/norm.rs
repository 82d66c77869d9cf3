//! Normalisations, with the scales and shifts that follow them: tensor -> tensor of the same shape.

use burn::tensor::Tensor;
use burn_cubecl::cubecl::{
    self,
    ir::ElemType,
    prelude::{Tensor as Buffer, *},
};

use super::{cube, element, empty_like, rows::Rows, tensor};
use crate::Norm;

/// Units that share a row: few for rows as short as a head, many for others.
const UNITS: [usize; 2] = [32, 256];
/// Widths from which on a row has many.
const WIDE: usize = 1024;

/// Units that share a row of this many values.
pub(super) fn units_of(width: usize) -> usize {
    UNITS[usize::from(width >= WIDE)]
}

/// [`Norm`] without its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Rms,
    Layer,
    Affine,
    Modulated,
}

/// Normalises every row of the last dimension; `None` for tensors that are not for these kernels.
pub(super) fn normalize<const D: usize>(x: &Tensor<D>, norm: &Norm, epsilon: f64) -> Option<Tensor<D>> {
    let rows = Rows::of(cube(x)?);
    let own = || Some(Rows::of(cube(&x.clone())?));
    let (kind, first, second) = match norm {
        Norm::Rms { weight } => (Kind::Rms, Rows::of(cube(weight)?), Rows::of(cube(weight)?)),
        Norm::Layer => (Kind::Layer, own()?, own()?),
        Norm::Affine { weight, bias } => (Kind::Affine, Rows::of(cube(weight)?), Rows::of(cube(bias)?)),
        Norm::Modulated { scale, shift } => (Kind::Modulated, Rows::of(cube(scale)?), Rows::of(cube(shift)?)),
    };
    if first.width != rows.width || first.tensor.dtype != second.tensor.dtype {
        return None;
    }
    let batch = if kind == Kind::Modulated { first.count } else { 1 };
    let vector = rows.vector().min(first.vector()).min(second.vector());
    let (client, output) = (rows.tensor.client.clone(), empty_like(&rows.tensor, x.shape(), x.dtype()));
    let units = units_of(rows.width);
    let dtypes = [element(x.dtype())?, element(first.tensor.dtype)?];
    let (count, across) = (rows.count as u32, 1 << 15);
    norm_kernel::launch(
        &client,
        CubeCount::Static(count.min(across), count.div_ceil(across), 1),
        CubeDim::new_1d(units as u32),
        vector,
        rows.tensor.into_tensor_arg(),
        first.tensor.into_tensor_arg(),
        second.tensor.into_tensor_arg(),
        output.clone().into_tensor_arg(),
        rows.count,
        rows.width / vector,
        rows.inner,
        rows.inner_stride / vector,
        rows.outer_stride / vector,
        rows.count / batch,
        first.inner_stride / vector,
        second.inner_stride / vector,
        1.0 / rows.width as f32,
        epsilon as f32,
        kind,
        units,
        dtypes,
    );
    Some(tensor(output))
}

#[cube(launch)]
fn norm_kernel<F: Float, W: Float, N: Size>(
    x: &Buffer<Vector<F, N>>,
    first: &Buffer<Vector<W, N>>,
    second: &Buffer<Vector<W, N>>,
    output: &mut Buffer<Vector<F, N>>,
    count: usize,
    width: usize,
    inner: usize,
    inner_stride: usize,
    outer_stride: usize,
    rows_of_batch: usize,
    first_stride: usize,
    second_stride: usize,
    share: f32,
    epsilon: f32,
    #[comptime] kind: Kind,
    #[comptime] units: usize,
    #[define(F, W)] _dtypes: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row >= count {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let start = row / inner * outer_stride + row % inner * inner_stride;
    let mut shared = Shared::<[f32]>::new_slice(units);
    let mut mean = Vector::<f32, N>::new(0.0f32);
    if comptime!(kind != Kind::Rms) {
        let mut sum = Vector::<f32, N>::new(0.0f32);
        let mut column = unit;
        while column < width {
            sum += Vector::cast_from(x[start + column]);
            column += units;
        }
        mean = Vector::new(cube_sum(sum.vector_sum(), &mut shared, units) * share);
    }
    let mut squares = Vector::<f32, N>::new(0.0f32);
    let mut column = unit;
    while column < width {
        let centred = Vector::<f32, N>::cast_from(x[start + column]) - mean;
        squares += centred * centred;
        column += units;
    }
    let variance = cube_sum(squares.vector_sum(), &mut shared, units) * share;
    let inverse = Vector::<f32, N>::new((variance + epsilon).inverse_sqrt());
    let batch = row / rows_of_batch;
    let mut column = unit;
    while column < width {
        let normed = (Vector::<f32, N>::cast_from(x[start + column]) - mean) * inverse;
        let y = match kind {
            Kind::Rms => {
                let rounded = Vector::<F, N>::cast_from(normed);
                Vector::<f32, N>::cast_from(rounded) * Vector::cast_from(Vector::<F, N>::cast_from(first[column]))
            }
            Kind::Layer => normed,
            Kind::Affine => normed * Vector::cast_from(first[column]) + Vector::cast_from(second[column]),
            Kind::Modulated => {
                let scale = Vector::<f32, N>::cast_from(first[batch * first_stride + column]);
                let shift = Vector::<f32, N>::cast_from(second[batch * second_stride + column]);
                normed * (scale + Vector::new(1.0f32)) + shift
            }
        };
        output[row * width + column] = Vector::cast_from(y);
        column += units;
    }
}

/// The sum of what the units of a cube have, for each of them.
#[cube]
pub(super) fn cube_sum(value: f32, shared: &mut Shared<[f32]>, #[comptime] units: usize) -> f32 {
    let unit = UNIT_POS as usize;
    sync_cube();
    shared[unit] = value;
    sync_cube();
    let mut half = units.runtime() / 2;
    while half > 0 {
        if unit < half {
            let other = shared[unit + half];
            shared[unit] += other;
        }
        half /= 2;
        sync_cube();
    }
    shared[0]
}

/// The largest of what the units of a cube have, for each of them.
#[cube]
pub(super) fn cube_max(value: f32, shared: &mut Shared<[f32]>, #[comptime] units: usize) -> f32 {
    let unit = UNIT_POS as usize;
    sync_cube();
    shared[unit] = value;
    sync_cube();
    let mut half = units.runtime() / 2;
    while half > 0 {
        if unit < half {
            shared[unit] = max(shared[unit], shared[unit + half]);
        }
        half /= 2;
        sync_cube();
    }
    shared[0]
}
