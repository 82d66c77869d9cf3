//! The world of the small model through its public interface: same bytes, split by rule, determined prompts, fair scores.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};

use lab_world::{
    Colour, Emphasis, Kind, Object, Place, Scene, Shape, Split, Task, Variation, World, changed_region, is_held_out,
    judge, psnr_outside, read_scene,
};
use nexus_data::{Image, Language, Message, Role};
use sha2::{Digest, Sha256};

const TASKS: [Task; 5] = [Task::Understanding, Task::Generation, Task::Editing, Task::MultiTurn, Task::Reconstruction];

/// Samples of every task; fewer where nothing is optimised.
fn count(released: u64) -> u64 {
    if cfg!(debug_assertions) { released / 10 } else { released }
}

fn hash(messages: &[Message]) -> String {
    let mut hasher = Sha256::new();
    for message in messages {
        message.texts().for_each(|text| hasher.update(text));
        message.images().for_each(|image| hasher.update(image.rgb()));
    }
    format!("{:x}", hasher.finalize())
}

fn images(messages: &[Message]) -> Vec<Image> {
    messages.iter().flat_map(Message::images).cloned().collect()
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    for task in TASKS {
        for split in [Split::Train, Split::HeldOut] {
            let of = |seed: u64, index: u64| hash(&World::new(seed).sample(task, split, index).messages);
            assert_eq!(of(5, 17), of(5, 17));
            assert_ne!(of(5, 17), of(5, 18), "{task:?} {split:?}: another number is another sample");
            assert_ne!(of(5, 17), of(6, 17), "{task:?} {split:?}: another seed is another world");
        }
    }
}

#[test]
fn held_out_pairs_never_occur_in_training_and_always_in_evaluation() {
    let pairs = Shape::ALL.map(|shape| Colour::ALL.into_iter().filter(|&colour| is_held_out(colour, shape)).count());
    assert_eq!(pairs, [1; 4], "one pair for each shape");
    let world = World::new(3);
    let has_held_out = |scene: &Scene| scene.objects.iter().any(|object| is_held_out(object.colour, object.shape));
    for task in TASKS {
        for index in 0..count(3000) {
            let sample = world.sample(task, Split::Train, index);
            assert!(!sample.scenes.iter().any(has_held_out), "{}", sample.id);
            let sample = world.sample(task, Split::HeldOut, index);
            assert!(sample.scenes.iter().any(has_held_out), "{}", sample.id);
        }
    }
}

#[test]
fn a_prompt_determines_one_scene() {
    let world = World::new(4);
    let mut known: BTreeMap<String, Scene> = BTreeMap::new();
    let mut again = 0;
    for index in 0..count(20_000) {
        let sample = world.sample(Task::Generation, Split::Train, index);
        let scene = sample.scenes[0].clone();
        if let Some(before) = known.insert(sample.prompt.clone(), scene.clone()) {
            again += 1;
            assert_eq!(before, scene, "{}", sample.prompt);
        }
    }
    assert!(again > 10, "only {again} prompts came twice");
}

#[test]
fn an_answer_follows_from_question_and_scene() {
    let world = World::new(8);
    let mut known: BTreeMap<(String, Vec<u8>), String> = BTreeMap::new();
    let mut kinds = BTreeSet::new();
    for index in 0..count(3000) {
        let sample = world.sample(Task::Understanding, Split::Train, index);
        kinds.insert(sample.kind);
        let scene = &sample.scenes[0];
        let answer: String = sample.messages[1].texts().collect();
        let key = (sample.prompt.clone(), scene.render().rgb().to_vec());
        assert_eq!(known.entry(key).or_insert(answer.clone()), &answer, "{}", sample.prompt);
        if sample.kind == Kind::Where && sample.language == Language::English {
            let places = Place::ALL.map(|place| place.name(Language::English));
            assert!(places.contains(&answer.as_str()), "{answer}");
        }
        if sample.kind == Kind::Count {
            let counted: usize = answer.parse().unwrap();
            assert!(counted <= scene.objects.len(), "{}: {answer}", sample.prompt);
        }
    }
    assert_eq!(kinds, Task::Understanding.kinds().iter().copied().collect());
}

#[test]
fn kinds_can_be_chosen() {
    let world = World::new(9);
    for index in 0..40 {
        let sample = world.sample_of(Task::Understanding, &[Kind::Describe], Split::Train, index);
        assert_eq!(sample.kind, Kind::Describe);
        let sample = world.sample_of(Task::Generation, &[Kind::Counting, Kind::Colours], Split::Train, index);
        assert!([Kind::Counting, Kind::Colours].contains(&sample.kind));
        let any = world.sample_of(Task::Generation, &[], Split::Train, index);
        assert_eq!(any, world.sample(Task::Generation, Split::Train, index));
    }
}

#[test]
fn a_mix_is_a_shade_of_the_nearest_colour() {
    for colour in Colour::ALL {
        assert_eq!(Colour::nearest(colour.rgb()), colour);
    }
    assert_eq!(Colour::nearest([0, 0, 0]), Colour::Black);
    // From green to cyan, just before the middle and just after it.
    assert_eq!([Colour::nearest([22, 166, 130]), Colour::nearest([22, 169, 140])], [Colour::Green, Colour::Cyan]);
}

#[test]
fn objects_in_shades_keep_the_colours_that_they_are_shades_of() {
    let world = World::new(15);
    let mut shaded = BTreeSet::new();
    for index in 0..count(300) {
        let scene = &world.sample(Task::Editing, Split::Train, index).scenes[0];
        let variation = Variation { shades: true, seed: index, ..Variation::default() };
        let (plain, picture) = (scene.render(), scene.render_with(variation));
        assert_eq!(picture.rgb(), scene.render_with(variation).rgb());
        assert_ne!(picture.rgb(), scene.render_with(Variation { seed: index + 1, ..variation }).rgb());
        let pixel = |picture: &Image, x: usize, y: usize| -> [u8; 3] {
            picture.rgb()[3 * (y * picture.width_px() + x)..][..3].try_into().unwrap()
        };
        assert_eq!(pixel(&picture, 0, 0), pixel(&plain, 0, 0), "the background stays");
        let alone = |object: &&Object| scene.objects.iter().filter(|other| other.place == object.place).count() == 1;
        for object in scene.objects.iter().filter(alone) {
            let middle = |part: u8| 24 + 48 * usize::from(part);
            let found = pixel(&picture, middle(object.place.column()), middle(object.place.row()));
            assert_eq!(Colour::nearest(found), object.colour, "{object:?} {found:?}");
            shaded.extend((found != object.colour.rgb()).then_some(object.colour as u8));
        }
    }
    assert_eq!(shaded.len(), Colour::ALL.len());
}

#[test]
fn a_world_of_shades_has_them_in_all_pictures_but_those_of_edits() {
    let (plain, shaded) = (World::new(15), World::new(15).with_shades(true));
    let mut changed = 0;
    for index in 0..40 {
        for task in [Task::Understanding, Task::Generation, Task::Reconstruction] {
            let [one, other] = [plain, shaded].map(|world| world.sample(task, Split::Train, index));
            assert_eq!((&one.prompt, &one.scenes), (&other.prompt, &other.scenes));
            changed += usize::from(hash(&one.messages) != hash(&other.messages));
        }
        let again = images(&shaded.sample(Task::Reconstruction, Split::Train, index).messages);
        assert_eq!(again[0].rgb(), again[1].rgb());
        let [one, other] = [plain, shaded].map(|world| world.sample(Task::Editing, Split::Train, index));
        assert_eq!(one, other);
    }
    // A shade may be the colour itself.
    assert!(changed >= 110, "{changed} of 120");
}

#[test]
fn samples_can_be_full_of_lookalikes() {
    let world = World::new(14).with_emphasis(Some(Emphasis::Lookalikes));
    let alike = |one: &Object, other: &Object| one.colour == other.colour || one.shape == other.shape;
    for split in [Split::Train, Split::HeldOut] {
        for index in 0..count(400) {
            let sample = world.sample_of(Task::Editing, &[Kind::Remove, Kind::Reshape], split, index);
            let objects = &sample.scenes[0].objects;
            assert!(objects.len() >= 2, "{}", sample.id);
            assert!(objects.iter().any(|one| objects.iter().all(|other| alike(one, other))), "{objects:?}");
            let held_out = objects.iter().any(|object| is_held_out(object.colour, object.shape));
            assert_eq!(held_out, split == Split::HeldOut, "{}", sample.id);
        }
    }
    assert_ne!(world.sample(Task::Editing, Split::Train, 3), World::new(14).sample(Task::Editing, Split::Train, 3));
    let plain = world.with_emphasis(None);
    assert_eq!(plain.sample(Task::Editing, Split::Train, 3), World::new(14).sample(Task::Editing, Split::Train, 3));
}

#[test]
fn samples_can_be_full_of_stacked_objects() {
    let stacked = |scene: &Scene| scene.objects.windows(2).any(|pair| pair[0].place == pair[1].place);
    let share = |world: World, task, kind| {
        let shows = |index| stacked(&world.sample_of(task, &[kind], Split::Train, index).scenes[0]);
        (0..400).filter(|&index| shows(index)).count()
    };
    for (task, kind) in [(Task::Understanding, Kind::Describe), (Task::Generation, Kind::Position)] {
        let (usual, full) = (World::new(15), World::new(15).with_emphasis(Some(Emphasis::Stacked)));
        let (few, many) = (share(usual, task, kind), share(full, task, kind));
        assert!(few < 110 && many > 240, "{task:?}: {few} and {many} of 400");
    }
}

#[test]
fn an_answer_says_where_it_is_about() {
    let world = World::new(13);
    let text = |message: &Message| message.texts().collect::<String>();
    let mut kinds = BTreeMap::new();
    for index in 0..count(1000) {
        let asked = [Kind::Where, Kind::Colour, Kind::Shape, Kind::Content, Kind::Count][index as usize % 5];
        let sample = world.sample_of(Task::MultiTurn, &[asked], Split::Train, index);
        assert_eq!(sample.kind, asked);
        let answers: Vec<String> =
            sample.messages.iter().filter(|message| message.role == Role::Assistant).map(text).collect();
        assert_eq!((answers.len(), sample.places.len()), (8, 8), "{}", sample.id);
        for (answer, places) in answers.iter().zip(&sample.places) {
            let language = sample.language;
            let here = |place: Place| sample.scenes[0].objects.iter().filter(move |object| object.place == place);
            // What cannot be asked of a scene is replaced by a question of presence, which is about none or several.
            if ["yes", "no", "是", "否"].contains(&answer.as_str()) {
                assert!(places.is_empty(), "{}: {answer} in {places:?}", sample.id);
                continue;
            }
            if let Ok(number) = answer.parse::<usize>() {
                assert_eq!(places.len(), number, "{}: {answer}", sample.id);
                *kinds.entry("count").or_insert(0) += 1;
                continue;
            }
            let [place] = places[..] else { panic!("{}: {answer} in {places:?}", sample.id) };
            let mut told = vec![("where", place.name(language) == answer)];
            told.push(("colour", here(place).any(|object| object.colour.name(language) == answer)));
            told.push(("shape", here(place).any(|object| object.shape.name(language) == answer)));
            let names = |object: &lab_world::Object| {
                answer.contains(object.colour.name(language)) && answer.contains(object.shape.name(language))
            };
            told.push(("content", here(place).all(names)));
            let found = told.into_iter().find(|(_, told)| *told);
            let (kind, _) = found.unwrap_or_else(|| panic!("{}: {answer} in {place:?}", sample.id));
            *kinds.entry(kind).or_insert(0) += 1;
        }
    }
    assert_eq!(kinds.len(), 5, "{kinds:?}");
    for index in 0..count(300) {
        let sample = world.sample(Task::Editing, Split::Train, index);
        let [before, after] = &sample.scenes[..] else { panic!("{}: two scenes", sample.id) };
        let of_whole = [Kind::Background, Kind::Restyle].contains(&sample.kind);
        assert_eq!(sample.places[0].is_empty(), of_whole, "{}: {}", sample.id, sample.prompt);
        for &place in &sample.places[0] {
            let at = |scene: &Scene| -> Vec<_> { scene.objects.iter().copied().filter(|o| o.place == place).collect() };
            assert_ne!(at(before), at(after), "{}: {}", sample.id, sample.prompt);
        }
    }
}

#[test]
fn an_edit_changes_what_it_says_and_nothing_else() {
    let world = World::new(10);
    let mut kinds = BTreeSet::new();
    for index in 0..count(600) {
        let sample = world.sample(Task::Editing, Split::HeldOut, index);
        kinds.insert(sample.kind);
        let [before, after] = &sample.scenes[..] else { panic!("{}: two scenes", sample.id) };
        let pictures = images(&sample.messages);
        assert!(judge(&pictures[0], before).correct && judge(&pictures[1], after).correct, "{}", sample.id);
        assert!(!judge(&pictures[0], after).correct, "{}: {} changes nothing", sample.id, sample.prompt);
        let region = changed_region(before, after);
        assert_eq!(psnr_outside(&pictures[0], &pictures[1], &region), f32::INFINITY, "{}", sample.id);
    }
    assert_eq!(kinds.len(), Task::Editing.kinds().len(), "{kinds:?}");
}

#[test]
fn several_turns_go_on_with_the_same_picture() {
    let world = World::new(11);
    let mut kinds = BTreeSet::new();
    for index in 0..40 {
        let sample = world.sample(Task::MultiTurn, Split::Train, index);
        kinds.insert(sample.kind);
        let turns = if sample.kind == Kind::Questions { 16 } else { 4 };
        let roles: Vec<Role> = sample.messages.iter().map(|message| message.role).collect();
        assert_eq!(roles, [Role::User, Role::Assistant].repeat(turns / 2), "{}", sample.id);
        let pictures = images(&sample.messages);
        assert_eq!(pictures.len(), sample.scenes.len());
        for (picture, scene) in pictures.iter().zip(&sample.scenes) {
            assert_eq!(read_scene(picture).scene.as_ref(), Some(scene), "{}", sample.id);
        }
    }
    assert_eq!(kinds, Task::MultiTurn.kinds().iter().copied().collect());
}

#[test]
fn a_wrong_picture_does_not_pass() {
    let world = World::new(12);
    let scenes: Vec<Scene> =
        (0..60).map(|index| world.sample(Task::Generation, Split::HeldOut, index).scenes[0].clone()).collect();
    for pair in scenes.windows(2).filter(|pair| pair[0] != pair[1]) {
        assert!(!judge(&pair[0].render(), &pair[1]).correct, "{pair:?}");
    }
}

#[test]
fn languages_and_lengths_are_mixed() {
    let world = World::new(13);
    let samples: Vec<_> = (0..400).map(|index| world.sample(Task::Generation, Split::Train, index)).collect();
    let chinese = samples.iter().filter(|sample| sample.language == Language::Chinese).count();
    assert!((60..140).contains(&chinese), "{chinese} of 400 are Chinese");
    let lengths: BTreeSet<usize> = samples.iter().map(|sample| sample.prompt.chars().count()).collect();
    assert!(lengths.first().unwrap() < &16 && lengths.last().unwrap() > &80, "{lengths:?}");
    let prompts: BTreeSet<&str> = samples.iter().map(|sample| sample.prompt.as_str()).collect();
    assert!(prompts.len() > 360, "only {} of 400 prompts differ", prompts.len());
}
