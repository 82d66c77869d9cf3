//! `nexus devices`: the devices of this computer -> a table of what they compute in.

use std::process::ExitCode;

use anyhow::Result;
use nexus::{DeviceInfo, FloatDType, Precision};
use serde::Serialize;

use crate::Output;

/// What a program reads.
#[derive(Serialize)]
struct Report {
    command: &'static str,
    devices: Vec<Device>,
}

/// A device that can be used, or why it cannot.
#[derive(Serialize)]
struct Device {
    name: String,
    info: Option<DeviceInfo>,
    /// Dtypes that it computes in.
    computes_in: Vec<String>,
    /// Dtype of the weights unless options say otherwise.
    weights: Option<String>,
    /// Dtype of the activations unless options say otherwise.
    activations: Option<String>,
    error: Option<String>,
}

pub fn run(output: &Output) -> Result<ExitCode> {
    let devices: Vec<Device> = nexus::devices().into_iter().map(look_at).collect();
    if devices.is_empty() {
        output.say("no device: build with one of the features cpu, wgpu, vulkan, metal, cuda, rocm");
    } else {
        output.say(format!(
            "{:<10} {:<16} {:<24} {:<16} device",
            "--device", "computes in", "weights by default", "used by default"
        ));
    }
    for device in &devices {
        match device {
            Device {
                name,
                info: Some(info),
                computes_in,
                weights: Some(weights),
                activations: Some(activations),
                ..
            } => {
                output.say(format!("{name:<10} {:<16} {weights:<24} {activations:<16} {info}", computes_in.join(" ")));
            }
            Device { error, .. } => output.warn(&format!("error: {}", error.as_deref().unwrap_or_default())),
        }
    }
    output.object(&Report { command: "devices", devices })?;
    Ok(ExitCode::SUCCESS)
}

fn look_at(name: String) -> Device {
    let lower = |dtype: &dyn std::fmt::Debug| format!("{dtype:?}").to_lowercase();
    match nexus::device(&name) {
        Ok(device) => {
            let Precision { weights, compute } = Precision::of(&device);
            let dtypes = [FloatDType::F32, FloatDType::F16, FloatDType::BF16];
            let supported = dtypes.iter().filter(|&&dtype| device.supports_dtype(dtype));
            Device {
                name,
                info: Some(DeviceInfo::of(&device)),
                computes_in: supported.map(|dtype| lower(dtype)).collect(),
                weights: Some(lower(&weights)),
                activations: Some(lower(&compute)),
                error: None,
            }
        }
        Err(error) => {
            let error = Some(error.to_string());
            Device { name, info: None, computes_in: vec![], weights: None, activations: None, error }
        }
    }
}
