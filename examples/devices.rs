//! How do I choose a device and a dtype? `cargo run --release --features wgpu --example devices -- wgpu`
#![allow(clippy::print_stdout, reason = "an example talks to a person")]

use anyhow::Result;
use nexus::{DeviceInfo, FloatDType, Nexus, Precision, Quantization, Residency};

fn main() -> Result<()> {
    // Names of all devices for which this build has a backend: `cpu`, `cuda:0`, `wgpu:0`, ...
    println!("devices here: {}", nexus::devices().join(", "));
    let name = std::env::args().nth(1).unwrap_or_else(|| "cpu".to_string());
    let model = std::env::args().nth(2).unwrap_or_else(|| "assets/nexus-tiny".to_string());

    // A device is asked to add before it is trusted; the error says what there is instead.
    let device = nexus::device(&name)?;
    println!("{name}: {}, {:?} unless told otherwise", DeviceInfo::of(&device), Precision::of(&device));

    // Activations in bf16 if the device has it, weights in 8 bits, and one stage in memory at a time.
    let mut loader = Nexus::loader(model).quantization(Quantization::Q8).residency(Residency::OneStageAtATime);
    if device.supports_dtype(FloatDType::BF16) {
        loader = loader.compute_dtype(FloatDType::BF16);
    }
    let nexus = loader.load(&device, ())?;
    let options = nexus.default_options().generate.clone();
    nexus.generate("a blue square", &options, ())?.save("devices.png")?;
    for (stage, bytes) in nexus.loaded() {
        println!("in memory: the {stage}, {} kB", bytes / 1000);
    }
    println!("devices.png");
    Ok(())
}
