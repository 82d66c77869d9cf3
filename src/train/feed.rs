//! Samples of a stage: the number of a sample -> a conversation, or a reason why it was set aside.

use std::fmt::Display;

use nexus_data::{
    Message, MessagesFile, Mixture, RejectedSamples,
    world::{Kind, Place, Sample, Scene, Split, Task, World},
};

use super::{REJECTED, Recipe, RunDir, Source, StageRecipe, TrainError};

/// The sources of one stage, mixed.
pub(crate) struct Feed {
    mixture: Mixture,
    sources: Vec<OpenSource>,
    rejected: RejectedSamples,
    /// Samples after which the first comes again.
    distinct: Option<u64>,
}

/// A sample, and what its images show where that is known.
pub(crate) struct Conversation {
    pub(crate) messages: Vec<Message>,
    /// The truth of every image in order, or nothing.
    pub(crate) scenes: Vec<Scene>,
    /// For every turn of the model the places that the answer is about, or nothing.
    pub(crate) places: Vec<Vec<Place>>,
}

enum OpenSource {
    World { world: World, task: Task, kinds: Vec<Kind> },
    Messages(MessagesFile),
}

impl Feed {
    pub(crate) fn open(
        stage: &StageRecipe,
        recipe: &Recipe,
        index: usize,
        dir: &RunDir,
        rejected: u64,
    ) -> Result<Self, TrainError> {
        let sources = stage.data.iter().map(|data| match &data.source {
            Source::World { seed, task, kinds, emphasis, shades } => {
                let world = World::new(*seed).with_emphasis(*emphasis).with_shades(*shades);
                Ok(OpenSource::World { world, task: *task, kinds: kinds.clone() })
            }
            Source::Messages { path } => Ok(OpenSource::Messages(MessagesFile::open(path)?)),
        });
        let sources: Vec<OpenSource> = sources.collect::<Result<_, TrainError>>()?;
        let shares: Vec<(f64, Option<u64>)> =
            stage.data.iter().zip(&sources).map(|(data, source)| (data.weight, source.len())).collect();
        let mixture = Mixture::new(recipe.seed.wrapping_add(index as u64), &shares)?;
        let rejected = RejectedSamples::new(dir.path().join(REJECTED), recipe.max_rejected)?.with_count(rejected)?;
        Ok(Self { mixture, sources, rejected, distinct: stage.distinct_samples })
    }

    /// The first sample that is the same as this one.
    pub(crate) fn first(&self, number: u64) -> u64 {
        self.distinct.map_or(number, |distinct| number % distinct)
    }

    /// The conversation of a sample; `None` if it was set aside.
    pub(crate) fn conversation(&mut self, number: u64) -> Result<Option<Conversation>, TrainError> {
        let pick = self.mixture.pick(self.first(number));
        let failed = match &self.sources[pick.source] {
            OpenSource::World { world, task, kinds } => {
                let Sample { messages, scenes, places, .. } = world.sample_of(*task, kinds, Split::Train, pick.index);
                return Ok(Some(Conversation { messages, scenes, places }));
            }
            OpenSource::Messages(file) => match file.get(pick.index) {
                Ok(messages) => return Ok(Some(Conversation { messages, scenes: vec![], places: vec![] })),
                Err(error) => error,
            },
        };
        self.reject(number, &failed)?;
        Ok(None)
    }

    /// Sets a sample aside; one that comes again already is.
    pub(crate) fn reject(&mut self, number: u64, reason: &dyn Display) -> Result<(), TrainError> {
        if self.first(number) != number {
            return Ok(());
        }
        let pick = self.mixture.pick(number);
        let source = match &self.sources[pick.source] {
            OpenSource::World { .. } => "world".to_string(),
            OpenSource::Messages(file) => file.path().display().to_string(),
        };
        Ok(self.rejected.reject(&source, pick.index, reason)?)
    }

    /// Samples set aside so far.
    pub(crate) fn rejected(&self) -> u64 {
        self.rejected.count()
    }
}

impl OpenSource {
    fn len(&self) -> Option<u64> {
        match self {
            Self::World { .. } => None,
            Self::Messages(file) => Some(file.len()),
        }
    }
}
