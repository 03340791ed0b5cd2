//! Mean next-token cross-entropy and perplexity of a text, and how far a draft agrees with the model on it.
//!
//!     gpt2 perplexity --text README.md
//!     gpt2 perplexity --model gpt2 --text book.txt --stride 512
//!     gpt2 perplexity --draft embedded --text assets/held_out.txt

use std::io::Write;
use std::path::PathBuf;

use gpt2_burn::perplexity::{Agreement, Perplexity};
use gpt2_burn::{Error, Gpt2};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::args::model::ModelArgs;
use crate::args::prompts::{Ids, read_text};
use crate::args::{Failure, Given};

/// Mean next-token cross-entropy and perplexity of a text.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A text file
    #[arg(long, value_name = "FILE", required_unless_present = "prompt_ids", conflicts_with = "prompt_ids")]
    text: Option<PathBuf>,
    /// Token ids, instead of a text
    #[arg(long, value_name = "1,2,3", conflicts_with = "tokenizer")]
    prompt_ids: Option<Ids>,
    /// A model to compare with: how well it predicts, and how often it names the model's next token
    #[arg(long, value_name = "embedded|NAME|DIR|FILE.pt")]
    draft: Option<String>,
    /// Tokens between the starts of windows; default: half the context
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args, given: &Given) -> Result<(), Failure> {
    args.model.check(given)?;
    args.model.with_threads(|| perplexity(args))
}

fn perplexity(args: &Args) -> Result<(), Failure> {
    let text = args.text.as_deref().map(read_text).transpose()?;
    let (model, tokenizer) = args.model.load()?;
    let draft = args.draft.as_deref().map(|name| args.model.load_draft(name)).transpose()?;
    let ids = match (&text, &args.prompt_ids) {
        (Some(text), _) => tokenizer.ok_or(Error::NoTokenizer { what: "a text" })?.encode(text)?,
        (None, ids) => ids.as_ref().map_or(Vec::new(), |ids| ids.0.clone()),
    };
    let bytes = text.as_ref().map(String::len);

    // First what can be refused, before minutes go into the rest.
    let agreement = draft.as_ref().map(|draft| agreement(&model, draft, &ids, args.stride)).transpose()?;
    let of_model = measure(&model, &ids, args.stride)?;
    let of_draft = draft.as_ref().map(|draft| measure(draft, &ids, args.stride)).transpose()?;

    let mut out = std::io::stdout().lock();
    if args.json {
        let mut report = json_of(&of_model, bytes);
        if let (Some(draft), Some(agreement)) = (of_draft, agreement) {
            report["draft"] = json_of(&draft, bytes);
            report["greedy_agreement"] = agreement.greedy.into();
            report["sampled_agreement"] = agreement.sampled.into();
        }
        writeln!(out, "{report}")?;
        return Ok(());
    }
    print(&mut out, "", &of_model, bytes)?;
    if let (Some(draft), Some(agreement)) = (of_draft, agreement) {
        print(&mut out, "draft: ", &draft, bytes)?;
        writeln!(
            out,
            "agreement: {:.4} of the most likely tokens, {:.4} of samples",
            agreement.greedy, agreement.sampled
        )?;
    }
    Ok(())
}

fn measure(model: &Gpt2, ids: &[u32], stride: Option<usize>) -> Result<Perplexity, Failure> {
    let stride = stride.unwrap_or(model.config().n_positions.div_ceil(2));
    let bar = bar(ids)?;
    let result = model.perplexity(ids, stride, |tokens| bar.set_position(tokens as u64))?;
    bar.finish_and_clear();
    Ok(result)
}

fn agreement(model: &Gpt2, draft: &Gpt2, ids: &[u32], stride: Option<usize>) -> Result<Agreement, Failure> {
    let n_positions = model.config().n_positions.min(draft.config().n_positions);
    let bar = bar(ids)?;
    let progress = |tokens| bar.set_position(tokens as u64);
    let result = model.agreement(draft, ids, stride.unwrap_or(n_positions.div_ceil(2)), progress)?;
    bar.finish_and_clear();
    Ok(result)
}

fn bar(ids: &[u32]) -> Result<ProgressBar, Failure> {
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} tokens, {eta} left")?;
    Ok(ProgressBar::new(ids.len().saturating_sub(1) as u64).with_style(style))
}

/// Tokenizers compare by what a byte costs, not a token.
fn nats_per_byte(result: &Perplexity, bytes: usize) -> f64 {
    result.loss * result.tokens as f64 / bytes as f64
}

fn json_of(result: &Perplexity, bytes: Option<usize>) -> Value {
    json!({
        "loss": result.loss,
        "perplexity": result.perplexity(),
        "tokens": result.tokens,
        "bytes": bytes,
        "nats_per_byte": bytes.map(|bytes| nats_per_byte(result, bytes)),
    })
}

fn print(out: &mut impl Write, whose: &str, result: &Perplexity, bytes: Option<usize>) -> std::io::Result<()> {
    write!(out, "{whose}loss {:.4} nats per token, perplexity {:.3}", result.loss, result.perplexity())?;
    write!(out, ", {} tokens", result.tokens)?;
    match bytes {
        Some(bytes) => writeln!(out, ", {bytes} bytes, {:.4} nats per byte", nats_per_byte(result, bytes)),
        None => writeln!(out),
    }
}
