//! Where the benches run: the device of the process -> tensors on it in the dtype that it computes in.

use std::sync::OnceLock;

use burn::tensor::{FloatDType, Tensor};
use nexus::{Device, Precision};
use nexus_core::testing;

static DEVICE: OnceLock<Device> = OnceLock::new();
static COMPUTE: OnceLock<FloatDType> = OnceLock::new();

/// Chooses the device before anything runs; without this, it is that of the tests, [`testing::device`].
pub fn choose(device: Device) {
    // The first choice stays.
    let _ = DEVICE.set(device);
}

pub fn device() -> Device {
    DEVICE.get_or_init(testing::device).clone()
}

/// Chooses the dtype of the activations before anything runs; without this, it is what suits the device.
pub fn choose_compute(dtype: FloatDType) {
    // The first choice stays.
    let _ = COMPUTE.set(dtype);
}

/// Dtype of the activations.
pub fn compute() -> FloatDType {
    *COMPUTE.get_or_init(|| Precision::of(&device()).compute)
}

/// The input that all programs share, see [`testing::ramp`].
pub fn ramp<const D: usize>(shape: [usize; D], seed: usize) -> Tensor<D> {
    testing::ramp(shape, seed).to_device(&device()).cast(compute())
}
