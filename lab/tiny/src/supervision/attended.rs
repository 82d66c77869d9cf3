//! Where tokens should look, as far as it is known: a conversation and its truth -> tokens, and those they should attend to.

use std::ops::Range;

use lab_world::{Object, Place, Scene, token_places};
use nexus::GridThw;
use nexus_data::{Language, TrainingInput};
use nexus_train::TokenLooks;

/// An image of a conversation.
#[derive(Clone, Copy)]
struct Seen<'a> {
    /// Its first token.
    start: usize,
    grid: GridThw,
    /// What it shows, if that is known.
    scene: Option<&'a Scene>,
}

/// Tokens of a conversation of which it is known where they should look.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Looks {
    /// In one layer, where things are found. The token before the first of an answer looks at the places of the latest
    /// image that the answer is about. The last token of a name in a question about that image looks at the places of all
    /// that have the name. The tokens that predict an object of a picture look at what the object comes from:
    /// what stood in its place in the latest image, or the same object in another place of it, or else the words that name
    /// it. The tokens that predict the words of an answer that describe an object look at its place in the latest image.
    pub(super) attended: Vec<TokenLooks>,
    /// In the next layer, where what was found is used: the tokens that predict what an edit changes look at the token
    /// before the first of the answer, and the others do not.
    pub(super) selected: Vec<TokenLooks>,
}

/// Where the tokens of a conversation should look.
///
/// `places` has what each answer is about, `scenes` what each image shows, or nothing.
pub(super) fn looks_of(input: &TrainingInput, places: &[Vec<Place>], scenes: &[Scene], image_token: u32) -> Looks {
    let TrainingInput { token_ids, labels, grids, .. } = input;
    let known = scenes.len() == grids.len();
    let (mut images, mut answers, mut latest) = (grids.iter().enumerate(), places.iter(), None::<Seen<'_>>);
    // Where the latest turn of the user begins, and where the latest of the model, with what that is about.
    let (mut asked, mut answered, mut about) = (0, 0, &[][..]);
    let Looks { mut attended, mut selected } = Looks::default();
    for index in 1..token_ids.len() {
        let begins_answer = labels[index - 1].is_none() && labels[index].is_some();
        if begins_answer {
            answered = index;
            about = answers.next().map_or(&[], Vec::as_slice);
            if let Some(seen) = latest {
                attended.push(TokenLooks { queries: vec![index - 1], tokens: seen.tokens_of(about) });
                attended.extend(seen.named(input, asked..index));
            }
        }
        if token_ids[index] == image_token && token_ids[index - 1] != image_token {
            let Some((number, &grid)) = images.next() else { continue };
            let drawn = Seen { start: index, grid, scene: known.then(|| &scenes[number]) };
            if labels[index].is_some() {
                attended.extend(drawn.sources(latest, input, asked..index));
                selected.extend(latest.iter().flat_map(|seen| drawn.changes(*seen, about, answered - 1)));
            }
            latest = Some(drawn);
        }
        if labels[index - 1].is_some() && labels[index].is_none() {
            attended.extend(latest.iter().flat_map(|seen| seen.described(input, answered..index)));
            asked = index;
        }
    }
    attended.retain(|attended| !attended.queries.is_empty() && !attended.tokens.is_empty());
    Looks { attended, selected }
}

impl Seen<'_> {
    fn tokens_of(&self, places: &[Place]) -> Vec<usize> {
        let tokens = token_places(self.grid.merged_h(), self.grid.merged_w()).into_iter().enumerate();
        tokens.filter(|(_, place)| places.contains(place)).map(|(token, _)| self.start + token).collect()
    }

    /// For every place of this picture with an object, the tokens that predict it, and where its objects come from.
    fn sources(&self, before: Option<Self>, input: &TrainingInput, prompt: Range<usize>) -> Vec<TokenLooks> {
        let Some(scene) = self.scene else { return vec![] };
        let source_of = |place: Place, here: &[&Object]| {
            if let Some(seen) = before
                && let Some(source) = seen.scene.and_then(|before| stood(before, here, place))
            {
                return seen.tokens_of(&[source]);
            }
            let named =
                |object: &&Object| tokens_of(&LANGUAGES.map(|language| object.name(language)), input, prompt.clone());
            here.iter().flat_map(named).collect()
        };
        let predicted = |place| {
            let here: Vec<&Object> = scene.objects.iter().filter(|object| object.place == place).collect();
            let queries = self.tokens_of(&[place]).into_iter().map(|token| token - 1).collect();
            (!here.is_empty()).then(|| TokenLooks { queries, tokens: source_of(place, &here) })
        };
        Place::ALL.into_iter().filter_map(predicted).collect()
    }

    /// For every place of this picture the tokens that predict it: those that draw what an edit of single places changes
    /// look at the token that found these, the others at all but that token. Nothing is said of a place that an object
    /// moves to, which is drawn from its source alone.
    fn changes(&self, before: Self, about: &[Place], finder: usize) -> Vec<TokenLooks> {
        let (Some(scene), Some(before), false) = (self.scene, before.scene, about.is_empty()) else { return vec![] };
        let is_taken = |scene: &Scene, place: Place| scene.objects.iter().any(|object| object.place == place);
        let said = |place: &Place| about.contains(place) || !is_taken(scene, *place) || is_taken(before, *place);
        let looks = |place: Place| {
            let queries: Vec<usize> = self.tokens_of(&[place]).into_iter().map(|token| token - 1).collect();
            let last = queries.iter().max().map_or(0, |query| query + 1);
            let others = || (0..last).filter(|&token| token != finder).collect();
            let tokens = if about.contains(&place) { vec![finder] } else { others() };
            TokenLooks { queries, tokens }
        };
        Place::ALL.into_iter().filter(said).map(looks).collect()
    }

    /// For every name that objects of this picture have and that comes in a part of the conversation after it, the last
    /// token of the name, and the places of the objects.
    fn named(&self, input: &TrainingInput, part: Range<usize>) -> Vec<TokenLooks> {
        let part = part.start.max(self.start + self.grid.num_merged_tokens())..part.end;
        let names = self.alike(|object| LANGUAGES.map(|language| object.name(language)));
        let named = names.into_iter().map(|(names, places)| {
            let queries = tokens_of(&names, input, part.clone()).last().copied().into_iter().collect();
            TokenLooks { queries, tokens: self.tokens_of(&places) }
        });
        named.collect()
    }

    /// For every object of this picture that an answer describes, the tokens that predict the words, and its place;
    /// objects that are alike share their words and their places.
    fn described(&self, input: &TrainingInput, answer: Range<usize>) -> Vec<TokenLooks> {
        let alike = self.alike(|object| LANGUAGES.map(|language| object.description(language)));
        let told = alike.into_iter().map(|(words, places)| {
            let queries = tokens_of(&words, input, answer.clone()).into_iter().map(|token| token - 1).collect();
            TokenLooks { queries, tokens: self.tokens_of(&places) }
        });
        told.collect()
    }

    /// What objects of this picture are called, and the places of those that are called so.
    fn alike(&self, called: impl Fn(&Object) -> [String; 2]) -> Vec<([String; 2], Vec<Place>)> {
        let mut alike: Vec<([String; 2], Vec<Place>)> = Vec::new();
        for object in self.scene.iter().flat_map(|scene| &scene.objects) {
            let words = called(object);
            match alike.iter_mut().find(|(others, _)| *others == words) {
                Some((_, places)) => places.push(object.place),
                None => alike.push((words, vec![object.place])),
            }
        }
        alike
    }
}

/// Where the objects of a place stood before.
fn stood(before: &Scene, here: &[&Object], place: Place) -> Option<Place> {
    let same = |other: &Object| here.iter().any(|object| Object { place, ..*other } == **object);
    let in_place = before.objects.iter().find(|other| other.place == place);
    in_place.or_else(|| before.objects.iter().find(|other| same(other))).map(|other| other.place)
}

/// Languages that a text may be in.
const LANGUAGES: [Language; 2] = [Language::English, Language::Chinese];

/// Tokens of a part of a conversation that spell one of these phrases.
fn tokens_of(phrases: &[String], TrainingInput { text, starts, .. }: &TrainingInput, part: Range<usize>) -> Vec<usize> {
    let end = |token: usize| starts.get(token).copied().unwrap_or(text.len());
    let from = end(part.start);
    let spans = phrases.iter().flat_map(|phrase| text[from..end(part.end)].match_indices(phrase.as_str()));
    let spans: Vec<Range<usize>> = spans.map(|(at, phrase)| from + at..from + at + phrase.len()).collect();
    let is_in = |&token: &usize| {
        let bytes = starts[token]..end(token + 1).max(starts[token] + 1);
        spans.iter().any(|span| bytes.start < span.end && span.start < bytes.end)
    };
    part.filter(is_in).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use lab_world::{Kind, Sample, Split, Task, World};
    use nexus_data::{ProcessOptions, Processor};

    use super::*;

    const IMAGE: u32 = 9;

    #[test]
    fn answers_look_at_the_latest_image() {
        let question = |answer: &[u32]| (vec![1, 2], answer.to_vec());
        let grid = GridThw::new(1, 6, 6).unwrap();
        let picture = [&[7][..], &[IMAGE; 9], &[8]].concat();
        // A picture, two answers, an answer that is a picture, and a question about that.
        let turns =
            [([&picture[..], &[1]].concat(), vec![3, 4]), question(&[3]), question(&picture), question(&[5, 6])];
        let (mut token_ids, mut labels) = (vec![0], vec![None]);
        let mut starts = vec![];
        for (prompt, answer) in &turns {
            token_ids.extend(prompt);
            labels.resize(token_ids.len(), None);
            starts.push(token_ids.len() - 1);
            token_ids.extend(answer);
            labels.extend(answer.iter().copied().map(Some));
        }
        let input = TrainingInput {
            text: String::new(),
            starts: vec![0; token_ids.len()],
            token_ids,
            labels,
            input_images: vec![],
            answer_images: vec![],
            grids: vec![grid, grid],
        };
        let places = [vec![Place(0), Place(5)], vec![], vec![Place(8)], vec![Place(2)]];
        let drawn = starts[2] + 2;
        let expected = [(starts[0], vec![2, 7]), (starts[2], vec![10]), (starts[3], vec![drawn + 2])];
        let expected = expected.map(|(query, tokens)| TokenLooks { queries: vec![query], tokens });
        assert_eq!(looks_of(&input, &places, &[], IMAGE), Looks { attended: expected.to_vec(), selected: vec![] });
        assert_eq!(looks_of(&input, &[], &[], IMAGE), Looks::default());
    }

    /// Samples of a kind with where they look.
    fn samples(task: Task, kind: Kind) -> impl Iterator<Item = (Sample, TrainingInput, Looks)> {
        let processor =
            Processor::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nexus-tiny/Nexus-GenV2")).unwrap();
        let image = processor.tokenizer().special_tokens().image;
        (0..120).map(move |index| {
            let sample = World::new(8).sample_of(task, &[kind], Split::Train, index);
            let input = processor.training_input(&sample.messages, &ProcessOptions::default()).unwrap();
            let looks = looks_of(&input, &sample.places, &sample.scenes, image);
            (sample, input, looks)
        })
    }

    fn text_of(input: &TrainingInput, tokens: &[usize]) -> String {
        let end = |token: usize| input.starts.get(token + 1).copied().unwrap_or(input.text.len());
        tokens.iter().map(|&token| &input.text[input.starts[token]..end(token)]).collect()
    }

    fn first_pad(input: &TrainingInput) -> usize {
        let at = input.text.find("<|image_pad|>").unwrap();
        input.starts.iter().position(|&start| start == at).unwrap()
    }

    #[test]
    fn what_is_drawn_looks_at_the_words_that_name_it() {
        for kind in Task::Generation.kinds() {
            for (sample, input, Looks { attended, selected }) in samples(Task::Generation, *kind) {
                assert!(selected.is_empty());
                let first = input.labels.iter().position(Option::is_some).unwrap();
                let image = first_pad(&input);
                let mut places: Vec<Place> = sample.scenes[0].objects.iter().map(|object| object.place).collect();
                places.dedup();
                assert_eq!(attended.len(), places.len(), "{}", input.text);
                for (TokenLooks { queries, tokens }, place) in attended.iter().zip(places) {
                    assert_eq!(queries.len(), 9);
                    let corner = usize::from(place.row()) * 27 + usize::from(place.column()) * 3;
                    assert_eq!(queries[0], image + corner - 1);
                    assert!(tokens.iter().all(|&token| token < first));
                    let words = text_of(&input, tokens);
                    for object in sample.scenes[0].objects.iter().filter(|object| object.place == place) {
                        assert!(words.contains(&object.name(sample.language)), "{words} in {}", input.text);
                    }
                }
            }
        }
    }

    #[test]
    fn what_an_edit_leaves_or_changes_looks_at_what_it_was() {
        for kind in [Kind::Move, Kind::Recolour, Kind::Background, Kind::Add] {
            for (sample, input, Looks { attended, .. }) in samples(Task::Editing, kind) {
                let [before, after] = &sample.scenes[..] else { panic!("two scenes") };
                let place_of = |token: usize| token_places(9, 9)[token - first_pad(&input)];
                let drawn = attended.iter().filter(|attended| attended.queries.len() > 1);
                assert_eq!(drawn.clone().count(), after.objects.len());
                for (TokenLooks { tokens, .. }, object) in drawn.zip(&after.objects) {
                    if sample.kind == Kind::Add && !before.objects.contains(object) {
                        assert!(text_of(&input, tokens).contains(&object.name(sample.language)));
                        continue;
                    }
                    let places: Vec<Place> = tokens.iter().map(|&token| place_of(token)).collect();
                    assert_eq!(places.len(), 9);
                    let moved = sample.kind == Kind::Move && !before.objects.contains(object);
                    let from = if moved { sample.places[0][0] } else { object.place };
                    assert!(places.iter().all(|&place| place == from), "{}", input.text);
                }
            }
        }
    }

    #[test]
    fn what_an_edit_changes_looks_at_what_found_it_and_nothing_else_does() {
        for kind in [Kind::Remove, Kind::Move, Kind::Reshape, Kind::Add, Kind::Background] {
            for (sample, input, Looks { selected, .. }) in samples(Task::Editing, kind) {
                let ([before, after], about) = (&sample.scenes[..], &sample.places[0]) else { panic!("two scenes") };
                if about.is_empty() {
                    assert!(selected.is_empty() && [Kind::Background, Kind::Restyle].contains(&sample.kind));
                    continue;
                }
                let finder = input.labels.iter().position(Option::is_some).unwrap() - 1;
                let image = input.text.rfind("<|vision_start|>").unwrap();
                let boi = input.starts.iter().position(|&start| start == image).unwrap();
                let mut unsaid = Place::ALL.to_vec();
                for TokenLooks { queries, tokens } in selected {
                    assert_eq!(queries.len(), 9);
                    let places: BTreeSet<Place> = queries.iter().map(|query| token_places(9, 9)[query - boi]).collect();
                    let [place] = Vec::from_iter(places)[..] else { panic!("one place") };
                    unsaid.retain(|other| *other != place);
                    match about.contains(&place) {
                        true => assert_eq!(tokens, [finder]),
                        false => assert!(!tokens.contains(&finder) && tokens.len() == queries[8]),
                    }
                }
                let moved = |object: &&Object| sample.kind == Kind::Move && !before.objects.contains(object);
                let to: Vec<Place> = after.objects.iter().filter(moved).map(|object| object.place).collect();
                assert_eq!(unsaid, to, "{}", input.text);
            }
        }
    }

    #[test]
    fn names_in_a_question_look_at_all_that_have_the_name() {
        let mut several = 0;
        for kind in [Kind::Compare, Kind::Presence, Kind::Where] {
            for (sample, input, Looks { attended, .. }) in samples(Task::Understanding, kind) {
                let (start, objects) = (first_pad(&input), &sample.scenes[0].objects);
                let asked = |object: &Object| sample.prompt.contains(&object.name(sample.language));
                let names: BTreeSet<String> =
                    objects.iter().filter(|object| asked(object)).map(|object| object.name(sample.language)).collect();
                let finder = input.labels.iter().position(Option::is_some).unwrap() - 1;
                let named: Vec<&TokenLooks> = attended.iter().filter(|looks| looks.queries != [finder]).collect();
                assert_eq!(named.len(), names.len(), "{}", input.text);
                several += usize::from(names.len() > 1);
                for TokenLooks { queries, tokens } in named {
                    let before: Vec<usize> = (start + 81..queries[0] + 1).collect();
                    let text = text_of(&input, &before);
                    let name = names.iter().find(|name| {
                        let rest = text.rfind(*name).map(|at| &text[at + name.len()..]);
                        rest.is_some_and(|rest| rest.chars().count() <= 1)
                    });
                    let name = name.unwrap_or_else(|| panic!("{text} of {}", input.text));
                    let here = objects.iter().filter(|object| object.name(sample.language) == *name);
                    let expected: BTreeSet<Place> = here.map(|object| object.place).collect();
                    let found: BTreeSet<Place> =
                        tokens.iter().map(|&token| token_places(9, 9)[token - start]).collect();
                    assert_eq!((found, tokens.len()), (expected.clone(), 9 * expected.len()), "{}", input.text);
                }
            }
        }
        assert!(several > 40);
    }

    #[test]
    fn words_that_describe_objects_look_at_all_that_are_described_so() {
        let mut alike = 0;
        for (sample, input, Looks { attended, .. }) in samples(Task::Understanding, Kind::Describe) {
            let (start, objects) = (first_pad(&input), &sample.scenes[0].objects);
            let words = |object: &Object| object.description(sample.language);
            let described: BTreeSet<String> = objects.iter().map(words).collect();
            assert_eq!(attended.len(), described.len(), "{}", input.text);
            alike += usize::from(described.len() < objects.len());
            for TokenLooks { queries, tokens } in &attended {
                let predicted: Vec<usize> = queries.iter().map(|query| query + 1).collect();
                assert!(predicted.iter().all(|&token| input.labels[token].is_some()));
                let text = text_of(&input, &predicted);
                let described = described.iter().find(|words| text.contains(*words)).expect("words of an object");
                let here = objects.iter().filter(|object| words(object) == *described);
                let expected: BTreeSet<Place> = here.map(|object| object.place).collect();
                let found: BTreeSet<Place> = tokens.iter().map(|&token| token_places(9, 9)[token - start]).collect();
                assert_eq!((found, tokens.len()), (expected.clone(), 9 * expected.len()), "{}", input.text);
            }
        }
        assert!(alike > 0);
    }
}
