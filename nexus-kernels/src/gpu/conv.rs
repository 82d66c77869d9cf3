//! Convolutions as products of matrices: pictures and weights -> pictures.

use burn::tensor::{DType, Tensor, ops::ConvOptions};
use burn_cubecl::{
    cubecl::{
        self, calculate_cube_count_elemwise,
        ir::ElemType,
        prelude::{Tensor as Buffer, *},
    },
    kernel::conv::{ConvStrategy, conv_forward},
};

use super::{contiguous, cube, element, empty_like, joined, matmul::product, tensor};
use crate::{Filter, cast_like};

/// Matrix units take channels in groups of this many.
const CHANNELS: usize = 32;
/// Bytes of the pixels under the weights that are written at once.
const COLUMN_BYTES: usize = 1 << 28;

/// The convolution of a picture; `None` for tensors that are not for these kernels.
pub(super) fn conv2d(x: &Tensor<4>, filter: &Filter) -> Option<Tensor<4>> {
    let &Filter { stride, padding, .. } = filter;
    let (weight, bias) = (cast_like(filter.weight.clone(), x), cast_like(filter.bias.clone(), x));
    if let Some(y) = by_matrix_units(x, &weight, &bias, stride, padding) {
        return Some(y);
    }
    let ([outputs, _, kernel, kernel_width], [_, _, height, width]) = (weight.dims(), x.dims());
    if kernel != kernel_width || height.min(width) + padding.0 + padding.1 < kernel {
        return None;
    }
    let y = Patches::new(x.dims(), kernel, stride, padding).times(&weight, x)?;
    Some(y + bias.reshape([1, outputs, 1, 1]))
}

/// The convolution of half-precision pictures whose border is padded evenly, without writing what lies under the weights.
///
/// f32 is left to products, as matrix units would round it to 11 bits.
fn by_matrix_units(
    x: &Tensor<4>,
    weight: &Tensor<4>,
    bias: &Tensor<1>,
    stride: usize,
    (before, after): (usize, usize),
) -> Option<Tensor<4>> {
    let [outputs, inputs, ..] = weight.dims();
    let suits = before == after && [outputs, inputs].iter().all(|channels| channels.is_multiple_of(CHANNELS));
    if x.dtype() == DType::F32 || !suits {
        return None;
    }
    let (x, weight, bias) = (cube(x)?, cube(weight)?, cube(bias)?);
    let options = ConvOptions::new([stride; 2], [before; 2], [1; 2], 1);
    conv_forward::<2>(x, weight, Some(bias), options, ConvStrategy::ImplicitGemm).ok().map(tensor)
}

/// The pixels that lie under a square of weights, at each place where it is put on a picture.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patches {
    kernel: usize,
    stride: usize,
    /// Distance of the picture's pixels, between which there are zeros.
    spread: usize,
    /// Zeros before the first pixel.
    before: usize,
    /// Height and width of the result.
    places: [usize; 2],
}

impl Patches {
    /// Of a convolution.
    pub(super) fn new(
        [_, _, height, width]: [usize; 4],
        kernel: usize,
        stride: usize,
        (before, after): (usize, usize),
    ) -> Self {
        let places = [height, width].map(|side| (side + before + after - kernel) / stride + 1);
        Self { kernel, stride, spread: 1, before, places }
    }

    /// Of the convolution that gives a picture of these sides its gradient from that of the result.
    #[cfg(feature = "autodiff")]
    pub(super) fn back(self, sides: [usize; 2]) -> Self {
        let Self { kernel, stride, before, .. } = self;
        Self { kernel, stride: 1, spread: stride, before: kernel - 1 - before, places: sides }
    }

    /// The weights times what lies under them.
    ///
    /// # Shapes
    /// `[outputs, inputs, kernel, kernel]` and `[batch, inputs, height, width]` to `[batch, outputs, height, width]`
    pub(super) fn times(self, weight: &Tensor<4>, x: &Tensor<4>) -> Option<Tensor<4>> {
        let ([outputs, inputs, ..], [batch, ..], [_, width]) = (weight.dims(), x.dims(), self.places);
        // Copied here if it has to be, and not for every part.
        let x = &tensor(contiguous(x)?);
        let weight = weight.clone().reshape([outputs, inputs * self.kernel * self.kernel]);
        let mut samples = vec![];
        for sample in 0..batch {
            let mut parts = vec![];
            for (row, rows) in self.parts(x)? {
                let y = product(weight.clone(), self.columns(x, sample, row, rows)?, x.dtype())?;
                parts.push(y.reshape([1, outputs, rows, width]));
            }
            samples.push(joined(parts, 2));
        }
        Some(joined(samples, 0))
    }

    /// First rows and numbers of rows of the result, for whose places there is room at once.
    pub(super) fn parts(self, x: &Tensor<4>) -> Option<Vec<(usize, usize)>> {
        let ([_, inputs, ..], [height, width]) = (x.dims(), self.places);
        let largest = cube(x)?.client.properties().memory.max_page_size;
        let bytes = COLUMN_BYTES.min(usize::try_from(largest).unwrap_or(usize::MAX));
        let row = inputs * self.kernel * self.kernel * width * x.dtype().size();
        let rows = (bytes / row).clamp(1, height);
        Some((0..height).step_by(rows).map(|first| (first, rows.min(height - first))).collect())
    }

    /// What lies under each weight at the places of some rows of one sample, `[inputs * kernel * kernel, rows * width]`.
    pub(super) fn columns(self, x: &Tensor<4>, sample: usize, first: usize, rows: usize) -> Option<Tensor<2>> {
        let ([_, inputs, height, width], dtype) = (x.dims(), element(x.dtype())?);
        let (x, inner, places) = (contiguous(x)?, inputs * self.kernel * self.kernel, rows * self.places[1]);
        let output = empty_like(&x, [inner, places], x.dtype);
        let (client, total) = (x.client.clone(), inner * places);
        let cube_dim = CubeDim::new(&client, total);
        columns_kernel::launch(
            &client,
            calculate_cube_count_elemwise(&client, total, cube_dim),
            cube_dim,
            x.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            total,
            sample * inputs * height * width,
            first,
            places,
            self.places[1],
            height,
            width,
            self.kernel,
            self.stride,
            self.spread,
            self.before,
            dtype,
        );
        Some(tensor(output))
    }
}

#[cube(launch)]
fn columns_kernel<F: Float>(
    x: &Buffer<F>,
    output: &mut Buffer<F>,
    total: usize,
    start: usize,
    first: usize,
    places: usize,
    places_width: usize,
    height: usize,
    width: usize,
    kernel: usize,
    stride: usize,
    spread: usize,
    before: usize,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let weight = ABSOLUTE_POS / places;
    let place = ABSOLUTE_POS % places;
    // Counted from the first zero before the picture.
    let row = (first + place / places_width) * stride + weight / kernel % kernel;
    let column = place % places_width * stride + weight % kernel;
    let mut value = F::new(0.0);
    if row >= before && column >= before {
        let down = (row - before) / spread;
        let across = (column - before) / spread;
        // Not between pixels.
        if down * spread + before == row && across * spread + before == column && down < height && across < width {
            let channel = weight / kernel / kernel;
            value = x[start + (channel * height + down) * width + across];
        }
    }
    output[ABSOLUTE_POS] = value;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close_tensors, cpu, device, input};

    #[test]
    #[ignore = "needs a GPU that BURN_DEVICE names"]
    fn convolutions_are_those_of_burn_on_the_cpu() {
        for ([batch, inputs, outputs, height, width], kernel, stride, padding) in [
            ([1, 1, 1, 1, 1], 1, 1, (0, 0)),
            ([2, 3, 5, 7, 9], 3, 1, (1, 1)),
            ([1, 32, 64, 9, 5], 3, 1, (1, 1)),
            ([2, 4, 6, 10, 8], 3, 2, (0, 1)),
            ([1, 3, 4, 28, 14], 14, 14, (0, 0)),
            ([1, 16, 3, 6, 6], 1, 1, (0, 0)),
        ] {
            let x = input([batch, inputs, width, height], 1).swap_dims(2, 3);
            let (weight, bias) = (input([outputs, inputs, kernel, kernel], 2), input([outputs], 3));
            let on_cpu = x.clone().to_device(&cpu()).pad((padding.0, padding.1, padding.0, padding.1), 0.0f32);
            let options = ConvOptions::new([stride; 2], [0; 2], [1; 2], 1);
            let [of_weight, of_bias] =
                [weight.clone().flatten(0, 3), bias.clone()].map(|x: Tensor<1>| x.to_device(&cpu()));
            let of_weight = of_weight.reshape(weight.dims());
            let expected = burn::tensor::module::conv2d(on_cpu, of_weight, Some(of_bias), options);
            let filter = Filter { weight, bias, stride, padding };
            let y = conv2d(&x, &filter).unwrap();
            assert_close_tensors(&y.to_device(&cpu()), &expected, 1e-5);
            let dtype = if device().supports_dtype(DType::BF16) { DType::BF16 } else { DType::F16 };
            let half = conv2d(&x.cast(dtype), &filter).unwrap();
            assert_close_tensors(&half.cast(DType::F32).to_device(&cpu()), &expected, 1e-2);
        }
    }

    #[test]
    #[ignore = "needs a GPU that BURN_DEVICE names"]
    fn sums_of_half_precision_are_kept_in_f32() {
        let dtype = if device().supports_dtype(DType::BF16) { DType::BF16 } else { DType::F16 };
        // Sums in half precision, even four or eight side by side, stop growing long before the last of these.
        let ones = |shape: [usize; 4]| Tensor::<4>::ones(shape, &device()).cast(dtype);
        let bias = Tensor::<1>::zeros([3], &device()).cast(dtype);
        let filter = Filter { weight: ones([3, 3600, 3, 3]), bias, stride: 1, padding: (0, 0) };
        let y = conv2d(&ones([1, 3600, 4, 4]), &filter).unwrap();
        assert_close_tensors(&y.cast(DType::F32), &Tensor::full([1, 3, 2, 2], 32400.0, &device()), 5e-3);
    }
}
