//! The whole pipeline through the facade against the PyTorch libraries, on the bundled random checkpoint.

use std::ops::ControlFlow;

use burn::tensor::Tensor;
use nexus::{
    DrawOptions, DrawWith, EditOptions, EditWith, Error, FloatDType, GenerateOptions, Image, ImageEmbeds, Loader,
    Nexus, Noise, Picture, Progress, Residency, Stage, TextOptions, ar::FinishReason,
};
use nexus_core::testing::{
    Fixture, assert_close, device, fixtures_dir, load_options, random_models_dir, relative_drift, tolerance,
};

const TOLERANCE: f32 = 2e-5;

/// Options of a fixture, as the parity scripts write them.
#[derive(serde::Deserialize)]
struct Case {
    decoder: String,
    prompt: String,
    images: Vec<String>,
    #[serde(default)]
    height: usize,
    #[serde(default)]
    width: usize,
    #[serde(default)]
    cfg_scale: f64,
    #[serde(default)]
    seed: u64,
    steps: usize,
    embedded_guidance: f64,
    negative_prompt: String,
    max_pixels: usize,
    max_new_tokens: usize,
    #[serde(default)]
    png: String,
}

impl Case {
    fn text(&self) -> TextOptions {
        let Self { max_pixels, max_new_tokens, .. } = *self;
        TextOptions { max_pixels, max_new_tokens, ..TextOptions::default() }
    }

    fn images(&self) -> Vec<Image> {
        self.images.iter().map(|name| Image::open(fixtures_dir().join(name)).unwrap()).collect()
    }

    fn draw_options(&self) -> DrawOptions {
        DrawOptions {
            width: self.width,
            height: self.height,
            steps: self.steps,
            cfg_scale: self.cfg_scale,
            embedded_guidance: self.embedded_guidance,
            negative_prompt: self.negative_prompt.clone(),
            noise: Noise::Seed(self.seed),
            ..DrawOptions::default()
        }
    }

    fn generate_options(&self) -> GenerateOptions {
        GenerateOptions { draw: self.draw_options(), text: self.text(), ..GenerateOptions::default() }
    }

    fn edit_options(&self) -> EditOptions {
        EditOptions {
            draw: self.draw_options(),
            text: self.text(),
            decoder: match self.decoder.as_str() {
                "editing" => EditWith::EditingDecoder,
                _ => EditWith::GenerationDecoder,
            },
        }
    }
}

/// For f32, whatever the device computes in by default: tokens are compared exactly.
fn loader() -> Loader {
    Nexus::loader(random_models_dir()).compute_dtype(FloatDType::F32).weights_dtype(load_options().dtype)
}

fn nexus() -> Nexus {
    loader().load(&device(), ()).unwrap()
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor.to_data().try_into_vec_as::<f32>().unwrap()
}

/// At most one step of 255 apart, and at most one value in a thousand different.
fn assert_same_picture(found: &Image, expected: &Image) {
    assert_eq!((found.width_px(), found.height_px()), (expected.width_px(), expected.height_px()));
    let apart: Vec<u8> = found.rgb().iter().zip(expected.rgb()).map(|(a, b)| a.abs_diff(*b)).collect();
    assert!(apart.iter().all(|&apart| apart <= 1), "a value is off by more than 1");
    let different = apart.iter().filter(|&&apart| apart > 0).count();
    println!("{different} of {} values differ by 1", apart.len());
    assert!(different * 1000 <= apart.len(), "{different} of {} values differ", apart.len());
}

fn check(fixture: &Fixture, case: &Case, picture: &Picture) {
    let reply = picture.reply.as_ref().unwrap();
    assert_eq!(reply.generation.token_ids, fixture.ids("out.sequences"));
    assert_eq!(reply.prompt, fixture.meta::<String>("text"));
    assert_eq!(reply.text, fixture.meta::<String>("answer"));
    assert_close(&picture.embeds.values, &fixture.floats("out.image_embeds"), TOLERANCE);
    if let Some(reference) = &picture.reference {
        let all = values(&reference.values);
        let [_, tokens, hidden] = reference.values.dims();
        let every_9: Vec<f32> =
            (0..tokens).step_by(9).flat_map(|token| all[token * hidden..(token + 1) * hidden].to_vec()).collect();
        let drift = relative_drift(&every_9, &fixture.floats("tap.reference_embeds_every_9"));
        assert!(drift < tolerance(TOLERANCE), "the reference drifts by {drift:e}");
    }
    assert_close(&picture.latents, &fixture.floats("out.latents"), TOLERANCE);
    assert_same_picture(&picture.image, &Image::open(fixtures_dir().join(&case.png)).unwrap());
}

#[test]
fn generated_pictures_are_the_originals() {
    let nexus = nexus();
    for name in ["e2e_generate", "e2e_generate_zh"] {
        let fixture = Fixture::open(name);
        let case: Case = fixture.meta("options");
        check(&fixture, &case, &nexus.generate(&case.prompt, &case.generate_options(), ()).unwrap());
    }
}

#[test]
fn edited_pictures_are_the_originals() {
    let nexus = nexus();
    for name in ["e2e_edit", "e2e_edit_cfg", "e2e_edit_wide", "e2e_edit_by_generation"] {
        let fixture = Fixture::open(name);
        let case: Case = fixture.meta("options");
        let image = case.images().remove(0);
        let picture = nexus.edit(&image, &case.prompt, &case.edit_options(), ()).unwrap();
        assert_eq!(picture.reference.is_some(), case.decoder == "editing");
        check(&fixture, &case, &picture);
    }
}

#[test]
fn answers_about_two_images_of_odd_sizes_are_the_originals() {
    let fixture = Fixture::open("e2e_understand");
    let case: Case = fixture.meta("options");
    let reply = nexus().understand(&case.images(), &case.prompt, &case.text(), ()).unwrap();
    assert_eq!(reply.generation.token_ids, fixture.ids("out.sequences"));
    assert_eq!(reply.to_string(), fixture.meta::<String>("answer"));
    assert_eq!(reply.generation.finish, FinishReason::EndOfTurn);
}

#[test]
fn freeing_every_stage_changes_nothing() {
    let fixture = Fixture::open("e2e_edit_cfg");
    let case: Case = fixture.meta("options");
    let nexus = loader().residency(Residency::OneStageAtATime).load(&device(), ()).unwrap();
    let mut loaded = vec![];
    let observer = |event| {
        if let Progress::Loading(stage) = event {
            loaded.push(stage);
        }
        ControlFlow::Continue(())
    };
    let picture = nexus.edit(&case.images().remove(0), &case.prompt, &case.edit_options(), observer).unwrap();
    check(&fixture, &case, &picture);
    assert_eq!(loaded.first(), Some(&Stage::VisionEncoder));
    assert_eq!(loaded[loaded.len() - 2..], [Stage::EditingDecoder, Stage::Autoencoder]);
    assert_eq!(loaded.iter().filter(|stage| **stage == Stage::Ar).count(), 1);
}

#[test]
fn embeddings_can_be_saved_and_drawn_again() {
    let case: Case = Fixture::open("e2e_edit").meta("options");
    let nexus = nexus();
    let first = nexus.edit(&case.images().remove(0), &case.prompt, &case.edit_options(), ()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("embeds.safetensors");
    first.embeds.save(&path).unwrap();
    let embeds = ImageEmbeds::load(&path, &device()).unwrap();
    let with = DrawWith::EditingDecoder { reference: first.reference.as_ref() };
    let again = nexus.draw(&embeds, with, &case.draw_options(), ()).unwrap();
    assert_eq!(again.image, first.image);
    let without = nexus.draw(&embeds, DrawWith::EditingDecoder { reference: None }, &case.draw_options(), ()).unwrap();
    assert_ne!(without.image, first.image);
}

#[test]
fn given_latents_replace_the_seed() {
    let fixture = Fixture::open("e2e_generate");
    let case: Case = fixture.meta("options");
    let mut options = case.generate_options();
    options.draw.noise = Noise::Latents(fixture.tensor("in.noise"));
    check(&fixture, &case, &nexus().generate(&case.prompt, &options, ()).unwrap());
}

#[test]
fn progress_counts_the_steps_and_sizes_are_rounded_up() {
    let mut events = vec![];
    let draw = DrawOptions { width: 33, height: 16, steps: 3, cfg_scale: 1.0, ..DrawOptions::default() };
    let options = GenerateOptions { draw, ..GenerateOptions::default() };
    let nexus = nexus();
    let observer = |event| {
        events.push(event);
        ControlFlow::Continue(())
    };
    let picture = nexus.generate("A red fox under a pine", &options, observer).unwrap();
    assert_eq!((picture.image.width_px(), picture.image.height_px()), (48, 16));
    assert!(events.contains(&Progress::SizeRounded { asked: (33, 16), used: (48, 16) }));
    let steps: Vec<usize> = events
        .iter()
        .filter_map(|event| match event {
            Progress::Step { done, total: 3 } => Some(*done),
            _ => None,
        })
        .collect();
    assert_eq!(steps, [0, 1, 2, 3]);
    let text: String = events
        .iter()
        .filter_map(|event| if let Progress::Text(piece) = event { Some(piece.as_str()) } else { None })
        .collect();
    assert_eq!(text, picture.reply.unwrap().text.replace("<image>", ""));
}

#[test]
fn every_event_can_cancel() {
    let draw = DrawOptions { width: 32, height: 32, steps: 2, ..DrawOptions::default() };
    let options = GenerateOptions { draw, ..GenerateOptions::default() };
    let run = |allowed: usize| {
        let mut heard = 0;
        let nexus = nexus();
        let observer = |_| {
            heard += 1;
            if heard > allowed { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let result = nexus.generate("A red fox under a pine", &options, observer);
        (result, heard)
    };
    let (result, total) = run(usize::MAX);
    assert!(result.is_ok() && total > 10);
    for allowed in [0, 1, 3, total / 2, total - 3, total - 1] {
        assert!(matches!(run(allowed), (Err(Error::Cancelled), heard) if heard == allowed + 1), "after {allowed}");
    }
}

#[test]
fn tiles_cover_a_large_picture() {
    let draw = DrawOptions { width: 64, height: 1072, steps: 1, cfg_scale: 1.0, tiled: true, ..DrawOptions::default() };
    let options = GenerateOptions { draw, ..GenerateOptions::default() };
    let picture = nexus().generate("A red fox under a pine", &options, ()).unwrap();
    assert_eq!((picture.image.width_px(), picture.image.height_px()), (64, 1072));
    assert!(values(&picture.latents).iter().all(|value| value.is_finite()));
}
