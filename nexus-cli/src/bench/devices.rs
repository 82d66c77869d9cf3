//! Stages on devices, each in a process of its own -> a table, a chart and JSON.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, ensure};
use nexus_core::testing::relative_drift;
use serde::{Deserialize, Serialize};

use super::{
    RELEASED_MODELS, STAGES, Stage,
    chart::{chart, table},
    stage, write_whole,
};
use crate::{Output, failure::usage};

#[derive(clap::Args)]
pub struct DeviceArgs {
    /// Devices, with commas between them [default: all that are there]
    #[arg(short, long, value_delimiter = ',')]
    devices: Vec<String>,
    /// Stages, with commas between them [default: all but the models of the released size]
    #[arg(long, value_delimiter = ',')]
    stages: Vec<String>,
    /// Most runs of a stage, after one to warm up
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    runs: usize,
    /// No new run of a stage after this many seconds
    #[arg(long, value_name = "COUNT", default_value_t = 10.0)]
    seconds: f64,
    /// Directory for backends.md, backends.svg and backends.json
    #[arg(short, long, alias = "out", value_name = "DIR", default_value = "backends")]
    output: PathBuf,
    /// Let the results take the place of others
    #[arg(long)]
    overwrite: bool,
}

/// What a program reads.
#[derive(Serialize)]
struct Report<'a> {
    command: &'static str,
    table: &'a Path,
    rows: &'a [Row],
}

/// One stage on one device.
#[derive(Clone, Serialize)]
pub struct Row {
    pub stage: &'static str,
    pub device: String,
    /// What ran; absent if the stage failed.
    pub measured: Option<Times>,
    /// Why the stage failed.
    pub error: Option<String>,
}

/// What one stage took on one device.
#[derive(Clone, Serialize)]
pub struct Times {
    pub dtype: String,
    /// Median seconds of a run.
    pub seconds: f64,
    /// Memory of the device, or of the process on a CPU.
    pub bytes: Option<u64>,
    /// Largest difference from the first device that ran, relative to its largest value.
    pub drift: Option<f32>,
}

/// What the process of a stage says.
#[derive(Deserialize)]
struct Said {
    dtype: String,
    median: f64,
    peak_bytes: Option<u64>,
    device_bytes: Option<u64>,
}

pub fn run(args: &DeviceArgs, output: &Output) -> Result<ExitCode> {
    let devices = if args.devices.is_empty() { nexus::devices() } else { args.devices.clone() };
    ensure!(!devices.is_empty(), "no device: build with one of the features cpu, wgpu, vulkan, metal, cuda, rocm");
    let stages: Vec<&Stage> = match &args.stages[..] {
        [] => STAGES.iter().filter(|stage| stage.group != RELEASED_MODELS).collect(),
        names => names.iter().map(|name| stage(name)).collect::<Result<_>>()?,
    };
    let file = |extension: &str| args.output.join(format!("backends.{extension}"));
    if file("json").exists() && !args.overwrite {
        return Err(usage(format!(
            "{}: already there; give another directory with -o, or add --overwrite",
            file("json").display()
        )));
    }
    fs::create_dir_all(&args.output).with_context(|| args.output.display().to_string())?;
    let mut rows: Vec<Row> = Vec::new();
    for stage in stages {
        let mut first: Option<Vec<f32>> = None;
        for device in &devices {
            let (measured, error) = match in_own_process(args, stage.name, device) {
                Ok((mut times, values)) => {
                    times.drift = first.as_ref().map(|first| relative_drift(&values, first));
                    first.get_or_insert(values);
                    output.say(format!("{:<22} {device:<10} {:>9.1} ms", stage.name, 1000.0 * times.seconds));
                    (Some(times), None)
                }
                Err(error) => {
                    output.say(format!("{:<22} {device:<10} FAIL: {error:#}", stage.name));
                    (None, Some(format!("{error:#}")))
                }
            };
            rows.push(Row { stage: stage.name, device: device.clone(), measured, error });
        }
    }
    write_whole(&file("json"), &serde_json::to_vec_pretty(&rows)?)?;
    write_whole(&file("md"), table(&rows).as_bytes())?;
    if rows.iter().any(|row| row.measured.is_some()) {
        write_whole(&file("svg"), chart(&rows, &devices)?.as_bytes())?;
    }
    output.say(file("md").display());
    output.object(&Report { command: "bench", table: &file("md"), rows: &rows })?;
    Ok(if rows.iter().all(|row| row.measured.is_some()) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn in_own_process(args: &DeviceArgs, stage: &str, device: &str) -> Result<(Times, Vec<f32>)> {
    let file = args.output.join("values.unfinished");
    let done = Command::new(std::env::current_exe()?)
        .args(["bench", "run", stage, "--json", "--device", device, "--runs", &args.runs.to_string()])
        .args(["--seconds", &args.seconds.to_string()])
        .arg("--output")
        .arg(&file)
        .output()?;
    let said = String::from_utf8_lossy(&done.stderr);
    // The first line of a panic says where, the second why.
    let mut reasons = said.lines().filter(|line| !line.is_empty() && !line.starts_with("thread '"));
    ensure!(done.status.success(), "{}: {}", done.status, reasons.next().unwrap_or("no message"));
    let Said { dtype, median, peak_bytes, device_bytes } = serde_json::from_slice(&done.stdout)?;
    let bytes = fs::read(&file)?;
    fs::remove_file(file)?;
    let values = bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    let times = Times { dtype, seconds: median, bytes: device_bytes.or(peak_bytes), drift: None };
    Ok((times, values.collect()))
}
