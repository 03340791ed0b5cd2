//! Times decoders against each other on the same prompts, and checks that all of them give the same tokens.
//!
//!     gpt2 compare
//!     gpt2 compare --mode latency
//!     gpt2 compare --config gpt2 --batch-size 8
//!     gpt2 compare --config gpt2 --batch-size 8 --prompt-length 960 --ragged
//!     gpt2 compare --config gpt2 --prompt-length 912 --shared-tokens 896 --max-new-tokens 16
//!     gpt2 compare --mode latency --draft embedded --draft-len 2
//!     gpt2 compare --mode latency --config gpt2-large --draft-config gpt2 --agreement 0.75
//!
//! Decoding is greedy and goes on behind an end-of-text token, so that all rows have the same length.

mod naive;
mod report;
mod speculation;

use clap::ValueEnum;
use clap::builder::RangedU64ValueParser;
use gpt2_burn::backends::describe;
use gpt2_burn::burn::tensor::{DType, Device};
use gpt2_burn::cache::PageCounts;
use gpt2_burn::generate::{Decoder, GenerateRequest, Generator, Stop};
use gpt2_burn::measure::{Verdict, check_greedy_against, logit_drift};
use gpt2_burn::measure::{median, process_memory, quantile, reset_peak_memory};
use gpt2_burn::sampling::Sampling;
use gpt2_burn::speculative::SpeculationReport;
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{CacheStorage, Gpt2, Gpt2Config, Threads, WeightFormat};
use indicatif::{ProgressBar, ProgressStyle};
use report::Row;

use crate::args::draft::DraftArgs;
use crate::args::model::{CacheType, ModelArgs};
use crate::args::shape::ShapeArgs;
use crate::args::{Failure, Given, at_least_one};
use crate::sample_prompts;

/// Times decoders against each other on the same prompts, and checks that all of them give the same tokens.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    shape: ShapeArgs,
    /// Many rows, or one: the defaults of the batch size, the prompt length and the new tokens
    #[arg(long, value_enum, default_value = "throughput")]
    mode: Mode,
    /// Rows, up to 65536; default: 32 for throughput, 1 for latency
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=65_536))]
    batch_size: Option<usize>,
    /// Tokens of each prompt; default: 128 for throughput, 192 for latency
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    prompt_length: Option<usize>,
    /// Prompts of unequal length, from 16 tokens to the prompt length in equal steps; each is also computed by itself, to be compared
    /// with
    #[arg(long)]
    ragged: bool,
    /// Tokens that all prompts begin with
    #[arg(long, default_value_t = 0, value_name = "S")]
    shared_tokens: usize,
    /// Tokens to add to each prompt; default: 128 for throughput, 256 for latency
    #[arg(long, alias = "max_new_tokens", value_name = "N", value_parser = at_least_one())]
    max_new_tokens: Option<usize>,
    /// What is compared; default: naive, kv-growing and kv-preallocated, and speculative too with --draft or --agreement, or for
    /// the latency of the embedded model
    #[arg(long, value_enum, value_delimiter = ',')]
    decoders: Vec<DecoderName>,
    #[command(flatten)]
    draft: DraftArgs,
    /// A draft that is right about a token with this probability, whatever the model; it costs what the draft named costs
    #[arg(long, value_name = "A", allow_negative_numbers = true)]
    agreement: Option<f64>,
    /// Random weights in the shape of a published size as that draft
    #[arg(long, value_name = "NAME", requires = "agreement", conflicts_with = "draft")]
    draft_config: Option<String>,
    /// Element type of cached keys and values; default: that of what is computed
    #[arg(long, value_enum)]
    cache_dtype: Option<CacheType>,
    /// Timed repetitions, of which the medians are reported
    #[arg(long, alias = "num_samples", default_value_t = 3, value_name = "N", value_parser = at_least_one())]
    num_samples: usize,
    /// Untimed repetitions before those; of naive decoding, steps
    #[arg(long, alias = "num_warmup", default_value_t = 1, value_name = "N")]
    num_warmup: usize,
    /// Where naive decoding would take longer in all, only a sample of its steps is timed
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS")]
    naive_seconds: f64,
    /// The same bits from every decoder and in every batch: the CPU's kernels give them anyway, burn's operations only if they
    /// compute each token by itself
    #[arg(long)]
    deterministic: bool,
    /// Seed of random weights and random prompts
    #[arg(long, default_value_t = 1337)]
    seed: u64,
    /// Print the rows as JSON instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    Throughput,
    Latency,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DecoderName {
    Naive,
    KvGrowing,
    KvPreallocated,
    KvPaged,
    Speculative,
}

impl Args {
    fn decoders(&self) -> Vec<DecoderName> {
        let mut decoders = self.decoders.clone();
        if decoders.is_empty() {
            decoders = vec![DecoderName::Naive, DecoderName::KvGrowing, DecoderName::KvPreallocated];
            let is_pair = self.mode == Mode::Latency && self.shape.config.is_none() && self.model.is_embedded();
            if is_pair || self.draft.draft.is_some() || self.agreement.is_some() {
                decoders.push(DecoderName::Speculative);
            }
        }
        decoders
    }

    /// Refuses flags that would be ignored.
    fn check(&self, given: &Given) -> Result<(), Failure> {
        self.model.check(given)?;
        let decoders = self.decoders();
        if !decoders.contains(&DecoderName::Speculative) {
            DraftArgs::refuse(given)?;
        }
        if !decoders.contains(&DecoderName::Naive) {
            given.refuse(&["naive_seconds"], "has no effect: naive decoding is not compared")?;
        }
        if decoders.iter().all(|name| *name == DecoderName::Naive) {
            given.refuse(&["cache_dtype"], "has no effect: naive decoding has no cache")?;
        }
        if self.rows() == 1 {
            given.refuse(&["ragged", "shared_tokens"], "has no effect: there is one row (see --batch-size)")?;
        }
        Ok(())
    }

    fn rows(&self) -> usize {
        self.batch_size.unwrap_or(match self.mode {
            Mode::Throughput => 32,
            Mode::Latency => 1,
        })
    }

    fn decoder(&self, name: DecoderName) -> Decoder {
        match name {
            DecoderName::Naive => Decoder::Naive,
            DecoderName::KvGrowing => Decoder::Kv(CacheStorage::Growing),
            DecoderName::KvPreallocated => Decoder::Kv(CacheStorage::Preallocated),
            DecoderName::KvPaged => Decoder::Kv(CacheStorage::Paged),
            DecoderName::Speculative => self.draft.decoder(CacheStorage::Preallocated),
        }
    }
}

/// What is generated by every decoder.
struct Work {
    prompts: Vec<Vec<u32>>,
    /// Of the longest prompt.
    prompt_tokens: usize,
    new_tokens: usize,
    /// Tokens that all prompts begin with.
    shared_tokens: usize,
    /// Whether prompts are computed by themselves too.
    is_ragged: bool,
}

/// One repetition of a decoder.
struct Run {
    ttft_seconds: f64,
    /// Until the first token of each prompt by itself, of all prompts together.
    alone_seconds: Option<f64>,
    /// Of each step after the first token.
    step_seconds: Vec<f64>,
    decode_seconds: f64,
    /// What drafts were worth.
    speculation: Option<SpeculationReport>,
    kv_bytes: usize,
    pages: PageCounts,
    /// New ids of each row; none where only a sample of the steps was computed.
    ids: Option<Vec<Vec<u32>>>,
}

/// All that is known of a decoder.
struct Candidate {
    generator: Generator,
    runs: Vec<Run>,
    peak_bytes: Option<usize>,
    /// Steps of naive decoding that are timed, if not all.
    sampled: Option<Vec<usize>>,
}

/// Runs the command.
pub fn run(args: &Args, given: &Given) -> Result<(), Failure> {
    args.check(given)?;
    args.model.with_threads(|| compare(args))
}

fn compare(args: &Args) -> Result<(), Failure> {
    let names = args.model.device.split(',');
    // All of them before anything is computed, which takes minutes.
    let devices = names.map(|name| Ok((name, gpt2_burn::device(name)?))).collect::<Result<Vec<_>, Failure>>()?;
    // What other devices are held against: the CPU in f32, if this build has it.
    let cpu = gpt2_burn::device("flex").ok().filter(|cpu| devices.iter().any(|(_, device)| device != cpu));
    let exact = |cpu| args.shape.load_as(&args.model, args.seed, WeightFormat::F32, &cpu);
    let reference = cpu.map(exact).transpose()?.map(|(model, _)| model);
    let mut rows = Vec::new();
    let mut failed = Vec::new();
    for (name, device) in devices {
        match compare_on(args, name, &device, reference.as_ref()) {
            Ok(more) => rows.extend(more),
            Err(error) => failed.push(format!("{name}: {error}")),
        }
    }
    if !rows.is_empty() {
        report::print(&rows, args.json)?;
    }
    if !failed.is_empty() {
        return Err(failed.join("\n").into());
    }
    // Kernels compute in f32 whatever the type of the weights; burn's operations may round f32 on such GPUs.
    let rounds = |row: &Row| {
        let is_allowed_to = row.kernels && args.model.fast_f32;
        is_allowed_to || !row.kernels && ["cuda", "rocm"].iter().any(|kind| row.device.starts_with(kind))
    };
    let exact = |row: &&Row| {
        let is_f32 = row.dtype == "f32" || row.kernels && row.reference.is_none();
        row.cache_dtype == "f32" && is_f32 && !rounds(row)
    };
    match rows.iter().filter(exact).find(|row| !row.equal) {
        Some(row) => Err(format!("{} on {} gave other tokens than naive decoding", row.decoder, row.device).into()),
        None => Ok(()),
    }
}

fn compare_on(args: &Args, device_name: &str, device: &Device, reference: Option<&Gpt2>) -> Result<Vec<Row>, Failure> {
    let (model, tokenizer) = args.shape.load(&args.model, args.seed, device)?;
    let model = model.with_determinism(args.deterministic)?;
    let work = work(args, model.config(), tokenizer.as_ref())?;
    // What stands before a later step, so that this can be timed without all the steps before it; and what is drafted if a
    // draft is to agree with it.
    let ids = whole(&Generator::new(model.clone()), &work)?.ids.unwrap_or_default();
    let mut candidates = Vec::new();
    for name in args.decoders() {
        let mut generator = Generator::new(model.clone()).with_decoder(args.decoder(name));
        if name == DecoderName::Speculative {
            generator = generator.with_draft(speculation::draft(args, device, &ids)?)?;
        }
        if let Some(dtype) = args.cache_dtype {
            generator = generator.with_cache_dtype(dtype.into())?;
        }
        candidates.push(Candidate { generator, runs: Vec::new(), peak_bytes: None, sampled: None });
    }

    let bar = ProgressBar::new(((args.num_warmup + args.num_samples) * candidates.len()) as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} run {pos}/{len}: {msg}")?);
    warm_up(args, &work, &ids, &mut candidates, &bar)?;
    for _ in 0..args.num_samples {
        // In turns, so that whatever else the machine does befalls all of them.
        for candidate in &mut candidates {
            bar.set_message(candidate.generator.decoder().to_string());
            candidate.run(&work, &ids)?;
            bar.inc(1);
        }
    }
    bar.set_message("comparing tokens");
    let rows = candidates.iter().map(|candidate| row(args, device_name, candidate, &work, reference));
    let mut rows = rows.collect::<Result<Vec<_>, _>>()?;
    if let (Some(reference), Some(row), Some(prompt)) = (reference, ids.first(), work.prompts.first()) {
        let drift = logit_drift(reference, &model, &[&prompt[..], row].concat())?;
        rows.iter_mut().for_each(|row| row.logit_drift = Some(drift));
    }
    bar.finish_and_clear();

    let naive = rows.iter().find(|row| row.decoder == "naive").map(|row| row.tokens_per_second);
    rows.iter_mut().for_each(|row| row.speedup_over_naive = naive.map(|naive| row.tokens_per_second / naive));
    speculation::add_figures(&mut rows, &candidates);
    Ok(rows)
}

fn work(args: &Args, config: &Gpt2Config, tokenizer: Option<&Tokenizer>) -> Result<Work, Failure> {
    let (prompt_tokens, new_tokens) = match args.mode {
        Mode::Throughput => (128, 128),
        Mode::Latency => (192, 256),
    };
    let batch = args.rows();
    let prompt_tokens = args.prompt_length.unwrap_or(prompt_tokens);
    let new_tokens = args.max_new_tokens.unwrap_or(new_tokens);
    // Before anything is computed: a row that ends early could not be compared.
    let tokens = prompt_tokens.saturating_add(new_tokens - 1);
    if tokens > config.n_positions {
        let n_positions = config.n_positions;
        return Err(format!(
            "a prompt of {prompt_tokens} tokens and {new_tokens} new ones need {tokens} positions, the model has \
             {n_positions}: see --prompt-length and --max-new-tokens"
        )
        .into());
    }
    let mut prompts = match tokenizer {
        Some(tokenizer) => sample_prompts::held_out(tokenizer, batch, prompt_tokens)?,
        None => sample_prompts::random(config.vocab_size, batch, prompt_tokens, args.seed),
    };
    if args.shared_tokens > prompt_tokens {
        return Err(format!("{} shared tokens of prompts of {prompt_tokens}", args.shared_tokens).into());
    }
    let shared = prompts[0][..args.shared_tokens].to_vec();
    prompts.iter_mut().for_each(|prompt| prompt[..shared.len()].copy_from_slice(&shared));
    if args.ragged {
        let min_len = prompt_tokens.min(16);
        for (row, prompt) in prompts.iter_mut().enumerate() {
            prompt.truncate(min_len + row * (prompt_tokens - min_len) / (batch - 1));
        }
    }
    Ok(Work { prompts, prompt_tokens, new_tokens, shared_tokens: args.shared_tokens, is_ragged: args.ragged })
}

/// Runs every decoder untimed, and decides how much of naive decoding can be timed.
fn warm_up(
    args: &Args,
    work: &Work,
    ids: &[Vec<u32>],
    candidates: &mut [Candidate],
    bar: &ProgressBar,
) -> Result<(), Failure> {
    bar.set_message("warming up");
    for candidate in candidates {
        if candidate.is_naive() {
            let seconds = args.naive_seconds / args.num_samples as f64;
            candidate.sampled = naive::steps(&candidate.generator, work, seconds)?;
        }
        for _ in 0..args.num_warmup {
            match candidate.is_naive() {
                true => drop(naive::sample(&candidate.generator, work, ids, &[0])?),
                false => drop(whole(&candidate.generator, work)?),
            }
            bar.inc(1);
        }
    }
    Ok(())
}

impl Candidate {
    fn is_naive(&self) -> bool {
        self.generator.decoder() == &Decoder::Naive
    }

    fn run(&mut self, work: &Work, ids: &[Vec<u32>]) -> Result<(), Failure> {
        let peak_is_known = reset_peak_memory();
        let mut run = match &self.sampled {
            Some(steps) => naive::sample(&self.generator, work, ids, steps)?,
            None => whole(&self.generator, work)?,
        };
        let peak = process_memory().filter(|_| peak_is_known).map(|memory| memory.peak);
        self.peak_bytes = self.peak_bytes.max(peak);
        if work.is_ragged {
            let first = |prompt: &Vec<u32>| {
                let report = self.generator.complete(&request(vec![prompt.clone()], 1))?.report;
                Ok::<_, Failure>(report.prefill_seconds)
            };
            run.alone_seconds = Some(work.prompts.iter().map(first).sum::<Result<f64, _>>()?);
        }
        self.runs.push(run);
        Ok(())
    }

    fn median(&self, of: impl Fn(&Run) -> f64) -> f64 {
        median(&self.runs.iter().map(of).collect::<Vec<_>>()).unwrap_or(f64::NAN)
    }
}

/// Greedy, to exactly as many tokens.
fn request(prompts: Vec<Vec<u32>>, max_new_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        max_new_tokens,
        sampling: Sampling::greedy(),
        stop: Stop { ignore_eos: true, ..Stop::default() },
        ..GenerateRequest::new(prompts)
    }
}

fn whole(generator: &Generator, work: &Work) -> Result<Run, Failure> {
    let output = generator.complete(&request(work.prompts.clone(), work.new_tokens))?;
    let report = output.report;
    Ok(Run {
        ttft_seconds: report.prefill_seconds,
        alone_seconds: None,
        step_seconds: report.step_seconds,
        decode_seconds: report.decode_seconds,
        speculation: report.speculation,
        kv_bytes: report.kv_bytes,
        pages: report.pages,
        ids: Some(output.completions.into_iter().map(|completion| completion.ids).collect()),
    })
}

/// Naive decoding is what the others are compared with, on this device or on the reference; of those, every repetition counts.
fn verdict(candidate: &Candidate, work: &Work, reference: Option<&Gpt2>) -> Result<Verdict, Failure> {
    let is_compared = |_: &&Run| reference.is_some() || !candidate.is_naive();
    let mut verdict = Verdict::default();
    let mut checked: Vec<&[Vec<u32>]> = Vec::new();
    for ids in candidate.runs.iter().filter(is_compared).filter_map(|run| run.ids.as_deref()) {
        // Greedy: they are nearly always the same, and a check costs a forward a row.
        if !checked.contains(&ids) {
            let reference = reference.unwrap_or(candidate.generator.model());
            let found = check_greedy_against(reference, &candidate.generator, &work.prompts, ids)?;
            let worse = (found.diverged_rows, found.ties) > (verdict.diverged_rows, verdict.ties);
            verdict = if worse { found } else { verdict };
            checked.push(ids);
        }
    }
    Ok(verdict)
}

fn row(
    args: &Args,
    device: &str,
    candidate: &Candidate,
    work: &Work,
    reference: Option<&Gpt2>,
) -> Result<Row, Failure> {
    let ttft_seconds = candidate.median(|run| run.ttft_seconds);
    let seconds: Vec<f64> = candidate.runs.iter().map(|run| run.ttft_seconds + run.decode_seconds).collect();
    let spread = [0.0, 0.5, 1.0].map(|q| quantile(&seconds, q).unwrap_or(f64::NAN));
    let steps: Vec<f64> = candidate.runs.iter().flat_map(|run| run.step_seconds.iter().copied()).collect();
    let verdict = verdict(candidate, work, reference)?;
    let model = candidate.generator.model();
    let cache_dtype = if candidate.is_naive() { model.dtype() } else { candidate.generator.cache_dtype() };
    Ok(Row {
        device: device.to_owned(),
        device_is: describe(&candidate.generator.model().device()),
        reference: reference.is_some().then(|| "flex, f32".to_owned()),
        logit_drift: None,
        decoder: candidate.generator.decoder().to_string(),
        dtype: args.model.dtype.to_string(),
        cache_dtype: name_of(cache_dtype),
        kernels: model.is_packed(),
        threads: Threads::current(),
        batch: work.prompts.len(),
        prompt_tokens: work.prompt_tokens,
        all_prompt_tokens: work.prompts.iter().map(Vec::len).sum(),
        new_tokens: work.new_tokens,
        ttft_seconds,
        alone_seconds: work.is_ragged.then(|| candidate.median(|run| run.alone_seconds.unwrap_or(f64::NAN))),
        seconds: spread[1],
        seconds_min: spread[0],
        seconds_max: spread[2],
        tpot_seconds: speculation::tpot_seconds(candidate, work).or(median(&steps)),
        tpot_p95_seconds: quantile(&steps, 0.95),
        tokens_per_second: (work.prompts.len() * work.new_tokens) as f64 / spread[1],
        speedup_over_naive: None,
        speculation: None,
        sampled_steps: candidate.sampled.as_ref().map(Vec::len),
        peak_bytes: candidate.peak_bytes,
        kv_bytes: candidate.runs.iter().map(|run| run.kv_bytes).max().unwrap_or(0),
        shared_tokens: work.shared_tokens,
        pages_used: candidate.runs.iter().map(|run| run.pages.used).max().unwrap_or(0),
        pages_shared: candidate.runs.iter().map(|run| run.pages.shared).max().unwrap_or(0),
        pages_copied: candidate.runs.iter().map(|run| run.pages.copied).max().unwrap_or(0),
        equal: verdict.is_equal(),
        ties: verdict.ties,
        diverged_rows: verdict.diverged_rows,
        first_divergence: verdict.first_divergence.map(Into::into),
        deterministic: args.deterministic,
    })
}

fn name_of(dtype: DType) -> String {
    format!("{dtype:?}").to_lowercase()
}
