//! Normalisations: statistics in f32 whatever the dtype of the activations.

use burn::{
    module::{Initializer, Module, Param},
    tensor::{DType, Device, Tensor},
};

use super::cast_like;

fn in_f32<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.dtype() == DType::F32 { x } else { x.cast(DType::F32) }
}

/// Root-mean-square normalisation over the last dimension: `w * (x * rsqrt(mean x² + eps))`.
///
/// The normalised value is rounded to the dtype of `x` before the weight is applied.
///
/// Source: Qwen2.5-VL (modeling_qwen2_5_vl.py, `Qwen2RMSNorm`).
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
    layer_norm(x, epsilon) * (scale + 1.0) + shift
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
        let dtype = x.dtype();
        let x = in_f32(x);
        let weight = cast_like(self.weight.val(), &x).unsqueeze();
        let bias = cast_like(self.bias.val(), &x).unsqueeze();
        let normed = layer_norm(x, self.epsilon) * weight + bias;
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
        let [batch, channels, height, width] = x.dims();
        let dtype = x.dtype();
        let grouped = in_f32(x).reshape([batch, self.num_groups, channels / self.num_groups * height * width]);
        let normed = layer_norm(grouped, self.epsilon).reshape([batch, channels, height, width]);
        let weight = cast_like(self.weight.val(), &normed).reshape([1, channels, 1, 1]);
        let bias = cast_like(self.bias.val(), &normed).reshape([1, channels, 1, 1]);
        let normed = normed * weight + bias;
        if dtype == DType::F32 { normed } else { normed.cast(dtype) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, cpu};

    #[test]
    fn layer_norm_centres_and_scales() {
        let x = Tensor::<2>::from_floats([[1.0, 2.0, 3.0, 6.0]], &cpu());
        // mean 3, variance 3.5
        let expected = [-2.0, -1.0, 0.0, 3.0].map(|d: f32| d / 3.5f32.sqrt());
        assert_close(&layer_norm(x, 0.0), &expected, 1e-6);
    }

    #[test]
    fn rms_norm_divides_by_root_mean_square() {
        let x = Tensor::<2>::from_floats([[3.0, 4.0], [0.0, 0.0]], &cpu());
        let rms = 12.5f32.sqrt();
        assert_close(&RmsNorm::new(2, 1e-6, &cpu()).forward(x), &[3.0 / rms, 4.0 / rms, 0.0, 0.0], 1e-6);
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
}
