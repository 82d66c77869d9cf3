//! Sums over rows: gradients of rows, and what they are multiplied by -> sums of groups of rows.

use burn::tensor::{DType, Tensor};
use burn_cubecl::{
    cubecl::{
        self, calculate_cube_count_elemwise,
        ir::ElemType,
        prelude::{Tensor as Buffer, *},
    },
    tensor::CubeTensor,
};

use super::super::{contiguous, cube, element, empty_like, rows::Rows, tensor};

/// Rows that one unit adds up.
const ROWS: usize = 32;

/// What gradients are multiplied by before they are added.
#[derive(Clone, Copy)]
pub(super) enum Factor<'a, const D: usize> {
    /// Values of the same shape.
    Values(&'a Tensor<D>),
    /// Such values, normalised by what is there of each row: its mean and the inverse of its deviation, `[rows, 2]`.
    Normed(&'a Tensor<D>, &'a CubeTensor),
}

/// Sums of the gradients times the factor over each `group` rows, and, if `plain`, those of the gradients themselves; `None`
/// for tensors that are not for these kernels.
///
/// # Shapes
/// - `upstream`: `[.., width]`
/// - returns: of f32 `[rows / group, width]`
pub(super) fn sums<const D: usize>(
    upstream: &Tensor<D>,
    factor: Factor<'_, D>,
    group: usize,
    plain: bool,
) -> Option<(Tensor<2>, Option<Tensor<2>>)> {
    let (values, statistics) = match factor {
        Factor::Values(values) => (values, None),
        Factor::Normed(values, statistics) => (values, Some(statistics.clone())),
    };
    let dtypes = [element(upstream.dtype())?, element(values.dtype())?];
    let (rows, upstream) = (Rows::of(cube(values)?), contiguous(upstream)?);
    let normed = statistics.is_some();
    let statistics = statistics.unwrap_or_else(|| empty_like(&upstream, [2], DType::F32));
    let (client, vector) = (upstream.client.clone(), rows.vector());
    let (groups, parts, width) = (rows.count / group, group.div_ceil(ROWS), rows.width);
    let kinds = 1 + usize::from(plain);
    let output = empty_like(&upstream, [groups, parts, kinds, width], DType::F32);
    let total = groups * parts * width / vector;
    let cube_dim = CubeDim::new(&client, total);
    sums_kernel::launch(
        &client,
        calculate_cube_count_elemwise(&client, total, cube_dim),
        cube_dim,
        vector,
        upstream.into_tensor_arg(),
        rows.tensor.into_tensor_arg(),
        statistics.into_tensor_arg(),
        output.clone().into_tensor_arg(),
        total,
        width / vector,
        rows.inner,
        rows.inner_stride / vector,
        rows.outer_stride / vector,
        group,
        parts,
        ROWS,
        normed,
        plain,
        dtypes,
    );
    let sums: Tensor<3> = tensor::<4>(output).sum_dim(1).squeeze_dim(1);
    let kind = |at| sums.clone().narrow(1, at, 1).squeeze_dim(1);
    Some((kind(0), plain.then(|| kind(1))))
}

#[cube(launch)]
fn sums_kernel<G: Float, F: Float, N: Size>(
    upstream: &Buffer<Vector<G, N>>,
    values: &Buffer<Vector<F, N>>,
    statistics: &Buffer<f32>,
    output: &mut Buffer<Vector<f32, N>>,
    total: usize,
    width: usize,
    inner: usize,
    inner_stride: usize,
    outer_stride: usize,
    group: usize,
    parts: usize,
    #[comptime] rows: usize,
    #[comptime] normed: bool,
    #[comptime] plain: bool,
    #[define(G, F)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let column = ABSOLUTE_POS % width;
    let part = ABSOLUTE_POS / width;
    let first = part / parts * group + part % parts * rows;
    let end = min(first + rows, (part / parts + 1) * group);
    let mut products = Vector::<f32, N>::new(0.0f32);
    let mut sums = Vector::<f32, N>::new(0.0f32);
    let mut row = first;
    while row < end {
        let grad = Vector::<f32, N>::cast_from(upstream[row * width + column]);
        let at = row / inner * outer_stride + row % inner * inner_stride + column;
        let mut value = Vector::<f32, N>::cast_from(values[at]);
        if normed {
            value = (value - Vector::new(statistics[2 * row])) * Vector::new(statistics[2 * row + 1]);
        }
        products += grad * value;
        if plain {
            sums += grad;
        }
        row += 1;
    }
    let to = if plain { part * 2 * width } else { part * width };
    output[to + column] = products;
    if plain {
        output[to + width + column] = sums;
    }
}
