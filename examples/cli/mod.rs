//! What the examples share: arguments -> a loaded model, and progress events -> a bar on the terminal.
#![allow(dead_code)] // Each example uses its part.

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use nexus::{FloatDType, Nexus, Progress, Quantization, Residency};

/// Keeps freed memory for the next tensor; the system's allocator gives every large one back at once.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A small model of a toy world: it knows coloured shapes on plain backgrounds and nothing else.
const TINY_MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/nexus-tiny");

/// A picture of that world to ask about or to edit.
pub const SAMPLE_IMAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/nexus-tiny/scene.png");

/// Writes a file beside its place and puts it there whole.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = path.with_added_extension("unfinished");
    fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, path)).with_context(|| path.display().to_string())
}

/// Bits of a quantised weight.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Bits {
    Q8,
    Q4,
}

impl From<Bits> for Quantization {
    fn from(bits: Bits) -> Self {
        match bits {
            Bits::Q8 => Self::Q8,
            Bits::Q4 => Self::Q4,
        }
    }
}

/// Dtype of the activations.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum ComputeDtype {
    F32,
    Bf16,
    F16,
}

impl From<ComputeDtype> for FloatDType {
    fn from(dtype: ComputeDtype) -> Self {
        match dtype {
            ComputeDtype::F32 => Self::F32,
            ComputeDtype::Bf16 => Self::BF16,
            ComputeDtype::F16 => Self::F16,
        }
    }
}

/// Which model runs, and where.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Directory with Nexus-GenV2/ and FLUX/FLUX.1-dev/; without it, nexus-tiny, which knows coloured shapes alone
    #[arg(long, alias = "ckpt_path", value_name = "DIR")]
    model: Option<PathBuf>,
    /// Directory with the FLUX files, if they are not beside the model
    #[arg(long = "flux_path", value_name = "DIR")]
    flux_path: Option<PathBuf>,
    /// Device: cpu, cuda:0, wgpu, vulkan, metal, rocm (those compiled in)
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Dtype of the activations, if not the one that the `devices` example shows; on CPUs that multiply bf16, that is fastest
    #[arg(long = "compute_dtype")]
    compute_dtype: Option<ComputeDtype>,
    /// Keep the language model and the decoders in fewer bits, for devices with little memory
    #[arg(long)]
    quantize: Option<Bits>,
    /// Free each stage before the next one is loaded
    #[arg(long = "enable_cpu_offload")]
    enable_cpu_offload: bool,
}

impl ModelArgs {
    /// Loads the model.
    pub fn load(&self) -> Result<Nexus> {
        env_logger::builder().filter_level(log::LevelFilter::Warn).parse_default_env().init();
        let residency = if self.enable_cpu_offload { Residency::OneStageAtATime } else { Residency::KeepAll };
        let mut loader = Nexus::loader(self.dir()).residency(residency);
        if let Some(dir) = &self.flux_path {
            loader = loader.flux_dir(dir);
        }
        if let Some(dtype) = self.compute_dtype {
            loader = loader.compute_dtype(dtype.into());
        }
        if let Some(bits) = self.quantize {
            loader = loader.quantization(bits.into());
        }
        Ok(loader.load(&self.device()?, ())?)
    }

    /// The device that was asked for.
    pub fn device(&self) -> Result<nexus::Device> {
        Ok(nexus::device(&self.device)?)
    }

    /// Directory of the model; says so if it is the small one.
    pub fn dir(&self) -> PathBuf {
        self.model.clone().unwrap_or_else(|| {
            eprintln!("no --model given: using nexus-tiny, a small model that knows coloured shapes and nothing else");
            PathBuf::from(TINY_MODEL)
        })
    }
}

/// How a picture is drawn, under the names of the original's scripts.
#[derive(clap::Args, Clone)]
pub struct DrawArgs {
    /// Width in pixels, rounded up to a multiple of 16; 512 if the model has no size of its own
    #[arg(long)]
    pub width: Option<usize>,
    /// Height in pixels, rounded up to a multiple of 16; 512 if the model has no size of its own
    #[arg(long)]
    pub height: Option<usize>,
    /// Denoising steps; 50 if the model has no number of its own
    #[arg(long = "num_inference_steps")]
    pub num_inference_steps: Option<usize>,
    /// What the picture should not show; used if --cfg_scale is not 1
    #[arg(long = "negative_prompt")]
    pub negative_prompt: Option<String>,
    /// Guidance that is embedded into the transformer; 3.5 if the model has none of its own
    #[arg(long = "embedded_guidance")]
    pub embedded_guidance: Option<f64>,
    /// Classifier-free guidance; 1 is off and twice as fast
    #[arg(long = "cfg_scale")]
    pub cfg_scale: Option<f64>,
    /// Seed of the noise that the picture starts from
    #[arg(long)]
    pub seed: Option<u64>,
    /// Draw in overlapping tiles, for large pictures
    #[arg(long)]
    pub tiled: bool,
}

/// Puts what was given on the command line over the model's options for generation or editing.
#[macro_export]
macro_rules! draw_options {
    ($options:expr, $args:expr) => {{
        let (mut options, args) = ($options, $args);
        let draw = &mut options.draw;
        draw.width = args.width.unwrap_or(draw.width);
        draw.height = args.height.unwrap_or(draw.height);
        draw.steps = args.num_inference_steps.unwrap_or(draw.steps);
        draw.cfg_scale = args.cfg_scale.unwrap_or(draw.cfg_scale);
        draw.embedded_guidance = args.embedded_guidance.unwrap_or(draw.embedded_guidance);
        draw.negative_prompt = args.negative_prompt.unwrap_or(std::mem::take(&mut draw.negative_prompt));
        if let Some(seed) = args.seed {
            draw.noise = nexus::Noise::Seed(seed);
        }
        draw.tiled |= args.tiled;
        options
    }};
}

/// An observer that shows a bar with the stage at work, the steps done and the time left.
pub fn progress() -> impl FnMut(Progress) -> ControlFlow<()> {
    let bar = ProgressBar::no_length();
    bar.enable_steady_tick(Duration::from_millis(100));
    let spinner = ProgressStyle::with_template("{spinner} {msg}");
    let steps = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {pos}/{len} steps, {eta} left");
    if let Ok(style) = &spinner {
        bar.set_style(style.clone());
    }
    let mut text = String::new();
    move |event| {
        match event {
            Progress::Loading(stage) => bar.set_message(format!("loading the {stage}")),
            Progress::Running(stage) => bar.set_message(stage.to_string()),
            Progress::PromptRead { tokens, .. } => bar.set_message(format!("{tokens} prompt tokens read")),
            Progress::Text(piece) => {
                text.push_str(&piece);
                bar.set_message(text.replace('\n', " "));
            }
            Progress::SizeRounded { asked, used } => {
                bar.println(format!("{}x{} is drawn as {}x{}", asked.0, asked.1, used.0, used.1));
            }
            Progress::Step { done: 0, total } => {
                bar.set_length(total as u64);
                if let Ok(style) = &steps {
                    bar.set_style(style.clone());
                }
            }
            Progress::Step { done, total } => {
                bar.set_position(done as u64);
                if done == total
                    && let Ok(style) = &spinner
                {
                    bar.set_style(style.clone());
                }
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }
}
