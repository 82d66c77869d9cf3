//! For the tests of all nexus crates: devices, inputs, and comparisons that fail on NaN.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, missing_docs)]

use std::{env::VarError, sync::OnceLock};

use burn::tensor::{DType, Device, DeviceType, Tensor, TensorData};

#[cfg(any(feature = "cpu", feature = "gpu"))]
pub use crate::fast::taken_by_kernels;

#[cfg(feature = "cpu")]
pub use crate::cpu::{Instructions as CpuLevel, limit_cpu};

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
#[cfg(feature = "gpu")]
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

#[cfg(not(feature = "gpu"))]
fn gpus(_: &str) -> Vec<Device> {
    vec![]
}

/// Where the values of an f32 tensor on the CPU lie.
#[cfg(feature = "cpu")]
pub fn address<const D: usize>(tensor: &Tensor<D>) -> *const f32 {
    crate::cpu::View::of(tensor).unwrap().values::<f32>().as_ptr()
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

/// A [`relative_drift`], or relative to one twentieth where all values are rounding.
pub fn scaled_drift(actual: &[f32], expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(1e-30f32, |largest, value| largest.max(value.abs()));
    relative_drift(actual, expected) * (largest / largest.max(0.05))
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
