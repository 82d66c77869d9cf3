//! Normalisations: statistics in f32 whatever the dtype of the activations.

use burn::{
    module::{Initializer, Module, Param},
    tensor::{DType, Device, Tensor},
};

use super::{cast_like, silu};
#[cfg(feature = "cube")]
use crate::cube::{self, Norm};
#[cfg(feature = "flex")]
use crate::kernels;

fn in_f32<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.dtype() == DType::F32 { x } else { x.cast(DType::F32) }
}

/// Root-mean-square normalisation over the last dimension: `w * (x * rsqrt(mean x² + eps))`.
///
/// Source: Qwen2.5-VL (modeling_qwen2_5_vl.py, `Qwen2RMSNorm`).
/// Differs: kernels round once, after the weight; the original, and burn's operations here, round the normalised value too.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[width]`.
    pub weight: Param<Tensor<1>>,
    epsilon: f64,
}

impl RmsNorm {
    /// A norm of weight one.
    pub fn new(width: usize, epsilon: f64, device: &Device) -> Self {
        Self { weight: Initializer::Ones.init([width], device), epsilon }
    }

    /// # Shapes
    /// `[.., width]` to `[.., width]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        kernels_first!(
            x,
            kernels::rms_norm(x, &self.weight.val(), self.epsilon),
            cube::normalize(x, Norm::Rms { weight: &self.weight.val() }, self.epsilon)
        );
        self.plain_forward(x)
    }

    fn plain_forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let weight = cast_like(self.weight.val(), &x).unsqueeze();
        let dtype = x.dtype();
        let x = in_f32(x);
        let inverse = (x.clone().square().mean_dim(D - 1) + self.epsilon).sqrt().recip();
        let normed = x * inverse;
        let normed = if dtype == DType::F32 { normed } else { normed.cast(dtype) };
        normed * weight
    }
}

/// `(x - mean) / sqrt(variance + eps)` over the last dimension, without weights, in the dtype of `x`.
pub fn layer_norm<const D: usize>(x: Tensor<D>, epsilon: f64) -> Tensor<D> {
    kernels_first!(x, kernels::layer_norm(x, epsilon), cube::normalize(x, Norm::Layer, epsilon));
    plain_layer_norm(x, epsilon)
}

fn plain_layer_norm<const D: usize>(x: Tensor<D>, epsilon: f64) -> Tensor<D> {
    let dtype = x.dtype();
    let x = in_f32(x);
    let centred = x.clone() - x.mean_dim(D - 1);
    let inverse = (centred.clone().square().mean_dim(D - 1) + epsilon).sqrt().recip();
    let normed = centred * inverse;
    if dtype == DType::F32 { normed } else { normed.cast(dtype) }
}

/// Adaptive layer norm: `layer_norm(x) * (1 + scale) + shift`.
///
/// # Shapes
/// - `x`: `[batch, tokens, width]`
/// - `shift`, `scale`: `[batch, 1, width]`
pub fn modulate(x: Tensor<3>, shift: Tensor<3>, scale: Tensor<3>, epsilon: f64) -> Tensor<3> {
    kernels_first!(
        x,
        kernels::modulated_layer_norm(x, &shift, &scale, epsilon),
        cube::normalize(x, Norm::Modulated { scale: &scale, shift: &shift }, epsilon)
    );
    plain_modulate(x, shift, scale, epsilon)
}

fn plain_modulate(x: Tensor<3>, shift: Tensor<3>, scale: Tensor<3>, epsilon: f64) -> Tensor<3> {
    plain_layer_norm(x, epsilon) * (scale + 1.0) + shift
}

/// Layer normalisation over the last dimension with weight and bias.
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// `[width]`.
    pub weight: Param<Tensor<1>>,
    /// `[width]`.
    pub bias: Param<Tensor<1>>,
    epsilon: f64,
}

impl LayerNorm {
    /// A norm of weight one and bias zero.
    pub fn new(width: usize, epsilon: f64, device: &Device) -> Self {
        Self {
            weight: Initializer::Ones.init([width], device),
            bias: Initializer::Zeros.init([width], device),
            epsilon,
        }
    }

    /// # Shapes
    /// `[.., width]` to `[.., width]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        kernels_first!(
            x,
            kernels::affine_layer_norm(x, &self.weight.val(), &self.bias.val(), self.epsilon),
            cube::normalize(x, Norm::Affine { weight: &self.weight.val(), bias: &self.bias.val() }, self.epsilon)
        );
        self.plain_forward(x)
    }

    fn plain_forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        let x = in_f32(x);
        let weight = cast_like(self.weight.val(), &x).unsqueeze();
        let bias = cast_like(self.bias.val(), &x).unsqueeze();
        let normed = plain_layer_norm(x, self.epsilon) * weight + bias;
        if dtype == DType::F32 { normed } else { normed.cast(dtype) }
    }
}

/// Group normalisation over channels and positions of a picture.
#[derive(Module, Debug)]
pub struct GroupNorm {
    /// `[channels]`.
    pub weight: Param<Tensor<1>>,
    /// `[channels]`.
    pub bias: Param<Tensor<1>>,
    num_groups: usize,
    epsilon: f64,
}

impl GroupNorm {
    /// A norm of weight one and bias zero.
    ///
    /// # Panics
    /// If `num_groups` does not divide `channels`.
    pub fn new(num_groups: usize, channels: usize, epsilon: f64, device: &Device) -> Self {
        assert!(num_groups > 0 && channels.is_multiple_of(num_groups), "{num_groups} groups, {channels} channels");
        Self {
            weight: Initializer::Ones.init([channels], device),
            bias: Initializer::Zeros.init([channels], device),
            num_groups,
            epsilon,
        }
    }

    /// # Shapes
    /// `[batch, channels, height, width]` to the same.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.by_kernel(x, false).unwrap_or_else(|x| self.plain_forward(x))
    }

    /// [`silu`] of [`GroupNorm::forward`], in one pass where it can be.
    ///
    /// # Shapes
    /// `[batch, channels, height, width]` to the same.
    pub fn forward_silu(&self, x: Tensor<4>) -> Tensor<4> {
        self.by_kernel(x, true).unwrap_or_else(|x| silu(self.plain_forward(x)))
    }

    /// What the kernels for CPUs or GPUs make of a picture; where they do not know it, they give it back.
    #[allow(clippy::result_large_err, reason = "the error is the picture")]
    fn by_kernel(&self, x: Tensor<4>, silu: bool) -> Result<Tensor<4>, Tensor<4>> {
        #[cfg(feature = "flex")]
        let x = {
            let (weight, bias, num_groups, epsilon) =
                (self.weight.val(), self.bias.val(), self.num_groups, self.epsilon);
            match kernels::group_norm(x, &kernels::GroupNormOptions { weight, bias, num_groups, epsilon, silu }) {
                Ok(y) => return Ok(y),
                Err(x) => x,
            }
        };
        #[cfg(feature = "cube")]
        let x = match cube::group_norm(x, [&self.weight.val(), &self.bias.val()], self.num_groups, self.epsilon, silu) {
            Ok(y) => return Ok(y),
            Err(x) => x,
        };
        let _ = silu;
        Err(x)
    }

    fn plain_forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, channels, height, width] = x.dims();
        let dtype = x.dtype();
        let grouped = in_f32(x).reshape([batch, self.num_groups, channels / self.num_groups * height * width]);
        let normed = plain_layer_norm(grouped, self.epsilon).reshape([batch, channels, height, width]);
        let weight = cast_like(self.weight.val(), &normed).reshape([1, channels, 1, 1]);
        let bias = cast_like(self.bias.val(), &normed).reshape([1, channels, 1, 1]);
        let normed = normed * weight + bias;
        if dtype == DType::F32 { normed } else { normed.cast(dtype) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_close_tensors, cpu, device, input, ramp};

    #[test]
    fn layer_norm_centres_and_scales() {
        let x = Tensor::<2>::from_floats([[1.0, 2.0, 3.0, 6.0]], &device());
        // mean 3, variance 3.5
        let expected = [-2.0, -1.0, 0.0, 3.0].map(|d: f32| d / 3.5f32.sqrt());
        assert_close(&layer_norm(x, 0.0), &expected, 1e-6);
    }

    #[test]
    fn rms_norm_divides_by_root_mean_square() {
        let x = Tensor::<2>::from_floats([[3.0, 4.0], [0.0, 0.0]], &device());
        let rms = 12.5f32.sqrt();
        assert_close(&RmsNorm::new(2, 1e-6, &device()).forward(x), &[3.0 / rms, 4.0 / rms, 0.0, 0.0], 1e-6);
    }

    #[test]
    fn rms_norm_statistics_do_not_overflow_in_half_precision() {
        let x = Tensor::<2>::from_floats([[300.0, 400.0]], &cpu()).cast(DType::F16);
        let y = RmsNorm::new(2, 1e-6, &cpu()).forward(x);
        assert_eq!(y.dtype(), DType::F16);
        assert_close(&y.cast(DType::F32), &[0.848_528_1, 1.131_370_8], 1e-3);
    }

    #[test]
    fn group_norm_normalises_each_group() {
        let x = Tensor::<1>::from_floats([0.0, 2.0, 10.0, 14.0], &cpu()).reshape([1, 2, 1, 2]);
        assert_close(&GroupNorm::new(2, 2, 0.0, &cpu()).forward(x), &[-1.0, 1.0, -1.0, 1.0], 1e-6);
    }

    /// Activations of one shape, some of them views.
    fn inputs(batch: usize, tokens: usize, width: usize) -> [Tensor<3>; 3] {
        [
            input([batch, tokens, width], 1) * 3.0 + 0.5,
            input([batch, tokens + 2, width + 3], 2).narrow(1, 1, tokens).narrow(2, 2, width),
            input([width, batch, tokens], 3).permute([1, 2, 0]),
        ]
    }

    const SHAPES: [[usize; 3]; 6] = [[1, 1, 1], [1, 1, 3584], [2, 5, 7], [3, 11, 80], [2, 19, 1280], [2, 700, 17]];

    #[test]
    fn norms_of_rows_match_the_plain_formulation() {
        let mut dtypes = vec![DType::F32, DType::BF16, DType::F16];
        dtypes.retain(|&dtype| device().supports_dtype(dtype));
        for ([batch, tokens, width], dtype) in SHAPES.into_iter().zip(dtypes.into_iter().cycle()) {
            let weight = |seed| Param::from_tensor(input([width], seed).cast(dtype));
            let rms = RmsNorm { weight: weight(5), epsilon: 1e-6 };
            let layer = LayerNorm { weight: weight(6), bias: weight(7), epsilon: 1e-6 };
            let vectors = input([batch, 1, 3 * width], 8);
            let (shift, scale) = (vectors.clone().narrow(2, 0, width), vectors.narrow(2, width, width));
            for x in inputs(batch, tokens, width) {
                assert_close_tensors(&rms.forward(x.clone()), &rms.plain_forward(x.clone()), 2e-6);
                assert_close_tensors(&layer.forward(x.clone()), &layer.plain_forward(x.clone()), 2e-6);
                assert_close_tensors(&layer_norm(x.clone(), 1e-6), &plain_layer_norm(x.clone(), 1e-6), 2e-6);
                let expected = plain_modulate(x.clone(), shift.clone(), scale.clone(), 1e-6);
                assert_close_tensors(&modulate(x, shift.clone(), scale.clone(), 1e-6), &expected, 2e-6);
            }
        }
    }

    #[test]
    fn heads_are_normalised_where_they_lie() {
        let q = input([2, 9, 3 * 5, 16], 1).narrow(2, 5, 5);
        let norm = RmsNorm { weight: Param::from_tensor(input([16], 2)), epsilon: 1e-6 };
        assert_close_tensors(&norm.forward(q.clone()), &norm.plain_forward(q), 2e-6);
    }

    #[test]
    fn group_norms_match_the_plain_formulation() {
        let dtype = if device().supports_dtype(DType::BF16) { DType::BF16 } else { DType::F32 };
        for [batch, channels, height, width] in [[1, 4, 1, 1], [2, 6, 5, 7], [1, 8, 65, 17], [2, 4, 64, 80]] {
            let weight = |seed| Param::from_tensor(input([channels], seed).cast(dtype));
            for num_groups in [1, 2, channels] {
                let norm = GroupNorm { weight: weight(1), bias: weight(2), num_groups, epsilon: 1e-6 };
                let permuted = input([batch, height, width, channels], 4).permute([0, 3, 1, 2]);
                for x in [input([batch, channels, height, width], 3) * 5.0 - 2.0, permuted] {
                    let expected = norm.plain_forward(x.clone());
                    assert_close_tensors(&norm.forward(x.clone()), &expected, 2e-6);
                    assert_close_tensors(&norm.forward_silu(x), &silu(expected), 2e-6);
                }
            }
        }
    }

    #[test]
    fn values_that_are_not_finite_spread_as_in_the_plain_formulation() {
        let (rms, layer) = (RmsNorm::new(20, 1e-6, &cpu()), LayerNorm::new(20, 1e-6, &cpu()));
        let group = GroupNorm::new(2, 4, 1e-6, &cpu());
        let kinds = |x: Tensor<4>| -> Vec<_> {
            let values = x.into_data().try_to_vec::<f32>().unwrap();
            values.into_iter().map(|value| (value.is_nan(), value == f32::INFINITY, value == 0.0)).collect()
        };
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e25] {
            let mut values = ramp([160], 1).into_data().try_to_vec::<f32>().unwrap();
            values[33] = odd;
            let x = Tensor::<1>::from_floats(values.as_slice(), &cpu()).reshape([2, 4, 1, 20]);
            assert_eq!(kinds(rms.forward(x.clone())), kinds(rms.plain_forward(x.clone())), "rms {odd}");
            assert_eq!(kinds(layer.forward(x.clone())), kinds(layer.plain_forward(x.clone())), "layer {odd}");
            assert_eq!(kinds(group.forward(x.clone())), kinds(group.plain_forward(x)), "group {odd}");
        }
    }
}
