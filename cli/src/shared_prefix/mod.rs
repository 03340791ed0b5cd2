//! Times the first tokens of prompts that begin alike, with and without a cache of prefixes, and checks that both give the
//! same tokens.
//!
//!     gpt2 shared-prefix
//!     gpt2 shared-prefix --config gpt2 --prompts 32 --shared-tokens 512
//!     gpt2 shared-prefix --chart shared_prefix.svg
//!
//! Each prompt has tokens that all share, and behind them tokens of its own. With the cache, the first call finds it
//! empty: what it saves, it saves within the batch. The second call finds all prompts in it.

mod chart;
mod report;

use std::path::PathBuf;

use gpt2_burn::generate::{Decoder, GenerateRequest, Generator, Output, Stop};
use gpt2_burn::measure::{check_greedy, median};
use gpt2_burn::prefix::PrefixCache;
use gpt2_burn::sampling::Sampling;
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{CacheStorage, Gpt2Config, Threads};
use indicatif::{ProgressBar, ProgressStyle};
use report::Row;

use crate::args::model::ModelArgs;
use crate::args::shape::ShapeArgs;
use crate::args::{Failure, Given, at_least_one};
use crate::sample_prompts;

/// Times the first tokens of prompts that begin alike, with and without a cache of prefixes.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    shape: ShapeArgs,
    /// How many prompts: a list, with commas
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,4,16", value_parser = at_least_one())]
    prompts: Vec<usize>,
    /// How many tokens they share: a list, with commas
    #[arg(long, value_name = "P,...", value_delimiter = ',', default_value = "0,64,128,256,384")]
    shared_tokens: Vec<usize>,
    /// Tokens of each prompt behind those
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one())]
    own_tokens: usize,
    /// Tokens to add to each prompt, which are compared
    #[arg(long, alias = "max_new_tokens", value_name = "N", default_value_t = 8, value_parser = at_least_one())]
    max_new_tokens: usize,
    /// Timed repetitions, of which the medians are reported
    #[arg(long, alias = "num_samples", value_name = "N", default_value_t = 3, value_parser = at_least_one())]
    num_samples: usize,
    /// Bytes of keys and values that the cache may hold
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 30)]
    budget: usize,
    /// Draw how much faster the first tokens come
    #[arg(long, value_name = "FILE.svg")]
    chart: Option<PathBuf>,
    /// Seed of random weights and random prompts
    #[arg(long, default_value_t = 1337)]
    seed: u64,
    /// Print the rows as JSON instead of text
    #[arg(long)]
    json: bool,
}

/// What is known before anything is timed.
struct Bench<'a> {
    args: &'a Args,
    without: Generator,
    tokenizer: Option<Tokenizer>,
    /// Bytes of keys and values that this machine copies in a second.
    copied_per_second: f64,
}

/// Runs the command.
pub fn run(args: &Args, given: &Given) -> Result<(), Failure> {
    args.model.check(given)?;
    args.model.with_threads(|| shared_prefix(args))
}

fn shared_prefix(args: &Args) -> Result<(), Failure> {
    let device = args.model.device()?;
    let (model, tokenizer) = args.shape.load(&args.model, args.seed, &device)?;
    check(args, model.config())?;
    // Rows of a cache in pages would share them.
    let without = Generator::new(model).with_decoder(Decoder::Kv(CacheStorage::Preallocated));
    let bench = Bench { args, without, tokenizer, copied_per_second: report::copied_per_second() };

    let cases: Vec<(usize, usize)> = args
        .prompts
        .iter()
        .flat_map(|&prompts| args.shared_tokens.iter().map(move |&shared| (prompts, shared)))
        .collect();
    let bar = ProgressBar::new(((args.num_samples + 1) * cases.len()) as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} run {pos}/{len}: {msg}")?);
    let rows = cases.into_iter().map(|(prompts, shared)| {
        bar.set_message(format!("{prompts} prompts, {shared} shared tokens"));
        bench.row(prompts, shared, &bar)
    });
    let rows = rows.collect::<Result<Vec<_>, _>>()?;
    bar.finish_and_clear();

    report::print(&rows, &bench.heading(), args.json)?;
    if let Some(path) = &args.chart {
        chart::draw(path, &rows, &bench.heading())?;
    }
    match rows.iter().find(|row| !row.equal) {
        Some(row) => Err(format!(
            "{} prompts with {} shared tokens gave other tokens with the cache than without",
            row.prompts, row.shared_tokens
        )
        .into()),
        None => Ok(()),
    }
}

/// Before anything is computed: what a row would have to hold.
fn check(args: &Args, config: &Gpt2Config) -> Result<(), Failure> {
    let shared = args.shared_tokens.iter().copied().max().unwrap_or(0);
    let tokens = shared.saturating_add(args.own_tokens).saturating_add(args.max_new_tokens - 1);
    if tokens > config.n_positions {
        return Err(format!(
            "{shared} shared tokens, {} own and {} new ones need {tokens} positions, the model has {}: see \
             --shared-tokens, --own-tokens and --max-new-tokens",
            args.own_tokens, args.max_new_tokens, config.n_positions
        )
        .into());
    }
    Ok(())
}

impl Bench<'_> {
    /// Times one number of prompts and of shared tokens.
    fn row(&self, prompts: usize, shared: usize, bar: &ProgressBar) -> Result<Row, Failure> {
        let request = self.request(prompts, shared)?;
        let ids: Vec<Vec<u32>> =
            request.prompts.iter().map(|prompt| self.without.prompt_ids(prompt)).collect::<Result<_, _>>()?;
        let (mut without, mut with, mut again) = (Vec::new(), Vec::new(), Vec::new());
        let (mut equal, mut reports) = (true, None);
        for run in 0..=self.args.num_samples {
            // In turns, so that whatever else the machine does befalls all of them.
            let plain = self.without.complete(&request)?;
            let prefixes = PrefixCache::new(self.args.budget);
            let generator = Generator::new(self.without.model().clone()).with_prefix_cache(&prefixes)?;
            let first = generator.complete(&request)?;
            let second = generator.complete(&request)?;
            for output in [&first, &second] {
                equal &=
                    ids_of(output) == ids_of(&plain) || check_greedy(&generator, &ids, &ids_of(output))?.is_equal();
            }
            // The first run warms up.
            if run > 0 {
                without.push(plain.report.prefill_seconds);
                with.push(first.report.prefill_seconds);
                again.push(second.report.prefill_seconds);
            }
            reports = Some((first.report, second.report));
            bar.inc(1);
        }
        let Some((first, second)) = reports else { return Err("nothing was run".into()) };
        let seconds = |of: &[f64]| median(of).unwrap_or(f64::NAN);
        let seconds = [seconds(&without), seconds(&with), seconds(&again)];
        Row::new([&first, &second], (prompts, shared), seconds, equal, self)
    }

    fn request(&self, prompts: usize, shared: usize) -> Result<GenerateRequest, Failure> {
        let own = self.args.own_tokens;
        let vocab_size = self.without.model().config().vocab_size;
        let texts = |count, length| match &self.tokenizer {
            Some(tokenizer) => sample_prompts::held_out(tokenizer, count, length),
            None => Ok(sample_prompts::random(vocab_size, count, length, self.args.seed)),
        };
        let prefix = texts(1, shared.max(1))?.swap_remove(0);
        let own = texts(prompts + 1, own)?.split_off(1);
        Ok(GenerateRequest {
            max_new_tokens: self.args.max_new_tokens,
            sampling: Sampling::greedy(),
            stop: Stop { ignore_eos: true, ..Stop::default() },
            ..GenerateRequest::new(own.into_iter().map(|own| [&prefix[..shared], &own].concat()))
        })
    }

    fn heading(&self) -> String {
        let what = self.args.shape.name(&self.args.model);
        let how = if self.without.model().is_packed() { "" } else { ", without kernels" };
        let threads = Threads::current();
        format!(
            "{what} on {}{how}, {threads} threads, {} own tokens each",
            self.args.model.device, self.args.own_tokens
        )
    }
}

fn ids_of(output: &Output) -> Vec<Vec<u32>> {
    output.completions.iter().map(|completion| completion.ids.clone()).collect()
}
