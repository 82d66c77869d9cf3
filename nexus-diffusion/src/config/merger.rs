//! Sizes of the embedding merger, from the language model's `config.json`.

use std::path::Path;

use nexus_core::config::{ConfigError, check_divides, read_json};
use serde::{Deserialize, Serialize};

use super::{check_at_least_one, check_positive, check_rotary};

/// What the embedding merger takes from the `config.json` of the language model, whose first layer it copies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MergerConfig {
    /// Width of the image embeddings.
    pub hidden_size: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Epsilon of every norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// How the rotary frequencies are shared out.
    pub rope_scaling: RopeScaling,
    /// What the merger needs to know about the vision encoder.
    #[serde(default)]
    pub vision_config: MergerVisionConfig,
}

fn default_rope_theta() -> f64 {
    1e6
}

/// `rope_scaling` of [`MergerConfig`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeScaling {
    /// Frequencies of the temporal, row and column axis.
    pub mrope_section: [usize; 3],
}

/// `vision_config` of [`MergerConfig`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MergerVisionConfig {
    /// Patches along one side of a merged token.
    pub spatial_merge_size: usize,
    /// Temporal positions between two frames.
    pub tokens_per_second: usize,
}

impl Default for MergerVisionConfig {
    fn default() -> Self {
        Self { spatial_merge_size: 2, tokens_per_second: 4 }
    }
}

impl MergerConfig {
    /// Reads the language model's `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`] if the file is absent or malformed or its fields contradict each other.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let config: Self = read_json(path)?;
        config.validate()?;
        Ok(config)
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Checks the sizes against each other.
    ///
    /// # Errors
    /// [`ConfigError::Incoherent`] naming the field at fault.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_positive("hidden_size", self.hidden_size)?;
        check_positive("intermediate_size", self.intermediate_size)?;
        check_divides("num_attention_heads", self.num_attention_heads, self.hidden_size)?;
        check_divides("num_key_value_heads", self.num_key_value_heads, self.num_attention_heads)?;
        let sections = self.rope_scaling.mrope_section.map(|section| 2 * section);
        check_rotary("rope_scaling.mrope_section", &sections, self.head_dim())?;
        check_at_least_one("rope_theta", self.rope_theta)?;
        if self.vision_config.spatial_merge_size != nexus_core::MERGE_SIZE {
            let reason = format!("{} must be {}", self.vision_config.spatial_merge_size, nexus_core::MERGE_SIZE);
            return Err(ConfigError::incoherent("vision_config.spatial_merge_size", reason));
        }
        Ok(())
    }
}
