//! What is printed, and the ideal that it is held against.

use std::io::Write;
use std::time::Instant;

use comfy_table::{CellAlignment, Table, presets};
use gpt2_burn::backends::has_page_kernels;
use gpt2_burn::generate::Report;
use serde_json::json;

use super::Bench;
use crate::args::Failure;

/// A number of prompts that share a number of tokens.
pub struct Row {
    pub prompts: usize,
    pub shared_tokens: usize,
    pub requested_tokens: usize,
    pub computed_tokens: usize,
    /// From the start to the first token of all prompts.
    pub without_seconds: f64,
    pub with_seconds: f64,
    /// The same of the second call, and what that computed.
    pub again_seconds: f64,
    pub again_tokens: usize,
    pub equal: bool,
    /// What it would take if operations were computed as fast as without the cache, and bytes copied as fast as this machine
    /// does.
    pub ideal_seconds: f64,
}

impl Row {
    pub fn new(
        [first, second]: [&Report; 2],
        (prompts, shared): (usize, usize),
        [without_seconds, with_seconds, again_seconds]: [f64; 3],
        equal: bool,
        bench: &Bench<'_>,
    ) -> Result<Self, Failure> {
        let Some(sharing) = &first.sharing else { return Err("the cache of prefixes was not used".into()) };
        let config = bench.without.model().config();
        let token_bytes = 2 * config.n_layer * config.n_embd * bench.without.cache_dtype().size();
        // The shared keys and values are copied to each row, unless rows share the pages that they are in.
        let shares_pages = has_page_kernels(&bench.without.model().device());
        let copied = if prompts > 1 && !shares_pages { prompts * shared * token_bytes } else { 0 };
        let ideal_seconds =
            without_seconds * sharing.flops / sharing.flops_without + copied as f64 / bench.copied_per_second;
        Ok(Self {
            prompts,
            shared_tokens: shared,
            requested_tokens: sharing.requested_tokens,
            computed_tokens: sharing.computed_tokens,
            without_seconds,
            with_seconds,
            again_seconds,
            again_tokens: second.computed_prompt_tokens,
            equal,
            ideal_seconds,
        })
    }

    pub fn speedup(&self) -> f64 {
        self.without_seconds / self.with_seconds
    }

    pub fn ideal(&self) -> f64 {
        self.without_seconds / self.ideal_seconds
    }

    fn cells(&self) -> [String; 11] {
        let ms = |seconds: f64| format!("{:.1}", seconds * 1e3);
        [
            self.prompts.to_string(),
            self.shared_tokens.to_string(),
            self.requested_tokens.to_string(),
            self.computed_tokens.to_string(),
            ms(self.without_seconds),
            ms(self.with_seconds),
            format!("{:.2} x", self.speedup()),
            format!("{:.2} x", self.ideal()),
            format!("{:.0}%", 100.0 * self.speedup() / self.ideal()),
            self.again_tokens.to_string(),
            ms(self.again_seconds),
        ]
    }
}

/// Prints a table and the verdict, or JSON.
pub fn print(rows: &[Row], heading: &str, json: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    if json {
        let rows: Vec<_> = rows.iter().map(as_json).collect();
        writeln!(out, "{}", serde_json::to_string(&rows)?)?;
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header([
        "prompts",
        "shared",
        "tokens",
        "computed",
        "without ms",
        "with ms",
        "speed-up",
        "ideal",
        "reached",
        "again",
        "again ms",
    ]);
    table.add_rows(rows.iter().map(Row::cells));
    table.column_iter_mut().for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    writeln!(out, "{heading}: time to the first tokens of all prompts\n\n{table}\n")?;
    let verdict = match rows.iter().filter(|row| !row.equal).count() {
        0 => "The outputs are equal, with and without the cache, token by token.".to_owned(),
        different => format!("The outputs of {different} of {} rows DIFFER.", rows.len()),
    };
    writeln!(out, "{verdict}")?;
    Ok(())
}

fn as_json(row: &Row) -> serde_json::Value {
    json!({
        "prompts": row.prompts,
        "shared_tokens": row.shared_tokens,
        "requested_prompt_tokens": row.requested_tokens,
        "computed_prompt_tokens": row.computed_tokens,
        "ttft_seconds_without": row.without_seconds,
        "ttft_seconds_with": row.with_seconds,
        "equal": row.equal,
    })
}

/// Bytes that are copied in a second, from one range of memory to another.
pub fn copied_per_second() -> f64 {
    const BYTES: usize = 256 << 20;
    let (from, mut to) = (vec![1_u8; BYTES], vec![2_u8; BYTES]);
    let seconds = (0..4).map(|_| {
        let started = Instant::now();
        std::hint::black_box(&mut to[..]).copy_from_slice(std::hint::black_box(&from));
        started.elapsed().as_secs_f64()
    });
    BYTES as f64 / seconds.fold(f64::INFINITY, f64::min)
}
