//! The autoregressive model against transformers' Qwen2.5-VL on the bundled random checkpoint.

use std::ops::ControlFlow;

use burn::tensor::FloatDType;
use nexus::ar::{
    ArConfig, ArModel, Context, FinishReason, GenerateEvent, GenerateOptions, Generation, ImagePass,
    PositionsAfterImage, Prompt, Sampler, SamplingOptions, TokenIds, generate, generate_in, position_ids,
};
use nexus::vision_encoder::{VisionConfig, VisionEncoder};
use nexus::{
    checkpoint::Checkpoint,
    core::{GridThw, ImageEmbeds},
};
use nexus_core::testing::{
    Fixture, assert_close, assert_close_tensors, device, fixtures_dir, load_options, ramp, random_models_dir,
    relative_drift, tolerance,
};

const TOLERANCE: f32 = 1e-5;

fn checkpoint() -> Checkpoint {
    Checkpoint::open(random_models_dir().join("Nexus-GenV2")).unwrap()
}

fn model() -> ArModel {
    let config = ArConfig::read(random_models_dir().join("Nexus-GenV2/config.json")).unwrap();
    ArModel::load(&checkpoint(), &config, &device(), &load_options()).unwrap()
}

fn grids(fixture: &Fixture) -> Vec<GridThw> {
    let rows: Vec<[usize; 3]> = fixture.meta("grid_thw");
    rows.into_iter().map(|[t, h, w]| GridThw::new(t, h, w).unwrap()).collect()
}

fn images(fixture: &Fixture) -> Vec<ImageEmbeds> {
    if grids(fixture).is_empty() {
        return vec![];
    }
    let config = VisionConfig::read(random_models_dir().join("Nexus-GenV2/config.json")).unwrap();
    let encoder = VisionEncoder::load(&checkpoint(), &config, &device(), &load_options()).unwrap();
    encoder.encode(fixture.tensor::<2>("in.pixel_values"), &grids(fixture)).unwrap()
}

/// `[tokens][3]` of a fixture's `[3, tokens]`.
fn axes(values: &[i64]) -> Vec<[i64; 3]> {
    let tokens = values.len() / 3;
    (0..tokens).map(|token| [0, 1, 2].map(|axis| values[axis * tokens + token])).collect()
}

#[test]
fn positions_of_many_prompts() {
    #[derive(serde::Deserialize)]
    struct Case {
        name: String,
        input_ids: Vec<u32>,
        grids: Vec<[usize; 3]>,
        position_ids: [Vec<i64>; 3],
        delta: i64,
    }
    #[derive(serde::Deserialize)]
    struct File {
        cases: Vec<Case>,
    }
    let text = std::fs::read_to_string(fixtures_dir().join("positions.json")).unwrap();
    let file: File = serde_json::from_str(&text).unwrap();
    let ids = ArConfig::read(random_models_dir().join("Nexus-GenV2/config.json")).unwrap().token_ids;
    assert!(file.cases.len() > 10);
    for case in file.cases {
        let grids: Vec<GridThw> = case.grids.iter().map(|&[t, h, w]| GridThw::new(t, h, w).unwrap()).collect();
        let found = position_ids(&case.input_ids, &grids, &ids).unwrap();
        let expected: Vec<[i64; 3]> =
            (0..case.input_ids.len()).map(|i| [0, 1, 2].map(|axis| case.position_ids[axis][i])).collect();
        assert_eq!(found.axes, expected, "{}", case.name);
        assert_eq!(found.delta, case.delta, "{}", case.name);
    }
}

#[test]
fn a_forward_pass_over_text_and_two_images() {
    let (model, fixture) = (model(), Fixture::open("lm_forward"));
    let token_ids = fixture.ids("in.input_ids");
    let positions = position_ids(&token_ids, &grids(&fixture), &model.config().token_ids).unwrap();
    assert_eq!(positions.axes, axes(&fixture.integers("out.position_ids")));
    let embeds = model.embed(&token_ids, &images(&fixture), FloatDType::F32).unwrap();
    let hidden = model.forward(embeds, &positions.axes, None);
    assert_close(&model.predict_embeds(hidden.clone()), &fixture.floats("out.vision_head"), TOLERANCE);
    let logits = model.logits(hidden);
    let [_, tokens, _] = logits.dims();
    assert_close(&logits.clone().narrow(1, tokens - 1, 1), &fixture.floats("out.logits_last"), TOLERANCE);
    let columns: Vec<usize> = fixture.meta("columns");
    let indices = columns.iter().map(|&column| column as i64).collect::<Vec<_>>();
    let indices = burn::tensor::Tensor::<1, burn::tensor::Int>::from_data(indices.as_slice(), &device());
    assert_close(&logits.select(2, indices), &fixture.floats("out.logits_columns"), TOLERANCE);
}

#[test]
fn every_layer_matches() {
    let (model, fixture) = (model(), Fixture::open("lm_text"));
    let token_ids = fixture.ids("in.input_ids");
    let positions: Vec<[f32; 3]> = (0..token_ids.len()).map(|position| [position as f32; 3]).collect();
    let rotary = model.config().rotary().table(&positions, &device());
    let mut x = model.embed(&token_ids, &[], FloatDType::F32).unwrap();
    for (index, layer) in model.model.layers.iter().enumerate() {
        x = layer.forward(x, &rotary, nexus_kernels::Visibility::Causal, None);
        assert_close(&x, &fixture.floats(&format!("tap.layers.{index}")), TOLERANCE);
    }
    let hidden = model.model.norm.forward(x);
    assert_close(&hidden, &fixture.floats("tap.norm"), TOLERANCE);
    assert_close(&model.logits(hidden), &fixture.floats("out.logits"), TOLERANCE);
}

/// Runs a fixture's prompt and compares everything that the reference wrote down.
fn check(name: &str, pass: ImagePass, after: PositionsAfterImage) -> Generation {
    let (model, fixture) = (model(), Fixture::open(name));
    let prefix = match after {
        PositionsAfterImage::Reference => "out.",
        PositionsAfterImage::Trained => "out.trained.",
    };
    let repetition_penalty: f64 = fixture.meta("repetition_penalty");
    let options = GenerateOptions {
        max_new_tokens: fixture.meta("max_new_tokens"),
        eos_token_ids: Some(fixture.meta("eos_token_ids")),
        sampling: SamplingOptions { repetition_penalty: repetition_penalty as f32, ..SamplingOptions::greedy() },
        image_pass: pass,
        positions_after_image: after,
        keep_scores: true,
        ..GenerateOptions::default()
    };
    let (token_ids, images) = (fixture.ids("in.input_ids"), images(&fixture));
    let prompt = Prompt { token_ids: &token_ids, images: &images };
    let found = generate(&model, prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(found.token_ids, fixture.ids(&format!("{prefix}sequences")), "{name}: tokens");
    assert_eq!(found.positions, axes(&fixture.integers(&format!("{prefix}positions"))), "{name}: positions");
    if fixture.has("out.image_embeds") {
        let complete = found.images.first().map(|image| image.values.clone());
        let embeds = complete.or(found.unfinished_image.clone()).unwrap();
        assert_close(&embeds, &fixture.floats("out.image_embeds"), TOLERANCE);
    }
    let chosen: Vec<i64> = found.text_steps.iter().map(|step| step.index as i64).collect();
    if after == PositionsAfterImage::Reference {
        assert_eq!(chosen, fixture.integers("out.chosen"), "{name}: chosen tokens");
    }
    let finite = |values: Vec<f32>| values.into_iter().filter(|value| value.is_finite()).collect::<Vec<f32>>();
    let scores = finite(found.text_steps.iter().flat_map(|step| step.scores.clone()).collect());
    let drift = relative_drift(&scores, &finite(fixture.floats(&format!("{prefix}text_logits"))));
    assert!(drift < tolerance(TOLERANCE), "{name}: scores drift by {drift:e}");
    found
}

#[test]
fn text_to_image_in_one_pass_and_in_81() {
    for name in ["gen_t2i", "gen_t2i_zh", "gen_edit", "gen_forced_boi"] {
        for pass in [ImagePass::Parallel, ImagePass::Sequential] {
            for after in [PositionsAfterImage::Reference, PositionsAfterImage::Trained] {
                let found = check(name, pass, after);
                assert_eq!(found.images.len(), 1);
            }
        }
    }
}

#[test]
fn understanding_one_and_two_images() {
    for name in ["gen_und", "gen_und_two"] {
        let found = check(name, ImagePass::Parallel, PositionsAfterImage::Reference);
        assert_eq!((found.finish, found.images.len()), (FinishReason::EndOfTurn, 0));
    }
}

#[test]
fn repetition_penalty_changes_the_choice() {
    check("gen_penalty", ImagePass::Parallel, PositionsAfterImage::Reference);
}

#[test]
fn an_image_cut_off_by_the_length_is_unfinished() {
    for pass in [ImagePass::Parallel, ImagePass::Sequential] {
        let found = check("gen_limit", pass, PositionsAfterImage::Reference);
        assert_eq!((found.finish, found.images.len()), (FinishReason::Length, 0));
        assert!(found.unfinished_image.is_some());
    }
}

#[test]
fn sampling_probabilities_match() {
    #[derive(serde::Deserialize)]
    struct Setting {
        repetition_penalty: f32,
        temperature: f32,
        top_k: usize,
        top_p: f32,
    }
    let fixture = Fixture::open("sampling");
    let logits: Vec<f32> = fixture.tensor::<2>("in.logits").into_data().try_into_vec_as::<f32>().unwrap();
    let logits: Vec<f32> = logits.iter().map(|score| score * 8.0).collect();
    let seen = fixture.ids("in.seen_ids");
    let settings: Vec<Setting> = fixture.meta("settings");
    for (index, Setting { repetition_penalty, temperature, top_k, top_p }) in settings.into_iter().enumerate() {
        let options = SamplingOptions { do_sample: true, temperature, top_k, top_p, repetition_penalty, seed: 3 };
        let mut scores = logits.clone();
        let sampler = Sampler::new(options).unwrap();
        let ranked = sampler.probabilities(&mut scores, &seen);
        let mut found = vec![0.0f32; logits.len()];
        for (id, probability) in ranked {
            found[id as usize] = probability as f32;
        }
        let drift = relative_drift(&found, &fixture.floats(&format!("out.probabilities_{index}")));
        assert!(drift < TOLERANCE, "setting {index} drifts by {drift:e}");
    }
}

/// A prompt of the fixture that draws, with the ids of the model.
fn drawing() -> (ArModel, Vec<u32>, TokenIds) {
    let model = model();
    let ids = model.config().token_ids;
    (model, Fixture::open("gen_t2i").ids("in.input_ids"), ids)
}

#[test]
fn a_second_image_in_one_reply_works() {
    let (model, mut token_ids, ids) = drawing();
    let options = GenerateOptions { max_new_tokens: 110, ..GenerateOptions::default() };
    let run = |token_ids: &[u32], images: &[ImageEmbeds]| {
        generate(&model, Prompt { token_ids, images }, &options, &mut |_| ControlFlow::Continue(())).unwrap()
    };
    let first = run(&token_ids, &[]).images.remove(0);
    // The same conversation with the first image in place and the second one begun.
    token_ids.push(ids.vision_start_token_id);
    token_ids.extend([ids.image_token_id; 81]);
    token_ids.extend([ids.vision_end_token_id, ids.vision_start_token_id]);
    let second = run(&token_ids, std::slice::from_ref(&first));
    assert_eq!(second.images.len(), 1);
    let drift = relative_drift(
        &second.images[0].values.to_data().try_into_vec_as::<f32>().unwrap(),
        &first.values.to_data().try_into_vec_as::<f32>().unwrap(),
    );
    assert!(drift > 1e-3, "the second image depends on the first");
}

/// A model that begins an image whenever it can: all scores are equal, and the token that begins an image is id 0.
fn always_drawing() -> ArModel {
    let mut config = ArConfig::read(random_models_dir().join("Nexus-GenV2/config.json")).unwrap();
    config.token_ids.vision_start_token_id = 0;
    let mut model = ArModel::new(&config, &device()).unwrap();
    let head = model.lm_head.as_mut().unwrap();
    head.weight =
        burn::module::Param::from_tensor(ramp([config.vocab_size, config.hidden_size], 1).to_device(&device()) * 0.0);
    model
}

#[test]
fn every_image_of_a_reply_has_its_own_positions() {
    let model = always_drawing();
    let prompt = Prompt { token_ids: &[5, 6, 7], images: &[] };
    let run = |image_pass, positions_after_image| {
        let options =
            GenerateOptions { max_new_tokens: 2 * 83, image_pass, positions_after_image, ..GenerateOptions::default() };
        generate(&model, prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap()
    };
    for (after, advance) in [(PositionsAfterImage::Reference, 81), (PositionsAfterImage::Trained, 9)] {
        let found = run(ImagePass::Parallel, after);
        assert_eq!(found.images.len(), 2);
        // 3 prompt tokens, then twice: begin, 81 image tokens, end.
        for (image, begin) in [(0, 3), (1, 3 + advance + 2)] {
            let fed = &found.positions[3 + image * 83..];
            assert_eq!(fed[0], [begin; 3]);
            assert_eq!(fed[1], [begin + 1; 3]);
            assert_eq!(fed[81], [begin + 1, begin + 9, begin + 9]);
        }
        let stepwise = run(ImagePass::Sequential, after);
        assert_eq!((&stepwise.token_ids, &stepwise.positions), (&found.token_ids, &found.positions));
        for (one, other) in found.images.iter().zip(&stepwise.images) {
            assert_close_tensors(&one.values, &other.values, TOLERANCE);
        }
    }
}

#[test]
fn the_observer_hears_every_token_and_stops() {
    let (model, token_ids, _) = drawing();
    let prompt = Prompt { token_ids: &token_ids, images: &[] };
    let mut heard = vec![];
    let found = generate(&model, prompt, &GenerateOptions::default(), &mut |event| {
        if let GenerateEvent::Token { id } = event {
            heard.push(id);
        }
        if heard.len() == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    assert_eq!(found.finish, FinishReason::Stopped);
    assert_eq!(found.new_token_ids(), heard);
}

/// What follows in a context is what follows a prompt that is read anew, and only what differs is fed.
#[test]
fn a_context_continues_as_a_prompt_that_is_read_anew() {
    let (model, token_ids, _) = drawing();
    let ids = model.config().token_ids;
    for do_sample in [false, true] {
        let sampling = SamplingOptions { do_sample, top_k: 5, seed: 3, ..SamplingOptions::default() };
        let options = GenerateOptions { max_new_tokens: 110, sampling, ..GenerateOptions::default() };
        let mut context = Context::new();
        let mut run = |token_ids: &[u32], images: &[ImageEmbeds]| {
            let prompt = Prompt { token_ids, images };
            let quiet = &mut |_: GenerateEvent<'_>| ControlFlow::Continue(());
            let found = generate_in(&model, &mut context, prompt, &options, quiet).unwrap();
            let anew = generate(&model, prompt, &options, quiet).unwrap();
            assert_eq!((&found.token_ids, &found.positions), (&anew.token_ids, &anew.positions));
            assert_eq!(context.token_ids(), &found.token_ids[..found.positions.len()]);
            for (one, other) in found.images.iter().zip(&anew.images) {
                assert_close_tensors(&one.values, &other.values, TOLERANCE);
            }
            found
        };
        let first = run(&token_ids, &[]);
        assert_eq!(first.reused_len, 0);
        // The reply's picture comes back as one that was encoded: all before it is kept.
        let mut longer = first.token_ids.clone();
        longer.extend([ids.eos_token_id, 5, 6]);
        let begin = longer.iter().position(|id| *id == ids.vision_start_token_id);
        let second = run(&longer, &first.images);
        assert_eq!(second.reused_len, begin.map_or(first.positions.len(), |begin| begin + 1));
        // With that picture in the context, only what is new is read.
        let mut longest = longer.clone();
        longest.extend([7, 8, 9]);
        assert_eq!(run(&longest, &first.images).reused_len, longer.len());
        // Another beginning shares nothing but that.
        assert_eq!(run(&[token_ids[0], 9, 9], &[]).reused_len, 1);
    }
}

#[test]
fn a_stopped_or_failed_reply_leaves_a_context_that_can_be_used() {
    let (model, token_ids, _) = drawing();
    let (options, mut context) = (GenerateOptions { max_new_tokens: 5, ..GenerateOptions::default() }, Context::new());
    let prompt = Prompt { token_ids: &token_ids, images: &[] };
    let stop = &mut |event: GenerateEvent<'_>| match event {
        GenerateEvent::Token { .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let stopped = generate_in(&model, &mut context, prompt, &options, stop).unwrap();
    assert_eq!(stopped.finish, FinishReason::Stopped);
    assert_eq!(context.len(), token_ids.len());
    let unusable = Prompt { token_ids: &[token_ids[0], u32::MAX], images: &[] };
    let quiet = &mut |_: GenerateEvent<'_>| ControlFlow::Continue(());
    assert!(generate_in(&model, &mut context, unusable, &options, quiet).is_err());
    assert_eq!(context.token_ids(), token_ids);
    let again = generate_in(&model, &mut context, prompt, &options, quiet).unwrap();
    assert_eq!(again.reused_len, token_ids.len() - 1);
    assert_eq!(again.token_ids, generate(&model, prompt, &options, quiet).unwrap().token_ids);
}

#[test]
fn a_reply_is_as_long_as_it_must_be() {
    let (model, token_ids, _) = drawing();
    let prompt = Prompt { token_ids: &token_ids, images: &[] };
    let run = |min_new_tokens| {
        let options = GenerateOptions { max_new_tokens: 120, min_new_tokens, ..GenerateOptions::default() };
        generate(&model, prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap()
    };
    let free = run(0);
    assert_eq!(free.finish, FinishReason::EndOfTurn);
    let len = free.new_token_ids().len();
    assert_eq!(run(len - 1).token_ids, free.token_ids);
    let longer = run(len).token_ids;
    assert_eq!(longer[..free.token_ids.len() - 1], free.token_ids[..free.token_ids.len() - 1]);
    assert!(longer.len() > free.token_ids.len());
    let endless = run(usize::MAX);
    assert_eq!((endless.finish, endless.new_token_ids().len()), (FinishReason::Length, 120));
}

#[test]
fn prompts_that_cannot_be_used_are_refused() {
    let (model, token_ids, _) = drawing();
    let error = |token_ids: &[u32], options: GenerateOptions| {
        generate(&model, Prompt { token_ids, images: &[] }, &options, &mut |_| ControlFlow::Continue(()))
            .unwrap_err()
            .to_string()
    };
    let defaults = GenerateOptions::default;
    assert!(error(&[], defaults()).contains("no tokens"));
    assert!(error(&[9_999_999], defaults()).contains("9999999"));
    let context = model.config().max_position_embeddings;
    assert!(error(&vec![1; context], defaults()).contains(&context.to_string()));
    assert!(error(&token_ids, GenerateOptions { max_new_tokens: 0, ..defaults() }).contains("max_new_tokens"));
}
