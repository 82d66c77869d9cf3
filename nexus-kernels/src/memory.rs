//! What a device can hold: a device -> bytes.

use burn::tensor::Device;

/// Bytes that a device gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// At once.
    pub largest: u64,
    /// In all, where its driver tells.
    pub capacity: Option<u64>,
}

/// What a GPU gives; `None` for other devices, and for a GPU that does not answer.
pub fn device_memory(device: &Device) -> Option<DeviceMemory> {
    #[cfg(feature = "gpu")]
    return crate::gpu::device_memory(device);
    #[cfg(not(feature = "gpu"))]
    {
        let _ = device;
        None
    }
}
