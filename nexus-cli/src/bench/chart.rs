//! What was measured -> a table and a chart to look at.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use plotters::prelude::{
    ChartBuilder, Color, IntoDrawingArea, IntoLogRange, Palette, Palette99, Rectangle, SVGBackend, WHITE,
};

use super::devices::{Row, Times};

/// A table in Markdown.
pub fn table(rows: &[Row]) -> String {
    let mut text =
        "| stage | device | computes in | ms | MiB | drift from the first device |\n|---|---|---|---|---|---|\n"
            .to_string();
    for Row { stage, device, measured, error } in rows {
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
pub fn chart(rows: &[Row], devices: &[String]) -> Result<String> {
    fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
        anyhow!("drawing the plot: {error}")
    }
    let ran: Vec<(&Row, &Times)> = rows.iter().filter_map(|row| Some((row, row.measured.as_ref()?))).collect();
    let mut stages: Vec<&str> = ran.iter().map(|(row, _)| row.stage).collect();
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
                let left = index[row.0.stage] as f64 + width * order as f64;
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
