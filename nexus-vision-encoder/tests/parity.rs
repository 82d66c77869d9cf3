//! The vision encoder against transformers' Qwen2.5-VL on the bundled random checkpoint.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, missing_docs, reason = "a test may panic and print")]

use nexus_checkpoint::Checkpoint;
use nexus_core::{
    GridThw,
    testing::{Fixture, assert_close, assert_close_tensors, device, load_options, random_models_dir},
};
use nexus_vision_encoder::{VisionConfig, VisionEncoder, WindowLayout};

const TOLERANCE: f32 = 1e-5;

fn encoder() -> VisionEncoder {
    let dir = random_models_dir().join("Nexus-GenV2");
    let config = VisionConfig::read(dir.join("config.json")).unwrap();
    VisionEncoder::load(&Checkpoint::open(&dir).unwrap(), &config, &device(), &load_options()).unwrap()
}

fn grids(fixture: &Fixture) -> Vec<GridThw> {
    let rows: Vec<[usize; 3]> = fixture.meta("grid_thw");
    rows.into_iter().map(|[t, h, w]| GridThw::new(t, h, w).unwrap()).collect()
}

fn as_i64(values: &[usize]) -> Vec<i64> {
    values.iter().map(|&value| value as i64).collect()
}

fn check(name: &str) {
    let (encoder, fixture) = (encoder(), Fixture::open(name));
    let grids = grids(&fixture);
    let layout = WindowLayout::new(&grids, encoder.config().window_cells());
    assert_eq!(as_i64(&layout.cell_order), fixture.integers("out.window_index"), "{name}: window order");
    assert_eq!(as_i64(&layout.window_bounds), fixture.integers("out.cu_window_seqlens"), "{name}: windows");
    assert_eq!(as_i64(&layout.frame_bounds), fixture.integers("out.cu_seqlens"), "{name}: frames");
    let images = encoder.encode(fixture.tensor::<2>("in.pixel_values"), &grids).unwrap();
    let expected = fixture.tensor::<2>("out.embeds");
    let mut start = 0;
    for (image, grid) in images.iter().zip(&grids) {
        let tokens = grid.num_merged_tokens();
        let part = expected.clone().narrow(0, start, tokens).unsqueeze::<3>();
        assert_close_tensors(&image.values, &part, TOLERANCE);
        start += tokens;
    }
}

#[test]
fn several_images_of_odd_sizes() {
    check("vision_odd");
}

#[test]
fn a_generated_image_of_81_tokens() {
    check("vision_81");
}

#[test]
fn the_smallest_image_and_a_strip() {
    check("vision_min");
}

#[test]
fn a_grid_of_whole_windows() {
    check("vision_full_windows");
}

#[test]
fn every_block_matches() {
    let (encoder, fixture) = (encoder(), Fixture::open("vision_min"));
    let grids = grids(&fixture);
    let layout = WindowLayout::new(&grids, encoder.config().window_cells());
    let rotary = encoder.rotary(&grids, &layout, &device());
    let embedded = encoder.patch_embed.forward(fixture.tensor::<2>("in.pixel_values"));
    assert_close(&embedded, &fixture.floats("tap.patch_embed"), TOLERANCE);
    // The two grids of this fixture are one and two windows, so window order is raster order.
    assert!(layout.cell_order.is_sorted());
    let mut x = embedded;
    for (index, block) in encoder.blocks.iter().enumerate() {
        let full = encoder.config().fullatt_block_indexes.contains(&index);
        x = block.forward(x, &rotary, if full { &layout.frame_bounds } else { &layout.window_bounds });
        assert_close(&x, &fixture.floats(&format!("tap.blocks.{index}")), TOLERANCE);
    }
}

#[test]
fn patches_that_do_not_fit_the_grids_are_refused() {
    let encoder = encoder();
    for shape in [[323, 1176], [324, 1175]] {
        let patches = burn::tensor::Tensor::<2>::zeros(shape, &device());
        let error = encoder.encode(patches, &[GridThw::GENERATED]).unwrap_err().to_string();
        assert!(error.contains("324 of 1176"), "{error}");
    }
    assert!(encoder.encode(burn::tensor::Tensor::<2>::zeros([1, 1176], &device()), &[]).is_err());
}
