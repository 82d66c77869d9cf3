//! One model, several threads: requests give what they give alone, and only what is allowed is in memory.

use std::{ops::ControlFlow, thread};

use nexus::{DrawOptions, GenerateOptions, Image, Nexus, Noise, Picture, Progress, Residency, Stage, TextOptions};
use nexus_core::testing::{cpu, fixtures_dir, random_models_dir};

const PROMPT: &str = "A red fox under a pine";

fn options(seed: u64) -> GenerateOptions {
    let draw = DrawOptions { width: 32, height: 32, steps: 2, noise: Noise::Seed(seed), ..DrawOptions::default() };
    GenerateOptions { draw, ..GenerateOptions::default() }
}

fn load(residency: Residency) -> Nexus {
    Nexus::loader(random_models_dir()).residency(residency).load(&cpu(), ()).unwrap()
}

fn assert_same(found: &Picture, alone: &Picture) {
    let ids = |picture: &Picture| picture.reply.as_ref().unwrap().generation.token_ids.clone();
    assert_eq!(ids(found), ids(alone));
    assert_eq!(found.latents.to_data(), alone.latents.to_data());
    assert_eq!(found.image, alone.image);
}

#[test]
fn requests_of_several_threads_are_what_they_are_alone() {
    for residency in [Residency::KeepAll, Residency::OneStageAtATime] {
        let image = Image::open(fixtures_dir().join("images/photo_61x40.png")).unwrap();
        let ask = |nexus: &Nexus| nexus.understand(&image, "What differs?", &TextOptions::default(), ()).unwrap();
        let alone = load(residency);
        let pictures = [1, 2].map(|seed| alone.generate(PROMPT, &options(seed), ()).unwrap());
        let reply = ask(&alone);
        assert_ne!(pictures[0].image, pictures[1].image);

        let nexus = load(residency);
        let limit = if residency == Residency::OneStageAtATime { 1 } else { 5 };
        thread::scope(|scope| {
            let drawing = [1, 2].map(|seed| {
                let nexus = nexus.clone();
                scope.spawn(move || {
                    let observer = |event: Progress| {
                        if !matches!(event, Progress::Loading(_)) {
                            assert!(nexus.loaded().len() <= limit, "{:?} at {event:?}", nexus.loaded());
                        }
                        ControlFlow::Continue(())
                    };
                    nexus.generate(PROMPT, &options(seed), observer).unwrap()
                })
            });
            let asking = scope.spawn(|| ask(&nexus));
            for (drawn, alone) in drawing.into_iter().zip(&pictures) {
                assert_same(&drawn.join().unwrap(), alone);
            }
            assert_eq!(asking.join().unwrap().generation.token_ids, reply.generation.token_ids);
        });
    }
}

#[test]
fn what_is_in_memory_is_counted_and_freed() {
    let nexus = load(Residency::KeepAll);
    let stages = |nexus: &Nexus| nexus.loaded().into_iter().map(|(stage, _)| stage).collect::<Vec<_>>();
    assert_eq!(stages(&nexus), [Stage::VisionEncoder, Stage::Ar]);
    assert!(nexus.loaded().iter().all(|(_, bytes)| *bytes > 1000));
    nexus.generate(PROMPT, &options(1), ()).unwrap();
    assert_eq!(stages(&nexus), [Stage::VisionEncoder, Stage::Ar, Stage::GenerationDecoder, Stage::Autoencoder]);
    nexus.unload();
    assert!(nexus.loaded().is_empty());

    let nexus = load(Residency::OneStageAtATime);
    assert!(nexus.loaded().is_empty());
    nexus.generate(PROMPT, &options(1), ()).unwrap();
    assert_eq!(stages(&nexus), [Stage::Autoencoder]);
}
