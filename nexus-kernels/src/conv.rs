//! Convolutions over pictures: `[batch, channels, height, width]` -> the same with other sizes.

use burn::tensor::{
    Tensor,
    module::interpolate,
    ops::{ConvOptions, InterpolateMode, InterpolateOptions},
};

use crate::{
    cast_like,
    place::{at, dispatch},
};

/// A square convolution with bias.
#[derive(Debug, Clone)]
pub struct Filter {
    /// `[out, in, kernel, kernel]`.
    pub weight: Tensor<4>,
    /// `[out]`.
    pub bias: Tensor<1>,
    /// Step between output positions.
    pub stride: usize,
    /// Zeros before and after each spatial dimension.
    pub padding: (usize, usize),
}

/// Convolves pictures.
///
/// # Shapes
/// - `x`: `[batch, in, height, width]`
/// - returns: `[batch, out, ..]`, sides `(side + padding - kernel) / stride + 1`
///
/// # Panics
/// If the shapes do not belong together.
pub fn conv2d(x: Tensor<4>, filter: &Filter) -> Tensor<4> {
    dispatch!(&[at(&x), at(&filter.weight), at(&filter.bias)], conv2d(x, filter))
}

/// [`conv2d`] in burn's operations.
pub(crate) fn plain(x: Tensor<4>, filter: &Filter) -> Tensor<4> {
    let (weight, bias) = (cast_like(filter.weight.clone(), &x), cast_like(filter.bias.clone(), &x));
    let options = ConvOptions { stride: [filter.stride; 2], padding: [filter.padding; 2], dilation: [1; 2], groups: 1 };
    burn::tensor::module::conv2d(x, weight, Some(bias), options)
}

/// Doubles height and width by repeating each pixel.
pub fn upsample_nearest_2x(x: Tensor<4>) -> Tensor<4> {
    interpolate(x, InterpolateOptions::new(InterpolateMode::Nearest).with_scale_factor([2.0, 2.0]))
}

/// [`conv2d`] of [`upsample_nearest_2x`].
///
/// # Shapes
/// - `x`: `[batch, in, height, width]`
/// - returns: that of the convolution of `[batch, in, 2 * height, 2 * width]`
pub fn upsample_conv2d(x: Tensor<4>, filter: &Filter) -> Tensor<4> {
    dispatch!(&[at(&x), at(&filter.weight), at(&filter.bias)], upsample_conv2d(x, filter))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, cpu};

    #[test]
    fn upsampling_repeats_pixels() {
        let x = Tensor::<1>::from_floats([1.0, 2.0], &cpu()).reshape([1, 1, 1, 2]);
        assert_close(&upsample_nearest_2x(x), &[1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0], 0.0);
    }
}
