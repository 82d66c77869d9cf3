//! Parts of the model in a recipe: which fields each of them has.

use std::path::{Path, PathBuf};

use crate::optim::InitialWeights;
use burn::tensor::FloatDType;
use nexus_core::config::ConfigError;
use serde::{Deserialize, Serialize};

use super::{Phase, SourceRecipe, phase, positive};

/// The part of the model that is trained: what it begins with, and its phases, one after the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "part", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum PartRecipe {
    /// FLUX's autoencoder, by reconstruction.
    Autoencoder {
        /// What its weights begin with.
        #[serde(default)]
        initial: Initial,
        /// Steps between two sheets of pictures that it encoded and decoded; never if absent.
        #[serde(default)]
        sample_every: Option<usize>,
        /// Its phases.
        phases: Vec<Phase<AutoencoderSettings>>,
    },
    /// The vision encoder, together with the language model and a head that draws its embeddings, which is thrown away.
    VisionEncoder {
        /// What its weights begin with.
        #[serde(default)]
        initial: Initial,
        /// Its phases.
        phases: Vec<Phase<VisionEncoderSettings>>,
    },
    /// The language model with vision head and prefill embeddings.
    Autoregressive {
        /// What its weights begin with.
        #[serde(default)]
        initial: Initial,
        /// Steps between two sheets of what the generation decoder of the model draws from its predictions; never if
        /// absent.
        #[serde(default)]
        sample_every: Option<usize>,
        /// Its phases.
        phases: Vec<Phase<AutoregressiveSettings>>,
    },
    /// Adapter and transformer of the generation decoder.
    GenerationDecoder {
        /// What its weights begin with.
        #[serde(default)]
        initial: Initial,
        /// Steps between two sheets of pictures that it drew; never if absent.
        #[serde(default)]
        sample_every: Option<usize>,
        /// Its phases.
        phases: Vec<Phase<DecoderSettings>>,
    },
    /// Merger and transformer of the editing decoder.
    EditingDecoder {
        /// What its weights begin with.
        #[serde(default)]
        initial: EditingInitial,
        /// Steps between two sheets of pictures that it drew; never if absent.
        #[serde(default)]
        sample_every: Option<usize>,
        /// Its phases.
        phases: Vec<Phase<DecoderSettings>>,
    },
}

/// A part of the model that is trained on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrainedPart {
    /// FLUX's autoencoder.
    Autoencoder,
    /// The vision encoder, with the language model.
    VisionEncoder,
    /// The language model.
    Autoregressive,
    /// The generation decoder.
    GenerationDecoder,
    /// The editing decoder.
    EditingDecoder,
}

/// What the weights of a run begin with.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Initial {
    /// The weights in the model's directory.
    #[default]
    Checkpoint,
    /// Seeded random values; the directory needs only the configuration of this part.
    Random(InitialWeights),
}

/// What the weights of an editing decoder begin with.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EditingInitial {
    /// The weights in the model's directory.
    #[default]
    Checkpoint,
    /// Seeded random values; the directory needs only the configuration of this part.
    Random(InitialWeights),
    /// The transformer of the generation decoder, and seeded random values for the merger.
    GenerationDecoder(InitialWeights),
}

impl From<Initial> for EditingInitial {
    fn from(initial: Initial) -> Self {
        match initial {
            Initial::Checkpoint => Self::Checkpoint,
            Initial::Random(weights) => Self::Random(weights),
        }
    }
}

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

/// The same of the phases of every part.
macro_rules! of_phases {
    ($recipe:expr, $phases:ident => $result:expr) => {
        match $recipe {
            PartRecipe::Autoencoder { phases: $phases, .. } => $result,
            PartRecipe::VisionEncoder { phases: $phases, .. } => $result,
            PartRecipe::Autoregressive { phases: $phases, .. } => $result,
            PartRecipe::GenerationDecoder { phases: $phases, .. } => $result,
            PartRecipe::EditingDecoder { phases: $phases, .. } => $result,
        }
    };
}

impl PartRecipe {
    /// The part.
    pub fn part(&self) -> TrainedPart {
        match self {
            Self::Autoencoder { .. } => TrainedPart::Autoencoder,
            Self::VisionEncoder { .. } => TrainedPart::VisionEncoder,
            Self::Autoregressive { .. } => TrainedPart::Autoregressive,
            Self::GenerationDecoder { .. } => TrainedPart::GenerationDecoder,
            Self::EditingDecoder { .. } => TrainedPart::EditingDecoder,
        }
    }

    /// Whether it begins with random weights.
    pub fn begins_random(&self) -> bool {
        match self {
            Self::Autoencoder { initial, .. }
            | Self::VisionEncoder { initial, .. }
            | Self::Autoregressive { initial, .. }
            | Self::GenerationDecoder { initial, .. } => matches!(initial, Initial::Random(_)),
            Self::EditingDecoder { initial, .. } => matches!(initial, EditingInitial::Random(_)),
        }
    }

    /// Steps of all phases.
    pub fn num_steps(&self) -> usize {
        of_phases!(self, phases => phases.iter().map(|phase| phase.steps).sum())
    }

    /// Dtypes in which the phases compute.
    pub(crate) fn compute_dtypes(&self) -> Vec<FloatDType> {
        of_phases!(self, phases => phases.iter().map(|phase| phase.compute_dtype.into()).collect())
    }

    /// Steps between two sheets of samples.
    pub(crate) fn sample_every(&self) -> Option<usize> {
        match self {
            Self::VisionEncoder { .. } => None,
            Self::Autoencoder { sample_every, .. }
            | Self::Autoregressive { sample_every, .. }
            | Self::GenerationDecoder { sample_every, .. }
            | Self::EditingDecoder { sample_every, .. } => *sample_every,
        }
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        positive("sample_every", self.sample_every().unwrap_or(1))?;
        of_phases!(self, phases => {
            positive("phases", phases.len())?;
            phases.iter().try_for_each(phase::validate)
        })
    }

    /// The same with the paths of its files as the file system has them, however they were typed; relative ones are looked
    /// for in `dir`. A file that is not there keeps its path.
    pub(super) fn beside(&self, dir: &Path) -> Self {
        let resolved = |path: PathBuf| path.canonicalize().unwrap_or(path);
        let mut recipe = self.clone();
        of_phases!(&mut recipe, phases => {
            for data in phases.iter_mut().flat_map(|phase| &mut phase.data) {
                if let SourceRecipe::Messages(messages) = &mut data.source {
                    messages.path = resolved(resolved(dir.to_path_buf()).join(&messages.path));
                }
            }
        });
        recipe
    }

    /// The first field in which this would train otherwise than another one.
    pub(super) fn differs_from(&self, other: &Self) -> Option<&'static str> {
        macro_rules! compare {
            ($($part:ident),*) => {
                match (self, other) {
                    $((
                        Self::$part { initial, phases, .. },
                        Self::$part { initial: other_initial, phases: other_phases, .. },
                    ) => [("initial", initial == other_initial), ("phases", phases == other_phases)],)*
                    _ => return Some("part"),
                }
            };
        }
        let fields = compare!(Autoencoder, VisionEncoder, Autoregressive, GenerationDecoder, EditingDecoder);
        fields.into_iter().find(|(_, same)| !same).map(|(field, _)| field)
    }
}
