//! Kernels for CPUs at every level that the CPU has: all memory lies against a page that must not be touched and is full of
//! NaN before it is written, and all levels give the same numbers.
//!
//! A read or write past either end of a tensor stops the process by a signal. What valgrind cannot run, AVX-512 and AMX, is
//! checked so.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod guard;

use burn::tensor::{DType, Device, Tensor, TensorData};
use nexus_kernels::{
    Attention, Filter, GroupNormOptions, RotaryTable, Visibility, affine_layer_norm, attention, cat, conv2d,
    gated_residual, gelu, gelu_tanh_mul, group_norm, linear, modulate, rms_norm, rotate_half, rotate_interleaved,
    silu_mul, split,
    testing::{CpuLevel, cpu, limit_cpu, relative_drift},
    upsample_conv2d,
};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use rand_distr::{Distribution, StandardNormal};

use guard::{End, guarded};

/// Shapes and values of one round; the same numbers for every level.
struct Round {
    draws: ChaCha8Rng,
    dtype: DType,
    device: Device,
}

impl Round {
    fn size(&mut self, largest: usize) -> usize {
        self.draws.random_range(1..=largest)
    }

    fn values<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        let draw = |_| -> f32 { StandardNormal.sample(&mut self.draws) };
        let values: Vec<f32> = (0..shape.iter().product()).map(draw).collect();
        Tensor::from_data(TensorData::new(values, shape), (&self.device, self.dtype))
    }

    /// Values that do not lie in the order of the shape.
    fn strided(&mut self, [a, b, c, d]: [usize; 4]) -> Tensor<4> {
        match self.draws.random_range(0..3) {
            0 => self.values([a, b, c, d]),
            1 => self.values([a, c, b, d]).swap_dims(1, 2),
            _ => self.values([a, b, c, d + 3]).narrow(3, 2, d),
        }
    }
}

/// Each kernel's name and result.
type Results = Vec<(&'static str, Tensor<1>)>;

fn flat<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    x.flatten(0, D - 1)
}

fn ones(count: usize) -> Tensor<1> {
    Tensor::ones([count], &cpu())
}

fn zeros(count: usize) -> Tensor<1> {
    Tensor::zeros([count], &cpu())
}

fn products(round: &mut Round) -> Results {
    let (rows, inputs, outputs) = (round.size(70), round.size(300), round.size(140));
    let (x, bias) = (round.values([1, rows, inputs]), round.values([outputs]));
    let weight = round.values([outputs, inputs]);
    let halves = round.values([outputs, inputs]).cast(DType::BF16);
    vec![
        ("linear", flat(linear(x.clone(), weight, Some(bias)))),
        ("linear, bf16 weights", flat(linear(x.clone(), halves.clone(), None))),
        ("linear, one row", flat(linear(x.narrow(1, 0, 1), halves, None))),
    ]
}

fn mixes(round: &mut Round) -> Results {
    let (kv_heads, group, width) = (round.size(3), round.size(3), 2 * round.size(40));
    let (queries, past) = (round.size(60), round.draws.random_range(0..80));
    let [batch, keys, heads] = [round.size(2), queries + past, kv_heads * group];
    let q = round.strided([batch, queries, heads, width]);
    let [k, v] = [0; 2].map(|_| round.strided([batch, keys, kv_heads, width]));
    let mixed = |visibility| {
        let options = Attention { visibility, ..Default::default() };
        flat(attention(q.clone(), k.clone(), v.clone(), options))
    };
    let table = RotaryTable {
        cos: round.values([1, queries, width / 2]).cast(DType::F32),
        sin: round.values([1, queries, width / 2]).cast(DType::F32),
    };
    vec![
        ("attention", mixed(Visibility::All)),
        ("attention, causal", mixed(Visibility::Causal)),
        ("rotation of halves", flat(rotate_half(q.clone(), &table))),
        ("rotation of pairs", flat(rotate_interleaved(q.clone(), &table))),
    ]
}

fn rows(round: &mut Round) -> Results {
    let [batch, tokens, width] = [round.size(2), round.size(20), round.size(200)];
    let [x, y] = [0; 2].map(|_| round.strided([1, batch, tokens, width]).squeeze_dim::<3>(0));
    let [shift, scale, gate] = [0; 3].map(|_| round.values([batch, 1, width]));
    let [first, last] = split(x.clone(), 2, [width / 2, width - width / 2]);
    vec![
        ("rms norm", flat(rms_norm(x.clone(), ones(width), 1e-6))),
        ("layer norm", flat(affine_layer_norm(x.clone(), ones(width), zeros(width), 1e-6))),
        ("modulation", flat(modulate(x.clone(), shift, scale, 1e-6))),
        ("gelu", flat(gelu(x.clone()))),
        ("gated silu", flat(silu_mul(x.clone(), y.clone()))),
        ("gated gelu", flat(gelu_tanh_mul(x.clone(), y.clone()))),
        ("gated residual", flat(gated_residual(x, gate, y))),
        ("join", flat(cat(vec![last, first], 2))),
    ]
}

fn pictures(round: &mut Round) -> Results {
    let [groups, of_group, outputs] = [round.size(4), round.size(5), round.size(20)];
    let [batch, inputs, height, width] = [round.size(2), groups * of_group, 2 * round.size(9), 2 * round.size(20)];
    let x = round.strided([batch, inputs, height, width]);
    let mut filter = |outputs: usize, kernel: usize, stride: usize, padding: (usize, usize)| {
        let weight = round.values([outputs, inputs, kernel, kernel]).cast(DType::F32);
        Filter { weight, bias: zeros(outputs), stride, padding }
    };
    let (same, narrow) = (filter(outputs, 3, 1, (1, 1)), filter(outputs, 1, 1, (0, 0)));
    let halving = filter(inputs, 3, 2, (0, 1));
    let (weight, bias) = (ones(inputs), zeros(inputs));
    let norm = GroupNormOptions { weight, bias, num_groups: groups, epsilon: 1e-6, silu: false };
    let norm_silu = GroupNormOptions { silu: true, ..norm.clone() };
    vec![
        ("convolution", flat(conv2d(x.clone(), &same))),
        ("convolution, 1x1", flat(conv2d(x.clone(), &narrow))),
        ("convolution, halving", flat(conv2d(x.clone(), &halving))),
        ("convolution, doubling", flat(upsample_conv2d(x.clone(), &same))),
        ("group norm", flat(group_norm(x.clone(), &norm))),
        ("group norm, silu", flat(group_norm(x, &norm_silu))),
    ]
}

fn gradients(round: &mut Round) -> Results {
    let device = std::mem::replace(&mut round.device, cpu().autodiff());
    let [tokens, heads, width] = [8 + round.size(40), round.size(3), 4 * round.size(12)];
    let x = round.values([1, tokens, heads * width]).require_grad();
    // Scores of about one: gradients of a saturated softmax are rounding.
    let weight = (round.values([heads * width; 2]) / (heads * width) as f64).require_grad();
    let heads_of = |x: Tensor<3>| x.reshape([1, tokens, heads, width]);
    let projected =
        heads_of(linear(modulate(x.clone(), x.clone().mean_dim(1), x.clone().mean_dim(1), 1e-6), weight.clone(), None));
    let options = Attention { visibility: Visibility::Causal, ..Default::default() };
    let mixed = attention(projected.clone(), projected, heads_of(x.clone()), options);
    let mut all = silu_mul(rms_norm(mixed, ones(heads * width), 1e-6), x.clone()).sum().backward();
    let results = vec![
        ("gradient of the input", flat(x.grad_remove(&mut all).unwrap())),
        ("gradient of the weight", flat(weight.grad_remove(&mut all).unwrap())),
    ];
    round.device = device;
    results
}

/// Results of all kernels with the shapes and values of a seed, in f32.
fn results(seed: u64, dtype: DType) -> Vec<(&'static str, Vec<f32>)> {
    let kinds = [products, mixes, rows, pictures, gradients];
    let run = |(index, kind): (usize, &fn(&mut Round) -> Results)| {
        let draws = ChaCha8Rng::seed_from_u64(100 * seed + index as u64);
        kind(&mut Round { draws, dtype, device: cpu() })
    };
    let values = |x: Tensor<1>| x.cast(DType::F32).into_data().try_into_vec::<f32>().unwrap();
    kinds.iter().enumerate().flat_map(run).map(|(name, result)| (name, values(result))).collect()
}

#[test]
fn no_level_leaves_its_memory_and_all_give_the_same_numbers() {
    for seed in 0..12 {
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::BF16, 3e-2), (DType::F16, 4e-3)] {
            limit_cpu(CpuLevel::Portable);
            let expected = results(seed, dtype);
            for level in CpuLevel::available() {
                limit_cpu(level);
                let [found, again] = [End::First, End::Last].map(|end| guarded(end, || results(seed, dtype)));
                assert_eq!(found.len(), expected.len());
                for ((name, found), (_, expected)) in found.iter().zip(&expected) {
                    let drift = relative_drift(found, expected);
                    assert!(drift < tolerance, "{name}, {level:?}, {dtype:?}, seed {seed}: drift {drift:e}");
                }
                assert!(found == again, "{level:?}, {dtype:?}, seed {seed}: a second run differs");
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row_and_is_not_lost() {
    const SHAPE: [usize; 3] = [1, 4, 38];
    for (level, bad) in CpuLevel::available().flat_map(|level| [f32::NAN, f32::INFINITY].map(|bad| (level, bad))) {
        limit_cpu(level);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let mut round = Round { draws: ChaCha8Rng::seed_from_u64(1), dtype, device: cpu() };
            let good: Tensor<3> = round.values(SHAPE);
            let spot = Tensor::full([1, 1, 1], bad, (&cpu(), dtype));
            let x = good.clone().slice_assign([0..1, 2..3, 5..6], spot);
            let one: Tensor<3> = Tensor::ones([1, 1, SHAPE[2]], (&cpu(), dtype));
            let heads = x.clone().reshape([1, 4, 1, SHAPE[2]]);
            let angles = || Tensor::full([1, 4, SHAPE[2] / 2], 0.5, (&cpu(), DType::F32));
            let table = RotaryTable { cos: angles(), sin: angles() };
            let elements = [
                ("gelu", gelu(x.clone())),
                ("gated silu", silu_mul(x.clone(), one.clone().expand(SHAPE))),
                ("gated gelu", gelu_tanh_mul(x.clone(), one.clone().expand(SHAPE))),
                ("gated residual", gated_residual(good.clone(), one.clone(), x.clone())),
            ];
            let rows = [
                ("rms norm", rms_norm(x.clone(), ones(SHAPE[2]), 1e-6)),
                ("layer norm", affine_layer_norm(x.clone(), ones(SHAPE[2]), zeros(SHAPE[2]), 1e-6)),
                ("modulation", modulate(x.clone(), one.clone(), one, 1e-6)),
                ("rotation of halves", rotate_half(heads.clone(), &table).reshape(SHAPE)),
                ("rotation of pairs", rotate_interleaved(heads, &table).reshape(SHAPE)),
            ];
            let found = |y: &Tensor<3>| -> Vec<usize> {
                let values = flat(y.clone()).cast(DType::F32).into_data().try_into_vec::<f32>().unwrap();
                values.iter().enumerate().filter(|(_, value)| !value.is_finite()).map(|(index, _)| index).collect()
            };
            for (name, y) in &elements {
                assert_eq!(found(y), [2 * SHAPE[2] + 5], "{name}, {level:?}, {dtype:?}, {bad}");
            }
            for (name, y) in &rows {
                let rows: Vec<usize> = found(y).iter().map(|index| index / SHAPE[2]).collect();
                assert!(!rows.is_empty() && rows.iter().all(|row| *row == 2), "{name}, {level:?}, {dtype:?}, {bad}");
            }
        }
    }
}

#[test]
fn an_element_past_either_end_stops_the_process() {
    const TEST: &str = "an_element_past_either_end_stops_the_process";
    const OFFSET: &str = "NEXUS_TEST_OFFSET";
    if let Ok(offset) = std::env::var(OFFSET) {
        let offset: isize = offset.parse().unwrap();
        let end = if offset < 0 { End::First } else { End::Last };
        let values = guarded(end, || vec![1.0f32; 1001]);
        let at = values.as_ptr().wrapping_offset(offset);
        // SAFETY: not safe for -1 and 1001, which is what the parent process wants to see.
        #[allow(unsafe_code)]
        let value = unsafe { at.read_volatile() };
        assert_eq!(value, 1.0);
        return;
    }
    let run = |offset: &str| {
        let program = std::env::current_exe().unwrap();
        let child = std::process::Command::new(program).args([TEST, "--exact"]).env(OFFSET, offset).output().unwrap();
        child.status.success()
    };
    assert_eq!(["0", "1000", "-1", "1001"].map(run), [true, true, false, false]);
}
