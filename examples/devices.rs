//! Which devices does nexus see here? `cargo run --release --features wgpu --example devices`
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "examples talk to a person")]

use anyhow::Result;
use nexus::{FloatDType, Precision};

fn main() -> Result<()> {
    let names = nexus::devices();
    if names.is_empty() {
        println!("no device: build with one of the features flex, wgpu, vulkan, metal, cuda, rocm");
        return Ok(());
    }
    println!("{:<10} {:<16} {:<24} used by default", "--device", "computes in", "weights by default");
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
        println!("{name:<10} {:<16} {:<24} {compute}", supported.join(" "), format!("{weights:?}").to_lowercase());
    }
    Ok(())
}
