//! What is printed.

use std::io::Write;

use comfy_table::{CellAlignment, Table, presets};
use gpt2_burn::cost::{Term, format_bytes, format_seconds};

use super::{Best, CaseReport, Report, Step};
use crate::args::Failure;

/// Prints tables in Markdown, or one JSON object.
pub fn print(report: &Report, json: bool, terms: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string(report)?)?;
        return Ok(());
    }
    let hardware = &report.hardware;
    let memory = hardware.memory_bytes.map_or("memory not known".to_owned(), format_bytes);
    writeln!(
        out,
        "{} in {}: {} parameters, {}; counted: {}\n{}: {}/s, {}/s, {memory}; ridge point {:.0} FLOPs per byte",
        report.model,
        report.dtype,
        grouped(report.parameters),
        format_bytes(report.parameter_bytes),
        report.counted,
        hardware.name,
        format_bytes(hardware.bytes_per_second),
        flops(hardware.flops_per_second),
        hardware.ridge_point,
    )?;
    writeln!(out, "\nA decode step for B rows at length N\n")?;
    for (name, form) in [("naive ", &report.naive), ("cached", &report.cached)] {
        writeln!(out, "    {name} FLOPs = {}\n    {name} bytes = {}", form.flops, form.bytes)?;
    }
    writeln!(out, "\n{}", cases(&report.cases))?;
    for case in &report.cases {
        for (name, step) in [("naively", &case.naive), ("with a cache", &case.cached)] {
            if !step.fits {
                writeln!(out, "\n({}, {}) {name} {}", case.batch, case.length, step.fit)?;
            }
        }
    }
    if terms {
        for case in &report.cases {
            for (name, step) in [("naively", &case.naive), ("with a cache", &case.cached)] {
                writeln!(out, "\nTerms of ({}, {}) {name}\n\n{}", case.batch, case.length, of_terms(&step.terms))?;
            }
        }
    }
    writeln!(out, "\nKeys and values\n\n{}", keys_and_values(&report.cases))?;
    writeln!(out, "\nA decode step's constant: the weights read once\n\n{}", constants(report))?;
    write_speculation(&mut out, report)
}

fn write_speculation(out: &mut impl Write, report: &Report) -> Result<(), Failure> {
    let speculation = &report.speculation;
    writeln!(
        out,
        "\nSpeculation: a = {} accepted, a draft's step costs c = {:.4} of a target's\n\n{}",
        speculation.acceptance,
        speculation.draft_cost,
        lengths(report)
    )?;
    let say = |best: Best| match best.drafted {
        0 => "not at all".to_owned(),
        m => format!("m = {m} ({:.2} x)", best.speedup),
    };
    let (without, with) = (say(speculation.best_without_bonus), say(speculation.best_with_bonus));
    writeln!(out, "\nBest: {without} without the bonus token, {with} with it")?;
    let Some(temperatures) = &report.temperatures else { return Ok(()) };
    writeln!(out, "\nThe same c, with the share of a real pair's drafted tokens that is accepted at a temperature\n")?;
    let mut table = table(["temperature", "accepted a", "best m", "speed-up", "best m, bonus", "speed-up, bonus"]);
    for row in temperatures {
        let (without, with) = (row.best_without_bonus, row.best_with_bonus);
        let greedy = if row.temperature == 0.0 { " (greedy)" } else { "" };
        table.add_row([
            format!("{}{greedy}", row.temperature),
            format!("{:.4}", row.acceptance),
            without.drafted.to_string(),
            times(without.speedup),
            with.drafted.to_string(),
            times(with.speedup),
        ]);
    }
    writeln!(out, "{}", aligned(table))?;
    Ok(())
}

fn cases(cases: &[CaseReport]) -> Table {
    let mut table = table(["(B, N)", "", "FLOPs", "bytes", "seconds", "bound", "speed-up", "memory", "fits"]);
    for case in cases {
        let mut row = |name: &str, step: &Step, speedup: String| {
            table.add_row([
                format!("({}, {})", case.batch, case.length),
                name.to_owned(),
                count(step.flops),
                format_bytes(step.bytes),
                format_seconds(step.seconds),
                step.bound.clone(),
                speedup,
                format_bytes(step.memory_bytes),
                if step.fits { "yes" } else { "no" }.to_owned(),
            ]);
        };
        row("naive", &case.naive, String::new());
        row("cached", &case.cached, times(case.speedup));
    }
    aligned(table)
}

fn of_terms(terms: &[Term]) -> Table {
    let mut table = table(["part", "term", "times", "FLOPs", "weights", "reads", "writes"]);
    for term in terms {
        let bytes = |bytes: f64| if bytes == 0.0 { String::new() } else { format_bytes(bytes) };
        table.add_row([
            term.part.name().to_owned(),
            term.name.to_owned(),
            term.times.to_string(),
            if term.flops == 0.0 { String::new() } else { count(term.flops) },
            bytes(term.weights),
            bytes(term.read),
            bytes(term.written),
        ]);
    }
    aligned(table)
}

fn keys_and_values(cases: &[CaseReport]) -> Table {
    let mut table = table(["(B, N)", "a layer", "all layers"]);
    for case in cases {
        table.add_row([
            format!("({}, {})", case.batch, case.length),
            format_bytes(case.kv_bytes_per_layer),
            format_bytes(case.kv_bytes),
        ]);
    }
    aligned(table)
}

fn constants(report: &Report) -> Table {
    let mut table = table(["model", "without head", "with head"]);
    for constant in &report.decode_constants {
        // In microseconds too, as the assignment asks.
        let both = |seconds: f64| format!("{:.3} ms = {:.0} us", seconds * 1e3, seconds * 1e6);
        table.add_row([constant.model.clone(), both(constant.without_head_seconds), both(constant.with_head_seconds)]);
    }
    aligned(table)
}

fn lengths(report: &Report) -> Table {
    let mut table = table(["drafted m", "tokens", "speed-up", "tokens, bonus", "speed-up, bonus"]);
    for length in &report.speculation.lengths {
        table.add_row([
            length.drafted.to_string(),
            format!("{:.3}", length.tokens_without_bonus),
            times(length.speedup_without_bonus),
            format!("{:.3}", length.tokens_with_bonus),
            times(length.speedup_with_bonus),
        ]);
    }
    aligned(table)
}

fn times(factor: f64) -> String {
    format!("{factor:.2} x")
}

/// A number of operations: `94.4 G`.
fn count(flops: f64) -> String {
    format_bytes(flops).trim_end_matches('B').trim_end().to_owned()
}

fn flops(per_second: f64) -> String {
    format_bytes(per_second).replace('B', "FLOP")
}

/// `1,557,611,200`.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",")
}

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    table
}

/// All columns but the first to the right.
fn aligned(mut table: Table) -> Table {
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}
