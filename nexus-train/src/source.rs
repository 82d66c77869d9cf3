//! Where samples come from: a source of a recipe -> numbered conversations, with what is known of them.

use std::{collections::BTreeMap, sync::Arc};

use nexus_data::{BoxedSource, DataError, Message, MessagesFile, Tokenizer, TrainingInput};
use serde_json::Value;

use crate::{MessagesRecipe, SourceRecipe, Supervision, TrainError, recipe::MESSAGES};

/// Samples by number; one depends on its number alone, so that a run that was killed goes on with the same.
pub trait Source: Send + Sync {
    /// What the file of rejected samples calls it.
    fn name(&self) -> String;

    /// Number of samples; `None` if there is no end of them.
    fn len(&self) -> Option<u64>;

    /// Whether there is no sample.
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// What it can tell of its samples; `None` if nothing.
    fn knows(&self) -> Option<LabelClasses> {
        None
    }

    /// A sample.
    ///
    /// # Errors
    /// Why it cannot be read: it is set aside with this reason.
    fn sample(&self, number: u64) -> Result<Sample, BoxedSource>;
}

/// A conversation, and what is known of it.
pub struct Sample {
    /// Its turns, the model's last.
    pub messages: Vec<Message>,
    /// What is known.
    pub truth: Option<Box<dyn Truth>>,
}

/// What is known of a conversation before it is tokens.
pub trait Truth: Send + Sync {
    /// What is known of its tokens.
    ///
    /// # Errors
    /// [`DataError`] if a text cannot be encoded.
    fn supervision(&self, input: &TrainingInput, tokenizer: &Tokenizer) -> Result<Supervision, DataError>;
}

/// Labels that a source knows of every token of an image, by their numbers of classes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LabelClasses {
    /// Labels that embeddings and hidden states should tell.
    pub embeds: Vec<usize>,
    /// Labels after these that only hidden states should tell, which know what an embedding does not, such as where in the
    /// image a token is.
    pub states: Vec<usize>,
}

impl LabelClasses {
    /// Number of classes of every label that hidden states should tell.
    pub fn all(&self) -> Vec<usize> {
        [&self.embeds[..], &self.states[..]].concat()
    }
}

/// What makes a source of its settings in a recipe.
type Factory = Box<dyn Fn(&Value) -> Result<Box<dyn Source>, BoxedSource> + Send + Sync>;

/// The sources that a recipe may name.
#[derive(Default)]
pub(crate) struct Sources(BTreeMap<String, Factory>);

impl Sources {
    pub(crate) fn add(&mut self, name: String, factory: Factory) {
        self.0.insert(name, factory);
    }

    /// Opens a source.
    pub(crate) fn open(&self, recipe: &SourceRecipe) -> Result<Arc<dyn Source>, TrainError> {
        match recipe {
            SourceRecipe::Messages(MessagesRecipe { path }) => Ok(Arc::new(MessagesFile::open(path)?)),
            SourceRecipe::Named { name, settings } => {
                let Some(factory) = self.0.get(name) else {
                    let known = std::iter::once(MESSAGES).chain(self.0.keys().map(String::as_str));
                    let known = known.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
                    return Err(TrainError::UnknownSource { name: name.clone(), known });
                };
                let opened = factory(settings);
                Ok(opened.map_err(|source| TrainError::Source { name: name.clone(), source })?.into())
            }
        }
    }
}

impl Source for MessagesFile {
    fn name(&self) -> String {
        self.path().display().to_string()
    }

    fn len(&self) -> Option<u64> {
        Some(MessagesFile::len(self))
    }

    fn sample(&self, number: u64) -> Result<Sample, BoxedSource> {
        Ok(Sample { messages: self.get(number)?, truth: None })
    }
}
