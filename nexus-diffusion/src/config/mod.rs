//! What the JSON files say about the diffusion side: published field names -> plain structs, checked.

mod merger;
mod text_encoder;

use std::path::Path;

use nexus_core::config::{ConfigError, check_divides, read_json};
use serde::{Deserialize, Serialize};

pub use merger::{MergerConfig, MergerVisionConfig, RopeScaling};
pub use text_encoder::{ClipConfig, T5Config};

/// File beside the decoder weights with the sizes of the transformer; the released repository has none.
pub const DECODER_CONFIG_FILE: &str = "decoder_config.json";

/// File beside `ae.safetensors` with the sizes of the autoencoder; the released repository has none.
pub const AUTOENCODER_CONFIG_FILE: &str = "ae_config.json";

/// File of the language model's sizes.
const LANGUAGE_MODEL_CONFIG_FILE: &str = "config.json";

/// Sizes of the FLUX diffusion transformer; the default is the released one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DitConfig {
    /// Width of both streams.
    pub dim: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Double-stream blocks.
    pub num_double: usize,
    /// Single-stream blocks.
    pub num_single: usize,
    /// Numbers in one 2x2 patch of latents: four times the latent channels.
    pub in_channels: usize,
    /// Width of the condition tokens.
    pub context_dim: usize,
    /// Width of the pooled text vector.
    pub pooled_dim: usize,
    /// Shares of one head's features among the three position axes.
    pub axes_dim: [usize; 3],
    /// Base of the rotary frequencies.
    pub theta: f64,
    /// Whether the embedded guidance scalar enters the conditioning.
    pub guidance_embed: bool,
}

impl Default for DitConfig {
    fn default() -> Self {
        Self {
            dim: 3072,
            num_heads: 24,
            num_double: 19,
            num_single: 38,
            in_channels: 64,
            context_dim: 4096,
            pooled_dim: 768,
            axes_dim: [16, 56, 56],
            theta: 10_000.0,
            guidance_embed: true,
        }
    }
}

impl DitConfig {
    /// Reads `decoder_config.json` of a directory; without one, the released sizes.
    ///
    /// # Errors
    /// [`ConfigError`] if the file is malformed or its fields contradict each other.
    pub fn read_in(directory: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let config: Self = read_or_default(&directory.as_ref().join(DECODER_CONFIG_FILE))?;
        config.validate()?;
        Ok(config)
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.dim / self.num_heads
    }

    /// Channels of the latents.
    pub fn latent_channels(&self) -> usize {
        self.in_channels / 4
    }

    /// Checks the sizes against each other.
    ///
    /// # Errors
    /// [`ConfigError::Incoherent`] naming the field at fault.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_positive("dim", self.dim)?;
        check_divides("num_heads", self.num_heads, self.dim)?;
        check_positive("in_channels", self.in_channels)?;
        check_divides("in_channels", 4, self.in_channels)?;
        check_positive("context_dim", self.context_dim)?;
        check_positive("pooled_dim", self.pooled_dim)?;
        check_positive("num_double", self.num_double)?;
        check_rotary("axes_dim", &self.axes_dim, self.head_dim())?;
        check_at_least_one("theta", self.theta)
    }

    /// Checks that the models of one pipeline fit together; those that are not there are not checked.
    ///
    /// # Errors
    /// [`ConfigError::Incoherent`] if the autoencoder has other latents, or a text encoder another width.
    pub fn validate_with(
        &self,
        autoencoder: Option<&AutoencoderConfig>,
        clip: Option<&ClipConfig>,
        t5: Option<&T5Config>,
    ) -> Result<(), ConfigError> {
        let latents = autoencoder.map_or(self.in_channels, |autoencoder| 4 * autoencoder.z_channels);
        let pooled = clip.map_or(self.pooled_dim, |clip| clip.hidden_size);
        let context = t5.map_or(self.context_dim, |t5| t5.d_model);
        let checks = [
            ("in_channels", "four times z_channels of the autoencoder", self.in_channels, latents),
            ("pooled_dim", "hidden_size of the CLIP text encoder", self.pooled_dim, pooled),
            ("context_dim", "d_model of the T5 encoder", self.context_dim, context),
        ];
        for (field, other, own, expected) in checks {
            if own != expected {
                return Err(ConfigError::incoherent(field, format!("{own} must equal {other}, {expected}")));
            }
        }
        Ok(())
    }
}

/// Sizes of the FLUX autoencoder; the default is the released one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AutoencoderConfig {
    /// Colour channels.
    pub in_channels: usize,
    /// Channels of the first level.
    pub ch: usize,
    /// Channels of each level, as multiples of `ch`; each level but the last halves the picture.
    pub ch_mult: Vec<usize>,
    /// Residual blocks per level when encoding; decoding has one more.
    pub num_res_blocks: usize,
    /// Channels of the latents.
    pub z_channels: usize,
    /// Groups of every group norm.
    pub groups: usize,
    /// Latents are `(z - shift_factor) * scale_factor`.
    pub scale_factor: f64,
    /// Latents are `(z - shift_factor) * scale_factor`.
    pub shift_factor: f64,
}

impl Default for AutoencoderConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            ch: 128,
            ch_mult: vec![1, 2, 4, 4],
            num_res_blocks: 2,
            z_channels: 16,
            groups: 32,
            scale_factor: 0.3611,
            shift_factor: 0.1159,
        }
    }
}

impl AutoencoderConfig {
    /// Reads `ae_config.json` of a directory; without one, the released sizes.
    ///
    /// # Errors
    /// [`ConfigError`] if the file is malformed or its fields contradict each other.
    pub fn read_in(directory: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let config: Self = read_or_default(&directory.as_ref().join(AUTOENCODER_CONFIG_FILE))?;
        config.validate()?;
        Ok(config)
    }

    /// Pixels along one side of a latent position.
    pub fn downscale(&self) -> usize {
        1 << (self.ch_mult.len() - 1)
    }

    /// Checks the sizes against each other.
    ///
    /// # Errors
    /// [`ConfigError::Incoherent`] naming the field at fault. The number of levels is fixed to four, so that a latent
    /// position is 8x8 pixels.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_positive("in_channels", self.in_channels)?;
        check_positive("z_channels", self.z_channels)?;
        check_positive("num_res_blocks", self.num_res_blocks)?;
        check_positive("ch", self.ch)?;
        if self.ch_mult.len() != 4 || self.ch_mult.contains(&0) {
            return Err(ConfigError::incoherent(
                "ch_mult",
                format!("{:?} must be four positive numbers", self.ch_mult),
            ));
        }
        for multiple in &self.ch_mult {
            check_divides("groups", self.groups, self.ch * multiple)?;
        }
        if !(self.scale_factor.is_finite() && self.scale_factor > 0.0) {
            return Err(ConfigError::incoherent("scale_factor", format!("{} must be positive", self.scale_factor)));
        }
        if !self.shift_factor.is_finite() {
            return Err(ConfigError::incoherent("shift_factor", format!("{} must be finite", self.shift_factor)));
        }
        Ok(())
    }
}

/// Sizes of a decoder: of its connector and of its transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct DiffusionConfig {
    /// What the connectors take from the language model; the adapter needs `hidden_size` alone.
    pub merger: MergerConfig,
    /// Sizes of the transformer.
    pub dit: DitConfig,
}

impl DiffusionConfig {
    /// Reads `config.json` and, if there is one, `decoder_config.json` of the Nexus-Gen directory.
    ///
    /// # Errors
    /// [`ConfigError`] if `config.json` is absent, or a file is malformed or its fields contradict each other.
    pub fn read_in(directory: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let directory = directory.as_ref();
        Ok(Self {
            merger: MergerConfig::read(directory.join(LANGUAGE_MODEL_CONFIG_FILE))?,
            dit: DitConfig::read_in(directory)?,
        })
    }

    /// Checks the sizes against each other.
    ///
    /// # Errors
    /// [`ConfigError::Incoherent`] naming the field at fault.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.merger.validate()?;
        self.dit.validate()
    }
}

fn read_or_default<T: serde::de::DeserializeOwned + Default>(path: &Path) -> Result<T, ConfigError> {
    match read_json(path) {
        Err(ConfigError::Missing { .. }) => Ok(T::default()),
        read => read,
    }
}

fn check_positive(field: &'static str, size: usize) -> Result<(), ConfigError> {
    if size == 0 { Err(ConfigError::incoherent(field, "must be positive")) } else { Ok(()) }
}

fn check_at_least_one(field: &'static str, value: f64) -> Result<(), ConfigError> {
    if value.is_finite() && value >= 1.0 {
        return Ok(());
    }
    Err(ConfigError::incoherent(field, format!("{value} must be a number of at least 1")))
}

fn check_supported(field: &'static str, value: &str, supported: &str) -> Result<(), ConfigError> {
    if value == supported {
        return Ok(());
    }
    Err(ConfigError::incoherent(field, format!("`{value}` is not supported, only `{supported}`")))
}

/// Rotary shares must be even, because features turn in pairs, and fill the head.
fn check_rotary(field: &'static str, shares: &[usize; 3], head_dim: usize) -> Result<(), ConfigError> {
    let total = shares.iter().fold(0usize, |sum, &share| sum.saturating_add(share));
    if total != head_dim || shares.iter().any(|share| !share.is_multiple_of(2)) {
        let reason = format!("shares {shares:?} of the features must be even and add up to the head width {head_dim}");
        return Err(ConfigError::incoherent(field, reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(result: Result<(), ConfigError>) -> &'static str {
        match result {
            Err(ConfigError::Incoherent { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn released_sizes_are_coherent() {
        let (dit, autoencoder) = (DitConfig::default(), AutoencoderConfig::default());
        dit.validate().unwrap();
        autoencoder.validate().unwrap();
        ClipConfig::vit_large().validate().unwrap();
        T5Config::v1_1_xxl().validate().unwrap();
        dit.validate_with(Some(&autoencoder), Some(&ClipConfig::vit_large()), Some(&T5Config::v1_1_xxl())).unwrap();
        assert_eq!((dit.head_dim(), dit.latent_channels(), autoencoder.downscale()), (128, 16, 8));
    }

    #[test]
    fn contradictions_name_the_field() {
        let dit = DitConfig::default();
        assert_eq!(field(DitConfig { num_heads: 7, ..dit.clone() }.validate()), "num_heads");
        assert_eq!(field(DitConfig { num_heads: 0, ..dit.clone() }.validate()), "num_heads");
        assert_eq!(field(DitConfig { axes_dim: [16, 56, 58], ..dit.clone() }.validate()), "axes_dim");
        assert_eq!(field(DitConfig { axes_dim: [15, 57, 56], ..dit.clone() }.validate()), "axes_dim");
        assert_eq!(field(DitConfig { in_channels: 63, ..dit.clone() }.validate()), "in_channels");
        assert_eq!(field(DitConfig { theta: f64::NAN, ..dit.clone() }.validate()), "theta");
        let autoencoder = AutoencoderConfig::default();
        assert_eq!(field(AutoencoderConfig { groups: 48, ..autoencoder.clone() }.validate()), "groups");
        assert_eq!(field(AutoencoderConfig { ch_mult: vec![1, 2], ..autoencoder.clone() }.validate()), "ch_mult");
        assert_eq!(field(AutoencoderConfig { scale_factor: 0.0, ..autoencoder.clone() }.validate()), "scale_factor");
        assert_eq!(field(ClipConfig { hidden_act: "gelu".into(), ..ClipConfig::vit_large() }.validate()), "hidden_act");
        assert_eq!(field(T5Config::default().validate()), "feed_forward_proj");
        let together = |dit: DitConfig| {
            dit.validate_with(Some(&autoencoder), Some(&ClipConfig::vit_large()), Some(&T5Config::v1_1_xxl()))
        };
        assert_eq!(field(together(DitConfig { in_channels: 128, ..dit.clone() })), "in_channels");
        assert_eq!(field(together(DitConfig { pooled_dim: 512, ..dit.clone() })), "pooled_dim");
        assert_eq!(field(together(DitConfig { context_dim: 512, ..dit })), "context_dim");
    }

    #[test]
    fn absent_files_mean_the_released_sizes_and_broken_ones_do_not() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(DitConfig::read_in(directory.path()).unwrap(), DitConfig::default());
        assert_eq!(AutoencoderConfig::read_in(directory.path()).unwrap(), AutoencoderConfig::default());
        std::fs::write(directory.path().join(DECODER_CONFIG_FILE), r#"{"num_double": 2, "num_single": 0}"#).unwrap();
        let expected = DitConfig { num_double: 2, num_single: 0, ..DitConfig::default() };
        assert_eq!(DitConfig::read_in(directory.path()).unwrap(), expected);
        std::fs::write(directory.path().join(AUTOENCODER_CONFIG_FILE), "{").unwrap();
        assert!(matches!(AutoencoderConfig::read_in(directory.path()), Err(ConfigError::Parse { .. })));
    }

    #[test]
    fn absent_fields_have_the_published_defaults() {
        let clip: ClipConfig = serde_json::from_str(r#"{"hidden_size": 768}"#).unwrap();
        assert_eq!((clip.hidden_size, clip.intermediate_size, clip.num_hidden_layers), (768, 2048, 12));
        let t5: T5Config = serde_json::from_str(r#"{"d_model": 4096, "feed_forward_proj": "gated-gelu"}"#).unwrap();
        assert_eq!((t5.d_ff, t5.relative_attention_max_distance), (2048, 128));
        let json = r#"{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6, "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}}"#;
        let merger: MergerConfig = serde_json::from_str(json).unwrap();
        merger.validate().unwrap();
        assert_eq!((merger.rope_theta, merger.vision_config.tokens_per_second), (1e6, 4));
    }
}
