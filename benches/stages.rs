//! How long does each stage take? `cargo bench --bench stages`; one group per stage.
//!
//! Random bf16 weights at a middle size, and single layers at the released size. The autoencoder at 512x512 takes long
//! and models of the released size take tens of gigabytes; they run only if asked for, as in
//! `cargo bench --bench stages -- autoencoder_512` or `-- released_models`. `BURN_DEVICE=wgpu cargo bench --features wgpu`
//! measures another device of the build.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    missing_docs,
    reason = "a bench may panic and print"
)]

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};
use nexus::{
    Image,
    data::{ImageProcessor, MAX_PIXELS_AR},
};
use nexus_cli::bench::{RELEASED_MODELS, STAGES, Stage, Weights, Work};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Take long or much memory, and run only if they are among the arguments.
const ON_REQUEST: [&str; 2] = ["autoencoder_512", RELEASED_MODELS];

fn data(criterion: &mut Criterion) {
    let processor = ImageProcessor::default();
    let pixels = (0..1024 * 768 * 3).map(|i| (i * 7919 % 256) as u8).collect();
    let image = Image::from_rgb8(1024, 768, pixels).unwrap();
    criterion.benchmark_group("data").bench_function("resize_and_patch_1024x768", |bencher| {
        bencher.iter(|| processor.patches(&processor.bound(black_box(&image), MAX_PIXELS_AR).unwrap()).unwrap());
    });
}

fn stages(criterion: &mut Criterion) {
    for Stage { group, name, load } in STAGES {
        if ON_REQUEST.contains(group) && !std::env::args().any(|argument| argument.contains(group)) {
            continue;
        }
        // Criterion calls this only for stages that its filter lets through; the weights are made at the first call.
        let mut work: Option<Box<dyn Work>> = None;
        let mut group = criterion.benchmark_group(*group);
        group.sampling_mode(SamplingMode::Flat);
        group.bench_function(*name, |bencher| {
            let work = work.get_or_insert_with(|| load(Weights::Random));
            bencher.iter_custom(|iterations| (0..iterations).map(|_| time(work.as_mut())).sum());
        });
    }
}

/// Time of one part of one run.
fn time(work: &mut dyn Work) -> Duration {
    work.prepare();
    let start = Instant::now();
    black_box(work.run());
    start.elapsed() / work.parts() as u32
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(5));
    targets = data, stages
}
criterion_main!(benches);
