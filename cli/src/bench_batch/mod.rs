//! Times requests that arrive over time: in one batch that they join and leave, and in batches that wait for each
//! other.
//!
//!     gpt2 bench-batch
//!     gpt2 bench-batch --rate 20
//!     gpt2 bench-batch --config gpt2 --rate 1.5
//!
//! Decoding is greedy and goes on behind an end-of-text token, so that the work is known.

mod report;
mod work;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use gpt2_burn::Threads;
use gpt2_burn::batch::{BatchOptions, RowEvent, RowId, RowRequest};
use gpt2_burn::generate::{Generator, Stop};
use gpt2_burn::prefix::PrefixCache;
use gpt2_burn::sampling::Sampling;
use indicatif::{ProgressBar, ProgressStyle};
use report::{Measured, Served};
use work::{Job, LengthRange, Work};

use crate::args::model::ModelArgs;
use crate::args::shape::ShapeArgs;
use crate::args::{Failure, Given, at_least_one};

/// Times requests that arrive over time, in one batch that they join and leave, and in batches that wait for others.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    shape: ShapeArgs,
    /// How requests are computed; default: both
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["running", "waiting"])]
    batching: Vec<Batching>,
    /// How many requests
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one())]
    requests: usize,
    /// How many arrive in a second (a Poisson process); 0: all at once
    #[arg(long, value_name = "R", default_value_t = 0.0, value_parser = rate, allow_negative_numbers = true)]
    rate: f64,
    /// Tokens of the prompts: from so many to so many
    #[arg(long, value_name = "N:M", default_value = "16:384")]
    prompt: LengthRange,
    /// New tokens of each
    #[arg(long, value_name = "N:M", default_value = "16:128")]
    new: LengthRange,
    /// Tokens that all prompts begin with; with some, there is a cache of prefixes
    #[arg(long, value_name = "N", default_value_t = 0)]
    shared: usize,
    /// Most rows that are computed together
    #[arg(long, value_name = "N", default_value_t = BatchOptions::default().max_rows, value_parser = at_least_one())]
    max_rows: usize,
    /// Tokens that a step computes, if there are so many
    #[arg(long, value_name = "N", default_value_t = BatchOptions::default().step_tokens, value_parser = at_least_one())]
    step_tokens: usize,
    /// Seed of the requests and of random weights
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print a line of JSON for each way instead of text
    #[arg(long)]
    json: bool,
}

/// How requests are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Batching {
    /// One batch: a request joins as soon as there is room
    Running,
    /// One batch after the other: those that have come when it begins, until the last of them is done
    Waiting,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate >= 0.0 => Ok(rate),
        Ok(rate) => Err(format!("{rate} is no number from 0 up")),
        Err(error) => Err(error.to_string()),
    }
}

/// Runs the command.
pub fn run(args: &Args, given: &Given) -> Result<(), Failure> {
    args.model.check(given)?;
    args.model.with_threads(|| bench(args))
}

fn bench(args: &Args) -> Result<(), Failure> {
    let (model, _) = args.shape.load(&args.model, args.seed, &args.model.device()?)?;
    let (n_positions, vocab_size) = (model.config().n_positions, model.config().vocab_size);
    let tokens = args.shared.saturating_add(args.prompt.max).saturating_add(args.new.max - 1);
    if tokens > n_positions {
        let message = "shared and own tokens of a prompt and new ones need";
        return Err(format!(
            "{message} {tokens} positions, the model has {n_positions}: see --shared, --prompt and --new"
        )
        .into());
    }
    let work = Work {
        requests: args.requests,
        rate: args.rate,
        prompt: args.prompt,
        new: args.new,
        shared: args.shared,
        seed: args.seed,
        vocab_size,
    };
    let jobs = work.jobs();
    let bar = ProgressBar::new((args.batching.len() * jobs.len()) as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} request {pos}/{len}")?);
    let mut all = Vec::new();
    for &batching in &args.batching {
        // A cache of prefixes that has seen nothing.
        let generator = Generator::new(model.clone());
        let generator = match args.shared {
            0 => generator,
            _ => generator.with_prefix_cache(&PrefixCache::new(4 << 30))?,
        };
        warm_up(&generator, &jobs, args)?;
        all.push(measure(&generator, batching, &jobs, args, &bar)?);
    }
    bar.finish_and_clear();
    let what = args.shape.name(&args.model);
    let heading = format!("{what} on {}, {} threads", args.model.device, Threads::current());
    report::print(&all, &heading, args)
}

fn options(args: &Args) -> BatchOptions {
    let options = BatchOptions::default().with_max_rows(args.max_rows).with_step_tokens(args.step_tokens);
    options.with_max_waiting(usize::MAX).with_max_row_tokens(args.shared + args.prompt.max + args.new.max)
}

fn request(job: &Job) -> RowRequest {
    RowRequest {
        max_new_tokens: job.new_tokens,
        sampling: Sampling::greedy(),
        stop: Stop { ignore_eos: true, ..Stop::default() },
        ..RowRequest::new(job.prompt.clone())
    }
}

/// The first tokens of some requests, in a batch of their own.
fn warm_up(generator: &Generator, jobs: &[Job], args: &Args) -> Result<(), Failure> {
    let mut batch = generator.batch(options(args))?;
    for job in jobs.iter().take(4) {
        let prompt = job.prompt[args.shared.min(job.prompt.len() - 1)..].iter().take(32).copied().collect();
        batch.add(&request(&Job { arrival: 0.0, prompt, new_tokens: 4 }))?;
    }
    while !batch.is_empty() {
        batch.step()?;
    }
    Ok(())
}

/// Serves all requests as they arrive.
fn measure(
    generator: &Generator,
    batching: Batching,
    jobs: &[Job],
    args: &Args,
    bar: &ProgressBar,
) -> Result<Measured, Failure> {
    let mut batch = generator.batch(options(args))?;
    let (mut waiting, mut served) = (jobs.iter().enumerate().peekable(), Vec::new());
    let mut live: HashMap<RowId, (usize, Option<f64>)> = HashMap::new();
    let mut outputs: Vec<Vec<u32>> = vec![Vec::new(); jobs.len()];
    let start = Instant::now();
    let now = || start.elapsed().as_secs_f64();
    while waiting.peek().is_some() || !batch.is_empty() {
        let may_join = batching == Batching::Running || batch.is_empty();
        while let Some((index, job)) = waiting.next_if(|(_, job)| may_join && job.arrival <= now()) {
            live.insert(batch.add(&request(job))?, (index, None));
            if batching == Batching::Waiting && batch.len() == args.max_rows {
                break;
            }
        }
        if batch.is_empty() {
            let next = waiting.peek().map_or(0.0, |(_, job)| job.arrival - now());
            std::thread::sleep(Duration::from_secs_f64(next.max(0.0)));
            continue;
        }
        for event in batch.step()? {
            let token = match event {
                RowEvent::Token(token) => token,
                RowEvent::Failed { error, .. } => return Err(error.into()),
                _ => continue,
            };
            let Some((index, first)) = live.get_mut(&token.row) else { continue };
            let (index, first) = (*index, *first.get_or_insert_with(now));
            outputs[index].push(token.id);
            if token.finish.is_some() {
                let (arrival, tokens) = (jobs[index].arrival, jobs[index].new_tokens);
                served.push(Served { arrival, first, last: now(), tokens });
                live.remove(&token.row);
                bar.inc(1);
            }
        }
    }
    Ok(Measured { batching, served, seconds: now(), report: *batch.report(), outputs })
}
