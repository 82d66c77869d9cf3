//! Double-stream block: image tokens and condition tokens, each with its own weights, meet in one attention.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use nexus_core::nn::{Linear, RmsNorm};
use nexus_kernels::{Attention, RotaryTable, attention, cat, gated_residual, gelu_tanh, rotate_interleaved, split};

use super::{AdaNorm, DoubleModulation, NORM_EPS};

/// Feed-forward width as a multiple of the model's.
const MLP_RATIO: usize = 4;

/// A block over two streams: `a` is the image, `b` the condition ("text").
///
/// Source: FLUX (layers.py, `DoubleStreamBlock`), under DiffSynth's names.
#[derive(Module, Debug)]
pub struct DoubleBlock {
    /// Modulation of the image stream.
    pub norm1_a: AdaNorm,
    /// Modulation of the text stream.
    pub norm1_b: AdaNorm,
    /// Attention over both streams.
    pub attn: JointAttention,
    /// Feed-forward block of the image stream.
    pub ff_a: FeedForward,
    /// Feed-forward block of the text stream.
    pub ff_b: FeedForward,
}

/// Projections of the attention of a [`DoubleBlock`].
#[derive(Module, Debug)]
pub struct JointAttention {
    /// Image: `[3 * dim, dim]`, queries, keys, values.
    pub a_to_qkv: Linear,
    /// Text: `[3 * dim, dim]`, queries, keys, values.
    pub b_to_qkv: Linear,
    /// Norm of each image query head.
    pub norm_q_a: RmsNorm,
    /// Norm of each image key head.
    pub norm_k_a: RmsNorm,
    /// Norm of each text query head.
    pub norm_q_b: RmsNorm,
    /// Norm of each text key head.
    pub norm_k_b: RmsNorm,
    /// Image: `[dim, dim]`.
    pub a_to_out: Linear,
    /// Text: `[dim, dim]`.
    pub b_to_out: Linear,
    num_heads: usize,
}

/// Linear, GELU, linear.
#[derive(Module, Debug)]
pub struct FeedForward {
    /// `[4 * dim, dim]`.
    pub in_layer: Linear,
    /// `[dim, 4 * dim]`.
    pub out_layer: Linear,
}

impl DoubleBlock {
    /// A lazily initialised block.
    pub fn new(dim: usize, num_heads: usize, device: &Device) -> Self {
        Self {
            norm1_a: AdaNorm::new(dim, 6, device),
            norm1_b: AdaNorm::new(dim, 6, device),
            attn: JointAttention::new(dim, num_heads, device),
            ff_a: FeedForward::new(dim, device),
            ff_b: FeedForward::new(dim, device),
        }
    }

    /// The shifts, scales and gates of this block.
    ///
    /// # Shapes
    /// - `conditioning`: `[batch, dim]`
    pub fn modulation(&self, conditioning: &Tensor<2>) -> DoubleModulation {
        DoubleModulation { image: self.norm1_a.stream(conditioning), text: self.norm1_b.stream(conditioning) }
    }

    /// # Shapes
    /// - `image`: `[batch, image tokens, dim]`
    /// - `text`: `[batch, text tokens, dim]`
    /// - `rotary`: text tokens first, then image tokens
    /// - returns: both streams
    pub fn forward(
        &self,
        image: Tensor<3>,
        text: Tensor<3>,
        modulation: &DoubleModulation,
        rotary: &RotaryTable,
    ) -> (Tensor<3>, Tensor<3>) {
        let DoubleModulation { image: a, text: b } = modulation;
        let (mixed_a, mixed_b) =
            self.attn.forward(a.attention.modulate(image.clone()), b.attention.modulate(text.clone()), rotary);
        let image = gated_residual(image, a.attention.gate.clone(), mixed_a);
        let text = gated_residual(text, b.attention.gate.clone(), mixed_b);
        let fed_a = self.ff_a.forward(a.mlp.modulate(image.clone()));
        let fed_b = self.ff_b.forward(b.mlp.modulate(text.clone()));
        (gated_residual(image, a.mlp.gate.clone(), fed_a), gated_residual(text, b.mlp.gate.clone(), fed_b))
    }
}

impl JointAttention {
    fn new(dim: usize, num_heads: usize, device: &Device) -> Self {
        let norm = || RmsNorm::new(dim / num_heads, NORM_EPS, device);
        Self {
            a_to_qkv: Linear::new(dim, 3 * dim, device),
            b_to_qkv: Linear::new(dim, 3 * dim, device),
            norm_q_a: norm(),
            norm_k_a: norm(),
            norm_q_b: norm(),
            norm_k_b: norm(),
            a_to_out: Linear::new(dim, dim, device),
            b_to_out: Linear::new(dim, dim, device),
            num_heads,
        }
    }

    /// # Shapes
    /// - `image`, `text`: `[batch, tokens, dim]`, modulated
    /// - returns: the same, in this order
    pub fn forward(&self, image: Tensor<3>, text: Tensor<3>, rotary: &RotaryTable) -> (Tensor<3>, Tensor<3>) {
        let ([_, image_tokens, dim], [_, text_tokens, _]) = (image.dims(), text.dims());
        let head_dim = dim / self.num_heads;
        let [q_a, k_a, v_a] = split_heads(self.a_to_qkv.forward(image), head_dim, [self.num_heads; 3]);
        let [q_b, k_b, v_b] = split_heads(self.b_to_qkv.forward(text), head_dim, [self.num_heads; 3]);
        let q = cat(vec![self.norm_q_b.forward(q_b), self.norm_q_a.forward(q_a)], 1);
        let k = cat(vec![self.norm_k_b.forward(k_b), self.norm_k_a.forward(k_a)], 1);
        let v = cat(vec![v_b, v_a], 1);
        let (q, k) = (rotate_interleaved(q, rotary), rotate_interleaved(k, rotary));
        let mixed = attention(q, k, v, Attention::default());
        let [text, image] = split(mixed, 1, [text_tokens, image_tokens]);
        (self.a_to_out.forward(image), self.b_to_out.forward(text))
    }
}

impl FeedForward {
    fn new(dim: usize, device: &Device) -> Self {
        Self {
            in_layer: Linear::new(dim, MLP_RATIO * dim, device),
            out_layer: Linear::new(MLP_RATIO * dim, dim, device),
        }
    }

    /// # Shapes
    /// `[batch, tokens, dim]` to the same.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.out_layer.forward(gelu_tanh(self.in_layer.forward(x)))
    }
}

/// Parts of a projection, each of some heads, as views.
///
/// # Shapes
/// - `projected`: `[batch, tokens, heads of all parts * head_dim]`
/// - returns: `[batch, tokens, heads, head_dim]` of each part
pub(super) fn split_heads<const N: usize>(projected: Tensor<3>, head_dim: usize, heads: [usize; N]) -> [Tensor<4>; N] {
    let [batch, tokens, width] = projected.dims();
    split(projected.reshape([batch, tokens, width / head_dim, head_dim]), 2, heads)
}
