//! One stage in a process of its own: work -> times, memory and what it computed.

use std::{
    fs,
    time::{Duration, Instant},
};

use nexus::{Precision, checkpoint::LoadDType};

use super::{
    models::Weights,
    place,
    work::{Stage, TRAINING},
};

/// What was measured.
pub struct Measured {
    /// Seconds of each run, divided by its parts.
    pub times: Vec<f64>,
    pub load_seconds: f64,
    /// Largest memory of the process before the stage was loaded.
    pub start_bytes: Option<u64>,
    /// Largest memory of the process.
    pub peak_bytes: Option<u64>,
    /// What a device with memory of its own holds at the end, pages kept for reuse included.
    pub device_bytes: Option<u64>,
    /// What the stage computed.
    pub values: Vec<f32>,
}

/// Runs a stage once to warm up, then until one of the limits is reached.
pub fn measure(stage: &Stage, weights: Weights<'_>, runs: usize, seconds: f64) -> Measured {
    let start_bytes = peak_bytes();
    let start = Instant::now();
    let mut work = (stage.load)(weights);
    let load_seconds = start.elapsed().as_secs_f64();
    work.prepare();
    let values = work.run();
    let mut times = vec![];
    let start = Instant::now();
    while times.is_empty() || (times.len() < runs && start.elapsed() < Duration::from_secs_f64(seconds)) {
        work.prepare();
        let start = Instant::now();
        std::hint::black_box(work.run());
        times.push(start.elapsed().as_secs_f64() / work.parts() as f64);
    }
    let device_bytes = place::device().memory_pool_usage().map(|usage| usage.bytes_reserved);
    Measured { times, load_seconds, start_bytes, peak_bytes: peak_bytes(), device_bytes, values }
}

impl Measured {
    pub fn median(&self) -> f64 {
        let mut sorted = self.times.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
    }

    /// The values as little-endian f32.
    pub fn bytes(&self) -> Vec<u8> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }
}

/// Dtypes that a stage runs in, such as `bf16 weights, f32 activations`.
pub fn dtype(stage: &Stage) -> String {
    let compute = place::compute();
    if stage.group == TRAINING {
        return format!("f32 weights, {compute:?} activations").to_lowercase();
    }
    let weights = match Precision::of(&place::device()).weights {
        // The weights of the benches are stored in bf16.
        LoadDType::AsStored => "bf16".to_string(),
        LoadDType::Convert(dtype) => format!("{dtype:?}"),
    };
    format!("{weights} weights, {compute:?} activations").to_lowercase()
}

/// Largest resident size of this process so far, where the system tells: mapped files that were read count too.
fn peak_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
