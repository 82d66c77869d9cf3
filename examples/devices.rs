//! Which devices does nexus see here? `cargo run --release --features wgpu --example devices`
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "examples talk to a person")]

use anyhow::Result;
use nexus::{DeviceInfo, FloatDType, Precision};

fn main() -> Result<()> {
    let names = nexus::devices();
    if names.is_empty() {
        println!("no device: build with one of the features cpu, wgpu, vulkan, metal, cuda, rocm");
        return Ok(());
    }
    println!("{:<10} {:<16} {:<24} {:<16} device", "--device", "computes in", "weights by default", "used by default");
    for name in names {
        let device = match nexus::device(&name) {
            Ok(device) => device,
            Err(error) => {
                eprintln!("{error}");
                continue;
            }
        };
        let supported: Vec<String> = [FloatDType::F32, FloatDType::F16, FloatDType::BF16]
            .into_iter()
            .filter(|&dtype| device.supports_dtype(dtype))
            .map(|dtype| format!("{dtype:?}").to_lowercase())
            .collect();
        let Precision { weights, compute } = Precision::of(&device);
        let compute = format!("{compute:?}").to_lowercase();
        let (supported, weights) = (supported.join(" "), format!("{weights:?}").to_lowercase());
        let info = DeviceInfo::of(&device);
        println!("{name:<10} {supported:<16} {weights:<24} {compute:<16} {info}");
    }
    Ok(())
}
