//! The certificate: what was run, where, with which files, and what came out -> JSON.

use std::path::Path;

use anyhow::Result;
use nexus::{DeviceInfo, Quantization, checkpoint::LoadDType};
use nexus_core::testing::fixtures_dir;

use super::{
    hashes::{HashedFile, hash_below},
    model::ModelVerdict,
    stages::{Setting, Verdict},
};

/// Which versions are compiled in.
const LOCK: &str = include_str!("../../../Cargo.lock");

/// What `--output` and `--json` write.
#[derive(serde::Serialize)]
pub struct Certificate {
    pub device: String,
    /// What the device and its driver are called.
    pub info: DeviceInfo,
    /// Of the activations.
    pub dtype: String,
    /// `as stored`, or what all weights are converted to.
    pub weights_dtype: String,
    pub quantization: Option<Quantization>,
    pub nexus: &'static str,
    pub burn: &'static str,
    /// Backends of this build and their compilers of kernels, by the features that turn them on.
    pub features: Vec<&'static str>,
    pub target: String,
    pub weights: Vec<HashedFile>,
    /// What the outputs were compared with.
    pub fixtures: Vec<HashedFile>,
    #[serde(flatten)]
    pub results: Results,
}

/// What came out.
#[derive(serde::Serialize)]
pub struct Results {
    /// Bytes of the weights of nexus-tiny's large stages on the device, if every stage passes.
    pub bytes: Vec<(&'static str, usize)>,
    pub stages: Vec<Verdict>,
    /// The model of `--model`.
    pub model: Option<ModelVerdict>,
    pub passes: bool,
}

impl Certificate {
    pub fn new(device: String, setting: &Setting, results: Results) -> Result<Self> {
        let weights = |dir: &Path| hash_below(dir, &["safetensors", "bin"]);
        let mut hashes = weights(&setting.random)?;
        hashes.extend(weights(&setting.tiny)?);
        Ok(Self {
            device,
            info: DeviceInfo::of(&setting.device),
            dtype: format!("{:?}", setting.precision.compute),
            weights_dtype: match setting.precision.weights {
                LoadDType::AsStored => "as stored".to_string(),
                LoadDType::Convert(dtype) => format!("{dtype:?}"),
            },
            quantization: setting.quantization,
            nexus: env!("CARGO_PKG_VERSION"),
            burn: locked_version("burn").unwrap_or("unknown"),
            features: features(),
            target: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            weights: hashes,
            fixtures: hash_below(&fixtures_dir(), &["safetensors", "json", "png", "jpg", "webp"])?,
            results,
        })
    }
}

fn locked_version(package: &str) -> Option<&'static str> {
    let (_, entry) = LOCK.split_once(&format!("name = \"{package}\"\nversion = \""))?;
    entry.split('"').next()
}

fn features() -> Vec<&'static str> {
    [
        ("cpu", cfg!(feature = "cpu")),
        ("wgpu", cfg!(feature = "wgpu")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("metal", cfg!(feature = "metal")),
        ("cuda", cfg!(feature = "cuda")),
        ("cuda-nvrtc", cfg!(feature = "cuda-nvrtc")),
        ("rocm", cfg!(feature = "rocm")),
    ]
    .into_iter()
    .filter_map(|(name, on)| on.then_some(name))
    .collect()
}
