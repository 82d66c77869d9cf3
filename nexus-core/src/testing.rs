//! For the tests of all nexus crates: devices, fixtures, and comparisons that fail on NaN.
//!
//! Fixture files are safetensors with `in.*`, `out.*` and `tap.*` tensors, made by `lab/parity`.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, missing_docs)]

use std::{
    env::VarError,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use burn::tensor::{DType, Device, DeviceType, FloatDType, Int, Tensor, TensorData};

#[cfg(feature = "flex")]
pub use crate::kernels::{Level as CpuLevel, limit_cpu};
use nexus_checkpoint::{Checkpoint, LoadDType, LoadOptions};

/// The CPU device of the test build, which compiles in exactly one CPU backend.
pub fn cpu() -> Device {
    Device::enumerate(DeviceType::Flex).into_iter().next().unwrap()
}

/// The device of the parity tests and the benches: the CPU, or the one that `BURN_DEVICE` names as `nexus::device` takes it,
/// such as `cpu` or `cuda:1`.
///
/// # Panics
/// If there is no such device.
pub fn device() -> Device {
    static CHOSEN: OnceLock<Device> = OnceLock::new();
    let chosen = || match std::env::var("BURN_DEVICE") {
        Ok(name) => named(&name).unwrap_or_else(|reason| panic!("BURN_DEVICE: {reason}")),
        Err(VarError::NotPresent) => cpu(),
        Err(error) => panic!("BURN_DEVICE: {error}"),
    };
    CHOSEN.get_or_init(chosen).clone()
}

fn named(name: &str) -> Result<Device, String> {
    let (backend, index) = name.split_once(':').unwrap_or((name, "0"));
    let devices = match backend {
        "cpu" => vec![cpu()],
        "wgpu" | "vulkan" | "metal" | "cuda" | "rocm" => gpus(backend),
        _ => vec![],
    };
    match index.parse::<usize>() {
        Ok(index) if index < devices.len() => Ok(devices[index].clone()),
        _ => Err(format!(
            "`{name}` is not here ({} of `{backend}` found): use cpu, wgpu, vulkan, metal, cuda or rocm, with `:N` for the \
             N-th of several, in a build with the feature of that name",
            devices.len()
        )),
    }
}

/// Devices of a backend in burn's order. This crate has no features of their names, which burn's `DeviceType` goes by, so
/// CubeCL is asked. In a build with `wgpu` alone `vulkan` and `metal` are there too, with the shaders of `wgpu`.
#[cfg(feature = "cube")]
fn gpus(backend: &str) -> Vec<Device> {
    use burn_cubecl::{
        CubeDevice,
        cubecl::device::{RuntimeId, WgpuBackend, WgpuDevice, WgpuDeviceKind},
    };
    let of = |runtime| CubeDevice::enumerate_all().into_iter().filter(|device| device.runtime() == runtime).collect();
    let on = |api| {
        let kinds = [
            WgpuDeviceKind::DiscreteGpu(0),
            WgpuDeviceKind::IntegratedGpu(0),
            WgpuDeviceKind::VirtualGpu(0),
            WgpuDeviceKind::Cpu,
            WgpuDeviceKind::Other(0),
        ];
        let ids = kinds.map(|kind| CubeDevice::enumerate(CubeDevice::Wgpu(WgpuDevice::new(kind).on(api)).to_id()));
        ids.into_iter().flatten().map(CubeDevice::from_id).collect()
    };
    let devices: Vec<CubeDevice> = match backend {
        "cuda" => of(RuntimeId::Cuda),
        "rocm" => of(RuntimeId::Hip),
        "vulkan" => on(WgpuBackend::Vulkan),
        "metal" => on(WgpuBackend::Metal),
        _ => of(RuntimeId::Wgpu),
    };
    devices.into_iter().map(Device::new).collect()
}

#[cfg(not(feature = "cube"))]
fn gpus(_: &str) -> Vec<Device> {
    vec![]
}

/// How the parity tests load weights: as stored on the CPU, in f32 on another device, which may have no bf16.
pub fn load_options() -> LoadOptions {
    let dtype = if device() == cpu() { LoadDType::AsStored } else { LoadDType::Convert(FloatDType::F32) };
    LoadOptions { dtype, ..Default::default() }
}

/// Largest accepted drift on the device of the parity tests: other devices than the CPU add in other orders and
/// approximate functions.
pub fn tolerance(on_cpu: f32) -> f32 {
    if device() == cpu() || on_cpu == 0.0 { on_cpu } else { on_cpu.max(1e-4) }
}

/// Values in `-1..=1` from a formula that the parity scripts share: `(((i * 7919 + seed * 104729) mod 2003) - 1001) / 1001`.
pub fn ramp<const D: usize>(shape: [usize; D], seed: usize) -> Tensor<D> {
    let count = shape.iter().product();
    let value = |i: usize| (((i * 7919 + seed * 104_729) % 2003) as f32 - 1001.0) / 1001.0;
    Tensor::from_data(TensorData::new((0..count).map(value).collect(), shape), (&cpu(), DType::F32))
}

/// A [`ramp`] on the device of the tests.
pub fn input<const D: usize>(shape: [usize; D], seed: usize) -> Tensor<D> {
    ramp(shape, seed).to_device(&device())
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

/// Largest difference, relative to the largest expected magnitude; NaN anywhere gives infinity.
pub fn relative_drift(actual: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(actual.len(), expected.len(), "number of values");
    let largest = expected.iter().fold(0.0f32, |max, value| max.max(value.abs())).max(f32::MIN_POSITIVE);
    let mut worst = 0.0f32;
    for (a, e) in actual.iter().zip(expected) {
        let difference = (a - e).abs();
        if difference.is_nan() {
            return f32::INFINITY;
        }
        worst = worst.max(difference);
    }
    worst / largest
}

/// Asserts that the drift is at most the [`tolerance`].
#[track_caller]
pub fn assert_close<const D: usize>(actual: &Tensor<D>, expected: &[f32], on_cpu: f32) {
    let tolerance = tolerance(on_cpu);
    let actual = actual.to_data().try_into_vec_as::<f32>().unwrap();
    let drift = relative_drift(&actual, expected);
    println!("{}: drift {drift:.1e}", std::panic::Location::caller());
    assert!(drift <= tolerance, "drift {drift:e} is over {tolerance:e}");
}

#[track_caller]
pub fn assert_close_tensors<const D: usize>(actual: &Tensor<D>, expected: &Tensor<D>, tolerance: f32) {
    assert_eq!(actual.dims(), expected.dims(), "shape");
    assert_close(actual, &expected.to_data().try_into_vec_as::<f32>().unwrap(), tolerance);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_named_as_everywhere_else() {
        assert_eq!(named("cpu"), Ok(cpu()));
        assert_eq!(named("cpu:0"), Ok(cpu()));
    }

    #[test]
    fn what_is_no_device_of_this_build_is_refused_by_name() {
        for name in ["", "flex", "CPU", "cpu:1", "cpu:", "cpu:x", "cpu:-1", "cuda:999"] {
            let reason = named(name).unwrap_err();
            assert!(reason.contains(&format!("`{name}`")) && reason.contains("use cpu, wgpu"), "{reason}");
        }
    }

    #[test]
    fn only_other_devices_than_the_cpu_may_drift_more() {
        assert_eq!(tolerance(0.0), 0.0);
        assert_eq!(tolerance(1e-3), 1e-3);
        assert_eq!(tolerance(1e-6), if device() == cpu() { 1e-6 } else { 1e-4 });
    }
}
