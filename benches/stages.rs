//! How long does each stage take? `cargo bench --bench stages`; one group per stage, on the bundled random checkpoint.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, missing_docs, reason = "a test may panic and print")]

use std::{hint::black_box, ops::ControlFlow};

use burn::tensor::{FloatDType, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use nexus::{
    GridThw, Image, ImageEmbeds, Noise,
    ar::{ArConfig, ArModel, GenerateOptions, Prompt, generate},
    core::checkpoint::{Checkpoint, LoadOptions},
    data::{ImageProcessor, MAX_PIXELS_AR},
    diffusion::{
        Autoencoder, Branch, Branches, DenoiseOptions, Denoiser, GenerationDecoder, LatentSize,
        config::{AutoencoderConfig, DiffusionConfig},
    },
    vision_encoder::{VisionConfig, VisionEncoder},
};
use nexus_core::testing::{cpu, ramp, random_models_dir};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn data(criterion: &mut Criterion) {
    let processor = ImageProcessor::default();
    let pixels = (0..1024 * 768 * 3).map(|i| (i * 7919 % 256) as u8).collect();
    let image = Image::from_rgb8(1024, 768, pixels).unwrap();
    criterion.benchmark_group("data").bench_function("resize_and_patch_1024x768", |bencher| {
        bencher.iter(|| processor.patches(&processor.bound(black_box(&image), MAX_PIXELS_AR).unwrap()).unwrap());
    });
}

fn vision_encoder(criterion: &mut Criterion) {
    let dir = random_models_dir().join("Nexus-GenV2");
    let config = VisionConfig::read(dir.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let encoder = VisionEncoder::load(&checkpoint, &config, &cpu(), &LoadOptions::default()).unwrap();
    let mut group = criterion.benchmark_group("vision_encoder");
    for (name, grid) in [("252x252", GridThw::GENERATED), ("504x504", GridThw::REFERENCE)] {
        let patches: Tensor<2> = ramp([grid.num_patches(), config.patch_values()], 1);
        group.bench_function(name, |bencher| bencher.iter(|| read(encoder.forward(patches.clone(), &[grid]))));
    }
}

fn ar(criterion: &mut Criterion) {
    let dir = random_models_dir().join("Nexus-GenV2");
    let config = ArConfig::read(dir.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let model = ArModel::load(&checkpoint, &config, &cpu(), &LoadOptions::default()).unwrap();
    let prompt: Vec<u32> = (0..300).map(|i| i * 7 % 500).collect();
    let positions: Vec<[i64; 3]> = (0..300).map(|position| [position; 3]).collect();
    let mut group = criterion.benchmark_group("ar");
    group.bench_function("prefill_300", |bencher| {
        bencher.iter(|| read(model.forward(model.embed(&prompt, &[], FloatDType::F32).unwrap(), &positions, None)));
    });
    let mut drawing = prompt[..40].to_vec();
    drawing.push(config.token_ids.vision_start_token_id);
    let options = GenerateOptions { max_new_tokens: 82, ..GenerateOptions::default() };
    group.bench_function("image_block", |bencher| {
        let prompt = Prompt { token_ids: &drawing, images: &[] };
        bencher.iter(|| generate(&model, prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap());
    });
}

fn diffusion(criterion: &mut Criterion) {
    let dir = random_models_dir().join("Nexus-GenV2");
    let config = DiffusionConfig::read(&dir).unwrap();
    let checkpoint = Checkpoint::open(dir.join("generation_decoder.bin")).unwrap();
    let decoder = GenerationDecoder::load(&checkpoint, &config, &cpu(), &LoadOptions::default()).unwrap();
    let embeds = ImageEmbeds::new(ramp([1, 81, config.merger.hidden_size], 1), GridThw::GENERATED).unwrap();
    let size = LatentSize::from_pixels(512, 512).unwrap();
    let pooled = ramp([1, config.dit.pooled_dim], 2);
    let positive = Branch { conditioning: decoder.condition(&embeds).unwrap(), pooled };
    let options = DenoiseOptions { cfg_scale: 1.0, ..DenoiseOptions::default() };
    let denoiser = Denoiser::new(&decoder.dit, Branches { positive, negative: None }, size, &options).unwrap();
    let noise = Noise::Seed(1).into_latents(decoder.dit.latent_channels(), size, FloatDType::F32, &cpu()).unwrap();
    let state = denoiser.start(noise, None).unwrap();
    criterion.benchmark_group("diffusion").bench_function("step_512x512", |bencher| {
        bencher.iter(|| {
            let mut state = state.clone();
            denoiser.step(&mut state);
            read(state.latents)
        });
    });
}

fn autoencoder(criterion: &mut Criterion) {
    let dir = random_models_dir().join("FLUX/FLUX.1-dev");
    let config = AutoencoderConfig::read_beside(&dir).unwrap();
    let checkpoint = Checkpoint::open(dir.join("ae.safetensors")).unwrap();
    let autoencoder = Autoencoder::load(&checkpoint, &config, &cpu(), &LoadOptions::default()).unwrap();
    let latents: Tensor<4> = ramp([1, config.z_channels, 32, 32], 1);
    let mut group = criterion.benchmark_group("autoencoder");
    group.sample_size(10);
    group.bench_function("decode_256x256", |bencher| {
        bencher.iter(|| read(autoencoder.decode(latents.clone(), None)));
    });
}

/// Waits for a result: backends may compute lazily.
fn read<const D: usize>(tensor: Tensor<D>) -> usize {
    tensor.into_data().num_elements()
}

criterion_group!(stages, data, vision_encoder, ar, diffusion, autoencoder);
criterion_main!(stages);
