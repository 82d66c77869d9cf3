//! The bundled small model: what it draws, describes and changes of scenes that no training has seen.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, reason = "a test may panic")]

use std::path::Path;

use nexus::{
    ConversationOptions, Error, GenerateOptions, Message, Nexus,
    data::world::{Kind, Split, Task, World, changed_region, judge, psnr_outside, read_scene},
};

/// Scenes of another seed than those of `examples/evaluate` and of training.
const SEED: u64 = 77;

fn tiny() -> Nexus {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/nexus-tiny");
    Nexus::load(dir, &nexus::device("cpu").unwrap()).unwrap()
}

fn drawing(nexus: &Nexus) -> GenerateOptions {
    // Fewer steps than the model's own: kernels are slow where nothing is optimised.
    let mut options = nexus.default_options().generate.clone();
    options.draw.steps = 8;
    options
}

/// Right ones among the first samples of a kind.
fn right(kind: Kind, task: Task, count: u64, mut is_right: impl FnMut(&nexus::data::world::Sample) -> bool) -> usize {
    let world = World::new(SEED);
    let samples = (0..count).map(|index| world.sample_of(task, &[kind], Split::HeldOut, index));
    samples.filter(|sample| is_right(sample)).count()
}

#[test]
fn a_prompt_becomes_its_scene() {
    let nexus = tiny();
    let options = drawing(&nexus);
    let mut draws = |sample: &nexus::data::world::Sample| {
        let picture = nexus.generate(&sample.prompt, &options, ()).unwrap();
        judge(&picture.image, &sample.scenes[0]).correct
    };
    let found = right(Kind::TwoObjects, Task::Generation, 4, &mut draws);
    assert!(found >= 3, "{found} of 4 pictures show what was asked for");
}

#[test]
fn a_picture_is_described() {
    let nexus = tiny();
    let options = nexus.default_options().text.clone();
    let mut describes = |sample: &nexus::data::world::Sample| {
        let image = sample.messages[0].images().next().unwrap();
        let expected: String = sample.messages[1].texts().collect();
        nexus.understand(image, &sample.prompt, &options, ()).unwrap().text.trim() == expected
    };
    let found = right(Kind::Describe, Task::Understanding, 6, &mut describes);
    assert!(found >= 3, "{found} of 6 descriptions are right");
}

/// Backgrounds and colours change, and what an instruction does not name stays.
#[test]
fn an_instruction_changes_a_picture_and_leaves_the_rest() {
    let nexus = tiny();
    let mut options = nexus.default_options().edit.clone();
    options.draw.steps = 8;
    let edit = |sample: &nexus::data::world::Sample| {
        let source = sample.messages[0].images().next().unwrap();
        nexus.edit(source, &sample.prompt, &options, ()).unwrap().image
    };
    let mut changes = |sample: &nexus::data::world::Sample| {
        let found = read_scene(&edit(sample)).scene.map(|scene| scene.background);
        found == Some(sample.scenes[1].background)
    };
    let found = right(Kind::Background, Task::Editing, 4, &mut changes);
    assert!(found >= 3, "{found} of 4 backgrounds are the new ones");
    let mut recolours = |sample: &nexus::data::world::Sample| judge(&edit(sample), &sample.scenes[1]).correct;
    let found = right(Kind::Recolour, Task::Editing, 4, &mut recolours);
    assert!(found >= 2, "{found} of 4 objects have the new colour");
    let mut leaves = |sample: &nexus::data::world::Sample| {
        let truth = sample.messages[1].images().next().unwrap();
        psnr_outside(&edit(sample), truth, &changed_region(&sample.scenes[0], &sample.scenes[1])) >= 20.0
    };
    let found = right(Kind::Recolour, Task::Editing, 3, &mut leaves);
    assert!(found >= 2, "{found} of 3 pictures are left alone where nothing was to change");
}

#[test]
fn a_conversation_draws_and_answers() {
    let nexus = tiny();
    let generate = drawing(&nexus);
    let options = ConversationOptions { generate, ..nexus.default_options().clone() };
    let mut conversation = nexus.conversation_with(options);
    let prompt = "Generate an image according to the following description: a blue circle";
    let answer = conversation.send(Message::text(prompt), ()).unwrap();
    assert!(answer.pictures().count() > 0, "{answer:?}");
    let answer = conversation.send(Message::text("What colour is the circle?"), ()).unwrap();
    assert_eq!(answer.text().trim(), "blue");
}

#[test]
fn a_question_is_no_order_to_draw() {
    let nexus = tiny();
    let options = drawing(&nexus);
    let sample = World::new(SEED).sample_of(Task::Understanding, &[Kind::Count], Split::HeldOut, 0);
    let image = sample.messages[0].images().next().unwrap();
    let reply = nexus.understand(image, &sample.prompt, &options.text, ()).unwrap();
    assert!(reply.generation.images.is_empty(), "{reply}");
    let error = nexus.generate(" ", &options, ()).unwrap_err();
    assert!(matches!(error, Error::Data(_)), "{error}");
}
