//! The files: points as CSV, charts as SVG, and the report.

use std::fmt::Write;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::figures::Figure;
use super::options::{Args, Axis};
use super::predict::Drafting;
use super::report;
use super::sweep::{Point, Sweep};
use crate::args::Failure;

/// A chart and the name of its file.
pub struct Drawn {
    pub name: String,
    pub svg: String,
}

/// Writes everything into the folder, and returns what it wrote.
pub fn write(args: &Args, sweeps: &[Sweep]) -> Result<Vec<PathBuf>, Failure> {
    let mut written = Vec::new();
    let mut write = |name: &str, text: &str| -> Result<(), Failure> {
        let path = args.out.join(name);
        std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
        written.push(path);
        Ok(())
    };
    write("points.csv", &as_csv(sweeps)?)?;
    let mut drawn = Vec::new();
    for sweep in sweeps {
        let charts = draw(sweep, sweeps.len() > 1)?;
        charts.iter().try_for_each(|chart| write(&chart.name, &chart.svg))?;
        drawn.push(charts);
    }
    write("report.html", &report::as_html(sweeps, &drawn))?;
    Ok(written)
}

/// All charts of a device, whose name is in theirs if there are several.
fn draw(sweep: &Sweep, several: bool) -> Result<Vec<Drawn>, Failure> {
    // Names of devices can have a number behind a colon, which not all systems have in names of files.
    let device = if several { format!("{}-", sweep.device.replace(':', "-")) } else { String::new() };
    let mut drawn = Vec::new();
    for figure in Figure::ALL {
        for axis in Axis::ALL {
            if let Some(chart) = sweep.chart(figure, axis)? {
                let name = format!("{device}{}-{}.svg", figure.slug(), axis.name());
                drawn.push(Drawn { name, svg: chart.svg()? });
            }
        }
    }
    Ok(drawn)
}

/// The columns, and what is in them.
fn columns(point: &Point) -> [(&'static str, Value); 20] {
    let (low, high) = point.total.spread();
    let drafting = point.drafting.as_ref();
    [
        ("curve", point.axis.name().into()),
        ("decoder", point.decoder.label().into()),
        ("prompt_tokens", point.lengths.prompt.into()),
        ("new_tokens", point.lengths.new.into()),
        ("total_seconds", point.total.median().into()),
        ("total_seconds_q25", low.into()),
        ("total_seconds_q75", high.into()),
        ("first_token_seconds", point.first.median().into()),
        ("seconds_per_token", point.per_token.as_ref().map(|timing| timing.median()).into()),
        ("memory_bytes", point.memory.into()),
        ("accounted_bytes", point.accounted.into()),
        ("predicted_total_seconds", point.predicted.total.into()),
        ("predicted_seconds_per_token", point.per_token.as_ref().map(|_| point.predicted.per_token).into()),
        ("predicted_memory_bytes", point.predicted.memory.into()),
        ("roofline_total_seconds", point.predicted.roofline.into()),
        ("of_roofline", (point.predicted.roofline / point.total.median()).into()),
        ("runs", point.total.seconds.len().into()),
        ("timed_steps", point.sampled_steps.into()),
        ("acceptance", drafting.map(|drafting| drafting.acceptance).into()),
        ("drafted_per_round", drafting.map(Drafting::mean_len).into()),
    ]
}

fn as_csv(sweeps: &[Sweep]) -> Result<String, Failure> {
    let mut text = String::new();
    for sweep in sweeps {
        for point in &sweep.points {
            let columns = columns(point);
            if text.is_empty() {
                let names: Vec<&str> = columns.iter().map(|column| column.0).collect();
                writeln!(text, "device,model,batch,{}", names.join(","))?;
            }
            let cells = columns.iter().map(|(_, value)| match value {
                Value::Null => String::new(),
                Value::String(text) => text.clone(),
                number => number.to_string(),
            });
            let cells: Vec<String> = cells.collect();
            // Only a path can hold what is not plain.
            let model = format!("\"{}\"", sweep.model.replace('"', "\"\""));
            writeln!(text, "{},{model},{},{}", sweep.device, sweep.batch, cells.join(","))?;
        }
    }
    Ok(text)
}

/// Machines and points.
pub fn as_json(sweeps: &[Sweep]) -> Value {
    let sweep = |sweep: &Sweep| {
        let point = |point: &Point| columns(point).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let points: Vec<serde_json::Map<String, Value>> = sweep.points.iter().map(point).collect();
        json!({
            "device": sweep.device,
            "model": sweep.model,
            "dtype": sweep.dtype,
            "draft": sweep.draft,
            "kernels": sweep.kernels,
            "threads": sweep.threads,
            "batch": sweep.batch,
            "bytes_per_second": sweep.machine.bandwidth,
            "flops_per_second": sweep.machine.flops,
            "weights_bytes_per_second": sweep.machine.reached.weights,
            "results_bytes_per_second": sweep.machine.reached.results,
            "linear_flops_per_second": sweep.machine.reached.linear,
            "attention_flops_per_second": sweep.machine.reached.attention,
            "points": points,
        })
    };
    sweeps.iter().map(sweep).collect()
}
