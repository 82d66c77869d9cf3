//! Convolutions as products of matrices that are never written: pictures and weights -> pictures.

use burn::tensor::{DType, Tensor, ops::ConvOptions};
use burn_cubecl::kernel::conv::{ConvStrategy, conv_forward};

use super::{cube, tensor};

/// Channels are taken in groups of this many.
const CHANNELS: usize = 32;

/// The convolution of half-precision pictures whose border is padded evenly; `None` for others.
///
/// f32 is left to burn's direct convolution, as matrix units would round it to 11 bits.
pub(crate) fn conv2d(
    x: &Tensor<4>,
    weight: &Tensor<4>,
    bias: &Tensor<1>,
    stride: usize,
    padding: usize,
) -> Option<Tensor<4>> {
    let [outputs, inputs, ..] = weight.dims();
    let suits = x.dtype() != DType::F32 && [outputs, inputs].iter().all(|channels| channels.is_multiple_of(CHANNELS));
    if !suits || [weight.dtype(), bias.dtype()] != [x.dtype(); 2] {
        return None;
    }
    let (x, weight, bias) = (cube(x)?, cube(weight)?, cube(bias)?);
    let options = ConvOptions::new([stride; 2], [padding; 2], [1; 2], 1);
    conv_forward::<2>(x, weight, Some(bias), options, ConvStrategy::ImplicitGemm).ok().map(tensor)
}
