//! The one linear layer of nexus: weights as stored, activations in theirs.

use burn::{
    module::{Initializer, Module, Param},
    tensor::{Device, Tensor, module::linear},
};

use super::{cast_like, normal_param, quantization::dequantized};

/// `x Wᵀ + b` with the weight kept as the checkpoints store it, `[out, in]`, in the dtype of the file or quantised.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Param<Tensor<2>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// A layer with bias, lazily initialised.
    pub fn new(inputs: usize, outputs: usize, device: &Device) -> Self {
        Self { bias: Some(Initializer::Zeros.init([outputs], device)), ..Self::without_bias(inputs, outputs, device) }
    }

    /// A layer without bias, lazily initialised.
    pub fn without_bias(inputs: usize, outputs: usize, device: &Device) -> Self {
        Self { weight: normal_param([outputs, inputs], device), bias: None }
    }

    /// Applies the layer in the dtype of `x`.
    ///
    /// # Shapes
    /// - `x`: `[.., in]`
    /// - returns: `[.., out]`
    ///
    /// # Panics
    /// If the last dimension of `x` is not `in`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let weight = dequantized(self.weight.val());
        let bias = self.bias.as_ref().map(|bias| bias.val());
        #[cfg(feature = "flex")]
        if let Some(y) = crate::kernels::linear(&x, &weight, bias.as_ref()) {
            return y;
        }
        let weight = cast_like(weight, &x);
        let bias = bias.map(|bias| cast_like(bias, &x));
        linear(x, weight.transpose(), bias)
    }
}
