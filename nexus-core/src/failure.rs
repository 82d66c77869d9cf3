//! What a device says when it fails: an error of the backend -> a reason, with what its memory holds.

use std::fmt::Display;

use burn::tensor::Device;

/// What the backend said, which names the bytes that it asked for if memory was not enough, and what the device holds
/// for this process already, where the backend keeps count.
pub fn failure_reason(error: &impl Display, device: &Device) -> String {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    match device.memory_pool_usage() {
        None => error.to_string(),
        Some(usage) => format!(
            "{error}; the device holds {} MiB for this process, {} MiB of them in use",
            mib(usage.bytes_reserved),
            mib(usage.bytes_in_use)
        ),
    }
}
