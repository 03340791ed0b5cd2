//! What is printed.

use std::io::Write;

use comfy_table::{CellAlignment, Table, presets};
use gpt2_burn::batch::BatchReport;
use serde_json::json;

use super::{Args, Batching};
use crate::args::Failure;

/// A request that was served: seconds from the start.
pub struct Served {
    pub arrival: f64,
    pub first: f64,
    pub last: f64,
    pub tokens: usize,
}

/// One way of serving all requests.
pub struct Measured {
    pub batching: Batching,
    pub served: Vec<Served>,
    pub seconds: f64,
    pub report: BatchReport,
    /// New tokens of each request.
    pub outputs: Vec<Vec<u32>>,
}

impl Measured {
    fn name(&self) -> &'static str {
        match self.batching {
            Batching::Running => "running",
            Batching::Waiting => "waiting",
        }
    }

    fn new_tokens(&self) -> usize {
        self.served.iter().map(|served| served.tokens).sum()
    }

    fn tokens_per_second(&self) -> f64 {
        self.new_tokens() as f64 / self.seconds
    }

    /// Seconds from a request's arrival to its first token.
    fn first_token_seconds(&self, share: f64) -> f64 {
        quantile(self.served.iter().map(|served| served.first - served.arrival).collect(), share)
    }

    /// Seconds between a request's tokens behind the first.
    fn token_seconds(&self, share: f64) -> f64 {
        let served = self.served.iter().filter(|served| served.tokens > 1);
        quantile(served.map(|served| (served.last - served.first) / (served.tokens - 1) as f64).collect(), share)
    }

    fn cells(&self) -> [String; 9] {
        let ms = |seconds: f64| format!("{:.0}", seconds * 1e3);
        [
            self.name().to_owned(),
            format!("{:.2}", self.seconds),
            format!("{:.1}", self.tokens_per_second()),
            ms(self.first_token_seconds(0.5)),
            ms(self.first_token_seconds(0.95)),
            format!("{:.1}", self.token_seconds(0.5) * 1e3),
            format!("{:.1}", self.token_seconds(0.95) * 1e3),
            self.report.joins.to_string(),
            self.report.computed_prompt_tokens.to_string(),
        ]
    }
}

/// The value below which this share of all is.
fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values
        .get(((share * values.len() as f64) as usize).min(values.len().saturating_sub(1)))
        .copied()
        .unwrap_or(f64::NAN)
}

/// Prints a table and a verdict, or JSON.
pub fn print(all: &[Measured], heading: &str, args: &Args) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let differ = all.windows(2).any(|pair| pair[0].outputs != pair[1].outputs);
    if args.json {
        for measured in all {
            writeln!(out, "{}", as_json(measured, args))?;
        }
    } else {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN).set_header([
            "batching",
            "seconds",
            "tokens/s",
            "TTFT p50 ms",
            "TTFT p95 ms",
            "TPOT p50 ms",
            "TPOT p95 ms",
            "joins",
            "computed",
        ]);
        table.add_rows(all.iter().map(Measured::cells));
        table.column_iter_mut().for_each(|column| column.set_cell_alignment(CellAlignment::Right));
        let arrivals = match args.rate {
            0.0 => "all at once".to_owned(),
            rate => format!("{rate} a second"),
        };
        let (requests, prompt, new) = (args.requests, args.prompt, args.new);
        writeln!(
            out,
            "{heading}: {requests} requests, {arrivals}, prompts of {prompt} tokens, {new} new ones\n\n{table}"
        )?;
        if all.len() > 1 && !differ {
            writeln!(out, "\nThe outputs are equal, token by token.")?;
        }
    }
    // With kernels on a CPU nothing else may be; elsewhere last digits depend on what is computed together.
    match differ && args.model.device == "flex" && args.model.kernels == crate::args::model::OnOff::On {
        true => Err("requests got other tokens in one way than in the other".into()),
        false => Ok(()),
    }
}

/// The fields that other engines' figures have too.
fn as_json(measured: &Measured, args: &Args) -> serde_json::Value {
    json!({
        "engine": format!("gpt2-burn {}", measured.name()),
        "requests": measured.served.len(),
        "rate": args.rate,
        "prompt": args.prompt.to_string(),
        "new": args.new.to_string(),
        "shared": args.shared,
        "new_tokens": measured.new_tokens(),
        "seconds": measured.seconds,
        "tok_s": measured.tokens_per_second(),
        "ttft_p50": measured.first_token_seconds(0.5),
        "ttft_p95": measured.first_token_seconds(0.95),
        "tpot_p50": measured.token_seconds(0.5),
        "tpot_p95": measured.token_seconds(0.95),
        "joins": measured.report.joins,
        "preemptions": measured.report.preemptions,
        "computed_prompt_tokens": measured.report.computed_prompt_tokens,
    })
}
