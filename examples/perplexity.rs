//! Mean next-token cross-entropy and perplexity of a text.
//!
//!     cargo run --release --example perplexity -- --text README.md
//!     cargo run --release --example perplexity -- --model gpt2 --text book.txt --stride 512

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use common::prompts::{Ids, read_text};
use common::{Failure, model::ModelArgs};
use gpt2_burn::Error;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

/// Mean next-token cross-entropy and perplexity of a text.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A text file
    #[arg(long, value_name = "FILE", required_unless_present = "prompt_ids", conflicts_with = "prompt_ids")]
    text: Option<PathBuf>,
    /// Token ids, instead of a text
    #[arg(long, value_name = "1,2,3")]
    prompt_ids: Option<Ids>,
    /// Tokens between the starts of windows; default: half the context
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    common::run(|| args.model.with_threads(|| perplexity(&args)))
}

fn perplexity(args: &Args) -> Result<(), Failure> {
    let text = args.text.as_deref().map(read_text).transpose()?;
    let (model, tokenizer) = args.model.load()?;
    let ids = match (&text, &args.prompt_ids) {
        (Some(text), _) => tokenizer.ok_or(Error::NoTokenizer { what: "a text" })?.encode(text)?,
        (None, ids) => ids.as_ref().map_or(Vec::new(), |ids| ids.0.clone()),
    };
    let stride = args.stride.unwrap_or(model.config().n_positions.div_ceil(2));

    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} tokens, {eta} left")?;
    let bar = ProgressBar::new(ids.len().saturating_sub(1) as u64).with_style(style);
    let result = model.perplexity(&ids, stride, |tokens| bar.set_position(tokens as u64))?;
    bar.finish_and_clear();

    let bytes = text.as_ref().map(String::len);
    let mut out = std::io::stdout().lock();
    if args.json {
        let report = json!({
            "loss": result.loss,
            "perplexity": result.perplexity(),
            "tokens": result.tokens,
            "bytes": bytes,
        });
        writeln!(out, "{report}")?;
        return Ok(());
    }
    writeln!(out, "loss        {:.4} nats per token", result.loss)?;
    writeln!(out, "perplexity  {:.3}", result.perplexity())?;
    writeln!(out, "tokens      {}", result.tokens)?;
    if let Some(bytes) = bytes {
        let per_byte = result.loss * result.tokens as f64 / bytes as f64;
        writeln!(out, "bytes       {bytes} ({per_byte:.4} nats per byte)")?;
    }
    Ok(())
}
