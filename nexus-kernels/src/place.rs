//! Where tensors are: devices and dtypes -> the backend whose operations take them, the one place of dispatch.

#[cfg(feature = "autodiff")]
use burn::backend::GradientCheckpointingStrategy;
#[cfg(feature = "autodiff")]
use burn::tensor::DType;
use burn::tensor::{Device, Tensor};

/// Whose operations take some tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// CPUs.
    #[cfg(feature = "cpu")]
    Cpu,
    /// CPUs, with gradients.
    #[cfg(all(feature = "cpu", feature = "autodiff"))]
    TrackedCpu,
    /// GPUs.
    #[cfg(feature = "gpu")]
    Gpu,
    /// GPUs, with gradients.
    #[cfg(all(feature = "gpu", feature = "autodiff"))]
    TrackedGpu,
    /// Every device, tracked or not.
    Other,
}

/// Device and dtype of a tensor.
pub(crate) struct At {
    device: Device,
    #[cfg(feature = "autodiff")]
    dtype: DType,
}

/// Where a tensor is.
pub(crate) fn at<const D: usize>(tensor: &Tensor<D>) -> At {
    At {
        device: tensor.device(),
        #[cfg(feature = "autodiff")]
        dtype: tensor.dtype(),
    }
}

impl Place {
    /// The place of an operation on all of these tensors, of which some may be constants beside tracked ones.
    pub(crate) fn of(tensors: &[At]) -> Self {
        #[cfg(feature = "autodiff")]
        if let Some(place) = Self::tracked(tensors) {
            return place;
        }
        match tensors.first().map(|at| at.device.as_dispatch()) {
            #[cfg(feature = "cpu")]
            Some(burn::backend::DispatchDevice::Flex(_)) => Self::Cpu,
            #[cfg(feature = "gpu")]
            Some(burn::backend::DispatchDevice::Cube(_)) => Self::Gpu,
            _ => Self::Other,
        }
    }

    /// `None` if none of the tensors is on the autodiff device.
    ///
    /// Graphs that checkpoint, and dtypes that the backward passes do not know, are left to burn's own operations.
    #[cfg(feature = "autodiff")]
    fn tracked(tensors: &[At]) -> Option<Self> {
        let tracked = tensors.iter().filter_map(|at| match at.device.as_dispatch() {
            burn::backend::DispatchDevice::Autodiff(device) => Some(device),
            _ => None,
        });
        let device = tracked.clone().next()?.clone();
        if tracked
            .into_iter()
            .any(|device| device.gradient_checkpointing_strategy() != GradientCheckpointingStrategy::Disabled)
        {
            return Some(Self::Other);
        }
        let all_are = |dtypes: &[DType]| tensors.iter().all(|at| dtypes.contains(&at.dtype));
        Some(match device.inner() {
            #[cfg(feature = "cpu")]
            burn::backend::DispatchDevice::Flex(_) if all_are(&[DType::F32, DType::BF16]) => Self::TrackedCpu,
            #[cfg(feature = "gpu")]
            burn::backend::DispatchDevice::Cube(_) if all_are(&[DType::F32, DType::BF16, DType::F16]) => {
                Self::TrackedGpu
            }
            _ => {
                let _ = all_are;
                Self::Other
            }
        })
    }
}

/// An operation where its tensors are: `dispatch!([tensors], operation(arguments))`.
macro_rules! dispatch {
    ($tensors:expr, $operation:ident($($argument:expr),* $(,)?)) => {
        match $crate::place::Place::of($tensors) {
            #[cfg(feature = "cpu")]
            $crate::place::Place::Cpu => <burn::backend::Flex as $crate::ops::Ops>::$operation($($argument),*),
            #[cfg(all(feature = "cpu", feature = "autodiff"))]
            $crate::place::Place::TrackedCpu => {
                <burn::backend::Autodiff<burn::backend::Flex> as $crate::ops::Ops>::$operation($($argument),*)
            }
            #[cfg(feature = "gpu")]
            $crate::place::Place::Gpu => <burn_cubecl::Cube as $crate::ops::Ops>::$operation($($argument),*),
            #[cfg(all(feature = "gpu", feature = "autodiff"))]
            $crate::place::Place::TrackedGpu => {
                <burn::backend::Autodiff<burn_cubecl::Cube> as $crate::ops::Ops>::$operation($($argument),*)
            }
            $crate::place::Place::Other => <$crate::ops::Plain as $crate::ops::Ops>::$operation($($argument),*),
        }
    };
}
pub(crate) use dispatch;
