//! What a device says when it fails: an error of the backend -> a reason, with what its memory holds, and whether memory
//! was what it lacked.

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Device, ExecutionError, Tensor};
use nexus_kernels::{DeviceMemory, device_memory};

/// What the backend said, on one line, which names the bytes that it asked for if memory was not enough, and what the
/// device holds for this process already, where the backend keeps count.
pub fn failure_reason(error: &impl Display, device: &Device) -> String {
    let error = one_line(&error.to_string());
    match held(device) {
        None => error,
        Some(Held { reserved, in_use }) => format!(
            "{error}; the device holds {} MiB for this process, {} MiB of them in use",
            mib(reserved),
            mib(in_use)
        ),
    }
}

/// Bytes in MiB, rounded up.
pub fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// Memory that a device did not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfMemory {
    /// Bytes of the allocation that failed, where the backend names them.
    pub needed: Option<u64>,
    /// Bytes that this process could have had in one piece at most, where the backend tells: the largest piece that the
    /// device gives, or what is left of its memory beside what this process uses. Other programs may use some of it.
    pub available: Option<u64>,
}

impl OutOfMemory {
    /// Whether a reason (of [`failure_reason`], or of a panic) is that memory was not enough; `None` if it is another.
    ///
    /// Backends give words only, not a kind of error.
    pub fn of(reason: &str, device: &Device) -> Option<Self> {
        let reason = reason.to_lowercase();
        let says = ["out of device memory", "out of memory", "out-of-memory", "out_of_memory", "not enough memory"];
        let refuses = ["can't allocate buffer of size: ", "allocating ", "can't allocate "];
        let asked = refuses.iter().find_map(|words| leading_number(reason.split(words).nth(1)?));
        // Words of allocation without a number may be about anything.
        let refused = asked.is_some() && reason.contains("can't allocate");
        (refused || says.iter().any(|words| reason.contains(words)))
            .then(|| Self { needed: asked, available: available(device) })
    }
}

fn leading_number(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().ok()
}

/// Backends spread an error over lines, with headings of backtraces that are not there.
fn one_line(text: &str) -> String {
    const EMPTY: [&str; 4] = ["", "No backtrace available", "Asked at:", "Backtrace:"];
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !EMPTY.contains(line)).collect();
    lines.join(" ")
}

/// Bytes that a device holds for this process.
struct Held {
    reserved: u64,
    in_use: u64,
}

fn held(device: &Device) -> Option<Held> {
    // A lost device may panic when it is asked.
    let usage = catch_unwind(AssertUnwindSafe(|| device.memory_pool_usage())).ok()??;
    Some(Held { reserved: usage.bytes_reserved, in_use: usage.bytes_in_use })
}

fn available(device: &Device) -> Option<u64> {
    let DeviceMemory { largest, capacity } = device_memory(device)?;
    let left = capacity.zip(held(device)).map(|(capacity, held)| capacity.saturating_sub(held.in_use));
    Some(left.map_or(largest, |left| left.min(largest)))
}

/// Waits until the weights of a module are on its device, and reads one value of each.
///
/// A device that has no memory for a tensor says so to whom reads it, not to whom makes it, nor to whom waits for the
/// device.
///
/// # Errors
/// What the device said of the first weight that it does not hold.
pub fn check_arrived(module: &impl Module) -> Result<(), ExecutionError> {
    let mut reader = Reader(Ok(()));
    module.visit(&mut reader);
    reader.0
}

struct Reader(Result<(), ExecutionError>);

impl ModuleVisitor for Reader {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.0.is_err() {
            return;
        }
        let values = param.base();
        let values = if matches!(values.dtype(), DType::QFloat(_)) { values.dequantize() } else { values };
        self.0 = values.slice(std::array::from_fn::<_, D, _>(|_| 0..1)).try_into_data().map(drop);
    }
}

#[cfg(test)]
mod tests {
    use burn::module::Quantizer;
    use burn::tensor::quantization::{Calibration, QuantScheme, QuantValue};

    use super::*;
    use crate::nn::Linear;
    use crate::testing::{cpu, device};

    #[test]
    fn words_of_backends_about_memory_are_understood_and_others_are_not() {
        for (reason, needed) in [
            ("Caused by: out of device memory allocating 4398046511104 bytes", Some(4_398_046_511_104)),
            ("Caused by: can't allocate buffer of size: 123", Some(123)),
            ("Can't allocate 77 bytes: every page size the memory tracks still holds live allocations", Some(77)),
            ("An out-of-memory error happened during launch", None),
            ("CUDA allocation error: CUDA_ERROR_OUT_OF_MEMORY", None),
            ("wgpu error: Out of Memory", None),
            ("Not enough memory left.", None),
        ] {
            assert_eq!(OutOfMemory::of(reason, &cpu()), Some(OutOfMemory { needed, available: None }), "{reason}");
        }
        for reason in
            ["", "the device is poisoned", "it adds 5 ones to 4", "can't allocate a stream", "allocating 5 bytes"]
        {
            assert_eq!(OutOfMemory::of(reason, &cpu()), None, "{reason}");
        }
    }

    #[test]
    fn a_reason_is_one_line_without_headings_of_what_is_missing() {
        let error =
            "An error\nCaused by:\n  out of device memory\nNo backtrace available\nAsked at:\nNo backtrace available";
        assert_eq!(failure_reason(&error, &cpu()), "An error Caused by: out of device memory");
    }

    #[test]
    fn weights_that_arrived_are_read_whatever_their_form() {
        let floats = Linear::new(32, 8, &device());
        let mut quantizer = Quantizer::new(Calibration::MinMax, QuantScheme::default().with_value(QuantValue::Q8S));
        let quantized = Linear::without_bias(32, 8, &cpu()).quantize_weights(&mut quantizer);
        assert!(matches!(quantized.weight.val().dtype(), DType::QFloat(_)));
        assert!(check_arrived(&floats).is_ok() && check_arrived(&quantized).is_ok());
    }
}
