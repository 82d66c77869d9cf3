//! The Qwen2 transformer layer, used by the language model and by the embedding merger of the editing decoder.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use nexus_kernels::{Attention, RotaryTable, Visibility, attention, rotate_half};

use super::{GatedMlp, KeyValue, Linear, RmsNorm};

/// Sizes of a [`DecoderLayer`].
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderLayerConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Epsilon of both norms.
    pub rms_norm_eps: f64,
}

impl DecoderLayerConfig {
    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// A lazily initialised layer.
    pub fn init(&self, device: &Device) -> DecoderLayer {
        let kv_size = self.num_key_value_heads * self.head_dim();
        DecoderLayer {
            input_layernorm: RmsNorm::new(self.hidden_size, self.rms_norm_eps, device),
            self_attn: SelfAttention {
                q_proj: Linear::new(self.hidden_size, self.hidden_size, device),
                k_proj: Linear::new(self.hidden_size, kv_size, device),
                v_proj: Linear::new(self.hidden_size, kv_size, device),
                o_proj: Linear::without_bias(self.hidden_size, self.hidden_size, device),
                head_dim: self.head_dim(),
            },
            post_attention_layernorm: RmsNorm::new(self.hidden_size, self.rms_norm_eps, device),
            mlp: GatedMlp::without_bias(self.hidden_size, self.intermediate_size, device),
        }
    }
}

/// Pre-norm transformer layer with grouped-query attention and a gated feed-forward block.
///
/// Source: Qwen2.5-VL (modeling_qwen2_5_vl.py, `Qwen2_5_VLDecoderLayer`).
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// Norm before attention.
    pub input_layernorm: RmsNorm,
    /// Attention.
    pub self_attn: SelfAttention,
    /// Norm before the feed-forward block.
    pub post_attention_layernorm: RmsNorm,
    /// Feed-forward block.
    pub mlp: GatedMlp,
}

/// Projections of [`DecoderLayer`]'s attention; queries, keys and values have biases.
#[derive(Module, Debug)]
pub struct SelfAttention {
    /// `[hidden, hidden]`.
    pub q_proj: Linear,
    /// `[kv_size, hidden]`.
    pub k_proj: Linear,
    /// `[kv_size, hidden]`.
    pub v_proj: Linear,
    /// `[hidden, hidden]`.
    pub o_proj: Linear,
    head_dim: usize,
}

impl DecoderLayer {
    /// Runs the layer over new tokens, after those in `cache`, and adds the new ones to it.
    ///
    /// # Shapes
    /// - `x`: `[batch, tokens, hidden]`
    /// - `rotary`: tables for these tokens, in the dtype in which queries and keys are rotated
    /// - returns: `[batch, tokens, hidden]`
    pub fn forward(
        &self,
        x: Tensor<3>,
        rotary: &RotaryTable,
        visibility: Visibility<'_>,
        cache: Option<&mut KeyValue>,
    ) -> Tensor<3> {
        let normed = self.input_layernorm.forward(x.clone());
        let x = x + self.self_attn.forward(normed, rotary, visibility, cache);
        let normed = self.post_attention_layernorm.forward(x.clone());
        x + self.mlp.forward(normed)
    }
}

impl SelfAttention {
    /// See [`DecoderLayer::forward`].
    pub fn forward(
        &self,
        x: Tensor<3>,
        rotary: &RotaryTable,
        visibility: Visibility<'_>,
        cache: Option<&mut KeyValue>,
    ) -> Tensor<3> {
        let q = rotate_half(self.heads(self.q_proj.forward(x.clone())), rotary);
        let mut keys = rotate_half(self.heads(self.k_proj.forward(x.clone())), rotary);
        let mut values = self.heads(self.v_proj.forward(x));
        if let Some(cache) = cache {
            [keys, values] = cache.append(keys, values);
        }
        self.o_proj.forward(attention(q, keys, values, Attention { visibility, ..Default::default() }))
    }

    fn heads(&self, x: Tensor<3>) -> Tensor<4> {
        let [batch, tokens, width] = x.dims();
        x.reshape([batch, tokens, width / self.head_dim, self.head_dim])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        nn::MultimodalRotary,
        testing::{assert_close_tensors, cpu, ramp},
    };

    /// A layer of 4 query heads and 2 key heads.
    fn layer() -> DecoderLayer {
        let config = DecoderLayerConfig {
            hidden_size: 32,
            intermediate_size: 40,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            rms_norm_eps: 1e-6,
        };
        config.init(&cpu())
    }

    #[test]
    fn a_cached_chunk_equals_the_whole_sequence() {
        let layer = layer();
        let rotary = MultimodalRotary::new(8, 1e6, [2, 1, 1]);
        let positions: Vec<[f32; 3]> = (0..7).map(|p| [p as f32, (p / 2) as f32, (p % 2) as f32]).collect();
        let x = ramp([1, 7, 32], 4);
        let table = rotary.table(&positions, &cpu());
        let whole = layer.forward(x.clone(), &table, Visibility::Causal, None);
        let mut cache = KeyValue::default();
        let mut parts = vec![];
        for (start, end) in [(0, 3), (3, 4), (4, 7)] {
            let table = rotary.table(&positions[start..end], &cpu());
            let chunk = x.clone().narrow(1, start, end - start);
            parts.push(layer.forward(chunk, &table, Visibility::Causal, Some(&mut cache)));
        }
        assert_close_tensors(&Tensor::cat(parts, 1), &whole, 1e-5);
        assert_eq!(cache.len(), 7);
    }
}
