//! What the curves show, in words: for the terminal, and as one HTML file that needs nothing else.

use gpt2_burn::cost::{format_bytes, format_seconds};
use gpt2_burn::measure::{CurveFit, median};

use super::figures::Figure;
use super::files::Drawn;
use super::options::{Axis, DecoderName};
use super::predict::Drafting;
use super::sweep::{Point, Sweep};

const STYLE: &str = include_str!("report.css");

/// For the terminal.
pub fn as_text(sweep: &Sweep) -> String {
    let machine = facts(sweep).into_iter().map(|(name, value)| format!("{name}: {value}"));
    let said = findings(sweep).into_iter().map(|finding| format!("- {finding}"));
    let machine = machine.collect::<Vec<_>>().join("; ");
    format!("{machine}\n\n{}", said.collect::<Vec<_>>().join("\n"))
}

/// The report.
pub fn as_html(sweeps: &[Sweep], drawn: &[Vec<Drawn>]) -> String {
    let sections: String = sweeps.iter().zip(drawn).map(|(sweep, charts)| section(sweep, charts)).collect();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>Latency curves</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<header>\n\
         <p class=\"kicker\">gpt2-burn</p>\n<h1>Latency curves</h1>\n\
         <p class=\"lead\">Time and memory against the length of the prompt and of the output. Points are measured, with bars \
         over the middle half of the runs; lines are what arithmetic predicts from the rates that were measured of the \
         machine.</p>\n</header>\n{sections}</main>\n</body>\n</html>\n"
    )
}

fn section(sweep: &Sweep, charts: &[Drawn]) -> String {
    let facts: String = facts(sweep)
        .into_iter()
        .map(|(name, value)| format!("<div><dt>{name}</dt><dd>{}</dd></div>\n", escaped(&value)))
        .collect();
    let findings: String = findings(sweep).iter().map(|finding| emphasised(finding)).collect();
    let figures: String = charts.iter().map(|chart| format!("<figure>{}</figure>\n", chart.svg)).collect();
    format!(
        "<section>\n<h2>{} on {}</h2>\n<dl class=\"facts\">\n{facts}</dl>\n<h3>What the curves show</h3>\n\
         <div class=\"findings\">\n{findings}</div>\n<div class=\"charts\">\n{figures}</div>\n\
         <h3>How far the prediction is off</h3>\n{}<h3>All points</h3>\n<details><summary>{} points, medians of {} runs</summary>\n\
         {}</details>\n</section>\n",
        escaped(&sweep.model),
        escaped(&sweep.device),
        deviations(sweep),
        sweep.points.len(),
        sweep.rounds,
        points(sweep),
    )
}

/// What was measured, and on what.
fn facts(sweep: &Sweep) -> Vec<(&'static str, String)> {
    let machine = &sweep.machine;
    let reached = machine.reached;
    let rate = |bytes: f64| format!("{}/s", format_bytes(bytes));
    let flops = |flops: f64| rate(flops).replace('B', "FLOP");
    let kernels = if sweep.kernels { "" } else { ", burn's operations" };
    vec![
        ("model", format!("{}, {:.1} M parameters", sweep.model, sweep.parameters as f64 / 1e6)),
        ("weights, rows", format!("{}{kernels}, {}", sweep.dtype, sweep.batch)),
        ("device", format!("{}, {} threads", sweep.device, sweep.threads)),
        ("reads, of that weights", format!("{}, {}", rate(machine.bandwidth), rate(reached.weights))),
        ("writes results", rate(reached.results)),
        ("multiplies, attends", format!("{}, {}", flops(reached.linear), flops(reached.attention))),
        ("peak, ridge point", format!("{}, {:.1} FLOP/B", flops(machine.flops), machine.ridge_point())),
        ("draft", sweep.draft.clone().unwrap_or_else(|| "none".to_owned())),
    ]
}

/// What the curves show, from their fits.
fn findings(sweep: &Sweep) -> Vec<String> {
    let per_token = grows(sweep, Figure::PerToken, Axis::Prompt);
    let totals = Axis::ALL.iter().filter_map(|axis| {
        let said = grows(sweep, Figure::Total, *axis)?;
        Some([said, pays(sweep, *axis).unwrap_or_default()].join(" "))
    });
    per_token.into_iter().chain(totals).chain(drafts(sweep)).chain(memory(sweep)).collect()
}

/// How a figure of each decoder grows; none if there are too few points.
fn grows(sweep: &Sweep, figure: Figure, axis: Axis) -> Option<String> {
    let said = sweep.decoders.iter().map(|&decoder| {
        let points = sweep.medians(figure, axis, decoder);
        let (fit, first, last) = (CurveFit::new(&points)?, points.first()?, points.last()?);
        let shares = fit.shares(last.0);
        let shares = shares.iter().zip(["constant", "linear", "quadratic"]).filter(|(share, _)| **share >= 0.005);
        let shares: Vec<String> = shares.map(|(share, name)| format!("{:.0}% {name}", 100.0 * share)).collect();
        Some(format!(
            "{} is {}, {} at {} tokens and {} at {} (fitted there: {})",
            decoder.label(),
            fit.growth(last.0),
            format_seconds(first.1),
            first.0,
            format_seconds(last.1),
            last.0,
            shares.join(", ")
        ))
    });
    let said = said.collect::<Option<Vec<String>>>()?.join("; ");
    Some(format!("{} against the {}'s length: {said}.", figure.title(), axis.name()))
}

/// From where on a cache is faster, and by how much at the end.
fn pays(sweep: &Sweep, axis: Axis) -> Option<String> {
    let [naive, cached] = [DecoderName::Naive, DecoderName::Kv].map(|of| sweep.medians(Figure::Total, axis, of));
    let ratios: Vec<(f64, f64)> = naive.iter().zip(&cached).map(|(naive, kv)| (naive.0, naive.1 / kv.1)).collect();
    let last = ratios.last()?;
    // The shortest length from which it always is.
    let slower = ratios.iter().rposition(|(_, ratio)| *ratio <= 1.0).map_or(0, |at| at + 1);
    let Some(first) = ratios.get(slower) else {
        return Some("The cache does not pay at the lengths measured.".to_owned());
    };
    let from = if slower == 0 { "the shortest, " } else { "" };
    Some(format!(
        "The cache pays from {from}{} tokens on: there it is {:.1} times as fast, at {} tokens {:.1} times.",
        first.0, first.1, last.0, last.1
    ))
}

/// What drafts are worth over a cache alone; none without them.
fn drafts(sweep: &Sweep) -> Option<String> {
    let of = |decoder: DecoderName| {
        let curves = Axis::ALL.into_iter().flat_map(move |axis| sweep.curve(axis, decoder));
        curves.filter_map(|point| Some((point, point.per_token.as_ref()?.median())))
    };
    let pairs =
        of(DecoderName::Kv).zip(of(DecoderName::Speculative)).filter(|(_, (point, _))| point.drafting.is_some());
    let (mut worth, mut paper, mut right, mut lens) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for ((kv, plain), (speculative, drafted)) in pairs {
        worth.push(plain / drafted);
        paper.push(kv.predicted.per_token / speculative.predicted.per_token);
        right.extend(speculative.drafting.as_ref().map(|drafting| 100.0 * drafting.acceptance));
        lens.extend(speculative.drafting.as_ref().map(Drafting::mean_len));
    }
    let middle = |values: &[f64]| median(values).unwrap_or(f64::NAN);
    let (least, max) = (worth.iter().copied().reduce(f64::min)?, worth.iter().copied().reduce(f64::max)?);
    Some(format!(
        "Drafts: {} proposes {:.1} tokens a round, of which {:.0}% stand if those before them do. A token comes {:.2} times as \
         fast as with the cache alone, from {least:.2} to {max:.2} times; on paper {:.2} times, with that share, which is \
         measured at each point.",
        sweep.draft.as_deref().unwrap_or("the draft"),
        middle(&lens),
        middle(&right),
        middle(&worth),
        middle(&paper),
    ))
}

fn memory(sweep: &Sweep) -> Option<String> {
    let said = sweep.decoders.iter().map(|&decoder| {
        let points = sweep.medians(Figure::Memory, Axis::Output, decoder);
        let (first, last) = (points.first()?, points.last()?);
        let of_paper = sweep.curve(Axis::Output, decoder).last()?.predicted.memory;
        let (low, high) = (format_bytes(first.1), format_bytes(last.1));
        let paper = format_bytes(of_paper);
        Some(format!(
            "{} takes {low} for {} new tokens and {high} for {}, on paper {paper}",
            decoder.label(),
            first.0,
            last.0
        ))
    });
    Some(format!("{}: {}.", Figure::Memory.title(), said.collect::<Option<Vec<_>>>()?.join("; ")))
}

fn deviations(sweep: &Sweep) -> String {
    let percent = |share: f64| format!("{:.0}%", 100.0 * share);
    let rows = sweep.decoders.iter().map(|&decoder| {
        let cells: String = Figure::ALL
            .iter()
            .map(|figure| match sweep.deviation(*figure, decoder) {
                Some([median, largest]) => format!("<td>{}</td><td>{}</td>", percent(median), percent(largest)),
                None => "<td>-</td><td>-</td>".to_owned(),
            })
            .collect();
        format!("<tr><th>{}</th>{cells}</tr>\n", decoder.label())
    });
    let titles: String =
        Figure::ALL.iter().map(|figure| format!("<th colspan=\"2\">{}</th>", figure.title())).collect();
    let parts = "<th>median</th><th>largest</th>".repeat(Figure::ALL.len());
    format!(
        "<table>\n<thead><tr><th></th>{titles}</tr>\n<tr><th></th>{parts}</tr></thead>\n<tbody>{}</tbody></table>\n",
        rows.collect::<String>()
    )
}

fn points(sweep: &Sweep) -> String {
    let header = ["decoder", "prompt", "new", "total", "predicted", "per token", "predicted", "memory", "predicted"];
    let header: String = header.iter().map(|name| format!("<th>{name}</th>")).collect();
    let row = |point: &Point| {
        let per_token = point.per_token.as_ref();
        let cells = [
            point.lengths.prompt.to_string(),
            format!("{}{}", point.lengths.new, point.sampled_steps.map_or("", |_| " *")),
            format_seconds(point.total.median()),
            format_seconds(point.predicted.total),
            per_token.map_or("-".to_owned(), |timing| format_seconds(timing.median())),
            per_token.map_or("-".to_owned(), |_| format_seconds(point.predicted.per_token)),
            point.memory.map_or("-".to_owned(), |bytes| format_bytes(bytes as f64)),
            format_bytes(point.predicted.memory),
        ];
        let cells: String = cells.iter().map(|cell| format!("<td>{cell}</td>")).collect();
        format!("<tr><th>{}</th>{cells}</tr>\n", point.decoder.label())
    };
    let rows: String = sweep.points.iter().map(row).collect();
    let sampled = sweep.points.iter().find_map(|point| point.sampled_steps);
    let note = sampled.map_or(String::new(), |steps| {
        format!("<p class=\"note\">* {steps} of its steps were timed, the others lie between them.</p>\n")
    });
    format!("<table>\n<thead><tr>{header}</tr></thead>\n<tbody>{rows}</tbody></table>\n{note}")
}

/// A paragraph whose words up to the first colon are bold.
fn emphasised(finding: &str) -> String {
    let (what, said) = finding.split_once(':').unwrap_or(("", finding));
    format!("<p><b>{}</b>: {}</p>\n", escaped(what), escaped(said.trim()))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
