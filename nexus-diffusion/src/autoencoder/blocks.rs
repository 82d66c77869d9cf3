//! Blocks of the autoencoder: pictures of features -> pictures of features.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use nexus_core::nn::{Conv2d, Conv2dConfig, GroupNorm};
use nexus_kernels::{Attention, attention};

/// Epsilon of every group norm.
pub(super) const GROUP_NORM_EPS: f64 = 1e-6;

/// Two normalised convolutions beside a shortcut.
///
/// Source: FLUX (autoencoder.py, `ResnetBlock`).
#[derive(Module, Debug)]
pub struct ResnetBlock {
    /// Norm before the first convolution.
    pub norm1: GroupNorm,
    /// 3x3, changes the number of channels.
    pub conv1: Conv2d,
    /// Norm before the second convolution.
    pub norm2: GroupNorm,
    /// 3x3.
    pub conv2: Conv2d,
    /// 1x1, where the number of channels changes.
    pub nin_shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    /// A lazily initialised block.
    pub fn new(inputs: usize, outputs: usize, groups: usize, device: &Device) -> Self {
        Self {
            norm1: GroupNorm::new(groups, inputs, GROUP_NORM_EPS, device),
            conv1: Conv2dConfig::same(inputs, outputs, 3).init(device),
            norm2: GroupNorm::new(groups, outputs, GROUP_NORM_EPS, device),
            conv2: Conv2dConfig::same(outputs, outputs, 3).init(device),
            nin_shortcut: (inputs != outputs).then(|| Conv2dConfig::same(inputs, outputs, 1).init(device)),
        }
    }

    /// # Shapes
    /// - `x`: `[batch, inputs, height, width]`
    /// - returns: `[batch, outputs, height, width]`
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = self.conv1.forward(self.norm1.forward_silu(x.clone()));
        let y = self.conv2.forward(self.norm2.forward_silu(y));
        match &self.nin_shortcut {
            Some(shortcut) => shortcut.forward(x) + y,
            None => x + y,
        }
    }
}

/// Attention among all positions, with one head.
///
/// Source: FLUX (autoencoder.py, `AttnBlock`).
#[derive(Module, Debug)]
pub struct AttentionBlock {
    /// Norm before attention.
    pub norm: GroupNorm,
    /// Queries, 1x1.
    pub q: Conv2d,
    /// Keys, 1x1.
    pub k: Conv2d,
    /// Values, 1x1.
    pub v: Conv2d,
    /// 1x1.
    pub proj_out: Conv2d,
}

impl AttentionBlock {
    /// A lazily initialised block.
    pub fn new(channels: usize, groups: usize, device: &Device) -> Self {
        let conv = || Conv2dConfig::same(channels, channels, 1).init(device);
        Self {
            norm: GroupNorm::new(groups, channels, GROUP_NORM_EPS, device),
            q: conv(),
            k: conv(),
            v: conv(),
            proj_out: conv(),
        }
    }

    /// # Shapes
    /// `[batch, channels, height, width]` to the same.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, channels, height, width] = x.dims();
        let tokens = |conv: &Conv2d, y: &Tensor<4>| {
            let y = conv.forward(y.clone()).reshape([batch, channels, height * width]);
            y.swap_dims(1, 2).unsqueeze_dim::<4>(2)
        };
        let y = self.norm.forward(x.clone());
        let (q, k, v) = (tokens(&self.q, &y), tokens(&self.k, &y), tokens(&self.v, &y));
        let mixed = attention(q, k, v, Attention::default());
        x + self.proj_out.forward(mixed.swap_dims(1, 2).reshape([batch, channels, height, width]))
    }
}

/// The blocks at the smallest size.
#[derive(Module, Debug)]
pub struct Middle {
    /// First.
    pub block_1: ResnetBlock,
    /// Second.
    pub attn_1: AttentionBlock,
    /// Third.
    pub block_2: ResnetBlock,
}

impl Middle {
    /// Lazily initialised blocks.
    pub fn new(channels: usize, groups: usize, device: &Device) -> Self {
        Self {
            block_1: ResnetBlock::new(channels, channels, groups, device),
            attn_1: AttentionBlock::new(channels, groups, device),
            block_2: ResnetBlock::new(channels, channels, groups, device),
        }
    }

    /// # Shapes
    /// `[batch, channels, height, width]` to the same.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.block_2.forward(self.attn_1.forward(self.block_1.forward(x)))
    }
}

/// A convolution that halves the picture, or one that follows its doubling.
#[derive(Module, Debug)]
pub struct Resample {
    /// 3x3.
    pub conv: Conv2d,
}

impl Resample {
    /// Halves height and width.
    pub fn halving(channels: usize, device: &Device) -> Self {
        Self { conv: Conv2dConfig::halving(channels).init(device) }
    }

    /// Refines a doubled picture.
    pub fn doubling(channels: usize, device: &Device) -> Self {
        Self { conv: Conv2dConfig::same(channels, channels, 3).init(device) }
    }

    /// # Shapes
    /// `[batch, channels, height, width]` to half of height and width.
    pub fn halve(&self, x: Tensor<4>) -> Tensor<4> {
        self.conv.forward(x)
    }

    /// # Shapes
    /// `[batch, channels, height, width]` to twice height and width.
    pub fn double(&self, x: Tensor<4>) -> Tensor<4> {
        self.conv.forward_upsampled(x)
    }
}
