//! The chart.

use std::path::Path;

use plotters::prelude::*;

use super::report::Row;
use crate::args::Failure;

/// Of each number of prompts.
const COLORS: [RGBColor; 6] = [
    RGBColor(0x1f, 0x77, 0xb4),
    RGBColor(0xd6, 0x27, 0x28),
    RGBColor(0x2c, 0xa0, 0x2c),
    RGBColor(0x94, 0x67, 0xbd),
    RGBColor(0xff, 0x7f, 0x0e),
    RGBColor(0x17, 0xbe, 0xcf),
];

/// Draws the speed-up over the number of shared tokens: a line for each number of prompts, and a dashed one for its ideal.
pub fn draw(path: &Path, rows: &[Row], heading: &str) -> Result<(), Failure> {
    let max_len = rows.iter().map(|row| row.shared_tokens).max().unwrap_or(0).max(1) as f64;
    let highest = rows.iter().map(|row| row.speedup().max(row.ideal())).fold(1.0, f64::max);
    let area = SVGBackend::new(path, (900, 560)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(heading, ("sans-serif", 18))
        .margin(20)
        .x_label_area_size(45)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..max_len * 1.02, 0.0..highest * 1.08)?;
    chart
        .configure_mesh()
        .x_desc("tokens that all prompts share")
        .y_desc("time to the first tokens: times faster")
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 13))
        .x_label_formatter(&|tokens| format!("{tokens:.0}"))
        .y_label_formatter(&|times| format!("{times:.0} x"))
        .light_line_style(WHITE)
        .bold_line_style(BLACK.mix(0.12))
        .draw()?;

    for (series, color) in rows.chunk_by(|a, b| a.prompts == b.prompts).zip(COLORS.iter().cycle()) {
        let points = |y: fn(&Row) -> f64| series.iter().map(move |row| (row.shared_tokens as f64, y(row)));
        chart.draw_series(DashedLineSeries::new(points(Row::ideal), 6, 4, color.mix(0.6).stroke_width(1)))?;
        let label = match series[0].prompts {
            1 => "1 prompt".to_owned(),
            prompts => format!("{prompts} prompts"),
        };
        chart
            .draw_series(LineSeries::new(points(Row::speedup), color.stroke_width(2)))?
            .label(label)
            .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], color.stroke_width(2)));
        chart.draw_series(points(Row::speedup).map(|point| Circle::new(point, 3, color.filled())))?;
    }
    chart
        .draw_series(std::iter::empty::<PathElement<(f64, f64)>>())?
        .label("dashed: ideal")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], BLACK.mix(0.5).stroke_width(1)));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 14))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}
