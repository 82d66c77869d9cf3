//! Choosing a device by name: `"cpu"`, `"cuda:0"`, … -> a burn device that is really there, and what it computes in.

use std::{
    fmt::{self, Display, Formatter},
    panic::AssertUnwindSafe,
};

use burn::tensor::{DType, Device, DeviceType, FloatDType, Tensor};
use nexus_core::{checkpoint::LoadDType, failure_reason};
use serde::{Deserialize, Serialize};

/// Names of the backends and how burn calls them, in the order of preference for messages.
fn compiled() -> Vec<(&'static str, DeviceType)> {
    vec![
        #[cfg(feature = "flex")]
        ("cpu", DeviceType::Flex),
        #[cfg(feature = "wgpu")]
        ("wgpu", DeviceType::Wgpu),
        #[cfg(feature = "vulkan")]
        ("vulkan", DeviceType::Vulkan),
        #[cfg(feature = "metal")]
        ("metal", DeviceType::Metal),
        #[cfg(feature = "cuda")]
        ("cuda", DeviceType::Cuda),
        #[cfg(feature = "rocm")]
        ("rocm", DeviceType::Rocm),
    ]
}

const KNOWN: [&str; 6] = ["cpu", "wgpu", "vulkan", "metal", "cuda", "rocm"];
/// Ones that a device adds before it is trusted; every partial sum is exact in f32.
const PROBE: usize = 1 << 20;

/// Finds a device by name: a backend (`cpu`, `wgpu`, `vulkan`, `metal`, `cuda`, `rocm`) and, after a colon, which of
/// its devices (0 if left out).
///
/// # Errors
/// [`DeviceError::Unknown`] for another name, [`DeviceError::NotCompiledIn`] if the feature is off,
/// [`DeviceError::NotFound`] if the machine has no such device, [`DeviceError::Unusable`] if it cannot add a million
/// ones.
pub fn device(name: &str) -> Result<Device, DeviceError> {
    let unknown = || DeviceError::Unknown { name: name.to_string() };
    let (backend, index) = match name.split_once(':') {
        None => (name, 0),
        Some((backend, index)) => (backend, index.parse::<usize>().map_err(|_| unknown())?),
    };
    let backend = KNOWN.into_iter().find(|known| *known == backend).ok_or_else(unknown)?;
    let compiled = compiled();
    let Some((_, device_type)) = compiled.iter().find(|(name, _)| *name == backend) else {
        let compiled = compiled.iter().map(|(name, _)| *name).collect();
        return Err(DeviceError::NotCompiledIn { backend, compiled });
    };
    let found: Vec<Device> = Device::enumerate(device_type.clone()).into_iter().collect();
    let count = found.len();
    let device = found.into_iter().nth(index).ok_or(DeviceError::NotFound { backend, index, found: count })?;
    probe(&device).map_err(|reason| DeviceError::Unusable { backend, index, reason })?;
    Ok(device)
}

/// Lets the device add; OpenGL, which burn takes where there is no Vulkan, may run and give wrong sums, and a device that
/// was lost gives nothing back or panics.
pub(crate) fn probe(device: &Device) -> Result<(), String> {
    let adds = || {
        let sum = Tensor::<1>::ones([PROBE], (device, DType::F32)).sum();
        let data = sum.try_into_data().map_err(|error| failure_reason(&error, device))?;
        let sums = data.try_into_vec_as::<f32>().map_err(|error| error.to_string())?;
        let sum = sums.first().ok_or("a sum came back empty")?;
        if *sum == PROBE as f32 { Ok(()) } else { Err(format!("it adds {PROBE} ones to {sum}")) }
    };
    std::panic::catch_unwind(AssertUnwindSafe(adds)).unwrap_or_else(|_| Err("its backend panics".to_string()))
}

/// What a device is called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// As it names itself; of a CPU its architecture.
    pub name: String,
    /// Its driver with the version, where WGPU tells.
    pub driver: Option<String>,
}

impl DeviceInfo {
    /// Asks the device, which is opened if it is not yet.
    pub fn of(device: &Device) -> Self {
        #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal", feature = "cuda", feature = "rocm"))]
        if let Some(identity) = device.identity() {
            return Self { driver: driver(&identity), name: identity.name };
        }
        let _ = device;
        Self { name: format!("{} CPU", std::env::consts::ARCH), driver: None }
    }
}

impl Display for DeviceInfo {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.driver.iter().try_for_each(|driver| write!(f, ", driver {driver}"))
    }
}

/// The driver of the adapter that burn opened, found by its name and by the numbers of vendor and device, which WGPU's
/// fingerprints end with.
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
fn driver(identity: &burn::tensor::DeviceIdentity) -> Option<String> {
    use burn::tensor::wgpu::wgpu::{Backends, Instance};
    use std::task::{Context, Poll, Waker};
    let asked = std::pin::pin!(Instance::default().enumerate_adapters(Backends::all()));
    // Outside of browsers the answer is there at once.
    let Poll::Ready(adapters) = asked.poll(&mut Context::from_waker(Waker::noop())) else { return None };
    let same = adapters.into_iter().map(|adapter| adapter.get_info()).find(|info| {
        info.name == identity.name && identity.fingerprint.ends_with(&format!("_{}_{}", info.vendor, info.device))
    });
    same.map(|info| format!("{} {}", info.driver, info.driver_info).trim().to_string())
}

#[cfg(all(any(feature = "cuda", feature = "rocm"), not(any(feature = "wgpu", feature = "vulkan", feature = "metal"))))]
fn driver(_: &burn::tensor::DeviceIdentity) -> Option<String> {
    None
}

/// Names of all devices that are there, for [`device`], which tells whether one can be used; never panics when a driver
/// is missing.
pub fn devices() -> Vec<String> {
    let names = |(backend, device_type): (&'static str, DeviceType)| {
        (0..Device::enumerate(device_type).len()).map(move |index| match (backend, index) {
            ("cpu", 0) => backend.to_string(),
            _ => format!("{backend}:{index}"),
        })
    };
    compiled().into_iter().flat_map(names).collect()
}

/// Dtypes of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// Of the weights in memory.
    pub weights: LoadDType,
    /// Of the activations; norms compute in f32.
    pub compute: FloatDType,
}

impl Precision {
    /// What suits a device: on a CPU weights as stored and f32 activations; elsewhere bf16 for both, or f32 where the
    /// device has no bf16. f16 is never chosen, because activations of T5 and Qwen2.5 go beyond its range.
    pub fn of(device: &Device) -> Self {
        if is_cpu(device) {
            return Self { weights: LoadDType::AsStored, compute: FloatDType::F32 };
        }
        let compute = if device.supports_dtype(FloatDType::BF16) { FloatDType::BF16 } else { FloatDType::F32 };
        Self { weights: LoadDType::Convert(compute), compute }
    }

    /// Fails if the device cannot compute in these dtypes.
    ///
    /// # Errors
    /// [`DeviceError::UnsupportedDType`].
    pub fn check(self, device: &Device) -> Result<(), DeviceError> {
        let weights = match self.weights {
            LoadDType::Convert(dtype) => Some(dtype),
            LoadDType::AsStored => None,
        };
        match [Some(self.compute), weights].into_iter().flatten().find(|&dtype| !device.supports_dtype(dtype)) {
            Some(dtype) => Err(DeviceError::UnsupportedDType { dtype }),
            None => Ok(()),
        }
    }
}

#[cfg(feature = "flex")]
fn is_cpu(device: &Device) -> bool {
    Device::enumerate(DeviceType::Flex).into_iter().any(|cpu| cpu == device.clone().inner())
}

#[cfg(not(feature = "flex"))]
fn is_cpu(_: &Device) -> bool {
    false
}

/// A device that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceError {
    /// Not the name of a device.
    #[error("`{name}` is not a device: use {}, with `:N` for the N-th of several", KNOWN.join(", "))]
    Unknown {
        /// Name given.
        name: String,
    },
    /// The backend was not compiled in.
    #[error("`{backend}` is not in this build, which has {}: build with the feature `{backend}`", list(compiled))]
    NotCompiledIn {
        /// Backend asked for.
        backend: &'static str,
        /// Backends of this build.
        compiled: Vec<&'static str>,
    },
    /// The device cannot compute in this dtype.
    #[error("the device has no {dtype:?}; leave the dtype out, or choose F32")]
    UnsupportedDType {
        /// Dtype asked for.
        dtype: FloatDType,
    },
    /// The device is there, and what it computes is wrong or fails.
    #[error(
        "`{backend}:{index}` cannot be used: {reason}; choose another device, or, where OpenGL is all that WGPU finds, \
         install a driver for Vulkan (on Linux that of the maker, or mesa-vulkan-drivers)"
    )]
    Unusable {
        /// Backend asked for.
        backend: &'static str,
        /// Which of its devices.
        index: usize,
        /// What it got wrong, or what the backend said.
        reason: String,
    },
    /// The machine has no such device.
    #[error("`{backend}:{index}` is not there: {found} device(s) of this kind were found")]
    NotFound {
        /// Backend asked for.
        backend: &'static str,
        /// Which of its devices.
        index: usize,
        /// How many were found.
        found: usize,
    },
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "no backend".to_string() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_device_are_refused() {
        for name in ["", "gpu", "cuda:x", "cpu:", "cpu:-1"] {
            assert_eq!(device(name).err(), Some(DeviceError::Unknown { name: name.to_string() }));
        }
    }

    #[cfg(feature = "flex")]
    #[test]
    fn the_cpu_is_there_once() {
        assert!(device("cpu").is_ok() && device("cpu:0").is_ok());
        assert_eq!(device("cpu:1").err(), Some(DeviceError::NotFound { backend: "cpu", index: 1, found: 1 }));
        assert_eq!(devices()[0], "cpu");
        let info = DeviceInfo::of(&device("cpu").unwrap());
        assert_eq!((info.to_string(), info.driver), (format!("{} CPU", std::env::consts::ARCH), None));
    }

    #[cfg(feature = "flex")]
    #[test]
    fn a_cpu_computes_in_f32_with_weights_as_stored() {
        let precision = Precision::of(&device("cpu").unwrap());
        assert_eq!(precision, Precision { weights: LoadDType::AsStored, compute: FloatDType::F32 });
        assert_eq!(precision.check(&device("cpu").unwrap()), Ok(()));
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_backend_that_is_not_compiled_in_says_so() {
        let error = device("cuda:0").err().unwrap();
        assert!(matches!(error, DeviceError::NotCompiledIn { backend: "cuda", .. }));
        assert!(error.to_string().contains("feature `cuda`"), "{error}");
    }
}
