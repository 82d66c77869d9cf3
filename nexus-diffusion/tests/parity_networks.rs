//! Every network against PyTorch on the bundled random checkpoint: connectors, transformer, autoencoder, text encoders.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic and print")]

mod random_models;

use burn::tensor::{DType, FloatDType, Tensor};
use nexus_checkpoint::{Checkpoint, LoadOptions, save_module};
use nexus_core::{
    GridThw, ImageEmbeds,
    testing::{Fixture, assert_close, assert_close_tensors, device, relative_drift},
};
use nexus_diffusion::{
    LatentSize, Tiling,
    connector::editing_text_ids,
    latents::patchify,
    transformer::{Dit, DitInput, image_positions},
    weights::FLUX1_DEV,
};
use random_models::{TOLERANCE, autoencoder, clip, config, editing_decoder, generation_decoder, positions, t5};

#[track_caller]
fn check<const D: usize>(actual: &Tensor<D>, fixture: &Fixture, name: &str) {
    assert_close(actual, &fixture.floats(name), TOLERANCE);
}

fn embeds(fixture: &Fixture, name: &str, grid: GridThw) -> ImageEmbeds {
    ImageEmbeds::new(fixture.tensor(name), grid).unwrap()
}

#[test]
fn adapter() {
    let fixture = Fixture::open("adapter");
    let embeds = embeds(&fixture, "in.embeds", GridThw::GENERATED);
    check(&generation_decoder().condition(&embeds).unwrap().embeds, &fixture, "out.context");
}

#[test]
fn embedding_merger() {
    let (decoder, fixture) = (editing_decoder(), Fixture::open("merger"));
    let size = LatentSize { height: 64, width: 64 };
    let odd_grid = GridThw::new(1, 24, 34).unwrap();
    let target = embeds(&fixture, "in.embeds", GridThw::GENERATED);
    let reference = embeds(&fixture, "in.reference", GridThw::REFERENCE);
    let odd = embeds(&fixture, "in.reference_24x34", odd_grid);
    for (reference, name) in
        [(Some(&reference), "out.context"), (Some(&odd), "out.context_24x34"), (None, "out.context_without_reference")]
    {
        check(&decoder.condition(&target, reference, size).unwrap().embeds, &fixture, name);
    }

    let merger = &decoder.embedding_merger;
    for (grid, name) in [(GridThw::REFERENCE, "out.positions"), (odd_grid, "out.positions_24x34")] {
        let positions = [merger.positions(GridThw::GENERATED), merger.positions(grid)].concat();
        let by_axis: Vec<f32> = (0..3).flat_map(|axis| positions.iter().map(move |triple| triple[axis])).collect();
        assert_eq!(by_axis, fixture.floats(name));
    }
    let positions = [merger.positions(GridThw::GENERATED), merger.positions(GridThw::REFERENCE)].concat();
    let x = Tensor::cat(vec![target.values, reference.values], 1);
    let x = merger.transform(x, &merger.rotary(&positions, DType::F32, &device()));
    check(&x.slice_dim(1, burn::tensor::s![..;5]), &fixture, "tap.layer");
}

fn velocity(dit: &Dit, fixture: &Fixture, guidance: f32, dtype: DType) -> Tensor<4> {
    let latents = fixture.tensor::<4>("in.latents").cast(dtype);
    let pooled = fixture.tensor::<2>("in.pooled").cast(dtype);
    let text_ids = positions(fixture, "in.text_ids");
    let rotary = dit.rotary(&text_ids, LatentSize::of(&latents), dtype, &device());
    let modulations = dit.modulations(&dit.conditioning(&[fixture.meta("timestep")], guidance, pooled));
    let context = dit.context(fixture.tensor::<3>("in.context").cast(dtype));
    dit.forward(DitInput { latents, context, modulations: &modulations, rotary: &rotary }, None)
}

#[test]
fn transformer() {
    let (generation, editing) = (generation_decoder().dit, editing_decoder().dit);
    for (dit, name) in [(&generation, "dit_gen"), (&editing, "dit_edit"), (&editing, "dit_edit_noref")] {
        let fixture = Fixture::open(name);
        let guidance: f32 = fixture.meta("guidance");
        let pooled = fixture.tensor("in.pooled");
        check(&dit.conditioning(&[fixture.meta("timestep")], guidance, pooled), &fixture, "tap.conditioning");
        check(&velocity(dit, &fixture, guidance, DType::F32), &fixture, "out.velocity");
        let size = LatentSize::of(&fixture.tensor("in.latents"));
        assert_eq!(image_positions(size), positions(&fixture, "in.image_ids"));
    }
}

#[test]
fn transformer_block_by_block() {
    let (dit, fixture) = (generation_decoder().dit, Fixture::open("dit_gen"));
    let latents = fixture.tensor::<4>("in.latents");
    let rotary = dit.rotary(&positions(&fixture, "in.text_ids"), LatentSize::of(&latents), DType::F32, &device());
    let conditioning =
        dit.conditioning(&[fixture.meta("timestep")], fixture.meta("guidance"), fixture.tensor("in.pooled"));
    let modulations = dit.modulations(&conditioning);
    let mut image = dit.x_embedder.forward(patchify(latents));
    let mut text = dit.context(fixture.tensor("in.context"));
    check(&image, &fixture, "tap.x_embedder");
    check(&text, &fixture, "tap.context_embedder");
    for (i, block) in dit.blocks.iter().enumerate() {
        (image, text) = block.forward(image, text, &modulations.double[i], &rotary);
        check(&image, &fixture, &format!("tap.blocks.{i}.image"));
        check(&text, &fixture, &format!("tap.blocks.{i}.text"));
    }
    let ([_, image_tokens, _], [_, text_tokens, _]) = (image.dims(), text.dims());
    let mut joined = Tensor::cat(vec![text, image], 1);
    for (i, block) in dit.single_blocks.iter().enumerate() {
        joined = block.forward(joined, &modulations.single[i], &rotary);
        check(&joined.clone().narrow(1, 0, text_tokens), &fixture, &format!("tap.single_blocks.{i}.text"));
        check(&joined.clone().narrow(1, text_tokens, image_tokens), &fixture, &format!("tap.single_blocks.{i}.image"));
    }
}

#[test]
fn editing_positions() {
    for (name, reference, height, width) in
        [("dit_edit", Some(GridThw::REFERENCE), 16, 16), ("dit_edit_noref", None, 12, 8)]
    {
        let ids = editing_text_ids(GridThw::GENERATED, reference, LatentSize { height, width });
        assert_eq!(ids, positions(&Fixture::open(name), "in.text_ids"));
    }
}

#[test]
fn transformer_in_bf16_is_the_f32_one_with_rounded_guidance() {
    assert!(device().supports_dtype(FloatDType::BF16), "for devices with bf16: leave this test out elsewhere");
    let (dit, fixture) = (generation_decoder().dit, Fixture::open("dit_gen"));
    let values = |x: Tensor<4>| x.cast(DType::F32).into_data().try_to_vec::<f32>().unwrap();
    let rounded = values(velocity(&dit, &fixture, 3.5, DType::BF16));
    // Random weights amplify the phase of the sinusoids, so the guidance of 3.504 shows.
    let drift = |guidance| relative_drift(&rounded, &values(velocity(&dit, &fixture, guidance, DType::F32)));
    assert!(drift(3.504) < 0.05, "{}", drift(3.504));
    assert!(drift(3.5) > 2.0 * drift(3.504), "{} {}", drift(3.5), drift(3.504));
}

#[test]
fn flux1_dev_has_shift_and_scale_in_the_other_order() {
    let dit = generation_decoder().dit;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("flux1-dev.safetensors");
    save_module(&dit, &FLUX1_DEV, &path, None).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let loaded = Dit::load_flux1_dev(&checkpoint, &config().dit, &device(), &LoadOptions::default()).unwrap();
    let (before, after) = (&dit.final_norm_out.linear, &loaded.final_norm_out.linear);
    let [rows, columns] = before.weight.dims();
    for (kept, moved) in [(0, rows / 2), (rows / 2, 0)] {
        let part = |weight: Tensor<2>, start| weight.narrow(0, start, rows / 2).cast(DType::F32);
        assert_close_tensors(&part(after.weight.val(), moved), &part(before.weight.val(), kept), 0.0);
    }
    assert_eq!(after.weight.dims(), [rows, columns]);
    let conditioning = dit.conditioning(&[500.0], 3.5, Fixture::open("dit_gen").tensor("in.pooled"));
    let (a, b) = (dit.modulations(&conditioning), loaded.modulations(&conditioning));
    assert_close_tensors(&a.output.scale, &b.output.shift, 0.0);
    assert_close_tensors(&a.output.shift, &b.output.scale, 0.0);
    assert_close_tensors(&a.single[0].gate, &b.single[0].gate, 0.0);
}

#[test]
fn autoencoder_whole_and_tiled() {
    let (autoencoder, fixture) = (autoencoder(), Fixture::open("ae"));
    let (image, latents) = (fixture.tensor::<4>("in.image"), fixture.tensor::<4>("in.latents"));
    check(&autoencoder.encode(image.clone(), None), &fixture, "out.latents");
    let drawn = autoencoder.decode(latents.clone(), None);
    check(&drawn, &fixture, "out.image");
    check_pixels(drawn, &fixture.floats("out.uint8"));
    let tiling = Some(Tiling::new(4, 2).unwrap());
    check(&autoencoder.encode(image, tiling), &fixture, "out.tiled_latents");
    check(&autoencoder.decode(latents, tiling), &fixture, "out.tiled_image");
}

/// No 8-bit value may be off by more than one.
#[track_caller]
fn check_pixels(picture: Tensor<4>, expected: &[f32]) {
    let values: Vec<f32> = picture.permute([0, 2, 3, 1]).into_data().try_to_vec().unwrap();
    assert_eq!(values.len(), expected.len());
    for (value, expected) in values.iter().zip(expected) {
        let pixel = ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).trunc();
        assert!((pixel - expected).abs() <= 1.0, "{pixel} instead of {expected}");
    }
}

#[test]
fn autoencoder_level_by_level() {
    let (autoencoder, fixture) = (autoencoder(), Fixture::open("ae"));
    let encoder = &autoencoder.encoder;
    let mut x = encoder.conv_in.forward(fixture.tensor("in.image"));
    for (i, level) in encoder.down.iter().enumerate() {
        x = level.forward(x);
        if i > 1 {
            check(&x, &fixture, &format!("tap.encoder.down.{i}"));
        }
    }
    check(&encoder.mid.forward(x), &fixture, "tap.encoder.mid");
    let decoder = &autoencoder.decoder;
    let x = decoder.conv_in.forward(fixture.tensor::<4>("in.latents") / 0.3611 + 0.1159);
    check(&x, &fixture, "tap.decoder.conv_in");
    let x = decoder.mid.forward(x);
    check(&x, &fixture, "tap.decoder.mid");
    check(&decoder.up[3].forward(x), &fixture, "tap.decoder.up.3");
}

#[test]
fn odd_sizes_are_tiled_without_nan() {
    let (autoencoder, fixture) = (autoencoder(), Fixture::open("ae"));
    // 6x8 positions in tiles of 4 every 4: the original leaves two rows uncovered.
    let drawn = autoencoder.decode(fixture.tensor("in.latents"), Some(Tiling::new(4, 4).unwrap()));
    let drift = relative_drift(&drawn.into_data().try_to_vec::<f32>().unwrap(), &fixture.floats("out.image"));
    assert!(drift < 1.0, "{drift}");
    let larger = autoencoder.decode(fixture.tensor("in.latents"), Some(Tiling::default()));
    check(&larger, &fixture, "out.image");
}

#[test]
fn clip_text_encoder() {
    let (clip, fixture) = (clip(), Fixture::open("clip"));
    check(&Tensor::cat(random_models::pooled(&clip), 0), &fixture, "out.pooled");
    let ids = fixture.ids("in.input_ids");
    check(&clip.hidden_states(&ids[77..2 * 77], FloatDType::F32).unwrap(), &fixture, "out.hidden");
}

#[test]
fn t5_encoder() {
    let t5 = t5();
    let fixture = Fixture::open("t5");
    check(&t5.encode(&fixture.ids("in.input_ids"), FloatDType::F32).unwrap(), &fixture, "out.hidden");
    let fixture = Fixture::open("t5_512");
    for text in ["empty", "negative"] {
        let hidden = t5.encode(&fixture.ids(&format!("in.{text}_input_ids")), FloatDType::F32).unwrap();
        let rows = hidden.select(1, fixture.ints::<1>("in.rows"));
        check(&rows, &fixture, &format!("out.{text}_hidden_rows"));
    }
}
