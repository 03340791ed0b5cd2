//! What is printed.

use std::io::Write;

use comfy_table::{CellAlignment, Table, presets};
use gpt2_burn::measure::Divergence;
use serde::Serialize;

use crate::args::Failure;

/// One decoder on one device.
#[derive(Debug, Serialize)]
pub struct Row {
    pub device: String,
    /// What it is, and what its kernels are compiled to.
    pub device_is: String,
    /// What outputs are compared with, if not with naive decoding on the same device.
    pub reference: Option<String>,
    /// Largest difference of any logit from the reference's, over one row.
    pub logit_drift: Option<f64>,
    pub decoder: String,
    pub dtype: String,
    pub cache_dtype: String,
    pub kernels: bool,
    pub deterministic: bool,
    pub threads: usize,
    pub batch: usize,
    /// Of the longest row.
    pub prompt_tokens: usize,
    /// Of all rows together.
    pub all_prompt_tokens: usize,
    /// Of each row.
    pub new_tokens: usize,
    pub ttft_seconds: f64,
    /// The same of each prompt by itself, added up, where prompts are of unequal length.
    pub alone_seconds: Option<f64>,
    pub tpot_seconds: Option<f64>,
    pub tpot_p95_seconds: Option<f64>,
    /// From the prompt to the last token of all rows: the median of the repetitions.
    pub seconds: f64,
    pub seconds_min: f64,
    pub seconds_max: f64,
    pub tokens_per_second: f64,
    pub speedup_over_naive: Option<f64>,
    /// What drafts were worth.
    pub speculation: Option<SpeculationJson>,
    pub sampled_steps: Option<usize>,
    pub peak_bytes: Option<usize>,
    pub kv_bytes: usize,
    /// Tokens that all prompts begin with.
    pub shared_tokens: usize,
    /// Most pages of the cache that were in use; 0 if it is in one piece.
    pub pages_used: usize,
    /// Most pages that several rows shared.
    pub pages_shared: usize,
    pub pages_copied: usize,
    pub equal: bool,
    pub ties: usize,
    pub diverged_rows: usize,
    pub first_divergence: Option<DivergenceJson>,
}

/// What drafts were worth, in figures and in words.
#[derive(Debug, Serialize)]
pub struct SpeculationJson {
    #[serde(flatten)]
    pub figures: serde_json::Value,
    #[serde(skip)]
    pub words: String,
}

/// [`Divergence`], to be printed.
#[derive(Debug, Serialize)]
pub struct DivergenceJson {
    row: usize,
    step: usize,
    margin: f64,
    max_logit_diff: f64,
}

impl From<Divergence> for DivergenceJson {
    fn from(divergence: Divergence) -> Self {
        let Divergence { row, step, margin, max_logit_diff, .. } = divergence;
        Self { row, step, margin, max_logit_diff }
    }
}

/// Prints the assignment's lines, the verdict and a table; or JSON.
pub fn print(rows: &[Row], json: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string(rows)?)?;
        return Ok(());
    }
    let several = rows.iter().any(|row| row.device != rows[0].device);
    for row in rows {
        writeln!(out, "{}", row.line(several))?;
    }
    for row in rows.iter().filter(|row| row.decoder != "naive" || row.reference.is_some()) {
        writeln!(out, "{}", row.verdict())?;
    }
    for first in rows.chunk_by(|a, b| a.device == b.device).map(|group| &group[0]) {
        if let Some(drift) = first.logit_drift {
            writeln!(
                out,
                "{} is {}: its logits differ from the reference's by up to {drift:.1e}",
                first.device, first.device_is
            )?;
        }
    }
    for row in rows {
        if let Some(alone) = row.alone_seconds {
            writeln!(
                out,
                "{} on {}: {:.3} s until the first tokens of {} prompts of {} tokens in all, {:.2} x the {alone:.3} s that they take \
                 one after the other",
                row.decoder,
                row.device,
                row.ttft_seconds,
                row.batch,
                row.all_prompt_tokens,
                row.ttft_seconds / alone,
            )?;
        }
    }
    for row in rows.iter().filter(|row| row.shared_tokens > 0 && row.pages_used > 0) {
        writeln!(
            out,
            "{} on {}: {} pages in use at most, of which rows share {}; {} were copied",
            row.decoder, row.device, row.pages_used, row.pages_shared, row.pages_copied,
        )?;
    }
    for speculation in rows.iter().filter_map(|row| row.speculation.as_ref()) {
        writeln!(out, "{}", speculation.words)?;
    }
    writeln!(out, "\n{}", table(rows))?;
    Ok(())
}

impl Row {
    /// The assignment's line; with the device in it if there are several.
    fn line(&self, several: bool) -> String {
        let label = match self.decoder.as_str() {
            "kv-preallocated" => "KV".to_owned(),
            "speculative" => "SPEC".to_owned(),
            other => other.to_uppercase(),
        };
        let label = if several { format!("{label} on {}", self.device) } else { label };
        let tokens = self.batch * self.new_tokens;
        let sampled = self
            .sampled_steps
            .map_or(String::new(), |steps| format!(" (estimated from {steps} of its {} steps)", self.new_tokens));
        let (seconds, rate) = (self.seconds, self.tokens_per_second);
        let spread = match self.seconds_min < self.seconds_max {
            true => format!(" ({:.3} to {:.3} s)", self.seconds_min, self.seconds_max),
            false => String::new(),
        };
        format!("[{label}] Generated {tokens} tokens in {seconds:.3} seconds for {rate:.1} tok/sec.{spread}{sampled}")
    }

    fn verdict(&self) -> String {
        let (decoder, device, rows) = (&self.decoder, &self.device, self.batch);
        let naive = self.reference.as_ref().map_or(String::new(), |reference| format!(" on {reference}"));
        let ties = match self.ties {
            0 => String::new(),
            ties => format!(", {ties} ties aside"),
        };
        match &self.first_divergence {
            None => format!("{decoder} on {device}: all {rows} rows equal naive decoding's{naive}{ties}"),
            Some(first) => format!(
                "{decoder} on {device}: {} of {rows} rows differ from naive decoding's{naive}{ties}; first in row {} at step {}, \
                 where naive decoding's margin is {:.2e} and logits differ by up to {:.2e}",
                self.diverged_rows, first.row, first.step, first.margin, first.max_logit_diff
            ),
        }
    }

    fn cells(&self) -> Vec<String> {
        let milliseconds = |seconds: Option<f64>| seconds.map_or("-".to_owned(), |s| format!("{:.2}", s * 1e3));
        let megabytes = |bytes: usize| format!("{:.1}", bytes as f64 / 1e6);
        let sampled = self.sampled_steps.map_or("", |_| " *");
        vec![
            format!("{}{sampled}", self.decoder),
            milliseconds(Some(self.ttft_seconds)),
            milliseconds(self.tpot_seconds),
            milliseconds(self.tpot_p95_seconds),
            format!("{:.1}", self.tokens_per_second),
            self.speedup_over_naive.map_or("-".to_owned(), |times| format!("{times:.2} x")),
            self.peak_bytes.map_or("-".to_owned(), megabytes),
            megabytes(self.kv_bytes),
        ]
    }
}

/// A table of all rows if they are of several devices, else one with the device above it.
fn table(rows: &[Row]) -> String {
    let mut devices: Vec<&Row> = Vec::new();
    for row in rows {
        if devices.iter().all(|known| known.device != row.device) {
            devices.push(row);
        }
    }
    let Some(first) = rows.first() else { return String::new() };
    // Naive decoding has no cache.
    let cache = &rows.last().unwrap_or(first).cache_dtype;
    let several = devices.len() > 1;
    let mut text = format!(
        "{} in {}{}{}{}, {} threads: batch {}, prompt {}{}, {} new tokens each\n\n",
        devices.iter().map(|row| row.device.as_str()).collect::<Vec<_>>().join(", "),
        first.dtype,
        if *cache == first.dtype { String::new() } else { format!(" with a cache in {cache}") },
        if rows.iter().any(|row| row.kernels) { "" } else { ", without kernels" },
        if first.deterministic { ", deterministic" } else { "" },
        first.threads,
        first.batch,
        if first.alone_seconds.is_some() { "up to " } else { "" },
        first.prompt_tokens,
        first.new_tokens
    );
    let mut header = vec!["decoder", "TTFT ms", "TPOT ms", "p95 ms", "tokens/s", "over naive", "peak MB", "KV MB"];
    if several {
        header.insert(0, "device");
    }
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    table.add_rows(rows.iter().map(|row| {
        let mut cells = row.cells();
        if several {
            cells.insert(0, row.device.clone());
        }
        cells
    }));
    let names = 1 + usize::from(several);
    table.column_iter_mut().skip(names).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    text += &format!("{table}\n");
    if let Some(steps) = rows.iter().find_map(|row| row.sampled_steps) {
        text += &format!("\n\\* estimated from {steps} of its {} steps\n", first.new_tokens);
    }
    text.trim_end().to_owned()
}
