//! Sizes and token ids: `config.json` -> [`ArConfig`], `generation_config.json` -> [`GenerationConfig`].

use std::path::Path;

use nexus_core::{
    config::{ConfigError, check_divides, read_json},
    nn::{DecoderLayerConfig, MultimodalRotary},
};
use serde::{Deserialize, Serialize};

/// What the language model needs from a Qwen2.5-VL `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArConfig {
    /// Width of the residual stream and of the image embeddings.
    pub hidden_size: usize,
    /// Width of the feed-forward blocks.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// How rotary frequencies are shared out.
    pub rope_scaling: RopeScaling,
    /// Epsilon of the norms.
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Longest sequence.
    #[serde(default = "default_max_position_embeddings")]
    pub max_position_embeddings: usize,
    /// Whether the output projection is the embedding table.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Ids with a meaning.
    #[serde(flatten)]
    pub token_ids: TokenIds,
}

/// `rope_scaling` of `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeScaling {
    /// Frequencies that follow the temporal, row and column position.
    pub mrope_section: [usize; 3],
}

/// Token ids with a meaning; absent fields have Qwen2.5-VL's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TokenIds {
    /// Begins an image (BOI).
    pub vision_start_token_id: u32,
    /// Ends an image (EOI).
    pub vision_end_token_id: u32,
    /// Stands at every position of an image.
    pub image_token_id: u32,
    /// Ends a turn.
    pub eos_token_id: u32,
    /// Ends a document.
    pub bos_token_id: u32,
}

impl Default for TokenIds {
    fn default() -> Self {
        Self {
            vision_start_token_id: 151_652,
            vision_end_token_id: 151_653,
            image_token_id: 151_655,
            eos_token_id: 151_645,
            bos_token_id: 151_643,
        }
    }
}

fn default_rms_norm_eps() -> f64 {
    1e-6
}

fn default_rope_theta() -> f64 {
    1e6
}

fn default_max_position_embeddings() -> usize {
    128_000
}

impl ArConfig {
    /// Sizes of the released 7B model.
    pub fn released() -> Self {
        Self {
            hidden_size: 3584,
            intermediate_size: 18_944,
            num_hidden_layers: 28,
            num_attention_heads: 28,
            num_key_value_heads: 4,
            vocab_size: 152_064,
            rope_scaling: RopeScaling { mrope_section: [16, 24, 24] },
            rms_norm_eps: default_rms_norm_eps(),
            rope_theta: default_rope_theta(),
            max_position_embeddings: default_max_position_embeddings(),
            tie_word_embeddings: false,
            token_ids: TokenIds::default(),
        }
    }

    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// [`ConfigError`] if the file or a needed field is absent, or if the sizes contradict each other.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let config: Self = read_json(path)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// [`ConfigError::Incoherent`] naming the field.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_divides("num_attention_heads", self.num_attention_heads, self.hidden_size)?;
        check_divides("num_key_value_heads", self.num_key_value_heads, self.num_attention_heads)?;
        let head_dim = self.hidden_size / self.num_attention_heads;
        let sections = self.rope_scaling.mrope_section;
        if !head_dim.is_multiple_of(2) || sections.iter().sum::<usize>() != head_dim / 2 {
            let reason = format!("{sections:?} must add up to half of the head width {head_dim}");
            return Err(ConfigError::incoherent("rope_scaling.mrope_section", reason));
        }
        let TokenIds { vision_start_token_id, vision_end_token_id, image_token_id, eos_token_id, .. } = self.token_ids;
        for (field, id) in [
            ("vision_start_token_id", vision_start_token_id),
            ("vision_end_token_id", vision_end_token_id),
            ("image_token_id", image_token_id),
            ("eos_token_id", eos_token_id),
        ] {
            if id as usize >= self.vocab_size {
                return Err(ConfigError::incoherent(
                    field,
                    format!("{id} is not below vocab_size {}", self.vocab_size),
                ));
            }
        }
        Ok(())
    }

    /// Sizes of one layer.
    pub fn layer(&self) -> DecoderLayerConfig {
        DecoderLayerConfig {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            rms_norm_eps: self.rms_norm_eps,
        }
    }

    /// Rotary frequencies of the model.
    pub fn rotary(&self) -> MultimodalRotary {
        MultimodalRotary::new(self.layer().head_dim(), self.rope_theta, self.rope_scaling.mrope_section)
    }
}

/// How the released model writes text: `generation_config.json`, with Hugging Face's defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// Whether tokens are drawn at random instead of taking the likeliest.
    pub do_sample: bool,
    /// Divides the scores before drawing.
    pub temperature: f32,
    /// Draws only among this many likeliest tokens; 0 is no limit.
    pub top_k: usize,
    /// Draws only among the likeliest tokens that together have this probability.
    pub top_p: f32,
    /// Makes tokens that have occurred less likely; 1 is off.
    pub repetition_penalty: f32,
    /// Ids that end the reply; empty means the model's `eos_token_id`.
    #[serde(deserialize_with = "one_or_many")]
    pub eos_token_id: Vec<u32>,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            do_sample: false,
            temperature: 1.0,
            top_k: 50,
            top_p: 1.0,
            repetition_penalty: 1.0,
            eos_token_id: vec![],
        }
    }
}

impl GenerationConfig {
    /// Reads `generation_config.json`; a missing file gives the defaults.
    ///
    /// # Errors
    /// [`ConfigError`] if the file is there but malformed.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        match read_json(path) {
            Err(ConfigError::Missing { .. }) => Ok(Self::default()),
            other => other,
        }
    }
}

fn one_or_many<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ids {
        None(()),
        One(u32),
        Many(Vec<u32>),
    }
    Ok(match Ids::deserialize(deserializer)? {
        Ids::None(()) => vec![],
        Ids::One(id) => vec![id],
        Ids::Many(ids) => ids,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn released_json() -> serde_json::Value {
        serde_json::to_value(ArConfig::released()).unwrap()
    }

    fn read(json: &serde_json::Value) -> Result<ArConfig, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, json.to_string()).unwrap();
        ArConfig::read(path)
    }

    #[test]
    fn a_config_without_optional_fields_has_the_released_values() {
        let mut json = released_json();
        let object = json.as_object_mut().unwrap();
        for field in ["rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings", "image_token_id"]
        {
            object.remove(field).unwrap();
        }
        assert_eq!(read(&json).unwrap(), ArConfig::released());
    }

    #[test]
    fn every_needed_field_is_named_when_absent() {
        for field in [
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
            "rope_scaling",
        ] {
            let mut json = released_json();
            json.as_object_mut().unwrap().remove(field).unwrap();
            let error = read(&json).unwrap_err().to_string();
            assert!(error.contains("config.json") && error.contains(field), "{error}");
        }
    }

    #[test]
    fn incoherent_sizes_name_their_field() {
        for (field, value) in [
            ("num_attention_heads", 27.into()),
            ("num_attention_heads", 0.into()),
            ("num_key_value_heads", 5.into()),
            ("rope_scaling", serde_json::json!({"mrope_section": [16, 24, 23]})),
            ("vocab_size", 151_655.into()),
        ] {
            let mut json = released_json();
            json[field] = value;
            let error = read(&json).unwrap_err();
            assert!(matches!(error, ConfigError::Incoherent { .. }), "{field}: {error}");
        }
    }

    #[test]
    fn eos_may_be_one_id_or_several_or_null() {
        let read = |text: &str| serde_json::from_str::<GenerationConfig>(text).unwrap().eos_token_id;
        assert_eq!(read(r#"{"eos_token_id": 7}"#), [7]);
        assert_eq!(read(r#"{"eos_token_id": [7, 8]}"#), [7, 8]);
        assert_eq!(read(r#"{"eos_token_id": null}"#), Vec::<u32>::new());
        assert_eq!(read("{}"), Vec::<u32>::new());
    }
}
