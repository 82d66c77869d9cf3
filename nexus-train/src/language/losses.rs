//! What the losses of the language model and of the vision encoder weigh: the settings of either -> the same numbers.

use std::ops::Range;

use nexus_ar::ArObjective;

use crate::{
    AutoregressiveSettings, VisionEncoderSettings,
    recipe::{DecoderSettings, Settings},
};

/// What the parts of the losses weigh; those that a part of the model does not have weigh nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LanguageLosses {
    /// Losses of text and of image embeddings.
    pub(super) objective: ArObjective,
    pub(super) appearance_weight: f64,
    pub(super) label_weight: f64,
    pub(super) input_label_weight: f64,
    pub(super) attention_weight: f64,
    pub(super) selection_weight: f64,
    /// Whether what must not be ruled out stays out of the losses.
    pub(super) exclude_unseen: bool,
    pub(super) state_layers: usize,
    pub(super) embeds_noise: f64,
}

impl LanguageLosses {
    /// Numbers of layers after which losses read the hidden states.
    pub(super) fn states_read(&self) -> Range<usize> {
        let first = self.input_label_weight > 0.0 || self.attention_weight > 0.0;
        let count = if self.selection_weight > 0.0 { 2 } else { usize::from(first) };
        self.state_layers..self.state_layers + count
    }

    /// Number of layers that the losses need.
    pub(super) fn layers_needed(&self) -> usize {
        self.states_read().end - usize::from(self.attention_weight == 0.0 && self.selection_weight == 0.0)
    }
}

/// Settings of a part that is trained with the language model.
pub(crate) trait LanguageSettings: Settings {
    /// Whether the vision encoder is trained too.
    const TRAINS_ENCODER: bool;

    fn losses(&self) -> LanguageLosses;

    /// How sheets of samples are drawn.
    fn drawn(&self) -> DecoderSettings;
}

impl LanguageSettings for VisionEncoderSettings {
    const TRAINS_ENCODER: bool = true;

    fn losses(&self) -> LanguageLosses {
        LanguageLosses {
            objective: ArObjective {
                token_weight: self.token_weight,
                image_weight: self.image_weight,
                prefill: self.prefill,
            },
            appearance_weight: self.appearance_weight,
            label_weight: self.label_weight,
            input_label_weight: 0.0,
            attention_weight: 0.0,
            selection_weight: 0.0,
            exclude_unseen: self.exclude_unseen,
            state_layers: AutoregressiveSettings::default().state_layers,
            embeds_noise: self.embeds_noise,
        }
    }

    fn drawn(&self) -> DecoderSettings {
        DecoderSettings::default()
    }
}

impl LanguageSettings for AutoregressiveSettings {
    const TRAINS_ENCODER: bool = false;

    fn losses(&self) -> LanguageLosses {
        LanguageLosses {
            objective: ArObjective {
                token_weight: self.token_weight,
                image_weight: self.image_weight,
                prefill: self.prefill,
            },
            appearance_weight: 0.0,
            label_weight: self.label_weight,
            input_label_weight: self.input_label_weight,
            attention_weight: self.attention_weight,
            selection_weight: self.selection_weight,
            exclude_unseen: self.exclude_unseen,
            state_layers: self.state_layers,
            embeds_noise: 0.0,
        }
    }

    fn drawn(&self) -> DecoderSettings {
        let Self { picture_px, embedded_guidance, .. } = *self;
        DecoderSettings { picture_px, embedded_guidance, ..DecoderSettings::default() }
    }
}
