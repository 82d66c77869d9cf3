//! What a phase says beside data and optimizer, for each part of the model.

use nexus_core::config::ConfigError;
use serde::{Deserialize, Serialize};

/// What a phase of the autoencoder needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AutoencoderSettings {
    /// Side of the pictures, in pixels, a multiple of 16.
    pub picture_px: usize,
    /// Weight of the differences of neighbouring pixels.
    pub gradient_weight: f64,
    /// Weight of the divergence of the latents from the normal distribution.
    pub kl_weight: f64,
}

/// What a phase of the vision encoder needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VisionEncoderSettings {
    /// Weight of the cross-entropy of text.
    pub token_weight: f64,
    /// Weight of the distance of image embeddings.
    pub image_weight: f64,
    /// Whether the language model sees learned embeddings in the places of a picture that it is to draw, instead of the
    /// true ones.
    pub prefill: bool,
    /// Weight of what a head draws from the embeddings.
    pub appearance_weight: f64,
    /// Weight of classes of what every token shows, where the source knows them, from the embeddings.
    pub label_weight: f64,
    /// Whether what must not be ruled out, where the source knows it, stays out of cross-entropy and labels.
    pub exclude_unseen: bool,
    /// Noise on the embeddings before reconstruction and labels, relative to their size.
    pub embeds_noise: f64,
    /// Keeps the input alone of every layer of the language model, and computes the rest again in the backward pass: less
    /// memory, the time of one more forward pass.
    pub recompute: bool,
}

/// What a phase of the language model needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AutoregressiveSettings {
    /// Weight of the cross-entropy of text.
    pub token_weight: f64,
    /// Weight of the distance of image embeddings.
    pub image_weight: f64,
    /// Whether the model sees learned embeddings in the places of a picture that it is to draw, instead of the true ones.
    pub prefill: bool,
    /// Weight of classes of what every token of an answer shows, where the source knows them, from predicted embeddings.
    pub label_weight: f64,
    /// Weight of classes of what every token of an input image shows, from hidden states.
    pub input_label_weight: f64,
    /// Weight of attention to what is meant, where the source knows it, in the layer that takes those hidden states.
    pub attention_weight: f64,
    /// Weight of attention to what was found, where the source knows it, in the layer after it.
    pub selection_weight: f64,
    /// Whether what must not be ruled out, where the source knows it, stays out of cross-entropy and labels.
    pub exclude_unseen: bool,
    /// Number of layers after which those hidden states are read.
    pub state_layers: usize,
    /// Keeps the input alone of every layer, and computes the rest again in the backward pass: less memory, the time of one
    /// more forward pass.
    pub recompute: bool,
    /// Side of the pictures on sheets of samples, in pixels, a multiple of 16.
    pub picture_px: usize,
    /// FLUX's embedded guidance of the pictures on sheets of samples.
    pub embedded_guidance: f64,
}

/// What a phase of a decoder needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DecoderSettings {
    /// Side of the pictures, in pixels, a multiple of 16.
    pub picture_px: usize,
    /// FLUX's embedded guidance.
    pub embedded_guidance: f64,
    /// Share of samples that see no condition (all zeros).
    pub condition_dropout: f64,
    /// Share of samples that are conditioned on the autoregressive model's prediction instead of the true embeddings.
    pub predicted_embeds: f64,
    /// Keeps the input alone of every block of the transformer, and computes the rest again in the backward pass: less
    /// memory, the time of one more forward pass.
    pub recompute: bool,
}

/// Side of the pictures that the released decoders were trained with, in pixels.
const PICTURE_PX: usize = 512;

/// FLUX's embedded guidance in training.
const EMBEDDED_GUIDANCE: f64 = 3.5;

impl Default for AutoencoderSettings {
    fn default() -> Self {
        Self { picture_px: PICTURE_PX, gradient_weight: 1.0, kl_weight: 1e-6 }
    }
}

impl Default for VisionEncoderSettings {
    fn default() -> Self {
        Self {
            token_weight: 3.0,
            image_weight: 3.0,
            prefill: true,
            appearance_weight: 1.0,
            label_weight: 0.0,
            exclude_unseen: false,
            embeds_noise: 0.2,
            recompute: false,
        }
    }
}

impl Default for AutoregressiveSettings {
    fn default() -> Self {
        Self {
            token_weight: 3.0,
            image_weight: 3.0,
            prefill: true,
            label_weight: 0.0,
            input_label_weight: 0.0,
            attention_weight: 0.0,
            selection_weight: 0.0,
            exclude_unseen: false,
            state_layers: 2,
            recompute: false,
            picture_px: PICTURE_PX,
            embedded_guidance: EMBEDDED_GUIDANCE,
        }
    }
}

impl Default for DecoderSettings {
    fn default() -> Self {
        Self {
            picture_px: PICTURE_PX,
            embedded_guidance: EMBEDDED_GUIDANCE,
            condition_dropout: 0.0,
            predicted_embeds: 0.0,
            recompute: false,
        }
    }
}

/// What the settings of every part have in common.
pub(crate) trait Settings: Send + Sync {
    /// Checks the fields.
    fn validate(&self) -> Result<(), ConfigError>;

    /// Whether blocks keep their inputs alone.
    fn recompute(&self) -> bool;

    /// The first field that asks for what a source knows of its samples.
    fn asks_for_supervision(&self) -> Option<&'static str> {
        None
    }
}

impl Settings for AutoencoderSettings {
    fn validate(&self) -> Result<(), ConfigError> {
        check_picture(self.picture_px)
    }

    fn recompute(&self) -> bool {
        false
    }
}

impl Settings for VisionEncoderSettings {
    fn validate(&self) -> Result<(), ConfigError> {
        Ok(())
    }

    fn recompute(&self) -> bool {
        self.recompute
    }

    fn asks_for_supervision(&self) -> Option<&'static str> {
        first_asked(&[("label_weight", self.label_weight > 0.0), ("exclude_unseen", self.exclude_unseen)])
    }
}

impl Settings for AutoregressiveSettings {
    fn validate(&self) -> Result<(), ConfigError> {
        check_picture(self.picture_px)
    }

    fn recompute(&self) -> bool {
        self.recompute
    }

    fn asks_for_supervision(&self) -> Option<&'static str> {
        first_asked(&[
            ("label_weight", self.label_weight > 0.0),
            ("input_label_weight", self.input_label_weight > 0.0),
            ("attention_weight", self.attention_weight > 0.0),
            ("selection_weight", self.selection_weight > 0.0),
            ("exclude_unseen", self.exclude_unseen),
        ])
    }
}

impl Settings for DecoderSettings {
    fn validate(&self) -> Result<(), ConfigError> {
        check_picture(self.picture_px)?;
        let shares = [("condition_dropout", self.condition_dropout), ("predicted_embeds", self.predicted_embeds)];
        match shares.into_iter().find(|(_, share)| !(0.0..=1.0).contains(share)) {
            Some((field, share)) => Err(ConfigError::incoherent(field, format!("{share} must lie in 0..=1"))),
            None => Ok(()),
        }
    }

    fn recompute(&self) -> bool {
        self.recompute
    }
}

fn first_asked(fields: &[(&'static str, bool)]) -> Option<&'static str> {
    fields.iter().find(|(_, asked)| *asked).map(|(field, _)| *field)
}

fn check_picture(picture_px: usize) -> Result<(), ConfigError> {
    match picture_px == 0 || !picture_px.is_multiple_of(16) {
        true => Err(ConfigError::incoherent("picture_px", format!("{picture_px} must be a multiple of 16"))),
        false => Ok(()),
    }
}
