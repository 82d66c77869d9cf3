//! Convolutions over pictures: `[batch, channels, height, width]` -> the same with other sizes.

use burn::{
    module::{Initializer, Module, Param},
    tensor::{Device, Tensor},
};
use nexus_kernels::{Filter, conv2d, upsample_conv2d};

use super::normal_param;

/// A square convolution with bias.
#[derive(Module, Debug)]
pub struct Conv2d {
    /// `[out, in, kernel, kernel]`.
    pub weight: Param<Tensor<4>>,
    /// `[out]`.
    pub bias: Param<Tensor<1>>,
    stride: usize,
    padding: (usize, usize),
}

/// Sizes of a [`Conv2d`].
#[derive(Debug, Clone, Copy)]
pub struct Conv2dConfig {
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
    /// Side of the kernel.
    pub kernel_size: usize,
    /// Step between output positions.
    pub stride: usize,
    /// Zeros added before and after each spatial dimension.
    pub padding: (usize, usize),
}

impl Conv2dConfig {
    /// A convolution that keeps height and width.
    pub fn same(inputs: usize, outputs: usize, kernel_size: usize) -> Self {
        let half = kernel_size / 2;
        Self { inputs, outputs, kernel_size, stride: 1, padding: (half, half) }
    }

    /// A 3x3 convolution of stride 2 that pads only right and bottom, and so halves height and width.
    pub fn halving(channels: usize) -> Self {
        Self { inputs: channels, outputs: channels, kernel_size: 3, stride: 2, padding: (0, 1) }
    }

    /// A lazily initialised convolution.
    pub fn init(&self, device: &Device) -> Conv2d {
        Conv2d {
            weight: normal_param([self.outputs, self.inputs, self.kernel_size, self.kernel_size], device),
            bias: Initializer::Zeros.init([self.outputs], device),
            stride: self.stride,
            padding: self.padding,
        }
    }
}

impl Conv2d {
    /// # Shapes
    /// - `x`: `[batch, in, height, width]`
    /// - returns: `[batch, out, height / stride, width / stride]`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        conv2d(x, &self.filter())
    }

    /// Doubles height and width by repeating each pixel, and convolves that.
    ///
    /// # Shapes
    /// - `x`: `[batch, in, height, width]`
    /// - returns: `[batch, out, 2 * height, 2 * width]`, for a convolution that keeps height and width
    pub fn forward_upsampled(&self, x: Tensor<4>) -> Tensor<4> {
        upsample_conv2d(x, &self.filter())
    }

    fn filter(&self) -> Filter {
        let (weight, bias) = (self.weight.val(), self.bias.val());
        Filter { weight, bias, stride: self.stride, padding: self.padding }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nexus_kernels::testing::{assert_close, cpu, ramp};

    fn direct(conv: &Conv2d, x: &Tensor<4>) -> Vec<f32> {
        let [_, inputs, height, width] = x.dims();
        let [outputs, _, kernel, _] = conv.weight.dims();
        let (w, x) =
            (conv.weight.val().to_data().try_to_vec::<f32>().unwrap(), x.to_data().try_to_vec::<f32>().unwrap());
        let (before, after) = conv.padding;
        let out = |side: usize| (side + before + after - kernel) / conv.stride + 1;
        let mut values = vec![];
        for o in 0..outputs {
            for row in 0..out(height) {
                for col in 0..out(width) {
                    let mut sum = 0.0f64;
                    for i in 0..inputs {
                        for dy in 0..kernel {
                            for dx in 0..kernel {
                                let (y, x_) = (row * conv.stride + dy, col * conv.stride + dx);
                                if y < before || x_ < before || y - before >= height || x_ - before >= width {
                                    continue;
                                }
                                let pixel = x[(i * height + y - before) * width + x_ - before];
                                sum += f64::from(pixel) * f64::from(w[((o * inputs + i) * kernel + dy) * kernel + dx]);
                            }
                        }
                    }
                    values.push(sum as f32);
                }
            }
        }
        values
    }

    #[test]
    fn every_kind_of_convolution_matches_the_sum() {
        let x = ramp([1, 3, 6, 8], 5);
        for config in [Conv2dConfig::same(3, 4, 3), Conv2dConfig::same(3, 2, 1), Conv2dConfig::halving(3)] {
            let conv = config.init(&cpu());
            assert_close(&conv.forward(x.clone()), &direct(&conv, &x), 1e-5);
        }
    }
}
