//! The curves of a run: `metrics.jsonl` -> `curves.svg`.

use std::{fs, path::Path};

use anyhow::{Context, Result, anyhow};
use plotters::prelude::{
    BLACK, ChartBuilder, IntoDrawingArea, IntoLogRange, LineSeries, Palette, Palette99, SVGBackend, WHITE,
};
use plotters::style::Color;
use serde_json::Value;

use crate::paths::write_whole;

/// Fields of the metrics that are no losses.
const NOT_LOSSES: [&str; 4] = ["step", "learning_rate", "grad_norm", "stage"];

/// A loss, and its value at every step that was logged.
type Curve = (String, Vec<(f64, f64)>);

/// Draws every loss part of a run against the step, on a logarithmic scale.
pub fn draw(run: &Path) -> Result<()> {
    let metrics = run.join("metrics.jsonl");
    let metrics = fs::read_to_string(&metrics).with_context(|| metrics.display().to_string())?;
    let curves = curves(&metrics);
    let points = || curves.iter().flat_map(|(_, points)| points);
    let last = points().map(|point| point.0).fold(1.0, f64::max);
    let low = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let high = points().map(|point| point.1).fold(0.0, f64::max);
    // A single point, or none, spans no axis.
    if low >= high {
        return Ok(());
    }
    let mut svg = String::new();
    draw_into(&mut svg, &curves, last, low..high).map_err(|error| anyhow!("cannot draw the curves: {error}"))?;
    write_whole(&run.join("curves.svg"), svg.as_bytes())
}

fn curves(metrics: &str) -> Vec<Curve> {
    let mut curves: Vec<Curve> = Vec::new();
    for line in metrics.lines() {
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
    curves
}

fn draw_into(
    svg: &mut String,
    curves: &[Curve],
    last: f64,
    losses: std::ops::Range<f64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, (900, 500)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..last, losses.log_scale())?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_loss_has_a_curve_and_nothing_else() {
        let run = tempfile::tempdir().unwrap();
        let line = |step: usize| {
            format!(
                r#"{{"step":{step},"stage":"only","loss":{},"reconstruction":0.5,"kl":{step},"learning_rate":0.1,"grad_norm":2.0}}"#,
                1.0 / step as f64
            )
        };
        fs::write(run.path().join("metrics.jsonl"), [line(1), line(2), line(3)].join("\n")).unwrap();
        draw(run.path()).unwrap();
        let svg = fs::read_to_string(run.path().join("curves.svg")).unwrap();
        assert!(svg.contains("<svg") && svg.matches("<polyline").count() >= 3, "{svg}");
        for name in ["loss", "reconstruction", "kl"] {
            assert!(svg.lines().any(|line| line.trim() == name), "no {name} in {svg}");
        }
        assert!(!svg.contains("grad_norm") && !svg.contains("learning_rate"));
    }
}
