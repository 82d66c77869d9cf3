//! Which device is fastest here? `cargo run --release --features wgpu --example bench_backends -- --out backends`
//!
//! Every stage runs on every device in a process of its own, so that a driver that fails spoils one row alone.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    reason = "a bench may panic and print"
)]

mod cli;
#[path = "../benches/stages/measure.rs"]
#[allow(dead_code, reason = "loading is of interest to examples/bench_stage.rs")]
mod measure;
#[path = "../benches/stages/models.rs"]
#[allow(dead_code, reason = "files are for examples/bench_stage.rs")]
mod models;
#[path = "../benches/stages/place.rs"]
mod place;
#[path = "../benches/stages/training.rs"]
mod training;
#[path = "../benches/stages/work.rs"]
#[allow(dead_code, reason = "groups are criterion's")]
mod work;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use nexus_core::testing::relative_drift;
use plotters::prelude::{
    ChartBuilder, Color, IntoDrawingArea, IntoLogRange, Palette, Palette99, Rectangle, SVGBackend, WHITE,
};
use serde::{Deserialize, Serialize};

use cli::write_whole;
use models::Weights;
use work::{RELEASED_MODELS, STAGES, Stage};

/// Times the stages at middle sizes on every device and writes a table, a plot and JSON.
///
/// The exit status is 0 if every stage ran on every device.
#[derive(Parser)]
struct Args {
    /// Devices; all that are there if left out
    #[arg(long, value_delimiter = ',')]
    devices: Vec<String>,
    /// Stages; all but the models of the released size if left out
    #[arg(long, value_delimiter = ',')]
    stages: Vec<String>,
    /// Most runs of a stage
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// No new run of a stage after this many seconds
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Directory for backends.md, backends.svg and backends.json
    #[arg(long, default_value = "backends")]
    out: PathBuf,
    /// Only one stage on one device, written into this file: what a process of its own does
    #[arg(long, hide = true)]
    single: Option<PathBuf>,
}

/// One stage on one device.
#[derive(Clone, Serialize, Deserialize)]
struct Row {
    stage: String,
    device: String,
    /// What ran; absent if the stage failed.
    measured: Option<Times>,
    /// Why the stage failed.
    error: Option<String>,
    #[serde(skip)]
    values: Vec<f32>,
}

/// What one stage took on one device.
#[derive(Clone, Serialize, Deserialize)]
struct Times {
    dtype: String,
    /// Median seconds of a run.
    seconds: f64,
    /// Memory of the device, or of the process on a CPU.
    bytes: Option<u64>,
    /// Largest difference from the first device that ran, relative to its largest value.
    drift: Option<f32>,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    if let Some(file) = &args.single {
        single(&args, file)?;
        return Ok(ExitCode::SUCCESS);
    }
    let devices = if args.devices.is_empty() { nexus::devices() } else { args.devices.clone() };
    ensure!(!devices.is_empty(), "no device: build with one of the features cpu, wgpu, vulkan, metal, cuda, rocm");
    let known: Vec<&str> = STAGES.iter().map(|stage| stage.name).collect();
    if let Some(unknown) = args.stages.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(anyhow!("`{unknown}` is not a stage: use {}", known.join(", ")));
    }
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let mut rows: Vec<Row> = Vec::new();
    let chosen = |stage: &&Stage| match &args.stages[..] {
        [] => stage.group != RELEASED_MODELS,
        names => names.iter().any(|name| name == stage.name),
    };
    for stage in STAGES.iter().filter(chosen) {
        let mut first: Option<Vec<f32>> = None;
        for device in &devices {
            let mut row = in_own_process(&args, stage.name, device).unwrap_or_else(|error| Row {
                stage: stage.name.to_string(),
                device: device.clone(),
                measured: None,
                error: Some(format!("{error:#}")),
                values: vec![],
            });
            match (&mut row.measured, &row.error) {
                (Some(measured), _) => {
                    measured.drift = first.as_ref().map(|first| relative_drift(&row.values, first));
                    println!("{:<22} {:<10} {:>9.1} ms", row.stage, row.device, 1000.0 * measured.seconds);
                    first.get_or_insert(std::mem::take(&mut row.values));
                }
                (None, error) => {
                    println!("{:<22} {:<10} FAIL: {}", row.stage, row.device, error.as_deref().unwrap_or_default());
                }
            }
            rows.push(row);
        }
    }
    write_whole(&args.out.join("backends.json"), &serde_json::to_vec_pretty(&rows)?)?;
    write_whole(&args.out.join("backends.md"), table(&rows).as_bytes())?;
    if rows.iter().any(|row| row.measured.is_some()) {
        write_whole(&args.out.join("backends.svg"), plot(&rows, &devices)?.as_bytes())?;
    }
    println!("{}", args.out.join("backends.md").display());
    Ok(if rows.iter().all(|row| row.measured.is_some()) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn in_own_process(args: &Args, stage: &str, device: &str) -> Result<Row> {
    let file = args.out.join("single.unfinished");
    let output = Command::new(std::env::current_exe()?)
        .args(["--devices", device, "--stages", stage, "--runs", &args.runs.to_string()])
        .args(["--seconds", &args.seconds.to_string()])
        .arg("--single")
        .arg(&file)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", output.status, said.lines().next().unwrap_or("no message"));
    let (row, values) = (fs::read(&file)?, fs::read(file.with_extension("values"))?);
    for path in [file.clone(), file.with_extension("values")] {
        fs::remove_file(path)?;
    }
    let values = values.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    Ok(Row { values: values.collect(), ..serde_json::from_slice(&row)? })
}

fn single(args: &Args, file: &Path) -> Result<()> {
    let ([device], [stage]) = (&args.devices[..], &args.stages[..]) else {
        return Err(anyhow!("--single needs one device and one stage"));
    };
    place::choose(nexus::device(device)?);
    let known = STAGES.iter().find(|known| known.name == stage).context("no such stage")?;
    let measured = measure::measure(known, Weights::Random, args.runs, args.seconds);
    let times = Times {
        dtype: measure::dtype(known),
        seconds: measured.median(),
        bytes: measured.device_bytes.or(measured.peak_bytes),
        drift: None,
    };
    let (stage, device) = (stage.clone(), device.clone());
    let row = Row { stage, device, measured: Some(times), error: None, values: vec![] };
    fs::write(file.with_extension("values"), measured.bytes())?;
    Ok(fs::write(file, serde_json::to_vec(&row)?)?)
}

fn table(rows: &[Row]) -> String {
    let mut text =
        "| stage | device | computes in | ms | MiB | drift from the first device |\n|---|---|---|---|---|---|\n"
            .to_string();
    for Row { stage, device, measured, error, .. } in rows {
        let cells = match measured {
            Some(Times { dtype, seconds, bytes, drift }) => {
                let bytes = bytes.map_or("-".to_string(), |bytes| (bytes >> 20).to_string());
                let drift = drift.map_or("-".to_string(), |drift| format!("{drift:.1e}"));
                format!("{dtype} | {:.1} | {bytes} | {drift}", 1000.0 * seconds)
            }
            // What a process says may hold what ends a cell.
            None => format!("FAIL: {} | - | - | -", error.as_deref().unwrap_or_default().replace('|', "/")),
        };
        text += &format!("| {stage} | {device} | {cells} |\n");
    }
    text
}

/// Bars of milliseconds on a logarithmic scale, one group per stage, one colour per device.
fn plot(rows: &[Row], devices: &[String]) -> Result<String> {
    fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
        anyhow!("drawing the plot: {error}")
    }
    let ran: Vec<(&Row, &Times)> = rows.iter().filter_map(|row| Some((row, row.measured.as_ref()?))).collect();
    let mut stages: Vec<&str> = ran.iter().map(|(row, _)| row.stage.as_str()).collect();
    stages.dedup();
    let index: BTreeMap<&str, usize> = stages.iter().enumerate().map(|(index, stage)| (*stage, index)).collect();
    let milliseconds = |(_, times): &(&Row, &Times)| 1000.0 * times.seconds;
    let (lowest, highest) = ran.iter().map(milliseconds).fold((f64::MAX, 0.0f64), |(a, b), x| (a.min(x), b.max(x)));
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (1000, 460)).into_drawing_area();
        area.fill(&WHITE).map_err(drawing)?;
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(70)
            .build_cartesian_2d(0.0..stages.len() as f64, (lowest * 0.5..highest * 2.0).log_scale())
            .map_err(drawing)?;
        let name =
            |at: &f64| stages.get(*at as usize).filter(|_| at.fract() == 0.0).map_or("", |name| name).to_string();
        chart
            .configure_mesh()
            .x_labels(stages.len() + 1)
            .x_label_formatter(&name)
            .y_desc("milliseconds")
            .draw()
            .map_err(drawing)?;
        let width = 0.8 / devices.len() as f64;
        for (order, device) in devices.iter().enumerate() {
            let color = Palette99::pick(order).to_rgba();
            let bars = ran.iter().filter(|(row, _)| row.device == *device).map(|row| {
                let left = index[row.0.stage.as_str()] as f64 + width * order as f64;
                Rectangle::new([(left, lowest * 0.5), (left + width, milliseconds(row))], color.filled())
            });
            chart
                .draw_series(bars)
                .map_err(drawing)?
                .label(device)
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled()));
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).draw().map_err(drawing)?;
        area.present().map_err(drawing)?;
    }
    Ok(svg)
}
