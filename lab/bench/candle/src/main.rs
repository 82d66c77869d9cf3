//! How fast are candle's FLUX transformer and autoencoder? One stage per process, over the weights of `nexus bench write`
//! converted to f32; prints the line of JSON that `lab/bench/compare.py --candle` reads.

use std::{
    fs,
    path::{Path, PathBuf},
    process::exit,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::flux::{
    WithForward,
    autoencoder::{AutoEncoder, Config as AutoencoderConfig},
    model::{Config, Flux},
};
use clap::Parser;
use serde_json::json;

/// Tells `compare.py` that there is nothing to compare with.
const NO_SUCH_STAGE: i32 = 3;

const IMAGE_TOKENS: usize = 81;
const LATENTS: usize = 64;

/// The options of `nexus bench run`.
#[derive(Parser)]
struct Arguments {
    stage: String,
    #[arg(long)]
    models: PathBuf,
    #[arg(long, default_value_t = 5)]
    runs: usize,
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    #[arg(long)]
    output: Option<PathBuf>,
}

type Work = Box<dyn Fn() -> Result<Tensor>>;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let start_bytes = peak_bytes();
    let start = Instant::now();
    let work = match arguments.stage.as_str() {
        "dit_step_generation" => step(&arguments.models, zero_positions(IMAGE_TOKENS)?)?,
        "dit_step_editing" => step(&arguments.models, editing_positions()?)?,
        "ae_decode_256" => draw(&arguments.models, 32)?,
        "ae_decode_512" => draw(&arguments.models, 64)?,
        _ => exit(NO_SUCH_STAGE),
    };
    let load_seconds = start.elapsed().as_secs_f64();
    let values = work()?.flatten_all()?.to_vec1::<f32>()?;
    let mut times = vec![];
    let start = Instant::now();
    while times.is_empty()
        || (times.len() < arguments.runs && start.elapsed() < Duration::from_secs_f64(arguments.seconds))
    {
        let start = Instant::now();
        std::hint::black_box(work()?);
        times.push(start.elapsed().as_secs_f64());
    }
    let peak_bytes = peak_bytes();
    if let Some(output) = arguments.output {
        fs::write(output, values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
    }
    let mut sorted = times.clone();
    sorted.sort_by(f64::total_cmp);
    let line = json!({
        "stage": arguments.stage,
        "program": "candle 0.11.1",
        "dtype": "f32",
        "median": (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0,
        "min": sorted.first(),
        "max": sorted.last(),
        "times": times,
        "threads": candle_core::utils::get_num_threads(),
        "load_seconds": load_seconds,
        "start_bytes": start_bytes,
        "peak_bytes": peak_bytes,
    });
    println!("{line}");
    Ok(())
}

/// The inputs of all programs: a formula, in -1..1.
fn ramp(shape: &[usize], seed: usize) -> Result<Tensor> {
    let value = |i: usize| (((i * 7919 + seed * 104_729) % 2003) as f32 - 1001.0) / 1001.0;
    let values = (0..shape.iter().product()).map(value).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

fn zero_positions(tokens: usize) -> Result<Tensor> {
    Ok(Tensor::zeros((1, tokens, 3), DType::F32, &Device::Cpu)?)
}

/// Of the tokens of the picture to draw (9x9) and of the reference (18x18), in the scale of the latents.
fn editing_positions() -> Result<Tensor> {
    let mut values = vec![];
    for (picture, side) in [(0.0, 9), (1.0, 18)] {
        let step = LATENTS as f32 / (2 * side) as f32;
        let token = |i: usize| [picture, (i / side) as f32 * step, (i % side) as f32 * step];
        values.extend((0..side * side).flat_map(token));
    }
    let tokens = values.len() / 3;
    Ok(Tensor::from_vec(values, (1, tokens, 3), &Device::Cpu)?)
}

/// One step of the middle-size transformer, from noise to picture.
fn step(models: &Path, text_positions: Tensor) -> Result<Work> {
    let config = Config {
        context_in_dim: 1024,
        hidden_size: 1024,
        num_heads: 8,
        depth: 4,
        depth_single_blocks: 8,
        ..Config::dev()
    };
    let path = models.join("FLUX/FLUX.1-dev/flux1-dev.safetensors");
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu)?;
    for tensor in tensors.values_mut() {
        *tensor = tensor.to_dtype(DType::F32)?;
    }
    // The file has the rows in the order of the decoders, scale before shift.
    for name in ["weight", "bias"] {
        let rows = tensors.get_mut(&format!("final_layer.adaLN_modulation.1.{name}")).context("the output modulation")?;
        let halves = rows.chunk(2, 0)?;
        *rows = Tensor::cat(&[&halves[1], &halves[0]], 0)?;
    }
    let flux = Flux::new(&config, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))?;
    let half = LATENTS / 2;
    let positions = (0..half * half).flat_map(|i| [0.0, (i / half) as f32, (i % half) as f32]).collect();
    let image_positions = Tensor::from_vec(positions, (1, half * half, 3), &Device::Cpu)?;
    let text = ramp(&[1, text_positions.dim(1)?, config.context_in_dim], 1)?;
    let pooled = ramp(&[1, config.vec_in_dim], 2)?;
    let latents = ramp(&[16, LATENTS, LATENTS], 3)?;
    let scalar = |value: f32| Tensor::from_vec(vec![value], 1, &Device::Cpu);
    let (timestep, guidance) = (scalar(1.0)?, scalar(2.0)?);
    Ok(Box::new(move || {
        let squares = latents.reshape(&[16, half, 2, half, 2])?.permute([1, 3, 0, 2, 4])?;
        let image = squares.reshape((1, half * half, 64))?;
        let velocity =
            flux.forward(&image, &image_positions, &text, &text_positions, &timestep, &pooled, Some(&guidance))?;
        let velocity = velocity.reshape(&[half, half, 16, 2, 2])?.permute([2, 0, 3, 1, 4])?;
        Ok((&latents - velocity.reshape((16, LATENTS, LATENTS))?)?)
    }))
}

/// The released autoencoder draws a square.
fn draw(models: &Path, side: usize) -> Result<Work> {
    let mut tensors = candle_core::safetensors::load(models.join("FLUX/FLUX.1-dev/ae.safetensors"), &Device::Cpu)?;
    for tensor in tensors.values_mut() {
        *tensor = tensor.to_dtype(DType::F32)?;
    }
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let autoencoder = AutoEncoder::new(&AutoencoderConfig::dev(), weights)?;
    let latents = ramp(&[1, 16, side, side], 1)?;
    Ok(Box::new(move || Ok(autoencoder.decode(&latents)?)))
}

fn peak_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
