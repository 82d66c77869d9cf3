//! The curves of a run: `metrics.jsonl` -> `curves.svg`.

use plotters::prelude::{
    BLACK, ChartBuilder, IntoDrawingArea, IntoLogRange, LineSeries, Palette, Palette99, SVGBackend, WHITE,
};
use plotters::style::Color;
use serde_json::Value;

use super::{RunDir, TrainError};

/// Lines of the file that are no losses.
const NOT_LOSSES: [&str; 4] = ["step", "learning_rate", "grad_norm", "stage"];

/// Draws every loss part against the step, on a logarithmic scale.
pub(super) fn draw(dir: &RunDir) -> Result<(), TrainError> {
    let path = dir.path().join("curves.svg");
    let mut curves: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    for line in dir.metrics()?.lines() {
        let Ok(Value::Object(fields)) = serde_json::from_str::<Value>(line) else { continue };
        let Some(step) = fields.get("step").and_then(Value::as_f64) else { continue };
        for (name, value) in fields.iter().filter(|(name, _)| !NOT_LOSSES.contains(&name.as_str())) {
            let Some(value) = value.as_f64().filter(|value| *value > 0.0) else { continue };
            match curves.iter_mut().find(|(known, _)| known == name) {
                Some((_, points)) => points.push((step, value)),
                None => curves.push((name.clone(), vec![(step, value)])),
            }
        }
    }
    let points = || curves.iter().flat_map(|(_, points)| points);
    let last = points().map(|point| point.0).fold(1.0, f64::max);
    let low = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let high = points().map(|point| point.1).fold(0.0, f64::max);
    // A single point, or none, spans no axis.
    if low >= high {
        return Ok(());
    }
    let mut svg = String::new();
    draw_into(&mut svg, &curves, last, low, high)
        .map_err(|error| TrainError::Plot { path: path.clone(), reason: error.to_string() })?;
    super::run::write_whole(&path, svg.as_bytes())
}

fn draw_into(
    svg: &mut String,
    curves: &[(String, Vec<(f64, f64)>)],
    last: f64,
    low: f64,
    high: f64,
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, (900, 500)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..last, (low..high).log_scale())?;
    chart.configure_mesh().x_desc("step").light_line_style(WHITE).draw()?;
    for (index, (name, points)) in curves.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| plotters::element::PathElement::new(vec![(x, y), (x + 16, y)], color));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}
