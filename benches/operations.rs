//! How long does each operation take? `cargo bench --bench operations`; one group per operation.
//!
//! Shapes are those of a layer of the released models at 300 prompt tokens, or 512x512 pixels; weights are in bf16.
//! `BURN_DEVICE=wgpu cargo bench --bench operations --features wgpu` measures another device of the build.
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench may panic")]

use std::{hint::black_box, time::Duration};

use burn::tensor::{FloatDType, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use nexus_cli::bench::{device, ramp};
use nexus_kernels::{
    AdamWStep, Attention, Filter, GroupNormOptions, RotaryTable, Visibility, adamw, attention, cat, conv2d,
    gated_residual, gelu_tanh, group_norm, layer_norm, linear, modulate, rms_norm, rotate_half, rotate_interleaved,
    silu_mul, split, upsample_conv2d,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Prompt, width, heads, key and value heads, and the width between the projections of the language model.
const LANGUAGE: [usize; 5] = [300, 3584, 28, 4, 18_944];
/// Tokens of picture and text, width and heads of the transformer.
const TRANSFORMER: [usize; 3] = [1024 + 81, 3072, 24];
/// Features of a head, in both.
const HEAD: usize = 128;
/// Channels and side of what the autoencoder decodes.
const LATENT: [usize; 2] = [512, 64];
const EPSILON: f64 = 1e-6;

/// A weight as the released files store it.
fn weight<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    let stored = if device().supports_dtype(FloatDType::BF16) { FloatDType::BF16 } else { FloatDType::F32 };
    ramp(shape, 7).cast(stored)
}

/// Times an operation until the device has done it.
fn bench<T>(criterion: &mut Criterion, operation: &str, case: &str, mut run: impl FnMut() -> T) {
    let device = device();
    criterion.benchmark_group(operation).bench_function(case, |bencher| {
        bencher.iter(|| {
            let result = black_box(run());
            device.sync().unwrap();
            result
        });
    });
}

fn products(criterion: &mut Criterion) {
    let [prompt, width, _, _, between] = LANGUAGE;
    let up = weight([between, width]);
    for (case, tokens) in [("one token", 1), ("prompt", prompt)] {
        let x = ramp([1, tokens, width], 1);
        bench(criterion, "linear", case, || linear(x.clone(), up.clone(), None));
    }
    let [tokens, width, _] = TRANSFORMER;
    let (x, square, bias) = (ramp([1, tokens, width], 1), weight([width, width]), weight([width]));
    bench(criterion, "linear", "transformer", || linear(x.clone(), square.clone(), Some(bias.clone())));
}

fn attentions(criterion: &mut Criterion) {
    let [prompt, _, heads, kv_heads, _] = LANGUAGE;
    let (k, v) = (ramp([1, prompt, kv_heads, HEAD], 2), ramp([1, prompt, kv_heads, HEAD], 3));
    let causal = || Attention { visibility: Visibility::Causal, ..Attention::default() };
    for (case, queries) in [("one token", 1), ("prompt", prompt)] {
        let q = ramp([1, queries, heads, HEAD], 1);
        bench(criterion, "attention", case, || attention(q.clone(), k.clone(), v.clone(), causal()));
    }
    let [tokens, _, heads] = TRANSFORMER;
    let [q, k, v] = [1, 2, 3].map(|seed| ramp([1, tokens, heads, HEAD], seed));
    bench(criterion, "attention", "transformer", || attention(q.clone(), k.clone(), v.clone(), Attention::default()));
}

fn rotations(criterion: &mut Criterion) {
    let angles = |tokens: usize| (0..tokens * HEAD / 2).map(|index| index as f64 * 1e-3).collect::<Vec<_>>();
    let table = |tokens: usize| RotaryTable::from_f64(&angles(tokens), tokens, HEAD / 2, &device());
    let [prompt, _, heads, _, _] = LANGUAGE;
    let (x, half) = (ramp([1, prompt, heads, HEAD], 1), table(prompt));
    bench(criterion, "rotate_half", "prompt", || rotate_half(x.clone(), &half));
    let [tokens, _, heads] = TRANSFORMER;
    let (x, neighbours) = (ramp([1, tokens, heads, HEAD], 1), table(tokens));
    bench(criterion, "rotate_interleaved", "transformer", || rotate_interleaved(x.clone(), &neighbours));
}

fn norms(criterion: &mut Criterion) {
    let [prompt, width, ..] = LANGUAGE;
    let (x, scale) = (ramp([1, prompt, width], 1), weight([width]));
    bench(criterion, "rms_norm", "prompt", || rms_norm(x.clone(), scale.clone(), EPSILON));
    let [tokens, width, _] = TRANSFORMER;
    let x: Tensor<3> = ramp([1, tokens, width], 1);
    let [shift, scale, gate] = [2, 3, 4].map(|seed| ramp([1, 1, width], seed));
    bench(criterion, "layer_norm", "transformer", || layer_norm(x.clone(), EPSILON));
    bench(criterion, "modulate", "transformer", || modulate(x.clone(), shift.clone(), scale.clone(), EPSILON));
    bench(criterion, "gated_residual", "transformer", || gated_residual(x.clone(), gate.clone(), x.clone()));
}

fn activations(criterion: &mut Criterion) {
    let [prompt, _, _, _, between] = LANGUAGE;
    let (gate, up): (Tensor<3>, Tensor<3>) = (ramp([1, prompt, between], 1), ramp([1, prompt, between], 2));
    bench(criterion, "silu_mul", "prompt", || silu_mul(gate.clone(), up.clone()));
    let [tokens, width, _] = TRANSFORMER;
    let x: Tensor<3> = ramp([1, tokens, 4 * width], 1);
    bench(criterion, "gelu_tanh", "transformer", || gelu_tanh(x.clone()));
}

fn joins(criterion: &mut Criterion) {
    let [tokens, width, _] = TRANSFORMER;
    let [text, image] = [81, tokens - 81].map(|tokens| ramp([1, tokens, width], 1));
    bench(criterion, "cat", "transformer", || cat(vec![text.clone(), image.clone()], 1));
    let joined: Tensor<3> = ramp([1, tokens, 3 * width], 1);
    bench(criterion, "split", "transformer", || split(joined.clone(), 2, [width; 3]));
}

fn pictures(criterion: &mut Criterion) {
    let [channels, side] = LATENT;
    let x = ramp([1, channels, side, side], 1);
    let filter =
        Filter { weight: weight([channels, channels, 3, 3]), bias: weight([channels]), stride: 1, padding: (1, 1) };
    bench(criterion, "conv2d", "autoencoder", || conv2d(x.clone(), &filter));
    bench(criterion, "upsample_conv2d", "autoencoder", || upsample_conv2d(x.clone(), &filter));
    let (scale, bias) = (weight([channels]), weight([channels]));
    let options = GroupNormOptions { weight: scale, bias, num_groups: 32, epsilon: EPSILON, silu: true };
    bench(criterion, "group_norm", "autoencoder", || group_norm(x.clone(), &options));
}

fn steps(criterion: &mut Criterion) {
    let [_, width, ..] = LANGUAGE;
    let step = AdamWStep { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01, lr: 1e-5, number: 1 };
    let [value, gradient, first, second] =
        [1, 2, 3, 4].map(|seed| ramp::<1>([width * width], seed).cast(FloatDType::F32));
    let moments = Some([first, second]);
    bench(criterion, "adamw", "square", || adamw(value.clone(), gradient.clone(), moments.clone(), &step));
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = products, attentions, rotations, norms, activations, joins, pictures, steps
}
criterion_main!(benches);
