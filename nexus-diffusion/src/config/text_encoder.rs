//! Sizes of the text encoders, from their `config.json` files.

use std::path::Path;

use nexus_core::config::{ConfigError, check_divides, read_json};
use serde::{Deserialize, Serialize};

use super::{check_positive, check_supported};

/// Sizes of a CLIP text encoder; absent fields have the defaults of Hugging Face's `CLIPTextConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Activation of the feed-forward block; only `quick_gelu` is supported.
    pub hidden_act: String,
    /// Epsilon of every layer norm.
    pub layer_norm_eps: f64,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49_408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_attention_heads: 8,
            num_hidden_layers: 12,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".to_string(),
            layer_norm_eps: 1e-5,
        }
    }
}

impl ClipConfig {
    /// The encoder of FLUX.1-dev (CLIP ViT-L/14).
    pub fn vit_large() -> Self {
        Self { hidden_size: 768, intermediate_size: 3072, num_attention_heads: 12, ..Self::default() }
    }

    /// Reads `text_encoder/config.json`.
    ///
    /// # Errors
    /// [`ConfigError`] if the file is absent or malformed or its fields contradict each other.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let config: Self = read_json(path)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks the sizes against each other.
    ///
    /// # Errors
    /// [`ConfigError::Incoherent`] naming the field at fault.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_positive("vocab_size", self.vocab_size)?;
        check_positive("hidden_size", self.hidden_size)?;
        check_positive("intermediate_size", self.intermediate_size)?;
        check_positive("max_position_embeddings", self.max_position_embeddings)?;
        check_divides("num_attention_heads", self.num_attention_heads, self.hidden_size)?;
        check_supported("hidden_act", &self.hidden_act, "quick_gelu")
    }
}

/// Sizes of a T5 encoder; absent fields have the defaults of Hugging Face's `T5Config`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct T5Config {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of one head.
    pub d_kv: usize,
    /// Width of the feed-forward block.
    pub d_ff: usize,
    /// Layers.
    pub num_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Rows of the table of relative position biases.
    pub relative_attention_num_buckets: usize,
    /// Distance from which on all positions share a bucket.
    pub relative_attention_max_distance: usize,
    /// Epsilon of every norm.
    pub layer_norm_epsilon: f64,
    /// Kind of feed-forward block; only `gated-gelu` is supported.
    pub feed_forward_proj: String,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32_128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: "relu".to_string(),
        }
    }
}

impl T5Config {
    /// The encoder of FLUX.1-dev (T5 v1.1 XXL).
    pub fn v1_1_xxl() -> Self {
        Self {
            d_model: 4096,
            d_ff: 10_240,
            num_layers: 24,
            num_heads: 64,
            feed_forward_proj: "gated-gelu".to_string(),
            ..Self::default()
        }
    }

    /// Reads `text_encoder_2/config.json`.
    ///
    /// # Errors
    /// [`ConfigError`] if the file is absent or malformed or its fields contradict each other.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let config: Self = read_json(path)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks the sizes against each other.
    ///
    /// # Errors
    /// [`ConfigError::Incoherent`] naming the field at fault.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_positive("vocab_size", self.vocab_size)?;
        check_positive("d_model", self.d_model)?;
        check_positive("d_kv", self.d_kv)?;
        check_positive("d_ff", self.d_ff)?;
        check_positive("num_heads", self.num_heads)?;
        let (buckets, distance) = (self.relative_attention_num_buckets, self.relative_attention_max_distance);
        check_positive("relative_attention_num_buckets", buckets)?;
        check_divides("relative_attention_num_buckets", 4, buckets)?;
        if distance <= buckets / 4 {
            let reason = format!("{distance} must be over a quarter of the {buckets} buckets");
            return Err(ConfigError::incoherent("relative_attention_max_distance", reason));
        }
        check_supported("feed_forward_proj", &self.feed_forward_proj, "gated-gelu")
    }
}
