//! Normalisations with their weights: statistics in f32 whatever the dtype of the activations.

use burn::{
    module::{Initializer, Module, Param},
    tensor::{Device, Tensor},
};
use nexus_kernels::{GroupNormOptions, affine_layer_norm, group_norm, rms_norm};

/// Root-mean-square normalisation over the last dimension: `w * (x * rsqrt(mean x² + eps))`.
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
        rms_norm(x, self.weight.val(), self.epsilon)
    }
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
        affine_layer_norm(x, self.weight.val(), self.bias.val(), self.epsilon)
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
        group_norm(x, &self.options(false))
    }

    /// The SiLU of [`GroupNorm::forward`], in one pass where it can be.
    ///
    /// # Shapes
    /// `[batch, channels, height, width]` to the same.
    pub fn forward_silu(&self, x: Tensor<4>) -> Tensor<4> {
        group_norm(x, &self.options(true))
    }

    fn options(&self, silu: bool) -> GroupNormOptions {
        let (weight, bias) = (self.weight.val(), self.bias.val());
        GroupNormOptions { weight, bias, num_groups: self.num_groups, epsilon: self.epsilon, silu }
    }
}
