//! A world of which we know the truth: seeded scenes of shapes -> pictures, prompts, questions, edits and their answers.
//!
//! It is for training small models and for scoring them. A picture has 144x144 pixels and 3x3 places with up to four
//! objects (nine for [`Task::Reconstruction`]); everything about it is in its [`Scene`].
//!
//! **Every prompt determines one scene.** A model that predicts embeddings by regression answers an open question with
//! the mean of all answers, which is a blur. So what a prompt leaves out has a default: objects are large and solid, the
//! background is white, the style flat, and objects without places stand in [`canonical_places`] in the order in which
//! they are named.
//!
//! **Held-out compositions.** The pairs of colour and shape for which [`is_held_out`] holds never occur in a scene of
//! [`Split::Train`]; every sample of [`Split::HeldOut`] shows at least one.
//!
//! **Samples are functions.** A sample depends on the seed, the task, the split and its number alone: there is no state,
//! and any number can be asked for at once.

mod compose;
mod draws;
mod edits;
mod judge;
mod labels;
mod phrases;
mod questions;
mod reader;
mod render;
mod scene;

use serde::{Deserialize, Serialize};

use crate::compose::Rules;
use crate::draws::Draws;
use crate::edits::Change;
use crate::questions::Asked;
use crate::scene::either;
use nexus_data::{Image, Language, Message, edit_prompt, generation_prompt};

pub use crate::compose::canonical_places;
pub use crate::judge::{Difference, Verdict, changed_region, judge, psnr_outside};
pub use crate::labels::{LABEL_CLASSES, Labels, token_places, unseen_labels};
pub use crate::reader::{Reading, read_scene};
pub use crate::render::{PLACE_PX, SIDE_PX, Variation};
pub use crate::scene::{Background, Colour, Object, Place, Scene, Shape, Size, Style, Texture, is_held_out};

/// What a sample asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// A question about a picture.
    Understanding,
    /// A picture of a description.
    Generation,
    /// A changed picture.
    Editing,
    /// Several turns about one picture.
    MultiTurn,
    /// The same picture again, with something in every place: what an autoencoder learns most from.
    Reconstruction,
}

/// Kind of a sample, within its task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Kind {
    Describe,
    Count,
    Colour,
    Where,
    Presence,
    Compare,
    Shape,
    Content,
    SingleObject,
    TwoObjects,
    Counting,
    Colours,
    Position,
    AttributeBinding,
    Add,
    Remove,
    Recolour,
    Reshape,
    Resize,
    Background,
    Move,
    Restyle,
    GenerateThenUnderstand,
    TwoEdits,
    Questions,
    Crowded,
}

impl Task {
    /// Kinds of its samples.
    pub fn kinds(self) -> &'static [Kind] {
        match self {
            Self::Understanding => &[
                Kind::Describe,
                Kind::Count,
                Kind::Colour,
                Kind::Where,
                Kind::Presence,
                Kind::Compare,
                Kind::Shape,
                Kind::Content,
            ],
            Self::Generation => &[
                Kind::SingleObject,
                Kind::TwoObjects,
                Kind::Counting,
                Kind::Colours,
                Kind::Position,
                Kind::AttributeBinding,
            ],
            Self::Editing => &[
                Kind::Add,
                Kind::Remove,
                Kind::Recolour,
                Kind::Reshape,
                Kind::Resize,
                Kind::Background,
                Kind::Move,
                Kind::Restyle,
            ],
            Self::MultiTurn => &[Kind::GenerateThenUnderstand, Kind::TwoEdits, Kind::Questions],
            Self::Reconstruction => &[Kind::Crowded],
        }
    }

    /// Whether samples of this task can be asked to be of this kind: one of [`Task::kinds`], or for several turns a kind
    /// of short question, for conversations in which every question is of that kind.
    pub fn accepts(self, kind: Kind) -> bool {
        self.kinds().contains(&kind) || (self == Self::MultiTurn && SHORT_ANSWERS.contains(&kind))
    }
}

/// Whether compositions may be those of training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Without held-out pairs.
    Train,
    /// With at least one held-out pair.
    HeldOut,
}

/// A conversation with its truth.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Name of the sample: task, split, seed and number.
    pub id: String,
    /// What it asks for.
    pub task: Task,
    /// Kind within the task.
    pub kind: Kind,
    /// Language of all texts.
    pub language: Language,
    /// What a person types first: the description, the instruction or the question.
    pub prompt: String,
    /// All turns with their images, the model's last.
    pub messages: Vec<Message>,
    /// The truth of every image, in the order of the messages.
    pub scenes: Vec<Scene>,
    /// For every turn of the model, in order, the places of the picture before it that the answer is about; none if that
    /// is not a matter of single things.
    pub places: Vec<Vec<Place>>,
}

/// All samples of one seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct World {
    seed: u64,
    emphasis: Option<Emphasis>,
    shades: bool,
}

/// What the samples of a world can be full of, because models find it hard and it is rare otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Emphasis {
    /// Objects of different names share their colour or their shape with one of them; pictures to be edited have at least
    /// two.
    Lookalikes,
    /// One object stands on another, where a picture to be asked about or drawn again has several, and in most prompts of
    /// [`Kind::Position`].
    Stacked,
}

/// Questions of a sample of several about one picture.
const QUESTIONS: usize = 8;

/// Their kinds: a description would be most of what is learnt.
const SHORT_ANSWERS: &[Kind] =
    &[Kind::Count, Kind::Colour, Kind::Where, Kind::Presence, Kind::Compare, Kind::Shape, Kind::Content];

/// Share of Chinese samples, in percent.
const CHINESE_PERCENT: usize = 25;

impl World {
    /// The world of a seed.
    pub fn new(seed: u64) -> Self {
        Self { seed, emphasis: None, shades: false }
    }

    /// The same world with samples that are full of something; the usual ones without.
    pub fn with_emphasis(self, emphasis: Option<Emphasis>) -> Self {
        Self { emphasis, ..self }
    }

    /// The same world, with shades of the colours ([`Variation::shades`]) in all pictures but those of edits.
    ///
    /// No description says which shade, so what is drawn in shades is for training decoders and autoencoders, which see the
    /// picture, and not for what predicts it from the description.
    pub fn with_shades(self, shades: bool) -> Self {
        Self { shades, ..self }
    }

    /// One of its samples.
    pub fn sample(&self, task: Task, split: Split, index: u64) -> Sample {
        self.sample_of(task, task.kinds(), split, index)
    }

    /// One of its samples, of one of these kinds of the task ([`Task::accepts`]); of any kind if there are none.
    ///
    /// A scene that has nothing to ask or to change in the wanted way gives a sample of another kind.
    pub fn sample_of(&self, task: Task, kinds: &[Kind], split: Split, index: u64) -> Sample {
        let mut draws = Draws::new(self.seed, 16 * (task as u64 + 1) + split as u64, index);
        let mut kind = draws.one(if kinds.is_empty() { task.kinds() } else { kinds });
        let language = if draws.percent(CHINESE_PERCENT) { Language::Chinese } else { Language::English };
        let rules = Rules { split, emphasis: self.emphasis, shades: self.shades };
        let mut conversation = Conversation::default();
        let prompt = match (task, kind) {
            (Task::Understanding, _) => conversation.question(&mut kind, language, rules, &mut draws),
            (Task::Generation, _) => conversation.generation(kind, language, rules, &mut draws),
            (Task::MultiTurn, asked) if asked == Kind::Questions || SHORT_ANSWERS.contains(&asked) => {
                let kinds = if asked == Kind::Questions { SHORT_ANSWERS } else { std::slice::from_ref(&asked) };
                let prompt = conversation.question(&mut draws.one(kinds), language, rules, &mut draws);
                for _ in 1..QUESTIONS {
                    conversation.question_about_last(draws.one(kinds), language, &mut draws);
                }
                prompt
            }
            (Task::Reconstruction, _) => conversation.reconstruction(language, rules, &mut draws),
            (Task::MultiTurn, Kind::GenerateThenUnderstand) => {
                let drawn = draws.one(Task::Generation.kinds());
                let prompt = conversation.generation(drawn, language, rules, &mut draws);
                conversation.question_about_last(draws.one(Task::Understanding.kinds()), language, &mut draws);
                prompt
            }
            _ => {
                let mut first = if task == Task::Editing { kind } else { draws.one(Task::Editing.kinds()) };
                let prompt = conversation.edit(&mut first, language, rules, &mut draws);
                if task == Task::Editing {
                    kind = first;
                } else {
                    conversation.edit_last(draws.one(Task::Editing.kinds()), language, &mut draws);
                }
                prompt
            }
        };
        let id = format!("{task:?}-{split:?}-{}-{index}", self.seed);
        let Conversation { messages, scenes, places } = conversation;
        Sample { id, task, kind, language, prompt, messages, scenes, places }
    }
}

/// A conversation that is being composed.
#[derive(Default)]
struct Conversation {
    messages: Vec<Message>,
    scenes: Vec<Scene>,
    places: Vec<Vec<Place>>,
}

impl Conversation {
    fn question(&mut self, kind: &mut Kind, language: Language, rules: Rules, draws: &mut Draws) -> String {
        let scene = questions::scene(rules, draws);
        let Asked { kind: asked, question, answer, places } = questions::ask(*kind, &scene, language, draws);
        *kind = asked;
        // Pictures of other sources are never quite clean.
        let noise = if draws.percent(30) { 6 } else { 0 };
        let image = scene.render_with(rules.variation(noise, draws));
        self.messages.push(Message::user().with_image(image).with_text(question.clone()));
        self.messages.push(Message::assistant().with_text(answer));
        self.scenes.push(scene);
        self.places.push(places);
        question
    }

    fn question_about_last(&mut self, kind: Kind, language: Language, draws: &mut Draws) {
        let Some(scene) = self.scenes.last() else { return };
        let Asked { question, answer, places, .. } = questions::ask(kind, scene, language, draws);
        self.places.push(places);
        self.messages.push(Message::text(question));
        self.messages.push(Message::assistant().with_text(answer));
    }

    fn generation(&mut self, kind: Kind, language: Language, rules: Rules, draws: &mut Draws) -> String {
        let (prompt, scene) = compose::generation(kind, language, rules, draws);
        // A prompt of the world is never empty, which is all that can be wrong with one.
        let asked = generation_prompt(&prompt, language).unwrap_or_else(|_| prompt.clone());
        self.messages.push(Message::text(asked));
        self.answer(scene, rules.variation(0, draws), vec![], language);
        prompt
    }

    fn reconstruction(&mut self, language: Language, rules: Rules, draws: &mut Draws) -> String {
        let scene = compose::free_scene(Place::ALL.len(), rules, draws);
        let asked = either(language, "Draw this picture again.", "请重画这张图。").to_string();
        let variation = rules.variation(0, draws);
        self.messages.push(Message::user().with_image(scene.render_with(variation)).with_text(asked.clone()));
        self.scenes.push(scene.clone());
        self.answer(scene, variation, vec![], language);
        asked
    }

    fn edit(&mut self, kind: &mut Kind, language: Language, rules: Rules, draws: &mut Draws) -> String {
        let before = edits::scene(rules, draws);
        let Change { kind: changed, instruction, after } = edits::change(*kind, &before, language, draws);
        *kind = changed;
        let asked = edit_prompt(&instruction).unwrap_or_else(|_| instruction.clone());
        self.messages.push(Message::user().with_text(asked).with_image(before.render()));
        let places = changed_places(&before, &after);
        self.scenes.push(before);
        self.answer(after, Variation::default(), places, language);
        instruction
    }

    fn edit_last(&mut self, kind: Kind, language: Language, draws: &mut Draws) {
        let Some(before) = self.scenes.last() else { return };
        let Change { instruction, after, .. } = edits::change(kind, before, language, draws);
        let places = changed_places(before, &after);
        self.messages.push(Message::text(instruction));
        self.answer(after, Variation::default(), places, language);
    }

    fn answer(&mut self, scene: Scene, variation: Variation, places: Vec<Place>, language: Language) {
        let text = either(language, "Here is the image: ", "这是图像：");
        let image: Image = scene.render_with(variation);
        self.messages.push(Message::assistant().with_text(text).with_image(image));
        self.places.push(places);
        self.scenes.push(scene);
    }
}

/// Places of the objects that an edit changes or takes away, or else of those that it adds.
fn changed_places(before: &Scene, after: &Scene) -> Vec<Place> {
    let missing = |from: &Scene, other: &Scene| -> Vec<Place> {
        from.objects.iter().filter(|object| !other.objects.contains(object)).map(|object| object.place).collect()
    };
    match missing(before, after) {
        none if none.is_empty() => missing(after, before),
        changed => changed,
    }
}
