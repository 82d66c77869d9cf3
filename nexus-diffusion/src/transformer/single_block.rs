//! Single-stream block: condition and image tokens as one sequence, attention and feed-forward side by side.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use nexus_core::nn::{Linear, RmsNorm};
use nexus_kernels::{Attention, RotaryTable, attention, cat, gated_residual, gelu_tanh, rotate_interleaved};

use super::{AdaNorm, Modulation, NORM_EPS, double_block::split_heads};

/// A block over the joined sequence.
///
/// Source: FLUX (layers.py, `SingleStreamBlock`), under DiffSynth's names.
#[derive(Module, Debug)]
pub struct SingleBlock {
    /// Modulation.
    pub norm: AdaNorm,
    /// `[7 * dim, dim]`: queries, keys, values, and the feed-forward block's hidden layer of `4 * dim`.
    pub to_qkv_mlp: Linear,
    /// Norm of each query head.
    pub norm_q_a: RmsNorm,
    /// Norm of each key head.
    pub norm_k_a: RmsNorm,
    /// `[dim, 5 * dim]`: attention and feed-forward together.
    pub proj_out: Linear,
    num_heads: usize,
}

impl SingleBlock {
    /// A lazily initialised block.
    pub fn new(dim: usize, num_heads: usize, device: &Device) -> Self {
        Self {
            norm: AdaNorm::new(dim, 3, device),
            to_qkv_mlp: Linear::new(dim, 7 * dim, device),
            norm_q_a: RmsNorm::new(dim / num_heads, NORM_EPS, device),
            norm_k_a: RmsNorm::new(dim / num_heads, NORM_EPS, device),
            proj_out: Linear::new(5 * dim, dim, device),
            num_heads,
        }
    }

    /// The shift, scale and gate of this block.
    ///
    /// # Shapes
    /// - `conditioning`: `[batch, dim]`
    pub fn modulation(&self, conditioning: &Tensor<2>) -> Modulation {
        self.norm.single(conditioning)
    }

    /// # Shapes
    /// - `x`: `[batch, text tokens + image tokens, dim]`
    /// - `rotary`: for the same tokens
    /// - returns: the same
    pub fn forward(&self, x: Tensor<3>, modulation: &Modulation, rotary: &RotaryTable) -> Tensor<3> {
        let ([batch, tokens, dim], heads) = (x.dims(), self.num_heads);
        let projected = self.to_qkv_mlp.forward(modulation.modulate(x.clone()));
        let [q, k, v, hidden] = split_heads(projected, dim / heads, [heads, heads, heads, 4 * heads]);
        let q = rotate_interleaved(self.norm_q_a.forward(q), rotary);
        let k = rotate_interleaved(self.norm_k_a.forward(k), rotary);
        let mixed = attention(q, k, v, Attention::default());
        let fed = gelu_tanh(hidden).reshape([batch, tokens, 4 * dim]);
        gated_residual(x, modulation.gate.clone(), self.proj_out.forward(cat(vec![mixed, fed], 2)))
    }
}
