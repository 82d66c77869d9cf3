//! For the tests of all nexus crates: fixture files -> tensors, beside the devices and comparisons of the kernels.
//!
//! Fixture files are safetensors with `in.*`, `out.*` and `tap.*` tensors, made by `lab/parity`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, missing_docs)]

#[cfg(feature = "autodiff")]
mod gradients;

use std::path::{Path, PathBuf};

use burn::tensor::{DType, FloatDType, Int, Tensor};
pub use nexus_kernels::testing::{
    assert_close, assert_close_tensors, cpu, device, input, ramp, relative_drift, tolerance,
};

#[cfg(feature = "autodiff")]
pub use gradients::{gradients_by_name, norm};
use nexus_checkpoint::{Checkpoint, LoadDType, LoadOptions};

/// How the parity tests load weights: as stored on the CPU, in f32 on another device, which may have no bf16.
pub fn load_options() -> LoadOptions {
    let dtype = if device() == cpu() { LoadDType::AsStored } else { LoadDType::Convert(FloatDType::F32) };
    LoadOptions { dtype, ..Default::default() }
}

/// One fixture file.
pub struct Fixture {
    file: Checkpoint,
}

impl Fixture {
    /// Opens `tests/fixtures/<name>.safetensors` of the workspace.
    pub fn open(name: &str) -> Self {
        Self::at(fixtures_dir().join(format!("{name}.safetensors")))
    }

    pub fn at(path: impl AsRef<Path>) -> Self {
        Self { file: Checkpoint::open(path).unwrap() }
    }

    pub fn has(&self, name: &str) -> bool {
        self.file.contains(name)
    }

    /// A tensor of the file, or an input that the metadata says is a [`ramp`].
    pub fn tensor<const D: usize>(&self, name: &str) -> Tensor<D> {
        if self.has(name) {
            return Tensor::from_data(self.file.data(name).unwrap(), (&device(), DType::F32));
        }
        #[derive(serde::Deserialize)]
        struct Ramp {
            ramp: usize,
            shape: Vec<usize>,
        }
        let mut inputs: std::collections::HashMap<String, Ramp> = self.meta("inputs");
        let Ramp { ramp: seed, shape } = inputs.remove(name).unwrap_or_else(|| panic!("no `{name}` in the fixture"));
        input(shape.try_into().unwrap(), seed)
    }

    /// A parameter of the fixture.
    pub fn meta<T: serde::de::DeserializeOwned>(&self, field: &str) -> T {
        let mut meta: serde_json::Value = serde_json::from_str(&self.file.metadata()["meta"]).unwrap();
        serde_json::from_value(meta[field].take()).unwrap_or_else(|error| panic!("meta `{field}`: {error}"))
    }

    pub fn ints<const D: usize>(&self, name: &str) -> Tensor<D, Int> {
        Tensor::from_data(self.file.data(name).unwrap(), &device())
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.file.data(name).unwrap().try_into_vec_as::<f32>().unwrap()
    }

    pub fn integers(&self, name: &str) -> Vec<i64> {
        self.file.data(name).unwrap().try_into_vec_as::<i64>().unwrap()
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.integers(name).into_iter().map(|id| u32::try_from(id).unwrap()).collect()
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.file.entry(name).unwrap().shape.clone()
    }
}

/// `tests/fixtures` at the root of the workspace.
pub fn fixtures_dir() -> PathBuf {
    workspace_dir().join("tests/fixtures")
}

/// The bundled tiny checkpoint with random weights.
pub fn random_models_dir() -> PathBuf {
    workspace_dir().join("assets/nexus-random")
}

fn workspace_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}
