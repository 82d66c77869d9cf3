//! What the programs of the lab have in common: arguments -> a loaded model, and files that appear whole.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nexus::{FloatDType, Nexus};

/// The small model of the repository.
const TINY_MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nexus-tiny");

/// Dtype of the activations.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum ComputeDtype {
    /// 32 bits.
    F32,
    /// bfloat16.
    Bf16,
    /// 16 bits.
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
#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// Directory with Nexus-GenV2/ and FLUX/FLUX.1-dev/
    #[arg(long, value_name = "DIR", default_value = TINY_MODEL, hide_default_value = true)]
    model: PathBuf,
    /// Device: cpu, cuda:0, wgpu, vulkan, metal, rocm (those compiled in)
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Dtype of the activations, if not the one that suits the device
    #[arg(long)]
    compute_dtype: Option<ComputeDtype>,
}

impl ModelArgs {
    /// Loads the model.
    ///
    /// # Errors
    /// What [`Nexus::loader`] says.
    pub fn load(&self) -> Result<Nexus> {
        let mut loader = Nexus::loader(&self.model);
        if let Some(dtype) = self.compute_dtype {
            loader = loader.compute_dtype(dtype.into());
        }
        Ok(loader.load(&self.device()?, ())?)
    }

    /// The device that was asked for.
    ///
    /// # Errors
    /// If it is not there.
    pub fn device(&self) -> Result<nexus::Device> {
        Ok(nexus::device(&self.device)?)
    }
}

/// Writes a file beside its place and puts it there whole.
///
/// # Errors
/// What the system says, with the path.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = path.with_added_extension("unfinished");
    fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, path)).with_context(|| path.display().to_string())
}
