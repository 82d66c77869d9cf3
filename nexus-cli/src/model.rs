//! Which model runs, and where: options -> a loaded model.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use nexus::{Device, FloatDType, Nexus, Quantization, Residency};

use crate::{Output, failure, watch::Watch};

/// A small model of a toy world, in a clone of the repository: it knows coloured shapes on plain backgrounds and nothing else.
const TINY_MODEL: &str = "assets/nexus-tiny";

/// Bits of a quantised weight.
#[derive(Clone, Copy, ValueEnum)]
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

/// Dtype of numbers.
#[derive(Clone, Copy, ValueEnum)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

impl From<Dtype> for FloatDType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::BF16,
            Dtype::F16 => Self::F16,
        }
    }
}

/// Which model, and on which device.
#[derive(clap::Args)]
#[command(next_help_heading = "Model and device")]
pub struct ModelArgs {
    /// Directory with Nexus-GenV2/ and FLUX/FLUX.1-dev/ [default: nexus-tiny, which knows coloured shapes alone]
    #[arg(short, long, alias = "ckpt_path", value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Directory with the FLUX files, if they are not beside the model
    #[arg(long, value_name = "DIR")]
    pub flux_path: Option<PathBuf>,
    /// cpu, cuda:0, wgpu, vulkan, metal, rocm: those of this build, which `nexus devices` lists
    #[arg(short, long, default_value = "cpu")]
    pub device: String,
    /// Dtype of the activations [default: what `nexus devices` shows]
    #[arg(long, alias = "compute_dtype")]
    dtype: Option<Dtype>,
    /// Keep the language model and the decoders in fewer bits, for devices with little memory
    #[arg(long, value_name = "BITS")]
    quantize: Option<Bits>,
    /// Free each stage before the next one is loaded, for little memory
    #[arg(long, alias = "enable_cpu_offload")]
    offload: bool,
}

/// Where a model is.
pub struct Place {
    pub dir: PathBuf,
    /// Whether it is nexus-tiny because no other was asked for.
    pub is_tiny: bool,
}

impl Place {
    /// The given directory, or that of nexus-tiny, with a note.
    pub fn of(model: Option<&Path>, output: &Output) -> Result<Self> {
        if let Some(dir) = model {
            return Ok(Self { dir: dir.to_path_buf(), is_tiny: false });
        }
        let dir = repository().join(TINY_MODEL);
        if !dir.is_dir() {
            return Err(failure::usage("no model: give its directory with --model DIR"));
        }
        output.note("no --model given: using nexus-tiny, a small model that knows coloured shapes and nothing else");
        Ok(Self { dir, is_tiny: true })
    }

    /// A picture to try nexus-tiny with.
    pub fn sample_image(&self) -> Option<PathBuf> {
        self.is_tiny.then(|| self.dir.join("sample.png"))
    }
}

impl ModelArgs {
    /// Loads a model with everything that the options say.
    pub fn load(&self, place: &Place, watch: &mut Watch<'_>) -> Result<Nexus> {
        watch.begin("load");
        let residency = if self.offload { Residency::OneStageAtATime } else { Residency::KeepAll };
        self.load_with(place, residency, watch)
    }

    /// Opens a model and compares all of its files with what it should have; the weights are not read.
    pub fn open(&self, place: &Place, watch: &mut Watch<'_>) -> Result<Nexus> {
        self.load_with(place, Residency::OneStageAtATime, watch)
    }

    fn load_with(&self, place: &Place, residency: Residency, watch: &mut Watch<'_>) -> Result<Nexus> {
        let mut loader = Nexus::loader(&place.dir).residency(residency);
        if let Some(dir) = &self.flux_path {
            loader = loader.flux_dir(dir);
        }
        if let Some(dtype) = self.dtype {
            loader = loader.compute_dtype(dtype.into());
        }
        if let Some(bits) = self.quantize {
            loader = loader.quantization(bits.into());
        }
        Ok(loader.load(&device(&self.device)?, watch.observer())?)
    }
}

/// The clone of the repository that the program was built in, on the computer that built it.
pub fn repository() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// The device of a name.
pub fn device(name: &str) -> Result<Device> {
    Ok(nexus::device(name)?)
}
