//! The part of the model that a recipe trains: what it begins with, and its phases.

use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use nexus_core::config::ConfigError;
use serde::{Deserialize, Serialize};

use super::{
    AutoencoderSettings, AutoregressiveSettings, DecoderInitial, DecoderSettings, EditingInitial, Initial,
    LanguageInitial, Phase, SourceRecipe, VisionEncoderSettings, phase, positive,
};

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
        initial: LanguageInitial,
        /// Its phases.
        phases: Vec<Phase<VisionEncoderSettings>>,
    },
    /// The language model with vision head and prefill embeddings.
    Autoregressive {
        /// What its weights begin with.
        #[serde(default)]
        initial: LanguageInitial,
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
        initial: DecoderInitial,
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
            Self::Autoencoder { initial, .. } => matches!(initial, Initial::Random(_)),
            Self::VisionEncoder { initial, .. } | Self::Autoregressive { initial, .. } => {
                matches!(initial, LanguageInitial::Random(_))
            }
            Self::GenerationDecoder { initial, .. } => matches!(initial, DecoderInitial::Random(_)),
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
        let resolve = |path: &mut PathBuf| *path = resolved(resolved(dir.to_path_buf()).join(&path));
        let mut recipe = self.clone();
        match &mut recipe {
            Self::VisionEncoder { initial: LanguageInitial::Qwen2_5Vl(start), .. }
            | Self::Autoregressive { initial: LanguageInitial::Qwen2_5Vl(start), .. } => resolve(&mut start.path),
            Self::EditingDecoder { initial: EditingInitial::Flux1Dev(start), .. } => {
                resolve(&mut start.language_model);
            }
            _ => {}
        }
        of_phases!(&mut recipe, phases => {
            for data in phases.iter_mut().flat_map(|phase| &mut phase.data) {
                if let SourceRecipe::Messages(messages) = &mut data.source {
                    resolve(&mut messages.path);
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
