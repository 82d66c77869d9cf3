//! What a user reaches besides the verbs: loaded stages, ready embeddings, a picture to start from, what a cache skipped.

use std::ops::ControlFlow;

use nexus::{
    DrawOptions, DrawWith, EditOptions, EditWith, Error, FloatDType, Image, Message, Nexus, Noise, Progress,
    SamplingOptions, Stage, Start, TextOptions,
    ar::FinishReason,
    burn::tensor::{DType, Tensor, TensorData},
    core::ImageEmbeds,
};
use nexus_core::testing::{assert_close_tensors, cpu, fixtures_dir, random_models_dir};

fn nexus() -> Nexus {
    Nexus::load(random_models_dir(), &cpu()).unwrap()
}

fn image() -> Image {
    Image::open(fixtures_dir().join("images/photo_61x40.png")).unwrap()
}

fn small() -> DrawOptions {
    DrawOptions { width: 32, height: 32, steps: 3, cfg_scale: 1.0, ..DrawOptions::default() }
}

/// Embeddings that any decoder draws.
fn embeds(nexus: &Nexus) -> ImageEmbeds {
    nexus.embed(&image(), 252 * 252, ()).unwrap()
}

#[test]
fn the_scores_of_a_prompt_are_those_that_a_reply_is_chosen_by() {
    let nexus = nexus();
    let text = TextOptions {
        sampling: Some(SamplingOptions::greedy()),
        keep_scores: true,
        max_new_tokens: 1,
        ..Default::default()
    };
    let reply = nexus.reply(&[Message::text("hi")], &text, ()).unwrap();
    let model = nexus.ar(()).unwrap();
    let prompt = &reply.generation.token_ids[..reply.generation.prompt_len];
    let embeds = model.embed(prompt, &[], FloatDType::F32).unwrap();
    let hidden = model.forward(embeds, &reply.generation.positions, None);
    let last = hidden.dims()[1] - 1;
    let mut scores = model.logits(hidden.narrow(1, last, 1)).into_data().try_into_vec_as::<f32>().unwrap();
    scores[model.config().token_ids.vision_end_token_id as usize] = f32::NEG_INFINITY;
    assert_eq!(scores, reply.generation.text_steps[0].scores);
}

#[test]
fn stages_are_the_ones_that_the_verbs_use() {
    let nexus = nexus();
    let picture = nexus.draw(&embeds(&nexus), DrawWith::GenerationDecoder, &small(), ()).unwrap();
    let autoencoder = nexus.autoencoder(()).unwrap();
    let decoded = autoencoder.decode(picture.latents.clone(), None).into_data().try_into_vec_as::<f32>().unwrap();
    assert_eq!(Image::from_decoded(&decoded, 32, 32).unwrap(), picture.image);
    let mut loaded = vec![];
    let observer = &mut |event| {
        if let Progress::Loading(stage) = event {
            loaded.push(stage);
        }
        ControlFlow::Continue(())
    };
    nexus.vision_encoder(&mut *observer).unwrap();
    nexus.generation_decoder(&mut *observer).unwrap();
    nexus.editing_decoder(&mut *observer).unwrap();
    nexus.editing_decoder(&mut *observer).unwrap();
    assert_eq!(loaded, [Stage::EditingDecoder]);
    assert_eq!(nexus.device(), (&cpu(), FloatDType::F32));
    let head = nexus.files().open_language_model().unwrap().data("vision_head.weight").unwrap();
    assert_eq!(head.shape().as_slice(), [72, 72]);
    assert!(nexus.files().open_autoencoder().unwrap().entries().count() > 0);
}

#[test]
fn an_edit_can_go_without_a_reference() {
    let nexus = nexus();
    let edit = |decoder| {
        let options = EditOptions { draw: small(), decoder, ..EditOptions::default() };
        nexus.edit(&image(), "Turn the sky into a sunset.", &options, ()).unwrap()
    };
    let alone = edit(EditWith::EditingDecoderWithoutReference);
    assert!(alone.reference.is_none());
    let with = DrawWith::EditingDecoder { reference: None };
    assert_eq!(nexus.draw(&alone.embeds, with, &small(), ()).unwrap().image, alone.image);
    assert_ne!(edit(EditWith::EditingDecoder).image, alone.image);
}

#[test]
fn a_drawing_can_start_from_a_picture() {
    let nexus = nexus();
    let embeds = embeds(&nexus);
    let draw = |options: &DrawOptions| nexus.draw(&embeds, DrawWith::GenerationDecoder, options, ());
    let plain = draw(&small()).unwrap();
    // All of it noise: the same picture as without a start.
    let start = Some(Start::Image(image()));
    let all_noise = draw(&DrawOptions { start: start.clone(), ..small() }).unwrap();
    assert_close_tensors(&all_noise.latents, &plain.latents, 1e-5);
    // Little noise: near the start, and latents are a start as well as their picture.
    let values = nexus::data::decoder_image(&image(), 32, 32).unwrap();
    let pixels = Tensor::<4>::from_data(TensorData::new(values, [1, 3, 32, 32]), (&cpu(), DType::F32));
    let clean = nexus.autoencoder(()).unwrap().encode(pixels, None);
    let near = draw(&DrawOptions { start, strength: 0.01, ..small() }).unwrap();
    let from_latents = DrawOptions { start: Some(Start::Latents(clean.clone())), strength: 0.01, ..small() };
    let same = draw(&from_latents).unwrap();
    assert_eq!(near.latents.to_data(), same.latents.to_data());
    let distance = |latents: &Tensor<4>| (latents.clone() - clean.clone()).abs().mean().into_scalar::<f32>();
    assert!(distance(&near.latents) < 0.1 * distance(&plain.latents));

    let error = draw(&DrawOptions { strength: 0.5, ..small() }).unwrap_err();
    assert!(matches!(error, Error::NothingToStartFrom { strength: 0.5 }), "{error}");
    let wrong = Start::Latents(Tensor::zeros([1, 16, 8, 8], &cpu()));
    assert!(matches!(draw(&DrawOptions { start: Some(wrong), ..small() }), Err(Error::Diffusion(_))));
}

#[test]
fn ready_embeddings_are_read_as_their_picture() {
    let nexus = nexus();
    let text = TextOptions { max_pixels: 20_000, ..TextOptions::default() };
    let pixels = Message::user().with_image(image()).with_text("What differs?");
    let ready = Message::user().with_embeds(nexus.embed(&image(), 20_000, ()).unwrap()).with_text("What differs?");
    let mut encoded = 0;
    let reply = nexus.reply(&[ready], &text, |event| {
        encoded += usize::from(event == Progress::Running(Stage::VisionEncoder));
        ControlFlow::Continue(())
    });
    let expected = nexus.reply(&[pixels], &text, ()).unwrap();
    assert_eq!(reply.unwrap().generation.token_ids, expected.generation.token_ids);
    assert_eq!(encoded, 0);
}

#[test]
fn a_reply_that_may_not_end_is_as_long_as_allowed() {
    let options = TextOptions { max_new_tokens: 40, min_new_tokens: 40, ..TextOptions::default() };
    let generation = nexus().reply(&[Message::text("What differs?")], &options, ()).unwrap().generation;
    assert_eq!((generation.finish, generation.new_token_ids().len()), (FinishReason::Length, 40));
}

#[test]
fn events_tell_the_steps_that_a_cache_skipped() {
    let nexus = nexus();
    let options = DrawOptions { steps: 4, tea_cache: Some(1e9), ..small() };
    let mut skipped = vec![];
    let picture = nexus.draw(&embeds(&nexus), DrawWith::GenerationDecoder, &options, |event| {
        if let Progress::StepSkipped { step, passes } = event {
            skipped.push((step, passes));
        }
        ControlFlow::Continue(())
    });
    picture.unwrap();
    assert_eq!(skipped, [(2, 1), (3, 1)]);
}

#[test]
fn a_picture_and_options_print_sizes_instead_of_numbers() {
    let nexus = nexus();
    let noise = Noise::Latents(Tensor::zeros([1, 16, 4, 4], &cpu()));
    let options = DrawOptions { noise, start: Some(Start::Image(image())), ..small() };
    let picture = nexus.draw(&embeds(&nexus), DrawWith::GenerationDecoder, &options, ()).unwrap();
    let printed = format!("{picture:?} {options:?}");
    for part in ["32x32", "[1, 16, 4, 4]", "61x40", "F32"] {
        assert!(printed.contains(part), "{printed} without {part}");
    }
    assert!(printed.len() < 1500, "{printed}");
}
