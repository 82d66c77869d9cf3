//! Noise, schedule, TeaCache and the whole way from condition to picture against PyTorch.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod random_models;

use std::ops::ControlFlow;

use burn::tensor::{FloatDType, Tensor};
use half::bf16;
use nexus_core::{
    GridThw, ImageEmbeds,
    testing::{Fixture, assert_close, device, fixtures_dir},
};
use nexus_diffusion::{
    Branch, Branches, Conditioning, DenoiseOptions, Denoiser, FlowMatchSchedule, LatentSize, Noise,
    connector::{editing_text_ids, zero_text_ids},
    torch_randn,
    transformer::Dit,
};
use random_models::{TOLERANCE, autoencoder, clip, editing_decoder, generation_decoder, t5};

/// PyTorch's vectorised logarithm, sine and cosine differ from ours in the last places.
const NOISE_TOLERANCE: f32 = 1.5e-6;

#[track_caller]
fn check_noise(actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len());
    for (value, expected) in actual.iter().zip(expected) {
        assert!((value - expected).abs() <= NOISE_TOLERANCE, "{value} instead of {expected}");
    }
}

#[test]
fn noise_of_many_seeds_and_lengths() {
    let fixture = Fixture::open("rng");
    for seed in [0, 42, 52, 123_456_789, 4_294_967_295, 4_294_967_301, 9_223_372_036_854_775_807] {
        for length in [1, 5, 15, 16, 17, 37, 1024] {
            let name = format!("out.seed_{seed}.length_{length}");
            if fixture.has(&name) {
                check_noise(&torch_randn(seed, length), &fixture.floats(&name));
            }
        }
    }
    for seed in [42, 4_294_967_301] {
        let values = torch_randn(seed, 16 * 64 * 64);
        let part = |name: &str| fixture.floats(&format!("out.seed_{seed}.latents_{name}"));
        check_noise(&values[..32], &part("first"));
        check_noise(&values[values.len() - 32..], &part("last"));
        let every: Vec<f32> = values.iter().copied().step_by(4099).collect();
        check_noise(&every, &part("every_4099"));
    }
}

#[test]
fn noise_rounded_to_bf16_is_what_torch_draws_in_bf16() {
    let fixture = Fixture::open("rng");
    for seed in [42, 4_294_967_301] {
        for length in [5, 1024] {
            let rounded: Vec<f32> =
                torch_randn(seed, length).into_iter().map(|value| bf16::from_f32(value).to_f32()).collect();
            assert_eq!(rounded, fixture.floats(&format!("out.seed_{seed}.bf16_length_{length}")), "{seed} {length}");
        }
    }
}

#[test]
fn schedules_are_exact() {
    let fixture = Fixture::open("scheduler");
    for (steps, strength) in [(1, "1.0"), (2, "1.0"), (4, "1.0"), (30, "1.0"), (50, "1.0"), (50, "0.7")] {
        let schedule = FlowMatchSchedule::new(steps, strength.parse().unwrap());
        assert_eq!(schedule.sigmas(), fixture.floats(&format!("out.sigmas_{steps}_{strength}")));
        assert_eq!(schedule.timesteps(), fixture.floats(&format!("out.timesteps_{steps}_{strength}")));
    }
    let (sample, velocity) = (fixture.tensor::<4>("in.sample"), fixture.tensor::<4>("in.velocity"));
    let schedule = FlowMatchSchedule::new(4, 1.0);
    for step in 0..4 {
        let next = schedule.step(step, sample.clone(), velocity.clone());
        assert_close(&next, &fixture.floats(&format!("out.euler_4_step_{step}")), 1e-7);
    }
}

#[test]
fn training_levels_and_weights() {
    let fixture = Fixture::open("scheduler");
    let schedule = FlowMatchSchedule::new(1000, 1.0);
    let weights = schedule.training_weights();
    let indexes = fixture.ids("in.training_indexes");
    let at = |values: &[f32]| -> Vec<f32> { indexes.iter().map(|&i| values[i as usize]).collect() };
    assert_eq!(at(schedule.sigmas()), fixture.floats("out.training_sigmas"));
    assert_eq!(at(schedule.timesteps()), fixture.floats("out.training_timesteps"));
    let weights = Tensor::<1>::from_floats(at(&weights).as_slice(), &device());
    assert_close(&weights, &fixture.floats("out.training_weights"), 1e-6);
    let noisy = schedule.add_noise(321, fixture.tensor("in.sample"), fixture.tensor("in.velocity"));
    assert_close(&noisy, &fixture.floats("out.noisy_321"), 1e-7);
}

/// Latents after each step.
fn trajectory(dit: &Dit, branches: Branches, noise: Tensor<4>, options: &DenoiseOptions) -> Vec<Tensor<4>> {
    let denoiser = Denoiser::new(dit, branches, LatentSize::of(&noise), options).unwrap();
    let mut state = denoiser.start(noise, None).unwrap();
    let mut latents = vec![];
    let flow = denoiser.run(&mut state, &mut |event| {
        if event.step > 0 {
            latents.push(event.latents.clone());
        }
        ControlFlow::Continue(())
    });
    assert!(flow.is_continue());
    latents
}

#[test]
fn teacache_with_one_cache_per_branch() {
    let fixture = Fixture::open("teacache");
    let branch = |context: &str, pooled: &str| Branch {
        conditioning: Conditioning::without_positions(fixture.tensor(context)),
        pooled: fixture.tensor(pooled),
    };
    let positive = branch("in.context", "in.pooled");
    let negative = Some(branch("in.negative_context", "in.negative_pooled"));
    let options = DenoiseOptions {
        num_steps: fixture.meta("steps"),
        cfg_scale: fixture.meta("cfg_scale"),
        embedded_guidance: fixture.meta("guidance"),
        tea_cache_threshold: Some(fixture.meta("threshold")),
        ..Default::default()
    };
    let noise = fixture.tensor("in.latents");
    let decoder = generation_decoder();
    let latents = trajectory(&decoder.dit, Branches { positive, negative }, noise, &options);
    assert_close(&Tensor::cat(latents, 0), &fixture.floats("out.trajectory"), TOLERANCE);
}

#[derive(serde::Deserialize)]
struct Request {
    decoder: String,
    cfg_scale: f64,
    embedded_guidance: f64,
    height: usize,
    width: usize,
    negative_prompt: String,
    png: String,
    seed: u64,
    steps: usize,
}

#[test]
fn from_condition_to_picture() {
    let (generation, editing, autoencoder) = (generation_decoder(), editing_decoder(), autoencoder());
    let pooled = random_models::pooled(&clip());
    let prompts = Fixture::open("t5_512");
    let t5 = t5();
    for name in
        ["e2e_generate", "e2e_generate_zh", "e2e_edit", "e2e_edit_cfg", "e2e_edit_by_generation", "e2e_edit_wide"]
    {
        let fixture = Fixture::open(name);
        let request: Request = fixture.meta("options");
        let size = LatentSize::from_pixels(request.height, request.width).unwrap();
        let context = fixture.tensor::<3>("out.context");
        let (dit, text_ids) = match request.decoder.as_str() {
            "generation" => {
                let embeds = ImageEmbeds::new(fixture.tensor("out.image_embeds"), GridThw::GENERATED).unwrap();
                let own = generation.condition(&embeds).unwrap();
                assert_close(&own.embeds, &fixture.floats("out.context"), TOLERANCE);
                (&generation.dit, zero_text_ids(81))
            }
            _ => (&editing.dit, editing_text_ids(GridThw::GENERATED, Some(GridThw::REFERENCE), size)),
        };
        let positive = Branch { conditioning: Conditioning { embeds: context, text_ids }, pooled: pooled[0].clone() };
        let (text, negative_pooled) = match request.negative_prompt.as_str() {
            "" => ("empty", &pooled[0]),
            _ => ("negative", &pooled[1]),
        };
        let tokens = t5.encode(&prompts.ids(&format!("in.{text}_input_ids")), FloatDType::F32).unwrap();
        let negative =
            Branch { conditioning: Conditioning::without_positions(tokens), pooled: negative_pooled.clone() };
        let options = DenoiseOptions {
            num_steps: request.steps,
            cfg_scale: request.cfg_scale,
            embedded_guidance: request.embedded_guidance,
            ..Default::default()
        };
        let noise = Noise::Seed(request.seed).into_latents(16, size, FloatDType::F32, &device()).unwrap();
        check_noise(&noise.to_data().try_to_vec::<f32>().unwrap(), &fixture.floats("in.noise"));

        let branches = Branches { positive, negative: Some(negative) };
        let latents = trajectory(dit, branches, fixture.tensor("in.noise"), &options);
        for (step, latents) in latents.iter().enumerate() {
            assert_close(latents, &fixture.floats(&format!("tap.latents_after_step_{step}")), TOLERANCE);
        }
        let latents = latents.into_iter().next_back().unwrap();
        assert_close(&latents, &fixture.floats("out.latents"), TOLERANCE);
        check_picture(autoencoder.decode(latents, None), &request.png);
    }
}

/// No 8-bit value may be off by more than one.
#[track_caller]
fn check_picture(picture: Tensor<4>, png: &str) {
    let values: Vec<f32> = picture.permute([0, 2, 3, 1]).into_data().try_to_vec().unwrap();
    let expected = image::open(fixtures_dir().join(png)).unwrap().to_rgb8().into_raw();
    assert_eq!(values.len(), expected.len());
    for (value, &expected) in values.iter().zip(&expected) {
        let pixel = ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0) as u8;
        assert!(pixel.abs_diff(expected) <= 1, "{pixel} instead of {expected} in {png}");
    }
}
