//! Sizes of the vision encoder: `vision_config` of `config.json` -> [`VisionConfig`].

use std::path::Path;

use nexus_core::{
    MERGE_SIZE, PATCH_SIZE_PX,
    config::{ConfigError, check_divides, read_json},
};
use serde::{Deserialize, Serialize};

/// `vision_config` of a Qwen2.5-VL `config.json`; absent fields have the released values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VisionConfig {
    /// Number of blocks.
    pub depth: usize,
    /// Width of a patch's features.
    pub hidden_size: usize,
    /// Width of the feed-forward blocks.
    pub intermediate_size: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Colour channels.
    pub in_channels: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Patches along one side of a merged token.
    pub spatial_merge_size: usize,
    /// Frames that one patch spans; an image is repeated to fill them.
    pub temporal_patch_size: usize,
    /// Side of an attention window in pixels.
    pub window_size: usize,
    /// Width of the embeddings, the language model's.
    pub out_hidden_size: usize,
    /// Blocks that attend to the whole image instead of a window.
    pub fullatt_block_indexes: Vec<usize>,
}

impl Default for VisionConfig {
    fn default() -> Self {
        Self {
            depth: 32,
            hidden_size: 1280,
            intermediate_size: 3420,
            num_heads: 16,
            in_channels: 3,
            patch_size: 14,
            spatial_merge_size: 2,
            temporal_patch_size: 2,
            window_size: 112,
            out_hidden_size: 3584,
            fullatt_block_indexes: vec![7, 15, 23, 31],
        }
    }
}

#[derive(Deserialize)]
struct ModelConfig {
    hidden_size: usize,
    vision_config: VisionConfig,
}

impl VisionConfig {
    /// Reads `vision_config` from a model's `config.json` and checks it.
    ///
    /// # Errors
    /// [`ConfigError`] if the file or a needed field is absent, or if the sizes contradict each other.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let ModelConfig { hidden_size, vision_config } = read_json(path)?;
        if vision_config.out_hidden_size != hidden_size {
            let reason =
                format!("{} is not the language model's hidden_size {hidden_size}", vision_config.out_hidden_size);
            return Err(ConfigError::incoherent("vision_config.out_hidden_size", reason));
        }
        vision_config.validate()?;
        Ok(vision_config)
    }

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// [`ConfigError::Incoherent`] naming the field.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_divides("vision_config.num_heads", self.num_heads, self.hidden_size)?;
        let is = |field, value: usize, needed: usize| match value == needed {
            true => Ok(()),
            false => Err(ConfigError::incoherent(field, format!("{value} is not supported, only {needed}"))),
        };
        is("vision_config.patch_size", self.patch_size, PATCH_SIZE_PX)?;
        is("vision_config.spatial_merge_size", self.spatial_merge_size, MERGE_SIZE)?;
        is("vision_config.temporal_patch_size", self.temporal_patch_size, 2)?;
        is("vision_config.in_channels", self.in_channels, 3)?;
        check_divides("vision_config.window_size", PATCH_SIZE_PX * MERGE_SIZE, self.window_size)?;
        if !self.head_dim().is_multiple_of(4) {
            let reason = format!("heads of width {} cannot hold rows and columns in pairs", self.head_dim());
            return Err(ConfigError::incoherent("vision_config.num_heads", reason));
        }
        if let Some(index) = self.fullatt_block_indexes.iter().find(|&&index| index >= self.depth) {
            let reason = format!("block {index} does not exist, depth is {}", self.depth);
            return Err(ConfigError::incoherent("vision_config.fullatt_block_indexes", reason));
        }
        Ok(())
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Numbers in one patch: channels x frames x height x width.
    pub fn patch_values(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Merged tokens along one side of an attention window.
    pub fn window_cells(&self) -> usize {
        self.window_size / (self.patch_size * self.spatial_merge_size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<VisionConfig, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, json).unwrap();
        VisionConfig::read(path)
    }

    #[test]
    fn the_released_file_stores_four_fields_and_the_rest_are_defaults() {
        let json = r#"{"hidden_size": 3584, "vision_config": {"hidden_size": 1280, "tokens_per_second": 2,
            "in_chans": 3, "spatial_patch_size": 14}}"#;
        assert_eq!(read(json).unwrap(), VisionConfig::default());
    }

    #[test]
    fn an_absent_vision_config_is_named() {
        let error = read(r#"{"hidden_size": 3584}"#).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("vision_config"), "{error}");
    }

    #[test]
    fn incoherent_sizes_name_their_field() {
        for (json, field) in [
            (r#"{"hidden_size": 64, "vision_config": {}}"#, "out_hidden_size"),
            (r#"{"hidden_size": 3584, "vision_config": {"num_heads": 17}}"#, "num_heads"),
            (r#"{"hidden_size": 3584, "vision_config": {"num_heads": 0}}"#, "num_heads"),
            (r#"{"hidden_size": 3584, "vision_config": {"window_size": 100}}"#, "window_size"),
            (r#"{"hidden_size": 3584, "vision_config": {"patch_size": 16}}"#, "patch_size"),
            (r#"{"hidden_size": 3584, "vision_config": {"fullatt_block_indexes": [32]}}"#, "fullatt_block_indexes"),
        ] {
            let error = read(json).unwrap_err().to_string();
            assert!(error.contains(&format!("vision_config.{field}")), "{error}");
        }
    }
}
