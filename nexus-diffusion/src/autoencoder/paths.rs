//! The two halves of the autoencoder: levels of blocks between picture and latents.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use nexus_core::nn::{Conv2d, Conv2dConfig, GroupNorm};

use super::blocks::{GROUP_NORM_EPS, Middle, Resample, ResnetBlock};
use crate::config::AutoencoderConfig;

/// Picture to moments of the latents.
///
/// Source: FLUX (autoencoder.py, `Encoder`).
#[derive(Module, Debug)]
pub struct DownPath {
    /// From colours to features.
    pub conv_in: Conv2d,
    /// Levels, from the largest picture to the smallest.
    pub down: Vec<DownLevel>,
    /// Blocks at the smallest size.
    pub mid: Middle,
    /// Norm before the last convolution.
    pub norm_out: GroupNorm,
    /// To mean and log-variance of the latents.
    pub conv_out: Conv2d,
}

/// One level of a [`DownPath`].
#[derive(Module, Debug)]
pub struct DownLevel {
    /// Residual blocks.
    pub block: Vec<ResnetBlock>,
    /// Halves the picture, on all levels but the last.
    pub downsample: Option<Resample>,
}

impl DownPath {
    /// A lazily initialised path.
    pub fn new(config: &AutoencoderConfig, device: &Device) -> Self {
        let groups = config.groups;
        let mut channels = config.ch;
        let mut down = vec![];
        for (level, multiple) in config.ch_mult.iter().enumerate() {
            let outputs = config.ch * multiple;
            let block = residual_blocks(config.num_res_blocks, channels, outputs, groups, device);
            let is_last = level + 1 == config.ch_mult.len();
            down.push(DownLevel { block, downsample: (!is_last).then(|| Resample::halving(outputs, device)) });
            channels = outputs;
        }
        Self {
            conv_in: Conv2dConfig::same(config.in_channels, config.ch, 3).init(device),
            down,
            mid: Middle::new(channels, groups, device),
            norm_out: GroupNorm::new(groups, channels, GROUP_NORM_EPS, device),
            conv_out: Conv2dConfig::same(channels, 2 * config.z_channels, 3).init(device),
        }
    }

    /// # Shapes
    /// - `image`: `[batch, 3, height, width]`
    /// - returns: `[batch, 2 * z_channels, height / 8, width / 8]`, means first
    pub fn forward(&self, image: Tensor<4>) -> Tensor<4> {
        let x = self.down.iter().fold(self.conv_in.forward(image), |x, level| level.forward(x));
        let x = self.mid.forward(x);
        self.conv_out.forward(self.norm_out.forward_silu(x))
    }
}

impl DownLevel {
    /// # Shapes
    /// `[batch, inputs, height, width]` to `[batch, outputs, height / 2, width / 2]`, on the last level without halving.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.block.iter().fold(x, |x, block| block.forward(x));
        match &self.downsample {
            Some(downsample) => downsample.halve(x),
            None => x,
        }
    }
}

/// Latents to picture.
///
/// Source: FLUX (autoencoder.py, `Decoder`).
#[derive(Module, Debug)]
pub struct UpPath {
    /// From latents to features.
    pub conv_in: Conv2d,
    /// Blocks at the smallest size.
    pub mid: Middle,
    /// Levels by the size of their picture, from the largest (0) to the smallest; they run from last to first.
    pub up: Vec<UpLevel>,
    /// Norm before the last convolution.
    pub norm_out: GroupNorm,
    /// To colours.
    pub conv_out: Conv2d,
}

/// One level of an [`UpPath`].
#[derive(Module, Debug)]
pub struct UpLevel {
    /// Residual blocks.
    pub block: Vec<ResnetBlock>,
    /// Doubles the picture, on all levels but the first.
    pub upsample: Option<Resample>,
}

impl UpPath {
    /// A lazily initialised path.
    pub fn new(config: &AutoencoderConfig, device: &Device) -> Self {
        let groups = config.groups;
        let width = |level: usize| config.ch * config.ch_mult[level];
        let num_levels = config.ch_mult.len();
        let up = (0..num_levels).map(|level| {
            let inputs = width((level + 1).min(num_levels - 1));
            let block = residual_blocks(config.num_res_blocks + 1, inputs, width(level), groups, device);
            UpLevel { block, upsample: (level > 0).then(|| Resample::doubling(width(level), device)) }
        });
        let (first, last) = (width(0), width(num_levels - 1));
        Self {
            conv_in: Conv2dConfig::same(config.z_channels, last, 3).init(device),
            mid: Middle::new(last, groups, device),
            up: up.collect(),
            norm_out: GroupNorm::new(groups, first, GROUP_NORM_EPS, device),
            conv_out: Conv2dConfig::same(first, config.in_channels, 3).init(device),
        }
    }

    /// # Shapes
    /// - `z`: `[batch, z_channels, height, width]`, not scaled
    /// - returns: `[batch, 3, 8 * height, 8 * width]`
    pub fn forward(&self, z: Tensor<4>) -> Tensor<4> {
        let x = self.mid.forward(self.conv_in.forward(z));
        let x = self.up.iter().rev().fold(x, |x, level| level.forward(x));
        self.conv_out.forward(self.norm_out.forward_silu(x))
    }
}

impl UpLevel {
    /// # Shapes
    /// `[batch, inputs, height, width]` to `[batch, outputs, 2 * height, 2 * width]`, on level 0 without doubling.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let x = self.block.iter().fold(x, |x, block| block.forward(x));
        match &self.upsample {
            Some(upsample) => upsample.double(x),
            None => x,
        }
    }
}

/// Blocks of one level; the first changes the number of channels.
fn residual_blocks(count: usize, inputs: usize, outputs: usize, groups: usize, device: &Device) -> Vec<ResnetBlock> {
    let width = |i: usize| if i == 0 { inputs } else { outputs };
    (0..count).map(|i| ResnetBlock::new(width(i), outputs, groups, device)).collect()
}
