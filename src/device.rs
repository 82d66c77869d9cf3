//! Choosing a device by name: `"cpu"`, `"cuda:0"`, … -> a burn device that is really there, and what it computes in.

use std::{
    any::Any,
    fmt::{self, Display, Formatter},
    panic::AssertUnwindSafe,
};

use burn::tensor::{DType, Device, DeviceType, FloatDType, Tensor};
use nexus_checkpoint::LoadDType;
use nexus_core::failure_reason;
use serde::{Deserialize, Serialize};

/// Names of the backends and how burn calls them, in the order of preference for messages.
fn compiled() -> Vec<(&'static str, DeviceType)> {
    vec![
        #[cfg(feature = "cpu")]
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
/// ones. All but the last say what was compiled in and which devices were found.
pub fn device(name: &str) -> Result<Device, DeviceError> {
    let Choice { backend, index, device } = choose(name, &compiled(), enumerate)?;
    probe(&device).map_err(|reason| DeviceError::Unusable { backend, index, reason })?;
    Ok(device)
}

/// Names of all devices that are there, for [`device`], which tells whether one can be used; never panics when a driver
/// is missing.
pub fn devices() -> Vec<String> {
    names(&compiled(), enumerate)
}

fn enumerate(device_type: &DeviceType) -> Vec<Device> {
    Device::enumerate(device_type.clone()).into_iter().collect()
}

/// A device among those that were found.
#[derive(Debug, PartialEq, Eq)]
struct Choice<D> {
    backend: &'static str,
    index: usize,
    device: D,
}

/// Chooses by name among backends and the devices that `found` gives for each; a backend that is not asked for is left
/// alone, unless there is an error to make.
fn choose<K, D>(
    name: &str,
    compiled: &[(&'static str, K)],
    found: impl Fn(&K) -> Vec<D>,
) -> Result<Choice<D>, DeviceError> {
    let here = || (compiled.iter().map(|(backend, _)| *backend).collect(), names(compiled, &found));
    let Some((backend, index)) = parse(name) else {
        let (compiled, found) = here();
        return Err(DeviceError::Unknown { name: name.to_string(), compiled, found });
    };
    let Some((_, kind)) = compiled.iter().find(|(compiled, _)| *compiled == backend) else {
        let (compiled, found) = here();
        return Err(DeviceError::NotCompiledIn { backend, compiled, found });
    };
    let Some(device) = found(kind).into_iter().nth(index) else {
        let (compiled, found) = here();
        return Err(DeviceError::NotFound { backend, index, compiled, found });
    };
    Ok(Choice { backend, index, device })
}

/// Backend and index of a name; `None` if it has another form.
fn parse(name: &str) -> Option<(&'static str, usize)> {
    let (backend, index) = match name.split_once(':') {
        None => (name, 0),
        // Numbers of Rust may begin with a plus.
        Some((_, index)) if !index.bytes().all(|byte| byte.is_ascii_digit()) => return None,
        Some((backend, index)) => (backend, index.parse().ok()?),
    };
    Some((KNOWN.into_iter().find(|known| *known == backend)?, index))
}

/// Names of all devices; the first CPU needs no number.
fn names<K, D>(compiled: &[(&'static str, K)], found: impl Fn(&K) -> Vec<D>) -> Vec<String> {
    let of = |(backend, kind): &(&'static str, K)| {
        let backend = *backend;
        (0..found(kind).len()).map(move |index| match (backend, index) {
            ("cpu", 0) => backend.to_string(),
            _ => format!("{backend}:{index}"),
        })
    };
    compiled.iter().flat_map(of).collect()
}

/// Lets the device add; OpenGL, which burn takes where there is no Vulkan, may run and give wrong sums, and a device that
/// was lost gives nothing back or panics.
pub(crate) fn probe(device: &Device) -> Result<(), String> {
    let adds = || {
        // What is held for reuse may be all that the device has.
        device.memory_cleanup();
        let sum = Tensor::<1>::ones([PROBE], (device, DType::F32)).sum();
        let data = sum.try_into_data().map_err(|error| failure_reason(&error, device))?;
        let sums = data.try_into_vec_as::<f32>().map_err(|error| error.to_string())?;
        let sum = sums.first().ok_or("a sum came back empty")?;
        if *sum == PROBE as f32 { Ok(()) } else { Err(format!("it adds {PROBE} ones to {sum}")) }
    };
    let panicked = |panic: Box<dyn Any + Send>| Err(format!("its backend panics: {}", panic_text(&*panic)));
    std::panic::catch_unwind(AssertUnwindSafe(adds)).unwrap_or_else(panicked)
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it gives no reason").to_string()
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

/// Dtypes of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// Of the weights in memory.
    pub weights: LoadDType,
    /// Of the activations; norms and softmax compute in f32.
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

#[cfg(feature = "cpu")]
pub(crate) fn is_cpu(device: &Device) -> bool {
    Device::enumerate(DeviceType::Flex).into_iter().any(|cpu| cpu == device.clone().inner())
}

#[cfg(not(feature = "cpu"))]
pub(crate) fn is_cpu(_: &Device) -> bool {
    false
}

/// A device that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceError {
    /// Not the name of a device.
    #[error(
        "`{name}` is not a device: use {}, with `:N` for the N-th of several, counted from 0; {}",
        KNOWN.join(", "), here(compiled, found)
    )]
    Unknown {
        /// Name given.
        name: String,
        /// Backends of this build.
        compiled: Vec<&'static str>,
        /// Devices that were found.
        found: Vec<String>,
    },
    /// The backend was not compiled in.
    #[error(
        "`{backend}` is not in this build: build with the feature `{backend}`, which needs {}; {}",
        needs(backend),
        here(compiled, found)
    )]
    NotCompiledIn {
        /// Backend asked for.
        backend: &'static str,
        /// Backends of this build.
        compiled: Vec<&'static str>,
        /// Devices that were found.
        found: Vec<String>,
    },
    /// The device cannot compute in this dtype.
    #[error("the device has no {dtype:?}; leave the dtype out, or choose F32")]
    UnsupportedDType {
        /// Dtype asked for.
        dtype: FloatDType,
    },
    /// The device is there, and what it computes is wrong or fails.
    #[error(
        "`{backend}:{index}` cannot be used: {reason}; choose another device, or see that there is {}",
        needs(backend)
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
    #[error(
        "`{backend}:{index}` is not there: choose one that is, or see that there is {}; {}",
        needs(backend),
        here(compiled, found)
    )]
    NotFound {
        /// Backend asked for.
        backend: &'static str,
        /// Which of its devices.
        index: usize,
        /// Backends of this build.
        compiled: Vec<&'static str>,
        /// Devices that were found.
        found: Vec<String>,
    },
}

/// What this build and this machine have.
fn here(compiled: &[&str], found: &[String]) -> String {
    let list = |names: String| if names.is_empty() { "none".to_string() } else { names };
    format!(
        "backends of this build: {}; devices found: {} (`nexus devices` tells more)",
        list(compiled.join(", ")),
        list(found.join(", "))
    )
}

/// What a machine must have for a backend.
fn needs(backend: &str) -> &'static str {
    match backend {
        "wgpu" => {
            "a driver for Vulkan, Metal or DirectX 12, without which OpenGL is taken, which may compute wrongly (on Linux \
             that of the GPU's maker, or mesa-vulkan-drivers)"
        }
        "vulkan" => "a driver for Vulkan (on Linux that of the GPU's maker)",
        "metal" => "macOS with a GPU",
        "cuda" => "an NVIDIA GPU with its driver and the CUDA toolkit (`nvidia-smi` lists such GPUs)",
        "rocm" => "an AMD GPU with ROCm (`rocminfo` lists such GPUs)",
        _ => "nothing but a CPU",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chooses in a build with the CPU and CUDA, on a machine with so many GPUs.
    fn choose_with(gpus: usize, name: &str) -> Result<Choice<usize>, DeviceError> {
        choose(name, &[("cpu", 1), ("cuda", gpus)], |&count| (0..count).collect())
    }

    #[test]
    fn devices_are_chosen_by_backend_and_number() {
        for (name, backend, index) in
            [("cpu", "cpu", 0), ("cpu:0", "cpu", 0), ("cuda", "cuda", 0), ("cuda:0", "cuda", 0), ("cuda:1", "cuda", 1)]
        {
            assert_eq!(choose_with(2, name), Ok(Choice { backend, index, device: index }), "{name}");
        }
        assert_eq!(names(&[("cpu", 1), ("cuda", 2), ("wgpu", 0)], |&n| vec![(); n]), ["cpu", "cuda:0", "cuda:1"]);
    }

    #[test]
    fn a_backend_that_is_not_asked_for_is_not_enumerated() {
        let asked = std::cell::RefCell::new(vec![]);
        let found = |kind: &&'static str| {
            asked.borrow_mut().push(*kind);
            vec![()]
        };
        assert!(choose("cpu", &[("cpu", "flex"), ("cuda", "cuda")], found).is_ok());
        assert_eq!(*asked.borrow(), ["flex"]);
    }

    #[test]
    fn names_that_are_no_device_are_refused_with_what_there_is() {
        let names =
            ["", ":", ":0", "gpu", "CPU", "Cuda:0", " cpu", "cuda:", "cuda:x", "cuda:-1", "cuda:+1", "cuda:1:2"];
        for name in names.into_iter().chain(["cpu:", "cuda:99999999999999999999", "cuda 0", "cuda:0 "]) {
            let expected = DeviceError::Unknown {
                name: name.to_string(),
                compiled: vec!["cpu", "cuda"],
                found: ["cpu", "cuda:0", "cuda:1"].map(str::to_string).to_vec(),
            };
            assert_eq!(choose_with(2, name).unwrap_err(), expected);
            let text = expected.to_string();
            for part in ["use cpu, wgpu", "build: cpu, cuda;", "found: cpu, cuda:0, cuda:1", "`nexus devices`"] {
                assert!(text.contains(part), "{text} without {part}");
            }
        }
    }

    #[test]
    fn a_number_too_high_or_no_device_at_all_says_what_was_found_and_what_to_do() {
        for (gpus, index, found) in [(2, 2, "cpu, cuda:0, cuda:1"), (0, 0, "cpu"), (1, usize::MAX, "cpu, cuda:0")] {
            let error = choose_with(gpus, &format!("cuda:{index}")).unwrap_err();
            assert!(
                matches!(&error, DeviceError::NotFound { backend: "cuda", index: i, .. } if *i == index),
                "{error}"
            );
            let text = error.to_string();
            for part in [format!("found: {found} ("), "build: cpu, cuda;".to_string(), "nvidia-smi".to_string()] {
                assert!(text.contains(&part), "{text} without {part}");
            }
        }
    }

    #[test]
    fn a_backend_that_is_not_compiled_in_says_which_feature_it_needs() {
        let compiled = vec!["cpu", "cuda"];
        let error = choose_with(1, "vulkan:3").unwrap_err();
        let found = ["cpu", "cuda:0"].map(str::to_string).to_vec();
        assert_eq!(error, DeviceError::NotCompiledIn { backend: "vulkan", compiled, found });
        assert!(error.to_string().contains("feature `vulkan`, which needs a driver for Vulkan"), "{error}");
        assert!(error.to_string().contains("found: cpu, cuda:0 ("), "{error}");

        let none: [(&str, usize); 0] = [];
        let error = choose("cpu", &none, |_| Vec::<()>::new()).unwrap_err().to_string();
        assert!(error.contains("feature `cpu`"), "{error}");
        assert!(error.contains("build: none; devices found: none"), "{error}");
    }

    #[test]
    fn advice_is_for_the_backend_that_cannot_be_used() {
        let text = |backend| DeviceError::Unusable { backend, index: 0, reason: "it fails".to_string() }.to_string();
        assert!(text("wgpu").contains("OpenGL") && text("wgpu").contains("it fails"));
        for backend in KNOWN.into_iter().filter(|&backend| backend != "wgpu") {
            assert!(!text(backend).contains("OpenGL"), "{}", text(backend));
        }
        assert!(text("cuda").contains("CUDA toolkit") && text("rocm").contains("ROCm"));
    }

    #[test]
    fn what_a_panic_said_is_kept() {
        let said = |panic: fn()| panic_text(&*std::panic::catch_unwind(panic).unwrap_err());
        assert_eq!(said(|| panic!("no driver")), "no driver");
        assert_eq!(said(|| panic!("error {}", 7)), "error 7");
        assert_eq!(said(|| std::panic::panic_any(7)), "it gives no reason");
    }

    #[cfg(feature = "cpu")]
    #[test]
    fn the_cpu_is_there_once() {
        assert!(device("cpu").is_ok() && device("cpu:0").is_ok());
        let error = device("cpu:1").err().unwrap();
        assert!(matches!(error, DeviceError::NotFound { backend: "cpu", index: 1, .. }), "{error}");
        assert_eq!(devices()[0], "cpu");
        let info = DeviceInfo::of(&device("cpu").unwrap());
        assert_eq!((info.to_string(), info.driver), (format!("{} CPU", std::env::consts::ARCH), None));
    }

    #[cfg(feature = "cpu")]
    #[test]
    fn a_cpu_computes_in_f32_with_weights_as_stored() {
        let precision = Precision::of(&device("cpu").unwrap());
        assert_eq!(precision, Precision { weights: LoadDType::AsStored, compute: FloatDType::F32 });
        assert_eq!(precision.check(&device("cpu").unwrap()), Ok(()));
    }

    #[cfg(feature = "cpu")]
    #[test]
    fn a_dtype_that_the_device_has_not_is_refused_for_weights_and_activations() {
        let (cpu, dtype) = (device("cpu").unwrap(), FloatDType::Flex32);
        let suited = Precision::of(&cpu);
        for precision in
            [Precision { compute: dtype, ..suited }, Precision { weights: LoadDType::Convert(dtype), ..suited }]
        {
            assert_eq!(precision.check(&cpu), Err(DeviceError::UnsupportedDType { dtype }));
        }
    }
}
