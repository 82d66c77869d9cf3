//! What training never shows, as words: a conversation and its truth -> tokens that need not be ruled out.

use std::ops::Range;

use lab_world::{Colour, Object, Place, Scene, Shape, is_held_out};
use nexus_data::{DataError, Language, Tokenizer, TrainingInput};
use nexus_train::PossibleToken;

/// Tokens that do not compete for the words of answers about a picture, each with the index of its label.
///
/// Where an answer says the shape of an object, the shape that no training picture shows in the object's colour does not
/// compete, and where it says the colour the one that no picture shows the shape in: what the model would learn of these is
/// that they cannot be. `places` has what each answer is about, `scenes` what each image shows, or nothing.
///
/// # Errors
/// [`DataError`] if a text cannot be encoded.
pub(super) fn unseen_words(
    input: &TrainingInput,
    places: &[Vec<Place>],
    scenes: &[Scene],
    image_token: u32,
    tokenizer: &Tokenizer,
) -> Result<Vec<PossibleToken>, DataError> {
    let TrainingInput { token_ids, labels, grids, .. } = input;
    let mut unseen = Vec::new();
    if scenes.len() != grids.len() {
        return Ok(unseen);
    }
    let (mut about, mut images, mut answered) = (places.iter(), 0, None::<(usize, usize)>);
    let is_answer = |index: usize| labels.get(index).is_some_and(Option::is_some);
    for index in 1..token_ids.len() {
        if is_answer(index) && !is_answer(index - 1) {
            answered = Some((index, images));
        }
        images += usize::from(token_ids[index] == image_token && token_ids[index - 1] != image_token);
        if let Some((from, seen)) = answered.take_if(|_| is_answer(index) && !is_answer(index + 1)) {
            let about = about.next().map_or(&[][..], Vec::as_slice);
            if let Some(scene) = seen.checked_sub(1).and_then(|latest| scenes.get(latest)) {
                let meant = |object: &&Object| about.is_empty() || about.contains(&object.place);
                let objects: Vec<&Object> = scene.objects.iter().filter(meant).collect();
                unseen.extend(unseen_in(input, from..index + 1, &objects, tokenizer)?);
            }
        }
    }
    Ok(unseen)
}

/// As [`unseen_words`], of one answer about some objects.
fn unseen_in(
    input: &TrainingInput,
    answer: Range<usize>,
    objects: &[&Object],
    tokenizer: &Tokenizer,
) -> Result<Vec<PossibleToken>, DataError> {
    let TrainingInput { text, starts, token_ids, labels, .. } = input;
    let end = starts.get(answer.end).copied().unwrap_or(text.len());
    let said = &text[starts[answer.start]..end];
    // The first token that would be another one if another word stood at a place.
    let first_other = |at: usize, word: &str, other: &str| {
        let changed = [&said[..at], other, &said[at + word.len()..]].concat();
        let ids = tokenizer.encode(&changed)?;
        let differs = ids.iter().zip(&token_ids[answer.clone()]).position(|(other, id)| other != id);
        let token = differs.map(|token| (answer.start + token, ids[token]));
        let is_in = |&(token, _): &(usize, u32)| starts[token] - starts[answer.start] < at + word.len();
        Ok::<_, DataError>(token.filter(|token| labels[token.0].is_some() && is_in(token)))
    };
    let mut unseen = Vec::new();
    for Word { word, seen: others, unseen: never } in words_of(objects) {
        let starts_here = |at: &usize| !said[..*at].ends_with(|before: char| before.is_ascii_alphabetic());
        for at in said.match_indices(word).map(|(at, _)| at).filter(starts_here) {
            let seen = others.iter().map(|other| first_other(at, word, other)).collect::<Result<Vec<_>, _>>()?;
            for other in &never {
                // A token that another word begins with too has to be learned.
                let token = first_other(at, word, other)?.filter(|token| !seen.contains(&Some(*token)));
                unseen.extend(token.map(|(index, id)| PossibleToken { index, id }));
            }
        }
    }
    Ok(unseen)
}

/// A word for an object, and the words of the same sort that it competes with.
struct Word {
    word: &'static str,
    /// Of which training shows some object that is otherwise alike.
    seen: Vec<&'static str>,
    /// Of which it never does.
    unseen: Vec<&'static str>,
}

/// Words for shapes and colours of objects, each once, those for which all others are seen left out.
fn words_of(objects: &[&Object]) -> Vec<Word> {
    let mut words: Vec<Word> = Vec::new();
    for language in [Language::English, Language::Chinese] {
        words.extend(Shape::ALL.map(|shape| {
            let alike = || objects.iter().filter(|object| object.shape == shape);
            let never = |other| alike().any(|object| is_held_out(object.colour, other));
            Word::new(shape, &Shape::ALL, never, |shape| shape.name(language))
        }));
        words.extend(Colour::ALL.map(|colour| {
            let alike = || objects.iter().filter(|object| object.colour == colour);
            let never = |other| alike().any(|object| is_held_out(other, object.shape));
            Word::new(colour, &Colour::ALL, never, |colour| colour.name(language))
        }));
    }
    words.retain(|word| !word.unseen.is_empty());
    words
}

impl Word {
    fn new<T: Copy + PartialEq>(
        meant: T,
        all: &[T],
        never: impl Fn(T) -> bool,
        name: impl Fn(T) -> &'static str,
    ) -> Self {
        let others = all.iter().filter(|&&other| other != meant);
        let (unseen, seen): (Vec<T>, Vec<T>) = others.partition(|&&other| never(other));
        let names = |all: Vec<T>| all.into_iter().map(&name).collect();
        Self { word: name(meant), seen: names(seen), unseen: names(unseen) }
    }
}

#[cfg(test)]
mod tests {
    use lab_world::{Kind, Sample, Split, Task, World};
    use nexus_data::{ProcessOptions, Processor};

    use super::*;

    /// What the answers of some samples would say with the first excluded token of each word.
    fn excluded(task: Task, kind: Kind, language: Language) -> Vec<(Sample, Vec<String>)> {
        let processor =
            Processor::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nexus-tiny/Nexus-GenV2")).unwrap();
        let tokenizer = processor.tokenizer();
        let image = tokenizer.special_tokens().image;
        let samples = (0..200).map(|index| World::new(6).sample_of(task, &[kind], Split::Train, index));
        let unseen = samples.filter(|sample| sample.language == language && sample.kind == kind).map(|sample| {
            let input = processor.training_input(&sample.messages, &ProcessOptions::default()).unwrap();
            let unseen = unseen_words(&input, &sample.places, &sample.scenes, image, tokenizer).unwrap();
            assert!(
                unseen.iter().all(|&PossibleToken { index, id }| input.labels[index].is_some_and(|label| label != id))
            );
            let texts = unseen
                .into_iter()
                .map(|PossibleToken { id, .. }| tokenizer.decode(&[id], false).unwrap().trim().to_string());
            (sample, texts.collect())
        });
        unseen.collect()
    }

    #[test]
    fn the_shape_that_no_object_of_the_colour_has_is_not_ruled_out() {
        let mut excluding = 0;
        for (sample, words) in excluded(Task::Understanding, Kind::Shape, Language::English) {
            let [place] = sample.places[0][..] else { panic!("about one place") };
            let here: Vec<&Object> = sample.scenes[0].objects.iter().filter(|object| object.place == place).collect();
            let [asked] = here[..] else { continue };
            // Words without a space before them are spelt in pieces. "circle" and "cross" begin with the same one, which
            // stays unless the answer has it too.
            let expected: Vec<&str> = match (asked.colour, asked.shape) {
                (Colour::Cyan, Shape::Cross) => vec!["ir"],
                (Colour::Blue, _) => vec!["s"],
                (Colour::Black, _) => vec!["t"],
                (Colour::Purple, Shape::Circle) => vec!["ross"],
                _ => vec![],
            };
            assert_eq!(words, expected, "{}", sample.prompt);
            excluding += usize::from(!words.is_empty());
        }
        assert!(excluding > 10, "{excluding}");
    }

    #[test]
    fn the_colour_that_no_object_of_the_shape_has_is_not_ruled_out() {
        let mut asked_for = [0; 4];
        for (sample, words) in excluded(Task::Understanding, Kind::Colour, Language::Chinese) {
            let [place] = sample.places[0][..] else { panic!("about one place") };
            let here: Vec<&Object> = sample.scenes[0].objects.iter().filter(|object| object.place == place).collect();
            let [asked] = here[..] else { continue };
            let expected = ["青", "蓝", "黑", "紫"][asked.shape as usize];
            let [word] = &words[..] else { panic!("{words:?} for {}", sample.prompt) };
            assert!(word.starts_with(expected), "{word} for {}", sample.prompt);
            asked_for[asked.shape as usize] += 1;
        }
        assert!(asked_for.iter().all(|&count| count > 0), "{asked_for:?}");
    }

    #[test]
    fn each_word_of_a_description_has_its_own() {
        for (sample, words) in excluded(Task::Understanding, Kind::Describe, Language::English) {
            let objects = &sample.scenes[0].objects;
            assert!(words.len() >= objects.len(), "{words:?} for {}", sample.prompt);
            let cyan = objects.iter().any(|object| object.colour == Colour::Cyan);
            assert_eq!(words.iter().any(|word| word == "circle"), cyan, "{words:?}");
        }
    }

    #[test]
    fn answers_about_what_the_model_drew_have_theirs() {
        let samples = excluded(Task::MultiTurn, Kind::GenerateThenUnderstand, Language::English);
        let excluding = samples.iter().filter(|(_, words)| !words.is_empty()).count();
        assert!(excluding > 5 && excluding < samples.len(), "{excluding} of {}", samples.len());
    }
}
