//! One block of the vision encoder: patch features -> patch features.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use nexus_core::nn::{GatedMlp, Linear, RmsNorm};
use nexus_kernels::{Attention, RotaryTable, Visibility, attention, rotate_half};

use crate::VisionConfig;

const RMS_NORM_EPS: f64 = 1e-6;

/// Pre-norm transformer block with attention inside segments.
///
/// Source: Qwen2.5-VL (modeling_qwen2_5_vl.py, `Qwen2_5_VLVisionBlock`).
#[derive(Module, Debug)]
pub struct VisionBlock {
    /// Norm before attention.
    pub norm1: RmsNorm,
    /// Norm before the feed-forward block.
    pub norm2: RmsNorm,
    /// Attention.
    pub attn: VisionAttention,
    /// Feed-forward block.
    pub mlp: GatedMlp,
}

/// Projections of [`VisionBlock`]'s attention.
#[derive(Module, Debug)]
pub struct VisionAttention {
    /// `[3 * hidden, hidden]`: queries, keys, values.
    pub qkv: Linear,
    /// `[hidden, hidden]`.
    pub proj: Linear,
    num_heads: usize,
}

impl VisionBlock {
    /// A lazily initialised block.
    pub fn new(config: &VisionConfig, device: &Device) -> Self {
        let hidden = config.hidden_size;
        Self {
            norm1: RmsNorm::new(hidden, RMS_NORM_EPS, device),
            norm2: RmsNorm::new(hidden, RMS_NORM_EPS, device),
            attn: VisionAttention {
                qkv: Linear::new(hidden, 3 * hidden, device),
                proj: Linear::new(hidden, hidden, device),
                num_heads: config.num_heads,
            },
            mlp: GatedMlp::new(hidden, config.intermediate_size, device),
        }
    }

    /// # Shapes
    /// - `x`: `[1, patches, hidden]`, in window order
    /// - `rotary`: f32 tables of the patches, in the same order; queries and keys are rotated in f32
    /// - `bounds`: segments of patches that see each other
    /// - returns: `[1, patches, hidden]`
    pub fn forward(&self, x: Tensor<3>, rotary: &RotaryTable, bounds: &[usize]) -> Tensor<3> {
        let x = x.clone() + self.attn.forward(self.norm1.forward(x), rotary, bounds);
        x.clone() + self.mlp.forward(self.norm2.forward(x))
    }
}

impl VisionAttention {
    /// See [`VisionBlock::forward`].
    pub fn forward(&self, x: Tensor<3>, rotary: &RotaryTable, bounds: &[usize]) -> Tensor<3> {
        let [batch, patches, hidden] = x.dims();
        let qkv = self.qkv.forward(x).reshape([batch, patches, 3 * self.num_heads, hidden / self.num_heads]);
        let heads = |part: usize| qkv.clone().narrow(2, part * self.num_heads, self.num_heads);
        let (q, k) = (rotate_half(heads(0), rotary), rotate_half(heads(1), rotary));
        let options = Attention { visibility: Visibility::Segments(bounds), ..Default::default() };
        self.proj.forward(attention(q, k, heads(2), options))
    }
}
