//! What a GPU can hold: a device -> bytes.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::{backend::DispatchDevice, tensor::Device};

use crate::DeviceMemory;

/// What a GPU gives; `None` for other devices, and for a GPU that does not answer.
pub(crate) fn device_memory(device: &Device) -> Option<DeviceMemory> {
    match device.clone().inner().as_dispatch() {
        DispatchDevice::Cube(device) => {
            let client = catch_unwind(AssertUnwindSafe(|| device.client())).ok()?;
            let memory = &client.properties().memory;
            Some(DeviceMemory { largest: memory.max_page_size, capacity: memory.max_memory() })
        }
        #[allow(unreachable_patterns, reason = "a build may have no other backend")]
        _ => None,
    }
}
