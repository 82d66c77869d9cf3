//! Plots: errors by position -> curves and maps, as SVG files.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::{
    BLACK, ChartBuilder, Color, HSLColor, IntoDrawingArea, IntoFont, LineSeries, Palette, Palette99, PathElement,
    Rectangle, SVGBackend, Text, WHITE,
};

use lab_tiny::model::write_whole;

use crate::errors::Errors;

/// Mean squared error against the position, one curve for each way.
pub fn curves(path: &Path, ways: &[(&str, &Errors)]) -> Result<()> {
    let highest = ways.iter().flat_map(|(_, errors)| errors.mse()).fold(1e-9, f64::max);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (860, 420)).into_drawing_area();
        area.fill(&WHITE).map_err(drawing)?;
        let positions = ways.first().map_or(1, |(_, errors)| errors.mse().len());
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..positions as f64 - 1.0, 0.0..highest * 1.05)
            .map_err(drawing)?;
        chart
            .configure_mesh()
            .x_desc("position of the embedding")
            .y_desc("mean squared error")
            .light_line_style(WHITE)
            .draw()
            .map_err(drawing)?;
        for (index, (name, errors)) in ways.iter().enumerate() {
            let color = Palette99::pick(index).to_rgba();
            let points = errors.mse().into_iter().enumerate().map(|(position, error)| (position as f64, error));
            chart
                .draw_series(LineSeries::new(points, color.stroke_width(2)))
                .map_err(drawing)?
                .label(*name)
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], color.stroke_width(2)));
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw().map_err(drawing)?;
        area.present().map_err(drawing)?;
    }
    write_whole(path, svg.as_bytes())
}

/// Values of all positions as squares in the place where they lie in the picture, one map for each title.
pub fn maps(path: &Path, side: usize, maps: &[(&str, Vec<f64>)]) -> Result<()> {
    const CELL: i32 = 44;
    const TOP: i32 = 34;
    const GAP: i32 = 24;
    let width = GAP + maps.len() as i32 * (side as i32 * CELL + GAP);
    let height = TOP + side as i32 * CELL + GAP;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width as u32, height as u32)).into_drawing_area();
        area.fill(&WHITE).map_err(drawing)?;
        for (index, (title, values)) in maps.iter().enumerate() {
            let left = GAP + index as i32 * (side as i32 * CELL + GAP);
            let font = ("sans-serif", 15).into_font();
            area.draw(&Text::new(*title, (left, 10), font)).map_err(drawing)?;
            let low = values.iter().copied().fold(f64::INFINITY, f64::min);
            let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            for (position, value) in values.iter().enumerate() {
                let (row, column) = ((position / side) as i32, (position % side) as i32);
                let (x, y) = (left + column * CELL, TOP + row * CELL);
                let share = (value - low) / (high - low).max(1e-12);
                let color = HSLColor(0.6 - 0.6 * share, 0.7, 0.75);
                let cell = Rectangle::new([(x, y), (x + CELL - 2, y + CELL - 2)], color.filled());
                area.draw(&cell).map_err(drawing)?;
                let font = ("sans-serif", 11).into_font();
                area.draw(&Text::new(format!("{value:.3}"), (x + 5, y + CELL / 2 - 6), font)).map_err(drawing)?;
            }
        }
        area.present().map_err(drawing)?;
    }
    write_whole(path, svg.as_bytes())
}

fn drawing(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("the plot cannot be drawn: {error}")
}
