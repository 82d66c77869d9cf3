//! The one linear layer of nexus: weights as stored, activations in theirs.

use burn::{
    module::{Initializer, Module, Param},
    tensor::{Device, Tensor},
};
use nexus_kernels::linear;

use super::normal_param;

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
        linear(x, self.weight.val(), self.bias.as_ref().map(|bias| bias.val()))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::DType;
    use nexus_checkpoint::{Quantization, weight_bytes};

    use super::*;
    use crate::testing::{cpu, device, ramp};

    fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
        x.into_data().try_into_vec_as().unwrap()
    }

    #[test]
    fn every_value_is_within_half_a_step_of_its_block() {
        for (quantization, levels) in [(Quantization::Q8, 127.0), (Quantization::Q4, 7.0)] {
            for (inputs, block) in [(64, 32), (96, 32), (48, 16), (40, 8)] {
                let weight = values(ramp([6, inputs], 3));
                // Blocks of very different sizes, one of them zero.
                let scaled = |(index, value): (usize, f32)| value * [1.0, 1e-3, 0.0, 30.0][index / block % 4];
                let weight: Vec<f32> = weight.into_iter().enumerate().map(scaled).collect();
                let tensor = Tensor::<1>::from_data(weight.as_slice(), &device()).reshape([6, inputs]);
                let quantized = quantization.quantize(tensor);
                assert!(matches!(quantized.dtype(), DType::QFloat(_)));
                let found = values(quantized.dequantize());
                for (found, weight) in found.chunks(block).zip(weight.chunks(block)) {
                    let largest = weight.iter().fold(0f32, |largest, value| largest.max(value.abs()));
                    let (half_step, mut exact) = (largest / levels / 2.0 * 1.01, true);
                    for (found, weight) in found.iter().zip(weight) {
                        assert!((found - weight).abs() <= half_step, "{found} for {weight}, half a step {half_step}");
                        exact &= found == weight;
                    }
                    assert_eq!(exact, largest == 0.0);
                }
            }
        }
    }

    #[test]
    fn weights_that_fill_no_words_stay_floats() {
        for inputs in [1, 4, 12, 31] {
            assert_eq!(Quantization::Q8.scheme(inputs), None);
            let weight = ramp([3, inputs], 1);
            assert_eq!(values(Quantization::Q4.quantize(weight.clone())), values(weight));
        }
    }

    #[test]
    fn bytes_are_those_of_values_and_scales() {
        let layer = |weight| Linear { weight: Param::from_tensor(weight), ..Linear::new(64, 12, &device()) };
        let weight = ramp::<2>([12, 64], 5).to_device(&device());
        assert_eq!(weight_bytes(&layer(weight.clone())), 12 * 64 * 4 + 12 * 4);
        for (quantization, packed) in [(Quantization::Q8, 64), (Quantization::Q4, 32)] {
            let values = if device() == cpu() { 64 } else { packed };
            let bytes = weight_bytes(&layer(quantization.quantize(weight.clone())));
            assert_eq!(bytes, 12 * (values + 2 * 4) + 12 * 4);
        }
    }

    #[test]
    fn a_layer_computes_with_what_its_weight_has_become() {
        let layer = Linear::new(64, 12, &device());
        let weight = ramp::<2>([12, 64], 5).to_device(&device());
        for quantization in [Quantization::Q8, Quantization::Q4] {
            let quantized = quantization.quantize(weight.clone());
            let floats = Linear { weight: Param::from_tensor(quantized.clone().dequantize()), ..layer.clone() };
            let layer = Linear { weight: Param::from_tensor(quantized), ..layer.clone() };
            for rows in [1, 7] {
                let x = ramp::<2>([rows, 64], 9).to_device(&device());
                let (found, expected) = (values(layer.forward(x.clone())), values(floats.forward(x.clone())));
                assert!(found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-4));
                let plain = Linear { weight: Param::from_tensor(weight.clone()), ..layer.clone() };
                assert_ne!(found, values(plain.forward(x)));
            }
        }
    }
}
