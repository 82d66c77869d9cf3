//! Recipes: one JSON file -> what is trained, from what, on which data, in which phases.

mod initial;
mod part;
mod phase;
mod settings;

use std::path::{Path, PathBuf};

use nexus_core::config::{ConfigError, read_json};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _, ser::SerializeMap};
use serde_json::Value;

pub use initial::{DecoderInitial, EditingInitial, EditingStart, Initial, LanguageInitial, Qwen2_5VlStart};
pub use part::{PartRecipe, TrainedPart};
pub use phase::{ComputeDType, Phase, Schedule};
pub(crate) use settings::Settings;
pub use settings::{AutoencoderSettings, AutoregressiveSettings, DecoderSettings, VisionEncoderSettings};

/// What a run trains and how.
///
/// Unknown fields are refused: a misspelt one would otherwise train with a default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Command line that runs the recipe; for readers.
    pub command: String,
    /// How long it takes on which machine; for readers.
    pub time: String,
    /// What comes out of it; for readers.
    pub expected: String,
    /// Seed of data order, noise and drop-out.
    pub seed: u64,
    /// Steps between two checkpoints.
    #[serde(default = "five_hundred")]
    pub checkpoint_every: usize,
    /// Checkpoints that are kept.
    #[serde(default = "two")]
    pub keep_checkpoints: usize,
    /// Steps between two lines of metrics.
    #[serde(default = "ten")]
    pub log_every: usize,
    /// Micro-batches of a step that are computed side by side, each with its share of the CPU's threads; their losses
    /// are the same as one after the other. Small models are faster, and take as many times the memory of activations.
    #[serde(default = "one")]
    pub parallel_micro_batches: usize,
    /// Bad samples after which the run stops.
    #[serde(default = "hundred")]
    pub max_rejected: u64,
    /// The part of the model that is trained, what it begins with, and in which phases.
    pub train: PartRecipe,
}

/// A source of samples and its share.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecipe {
    /// Where the samples come from.
    pub source: SourceRecipe,
    /// Share among the sources of the phase.
    pub weight: f64,
}

/// Where samples come from: `{"name": settings}`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum SourceRecipe {
    /// `messages`: a JSON-lines file of conversations.
    Messages(MessagesRecipe),
    /// A source that the program knows which runs the recipe; see [`Trainer::with_source`](crate::Trainer::with_source).
    Named {
        /// Its name.
        name: String,
        /// Its settings.
        settings: Value,
    },
}

/// A JSON-lines file of conversations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MessagesRecipe {
    /// The file; a relative path is looked for beside the recipe.
    pub path: PathBuf,
}

/// Name of [`SourceRecipe::Messages`].
pub(crate) const MESSAGES: &str = "messages";

impl Serialize for SourceRecipe {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1))?;
        match self {
            Self::Messages(messages) => map.serialize_entry(MESSAGES, messages)?,
            Self::Named { name, settings } => map.serialize_entry(name, settings)?,
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for SourceRecipe {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut map = serde_json::Map::<String, Value>::deserialize(deserializer)?.into_iter();
        let (Some((name, settings)), None) = (map.next(), map.next()) else {
            return Err(D::Error::custom(
                "a source is one name with its settings, such as {\"messages\": {\"path\": \"data.jsonl\"}}",
            ));
        };
        match name == MESSAGES {
            true => serde_json::from_value(settings).map(Self::Messages).map_err(D::Error::custom),
            false => Ok(Self::Named { name, settings }),
        }
    }
}

impl Recipe {
    /// Reads and checks a recipe; relative paths in it are looked for in its directory.
    ///
    /// # Errors
    /// [`ConfigError`] with the path and the field at fault.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let mut recipe: Self = read_json(path)?;
        let dir = path.parent().filter(|dir| *dir != Path::new("")).unwrap_or(Path::new("."));
        recipe.train = recipe.train.beside(dir);
        recipe.validate()?;
        Ok(recipe)
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    /// [`ConfigError::Incoherent`] naming the field at fault.
    pub fn validate(&self) -> Result<(), ConfigError> {
        positive("checkpoint_every", self.checkpoint_every)?;
        positive("keep_checkpoints", self.keep_checkpoints)?;
        positive("log_every", self.log_every)?;
        positive("parallel_micro_batches", self.parallel_micro_batches)?;
        self.train.validate()
    }

    /// The part that is trained.
    pub fn part(&self) -> TrainedPart {
        self.train.part()
    }

    /// Steps of all phases.
    pub fn num_steps(&self) -> usize {
        self.train.num_steps()
    }

    /// The first field in which this recipe would train otherwise than another one; notes, how often things are
    /// written and what is computed side by side make no difference.
    pub fn differs_from(&self, other: &Self) -> Option<&'static str> {
        if self.seed != other.seed {
            return Some("seed");
        }
        let here = Path::new(".");
        self.train.beside(here).differs_from(&other.train.beside(here))
    }
}

/// Refuses a number that is zero.
fn positive(field: &'static str, value: usize) -> Result<(), ConfigError> {
    match value {
        0 => Err(ConfigError::incoherent(field, "must be positive".to_string())),
        _ => Ok(()),
    }
}

fn one() -> usize {
    1
}

fn two() -> usize {
    2
}

fn ten() -> usize {
    10
}

fn hundred() -> u64 {
    100
}

fn five_hundred() -> usize {
    500
}
