//! The curves of a sweep: which figure against which length.

use gpt2_burn::measure::Timing;

use super::chart::{Chart, Series, Unit};
use super::options::{Axis, DecoderName, Lengths};
use super::predict::{Drafting, Predicted};
use super::sweep::{Point, Sweep};
use crate::args::Failure;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// Seconds from the prompt to the last token.
    Total,
    /// Seconds per token after the first.
    PerToken,
    /// Bytes.
    Memory,
}

impl Figure {
    pub const ALL: [Self; 3] = [Self::Total, Self::PerToken, Self::Memory];

    /// In the name of a file.
    pub fn slug(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::PerToken => "per-token",
            Self::Memory => "memory",
        }
    }

    /// On a chart.
    pub fn title(self) -> &'static str {
        match self {
            Self::Total => "Total time",
            Self::PerToken => "Time per output token",
            Self::Memory => "Memory",
        }
    }

    /// The runs of a point; of memory, one.
    pub fn measured(self, point: &Point) -> Option<Timing> {
        match self {
            Self::Total => Some(point.total.clone()),
            Self::PerToken => point.per_token.clone(),
            Self::Memory => Some(Timing::from(vec![point.memory? as f64])),
        }
    }

    pub fn predicted(self, predicted: &Predicted) -> f64 {
        match self {
            Self::Total => predicted.total,
            Self::PerToken => predicted.per_token,
            Self::Memory => predicted.memory,
        }
    }
}

impl Sweep {
    /// The length and the median of each point of a curve that has one.
    pub fn medians(&self, figure: Figure, axis: Axis, decoder: DecoderName) -> Vec<(f64, f64)> {
        let of = |point: &Point| Some((point.lengths.along(axis) as f64, figure.measured(point)?.median()));
        self.curve(axis, decoder).filter_map(of).collect()
    }

    /// Median and largest deviation of a decoder's points from the prediction, as shares of it.
    pub fn deviation(&self, figure: Figure, decoder: DecoderName) -> Option<[f64; 2]> {
        let points = self.points.iter().filter(|point| point.decoder == decoder);
        let deviations = points.filter_map(|point| {
            Some((figure.measured(point)?.median() / figure.predicted(&point.predicted) - 1.0).abs())
        });
        let deviations: Timing = deviations.collect::<Vec<f64>>().into();
        let largest = deviations.seconds.iter().copied().fold(0.0, f64::max);
        (!deviations.seconds.is_empty()).then(|| [deviations.median(), largest])
    }

    /// The chart of a figure against a length; none if nothing of it was measured.
    pub fn chart(&self, figure: Figure, axis: Axis) -> Result<Option<Chart>, Failure> {
        let series = self.decoders.iter().map(|&decoder| self.series(figure, axis, decoder));
        let series = series.collect::<Result<Vec<_>, Failure>>()?;
        if series.iter().all(|series| series.measured.is_empty()) {
            return Ok(None);
        }
        let other = self.points.iter().find(|point| point.axis == axis).map(|point| point.lengths);
        let fixed = other.map_or(String::new(), |lengths| match axis {
            Axis::Prompt => format!("and {} new ones", lengths.new),
            Axis::Output => format!("behind a prompt of {}", lengths.prompt),
        });
        let rows = if self.batch == 1 { String::new() } else { format!(", {} rows", self.batch) };
        Ok(Some(Chart {
            title: format!("{} against the {}'s length", figure.title(), axis.name()),
            x_label: match axis {
                Axis::Prompt => format!("tokens of the prompt ({fixed}{rows})"),
                Axis::Output => format!("new tokens ({fixed}{rows})"),
            },
            unit: if figure == Figure::Memory { Unit::Bytes } else { Unit::Seconds },
            series,
        }))
    }

    fn series(&self, figure: Figure, axis: Axis, decoder: DecoderName) -> Result<Series, Failure> {
        let measured = self.curve(axis, decoder).filter_map(|point| {
            let timing = figure.measured(point)?;
            let (low, high) = timing.spread();
            Some((point.lengths.along(axis) as f64, timing.median(), low, high))
        });
        if decoder == DecoderName::Speculative {
            // Between the points nobody knows how often drafts are right.
            let points = self.curve(axis, decoder).filter(|point| figure.measured(point).is_some());
            let predicted = points.map(|point| (point.lengths.along(axis) as f64, figure.predicted(&point.predicted)));
            return Ok(Series { decoder, measured: measured.collect(), predicted: predicted.collect() });
        }
        let mut predicted = Vec::new();
        let ends = self.curve(axis, decoder).map(|point| point.lengths).collect::<Vec<_>>();
        if let (Some(first), Some(last)) = (ends.first(), ends.last()) {
            let (from, to) = (first.along(axis), last.along(axis));
            let steps = 24.min(to - from).max(1);
            for step in 0..=steps {
                let along = from + (to - from) * step / steps;
                let lengths = match axis {
                    Axis::Prompt => Lengths { prompt: along, ..*first },
                    Axis::Output => Lengths { new: along, ..*first },
                };
                if figure == Figure::PerToken && lengths.new < 2 {
                    continue;
                }
                let of = self.predictor.predict(&self.machine, decoder, lengths, &Drafting::default())?;
                predicted.push((along as f64, figure.predicted(&of)));
            }
        }
        Ok(Series { decoder, measured: measured.collect(), predicted })
    }
}
