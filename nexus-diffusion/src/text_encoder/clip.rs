//! CLIP text encoder: token ids -> the vector of the end-of-text token.

use burn::{
    module::Module,
    tensor::{Device, FloatDType, Tensor},
};
use nexus_checkpoint::{Checkpoint, LoadOptions, load_module};
use nexus_core::nn::{Embedding, LayerNorm, Linear};
use nexus_kernels::{Attention, Visibility, attention, quick_gelu};

use super::checked_ids;
use crate::{DiffusionError, config::ClipConfig, weights::CLIP};

/// The text half of CLIP, without its projection.
///
/// Source: transformers (modeling_clip.py, `CLIPTextTransformer`).
#[derive(Module, Debug)]
pub struct ClipTextEncoder {
    /// Of tokens and positions.
    pub embeddings: ClipEmbeddings,
    /// `encoder.layers`.
    pub layers: Vec<ClipLayer>,
    /// Norm of the output.
    pub final_layer_norm: LayerNorm,
}

/// Learnt tables of tokens and positions.
#[derive(Module, Debug)]
pub struct ClipEmbeddings {
    /// `[vocab, hidden]`.
    pub token_embedding: Embedding,
    /// `[max_position_embeddings, hidden]`.
    pub position_embedding: Embedding,
}

/// A pre-norm layer with causal attention.
#[derive(Module, Debug)]
pub struct ClipLayer {
    /// Norm before attention.
    pub layer_norm1: LayerNorm,
    /// Attention.
    pub self_attn: ClipAttention,
    /// Norm before the feed-forward block.
    pub layer_norm2: LayerNorm,
    /// Feed-forward block.
    pub mlp: ClipMlp,
}

/// Projections of a layer's attention; `[hidden, hidden]` each.
#[derive(Module, Debug)]
pub struct ClipAttention {
    /// Queries.
    pub q_proj: Linear,
    /// Keys.
    pub k_proj: Linear,
    /// Values.
    pub v_proj: Linear,
    /// Output.
    pub out_proj: Linear,
    num_heads: usize,
}

/// Linear, quick GELU, linear.
#[derive(Module, Debug)]
pub struct ClipMlp {
    /// `[intermediate, hidden]`.
    pub fc1: Linear,
    /// `[hidden, intermediate]`.
    pub fc2: Linear,
}

impl ClipTextEncoder {
    /// A lazily initialised encoder.
    pub fn new(config: &ClipConfig, device: &Device) -> Self {
        let hidden = config.hidden_size;
        Self {
            embeddings: ClipEmbeddings {
                token_embedding: Embedding::new(config.vocab_size, hidden, device),
                position_embedding: Embedding::new(config.max_position_embeddings, hidden, device),
            },
            layers: (0..config.num_hidden_layers).map(|_| ClipLayer::new(config, device)).collect(),
            final_layer_norm: LayerNorm::new(hidden, config.layer_norm_eps, device),
        }
    }

    /// Loads `text_encoder/model.safetensors`.
    ///
    /// # Errors
    /// [`DiffusionError::Config`] if the configuration is incoherent, [`DiffusionError::Checkpoint`] if the weights do
    /// not fit it.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &ClipConfig,
        device: &Device,
        options: &LoadOptions,
    ) -> Result<Self, DiffusionError> {
        config.validate()?;
        Ok(load_module(Self::new(config, device), checkpoint, &CLIP, options)?)
    }

    /// The vector of the text: the output at the first end-of-text token, which has the highest id.
    ///
    /// # Shapes
    /// - `ids`: 77 in all known uses, padded with end-of-text
    /// - returns: `[1, hidden]` in `dtype`
    ///
    /// # Errors
    /// [`DiffusionError::TokenCount`], [`DiffusionError::TokenOutOfVocabulary`].
    pub fn pooled(&self, ids: &[u32], dtype: FloatDType) -> Result<Tensor<2>, DiffusionError> {
        let states = self.hidden_states(ids, dtype)?;
        let highest = ids.iter().copied().max().unwrap_or_default();
        let end = ids.iter().position(|&id| id == highest).unwrap_or_default();
        Ok(states.narrow(1, end, 1).squeeze_dim(1))
    }

    /// The normalised output of the last layer.
    ///
    /// # Shapes
    /// - returns: `[1, tokens, hidden]` in `dtype`
    ///
    /// # Errors
    /// As [`ClipTextEncoder::pooled`].
    pub fn hidden_states(&self, ids: &[u32], dtype: FloatDType) -> Result<Tensor<3>, DiffusionError> {
        let ClipEmbeddings { token_embedding, position_embedding } = &self.embeddings;
        let ([vocab_size, _], [max_tokens, _]) = (token_embedding.weight.dims(), position_embedding.weight.dims());
        let device = position_embedding.weight.device();
        let positions: Vec<u32> = (0u32..).take(ids.len()).collect();
        let ids = checked_ids("the CLIP text encoder", ids, max_tokens, vocab_size, &device)?;
        let positions = checked_ids("the CLIP text encoder", &positions, max_tokens, max_tokens, &device)?;
        let x = token_embedding.forward(ids, dtype) + position_embedding.forward(positions, dtype);
        let x = self.layers.iter().fold(x, |x, layer| layer.forward(x));
        Ok(self.final_layer_norm.forward(x))
    }
}

impl ClipLayer {
    fn new(config: &ClipConfig, device: &Device) -> Self {
        let (hidden, epsilon) = (config.hidden_size, config.layer_norm_eps);
        let projection = || Linear::new(hidden, hidden, device);
        Self {
            layer_norm1: LayerNorm::new(hidden, epsilon, device),
            self_attn: ClipAttention {
                q_proj: projection(),
                k_proj: projection(),
                v_proj: projection(),
                out_proj: projection(),
                num_heads: config.num_attention_heads,
            },
            layer_norm2: LayerNorm::new(hidden, epsilon, device),
            mlp: ClipMlp {
                fc1: Linear::new(hidden, config.intermediate_size, device),
                fc2: Linear::new(config.intermediate_size, hidden, device),
            },
        }
    }

    /// # Shapes
    /// `[batch, tokens, hidden]` to the same.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = x.clone() + self.self_attn.forward(self.layer_norm1.forward(x));
        let fed = quick_gelu(self.mlp.fc1.forward(self.layer_norm2.forward(x.clone())));
        x + self.mlp.fc2.forward(fed)
    }
}

impl ClipAttention {
    /// Causal, and without any mask of the padding.
    ///
    /// # Shapes
    /// `[batch, tokens, hidden]` to the same.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, tokens, hidden] = x.dims();
        let heads = |projection: &Linear| {
            let y = projection.forward(x.clone());
            y.reshape([batch, tokens, self.num_heads, hidden / self.num_heads])
        };
        let (q, k, v) = (heads(&self.q_proj), heads(&self.k_proj), heads(&self.v_proj));
        let options = Attention { visibility: Visibility::Causal, ..Default::default() };
        self.out_proj.forward(attention(q, k, v, options))
    }
}

#[cfg(test)]
mod tests {
    use nexus_core::testing::cpu;

    use super::*;

    #[test]
    fn ids_and_lengths_are_checked() {
        let config = ClipConfig { hidden_size: 8, num_hidden_layers: 1, vocab_size: 9, ..ClipConfig::default() };
        let encoder = ClipTextEncoder::new(&config, &cpu());
        assert_eq!(encoder.pooled(&[1, 8, 8], FloatDType::F32).unwrap().dims(), [1, 8]);
        let outside = encoder.pooled(&[1, 9], FloatDType::F32);
        assert!(matches!(outside, Err(DiffusionError::TokenOutOfVocabulary { id: 9, vocab_size: 9, .. })));
        for count in [0, 78] {
            let result = encoder.pooled(&vec![1; count], FloatDType::F32);
            assert!(matches!(result, Err(DiffusionError::TokenCount { max: 77, .. })), "{count}");
        }
    }

    #[test]
    fn the_first_of_the_highest_ids_is_taken_and_padding_after_it_does_not_matter() {
        let config = ClipConfig { hidden_size: 8, num_hidden_layers: 2, vocab_size: 9, ..ClipConfig::default() };
        let encoder = ClipTextEncoder::new(&config, &cpu());
        let long = encoder.pooled(&[1, 3, 8, 8, 8], FloatDType::F32).unwrap();
        let short = encoder.pooled(&[1, 3, 8], FloatDType::F32).unwrap();
        nexus_core::testing::assert_close_tensors(&long, &short, 1e-5);
    }
}
