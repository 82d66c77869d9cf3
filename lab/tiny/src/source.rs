//! Samples of the world for recipes: `{"world": {"seed": 1, "task": "editing"}}` -> conversations, with what is known of them.

use lab_world::{self as world, Emphasis, Kind, LABEL_CLASSES, Place, Scene, Split, Task, World};
use nexus_data::{BoxedSource, DataError, Tokenizer, TrainingInput};
use nexus_train::{LabelClasses, Sample, Source, Supervision, Trainer, Truth};
use serde::Deserialize;
use serde_json::Value;

use crate::supervision::supervision;

/// Samples of the world: unlimited.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorldSource {
    /// Seed of the world.
    pub seed: u64,
    /// What the samples ask for.
    pub task: Task,
    /// Kinds of samples within the task; all if empty.
    #[serde(default)]
    pub kinds: Vec<Kind>,
    /// What the samples are full of.
    #[serde(default)]
    pub emphasis: Option<Emphasis>,
    /// Whether pictures, but for those of edits, show shades of the colours.
    #[serde(default)]
    pub shades: bool,
}

/// What a conversation of the world shows and is about.
struct WorldTruth {
    scenes: Vec<Scene>,
    places: Vec<Vec<Place>>,
}

/// A trainer that knows the source `world`.
pub fn trainer() -> Trainer {
    Trainer::new().with_source("world", WorldSource::open)
}

impl WorldSource {
    /// The source of some settings of a recipe.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn open(settings: &Value) -> Result<Box<dyn Source>, BoxedSource> {
        let source = Self::deserialize(settings)?;
        let Self { task, kinds, .. } = &source;
        match kinds.iter().find(|&&kind| !task.accepts(kind)) {
            Some(kind) => Err(format!("{kind:?} is none of {task:?}: {:?}", task.kinds()).into()),
            None => Ok(Box::new(source)),
        }
    }
}

impl Source for WorldSource {
    fn name(&self) -> String {
        "world".to_string()
    }

    fn len(&self) -> Option<u64> {
        None
    }

    fn knows(&self) -> Option<LabelClasses> {
        Some(LabelClasses { embeds: LABEL_CLASSES.to_vec(), states: vec![Place::ALL.len()] })
    }

    fn sample(&self, number: u64) -> Result<Sample, BoxedSource> {
        let world = World::new(self.seed).with_emphasis(self.emphasis).with_shades(self.shades);
        let sample = world.sample_of(self.task, &self.kinds, Split::Train, number);
        let world::Sample { messages, scenes, places, .. } = sample;
        Ok(Sample { messages, truth: Some(Box::new(WorldTruth { scenes, places })) })
    }
}

impl Truth for WorldTruth {
    fn supervision(&self, input: &TrainingInput, tokenizer: &Tokenizer) -> Result<Supervision, DataError> {
        supervision(input, &self.scenes, &self.places, tokenizer)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn wrong_settings_are_refused() {
        let refused = |settings: Value| WorldSource::open(&settings).err().unwrap().to_string();
        let error = refused(json!({"seed": 1, "task": "generation", "kinds": ["describe"]}));
        assert!(error.contains("Describe is none of Generation"), "{error}");
        let error = refused(json!({"seed": 1, "task": "generation", "shade": true}));
        assert!(error.contains("shade"), "{error}");
    }
}
