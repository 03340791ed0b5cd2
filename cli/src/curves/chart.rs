//! One chart as SVG: measured points with their spread, and the prediction as a line.

use plotters::coord::ranged1d::{KeyPointHint, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::options::DecoderName;
use crate::args::Failure;

/// Size in pixels.
pub const SIZE: (u32, u32) = (560, 370);

const INK: RGBColor = RGBColor(31, 41, 55);
const GREY: RGBColor = RGBColor(107, 114, 128);
const GRID: RGBColor = RGBColor(229, 231, 235);

/// What the values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Seconds,
    Bytes,
}

/// A decoder's points and line.
pub struct Series {
    pub decoder: DecoderName,
    /// x, median, and the values between which the middle half of the runs lies.
    pub measured: Vec<(f64, f64, f64, f64)>,
    pub predicted: Vec<(f64, f64)>,
}

impl Series {
    /// Colours that can be told apart with any eyes (Okabe and Ito, 2008).
    fn color(&self) -> RGBColor {
        match self.decoder {
            DecoderName::Naive => RGBColor(213, 94, 0),
            DecoderName::Kv => RGBColor(0, 114, 178),
            DecoderName::Speculative => RGBColor(0, 158, 115),
        }
    }
}

/// What is drawn.
pub struct Chart {
    pub title: String,
    pub x_label: String,
    pub unit: Unit,
    pub series: Vec<Series>,
}

impl Chart {
    /// The text of an SVG file.
    pub fn svg(&self) -> Result<String, Failure> {
        let mut text = String::new();
        {
            let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
            self.draw(&root).map_err(|error| format!("{}: {error}", self.title))?;
        }
        Ok(text)
    }

    fn draw(&self, root: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>) -> Result<(), DrawError> {
        root.fill(&WHITE)?;
        let (header, body) = root.split_vertically(66);
        self.draw_header(&header)?;
        let (low, high) = self.range();
        let max = self.series.iter().flat_map(|series| &series.measured).map(|point| point.0).fold(1.0, f64::max);
        let (scale, unit) = self.scale(high);
        let x = Ticks::linear(0.0, max * 1.03, 9);
        let y = match self.unit {
            Unit::Seconds => Ticks::logarithmic(low / scale, high / scale),
            Unit::Bytes => Ticks::linear(0.0, high * 1.08 / scale, 7),
        };
        let mut chart = ChartBuilder::on(&body)
            .margin_right(20)
            .margin_bottom(8)
            .margin_left(4)
            .x_label_area_size(42)
            .y_label_area_size(60)
            .build_cartesian_2d(x, y)?;
        let small = ("sans-serif", 12.5).into_font().color(&GREY);
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .axis_style(GREY)
            .label_style(small.clone())
            .axis_desc_style(small)
            .x_desc(self.x_label.as_str())
            .y_desc(unit)
            .draw()?;
        for series in &self.series {
            let color = series.color();
            let line = series.predicted.iter().map(|(x, y)| (*x, y / scale));
            chart.draw_series(LineSeries::new(line, color.mix(0.75).stroke_width(2)))?;
        }
        for series in &self.series {
            let color = series.color();
            let bars = series.measured.iter().map(|(x, _, low, high)| {
                PathElement::new([(*x, low / scale), (*x, high / scale)], color.stroke_width(2))
            });
            chart.draw_series(bars)?;
            let point = |(x, y, ..): &(f64, f64, f64, f64)| {
                EmptyElement::at((*x, y / scale))
                    + Circle::new((0, 0), 6, WHITE.filled())
                    + Circle::new((0, 0), 5, color.filled())
            };
            chart.draw_series(series.measured.iter().map(point))?;
        }
        Ok(())
    }

    /// Title and legend, above the chart and so never on it.
    fn draw_header(&self, area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>) -> Result<(), DrawError> {
        let left = Pos::new(HPos::Left, VPos::Center);
        let title = ("sans-serif", 16).into_font().style(FontStyle::Bold).color(&INK).pos(left);
        area.draw(&Text::new(self.title.clone(), (14, 20), title))?;
        let grey = ("sans-serif", 12.5).into_font().color(&GREY).pos(left);
        let ink = ("sans-serif", 12.5).into_font().color(&INK).pos(left);
        area.draw(&Text::new("measured", (14, 46), grey.clone()))?;
        let mut x = 84;
        for series in &self.series {
            let label = series.decoder.label();
            area.draw(&Circle::new((x, 46), 5, series.color().filled()))?;
            area.draw(&Text::new(label, (x + 12, 46), ink.clone()))?;
            x += 12 + 7 * label.len() as i32 + 20;
        }
        area.draw(&Text::new("predicted", (x + 10, 46), grey))?;
        for (at, series) in self.series.iter().enumerate() {
            let y = 46 + 3 * (2 * at as i32 - self.series.len() as i32 + 1);
            area.draw(&PathElement::new([(x + 76, y), (x + 104, y)], series.color().stroke_width(2)))?;
        }
        Ok(())
    }

    fn range(&self) -> (f64, f64) {
        let measured =
            self.series.iter().flat_map(|series| &series.measured).flat_map(|(_, y, low, high)| [*y, *low, *high]);
        let predicted = self.series.iter().flat_map(|series| &series.predicted).map(|(_, y)| *y);
        measured
            .chain(predicted)
            .filter(|y| *y > 0.0)
            .fold((f64::INFINITY, 0.0), |(low, high), y| (y.min(low), y.max(high)))
    }

    /// The unit in which the largest value has few digits, and its size.
    fn scale(&self, high: f64) -> (f64, &'static str) {
        match self.unit {
            Unit::Seconds if high >= 2.0 => (1.0, "seconds"),
            Unit::Seconds => (1e-3, "milliseconds"),
            Unit::Bytes if high >= 2e9 => (1e9, "GB"),
            Unit::Bytes => (1e6, "MB"),
        }
    }
}

type DrawError = DrawingAreaErrorKind<std::io::Error>;
type DrawingAreaErrorKind<E> = plotters::drawing::DrawingAreaErrorKind<E>;

/// An axis with ticks at round numbers, linear or logarithmic.
struct Ticks {
    low: f64,
    high: f64,
    logarithmic: bool,
    at: Vec<f64>,
}

impl Ticks {
    /// From `low` to `high`, with up to `max` ticks.
    fn linear(low: f64, high: f64, max: usize) -> Self {
        let least = (high - low) / max as f64;
        let power = 10_f64.powf(least.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|step| step * power).into_iter().find(|step| *step >= least);
        let step = step.unwrap_or(10.0 * power);
        let at = (0..).map(|n| low + step * n as f64).take_while(|at| *at <= high * 1.000_001).collect();
        Self { low, high, logarithmic: false, at }
    }

    /// Around `low` to `high`, with ticks at 1, 2 and 5 times powers of ten, as far as there is room.
    fn logarithmic(low: f64, high: f64) -> Self {
        let (low, high) = (low / 1.5, high * 1.5);
        let decades = (high / low).log10();
        let of_a_decade: &[f64] = if decades > 3.5 {
            &[1.0]
        } else if decades > 2.0 {
            &[1.0, 3.0]
        } else {
            &[1.0, 2.0, 5.0]
        };
        let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
        let at = powers.flat_map(|power| of_a_decade.iter().map(move |factor| factor * 10_f64.powi(power)));
        Self { low, high, logarithmic: true, at: at.filter(|at| (low..=high).contains(at)).collect() }
    }
}

impl Ranged for Ticks {
    type FormatOption = plotters::coord::ranged1d::NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let share = match self.logarithmic {
            true => (value / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        from + ((to - from) as f64 * share).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.at.clone()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Ticks {
    fn format_ext(&self, value: &f64) -> String {
        let digits = format!("{value:.3}");
        digits.trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}
