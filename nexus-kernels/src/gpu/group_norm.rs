//! Group normalisation, with the activation that follows it: picture -> picture.

use burn::tensor::{DType, Tensor};
use burn_cubecl::{
    cubecl::{
        self, calculate_cube_count_elemwise,
        ir::ElemType,
        prelude::{Tensor as Buffer, *},
    },
    tensor::CubeTensor,
};

use super::{contiguous, element, elementwise::activated, empty_like, norm::cube_sum, rows::vector, tensor};
use crate::{GroupNormOptions, activation::Function};

/// Values that the units of a cube add up together.
const PART: usize = 1 << 14;
/// Units of such a cube.
const UNITS: usize = 256;

/// Normalises groups of channels, by statistics of each sample, and scales and shifts every channel; with the SiLU of that if it
/// is asked for; `None` for tensors that are not for these kernels.
///
/// # Shapes
/// - `x`: `[batch, channels, height, width]`
/// - `weight`, `bias`: `[channels]`
pub(super) fn group_norm(x: &Tensor<4>, options: &GroupNormOptions) -> Option<Tensor<4>> {
    let &GroupNormOptions { ref weight, ref bias, num_groups, epsilon, silu } = options;
    let [batch, channels, height, width] = x.dims();
    let dtypes = [element(x.dtype())?, element(weight.dtype())?];
    let (shape, values, weight, bias) = (x.shape(), contiguous(x)?, contiguous(weight)?, contiguous(bias)?);
    if weight.dtype != bias.dtype {
        return None;
    }
    let (plane, groups) = (height * width, batch * num_groups);
    let size = channels / num_groups * plane;
    let sums = |mean: Tensor<1>, squared| part_sums(&values, contiguous(&mean)?, [groups, size], dtypes[0], squared);
    let mean = sums(Tensor::zeros([groups], (&x.device(), DType::F32)), false)? / size as f64;
    let variance = sums(mean.clone(), true)? / size as f64;
    let inverse = (variance + epsilon).sqrt().recip();
    let vector = vector(plane);
    let (client, output, total) =
        (values.client.clone(), empty_like(&values, shape, x.dtype()), groups * size / vector);
    let cube_dim = CubeDim::new(&client, total);
    normalize_kernel::launch(
        &client,
        calculate_cube_count_elemwise(&client, total, cube_dim),
        cube_dim,
        vector,
        values.clone().into_tensor_arg(),
        contiguous(&mean)?.into_tensor_arg(),
        contiguous(&inverse)?.into_tensor_arg(),
        weight.into_tensor_arg(),
        bias.into_tensor_arg(),
        output.clone().into_tensor_arg(),
        total,
        plane / vector,
        size / vector,
        channels,
        silu,
        dtypes,
    );
    Some(tensor(output))
}

/// The sum of each group's values, or of the squares of their distances from its mean, in f32.
fn part_sums(
    values: &CubeTensor,
    mean: CubeTensor,
    [groups, size]: [usize; 2],
    dtype: ElemType,
    squared: bool,
) -> Option<Tensor<1>> {
    let (vector, parts) = (vector(size), size.div_ceil(PART));
    let output = empty_like(values, [groups, parts], DType::F32);
    let (count, across) = ((groups * parts) as u32, 1 << 15);
    sums_kernel::launch(
        &values.client.clone(),
        CubeCount::Static(count.min(across), count.div_ceil(across), 1),
        CubeDim::new_1d(UNITS as u32),
        vector,
        values.clone().into_tensor_arg(),
        mean.into_tensor_arg(),
        output.clone().into_tensor_arg(),
        groups * parts,
        parts,
        size / vector,
        PART / vector,
        squared,
        UNITS,
        dtype,
    );
    Some(tensor::<2>(output).sum_dim(1).reshape([groups]))
}

#[cube(launch)]
fn sums_kernel<F: Float, N: Size>(
    values: &Buffer<Vector<F, N>>,
    mean: &Buffer<f32>,
    output: &mut Buffer<f32>,
    count: usize,
    parts: usize,
    size: usize,
    part_size: usize,
    #[comptime] squared: bool,
    #[comptime] units: usize,
    #[define(F)] _dtype: ElemType,
) {
    let at = CUBE_POS;
    if at >= count {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let group = at / parts;
    let mean = Vector::<f32, N>::new(mean[group]);
    let end = min((at % parts + 1) * part_size, size);
    let mut sum = Vector::<f32, N>::new(0.0f32);
    let mut column = at % parts * part_size + unit;
    while column < end {
        let centred = Vector::<f32, N>::cast_from(values[group * size + column]) - mean;
        if squared {
            sum += centred * centred;
        } else {
            sum += centred;
        }
        column += units;
    }
    let mut shared = Shared::<[f32]>::new_slice(units);
    let total = cube_sum(sum.vector_sum(), &mut shared, units);
    if unit == 0 {
        output[at] = total;
    }
}

#[cube(launch)]
fn normalize_kernel<F: Float, W: Float, N: Size>(
    values: &Buffer<Vector<F, N>>,
    mean: &Buffer<f32>,
    inverse: &Buffer<f32>,
    weight: &Buffer<W>,
    bias: &Buffer<W>,
    output: &mut Buffer<Vector<F, N>>,
    total: usize,
    plane: usize,
    size: usize,
    channels: usize,
    #[comptime] silu: bool,
    #[define(F, W)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let group = ABSOLUTE_POS / size;
    let channel = ABSOLUTE_POS / plane % channels;
    let factor = inverse[group] * f32::cast_from(weight[channel]);
    let centred = Vector::<f32, N>::cast_from(values[ABSOLUTE_POS]) - Vector::new(mean[group]);
    let mut y = centred * Vector::new(factor) + Vector::new(f32::cast_from(bias[channel]));
    if silu {
        y = activated::<N>(y, Function::Silu);
    }
    output[ABSOLUTE_POS] = Vector::cast_from(y);
}
