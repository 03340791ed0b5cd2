//! Continues texts with a GPT-2.
//!
//!     gpt2 generate "ROMEO:"
//!     gpt2 generate --model gpt2 --num-samples 3 "Hello, I'm a language model,"
//!     gpt2 generate --prompt-ids 37,11,12 --model tests/fixtures/hf-tiny --json
//!     gpt2 generate --draft embedded --draft-len auto "ROMEO:"
//!
//! nanoGPT's spellings (`--init_from`, `--start`, `--max_new_tokens`, ...) are understood.

mod output;

use std::io::{IsTerminal, Write};

use clap::ValueEnum;
use gpt2_burn::generate::{ContextEnd, Decoder, GenerateRequest, Generator, Stop};
use gpt2_burn::sampling::Sampling;
use gpt2_burn::speculative::{Acceptance, Speculation};
use gpt2_burn::{CacheStorage, MemoryLimit};

use crate::args::draft::DraftArgs;
use crate::args::model::{CacheType, ModelArgs};
use crate::args::prefixes::PrefixArgs;
use crate::args::prompts::PromptArgs;
use crate::args::{Failure, Given, Switch, number_or_off};

/// Continues texts with a GPT-2.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    prompts: PromptArgs,
    #[command(flatten)]
    model: ModelArgs,
    /// How tokens are computed; which they are depends on it when sampling with --acceptance rejection, else only where last
    /// digits do (--kernels off, GPUs). Default: kv, or speculative if there is a --draft
    #[arg(long, value_enum)]
    decoder: Option<DecoderName>,
    #[command(flatten)]
    draft: DraftArgs,
    /// Which proposals stand when sampling: `rejection` sampling keeps the distribution and accepts most; `match` draws as
    /// without a draft, and gives the same ids for a seed where logits are the same
    #[arg(long, value_enum, default_value = "rejection")]
    acceptance: AcceptanceName,
    #[command(flatten)]
    prefixes: PrefixArgs,
    /// How the cache holds keys and values
    #[arg(long, value_enum, default_value = "paged")]
    cache: CacheName,
    /// Element type of cached keys and values; default: that of what is computed
    #[arg(long, value_enum)]
    cache_dtype: Option<CacheType>,
    /// The same bits from every decoder and in every batch: kernels give them anyway, burn's operations only if they compute
    /// each token by itself
    #[arg(long)]
    deterministic: bool,
    /// Most tokens to add to each prompt
    #[arg(long, alias = "max_new_tokens", default_value_t = 100, value_name = "N")]
    max_new_tokens: usize,
    /// Logits are divided by it; 0: always the most likely token
    #[arg(long, default_value_t = 0.8, value_name = "T", allow_negative_numbers = true)]
    temperature: f64,
    /// Only the K most likely tokens, or `off`
    #[arg(long, alias = "top_k", default_value = "200", value_parser = number_or_off::<usize>, value_name = "K|off")]
    top_k: Switch<usize>,
    /// Only the most likely tokens with this much probability together
    #[arg(long, alias = "top_p", default_value_t = 1.0, value_name = "P", allow_negative_numbers = true)]
    top_p: f64,
    /// Only tokens with at least this share of the most likely one's probability
    #[arg(long, alias = "min_p", default_value_t = 0.0, value_name = "P", allow_negative_numbers = true)]
    min_p: f64,
    /// Divides the logits of tokens that have occurred
    #[arg(long, alias = "repetition_penalty", default_value_t = 1.0, value_name = "R", allow_negative_numbers = true)]
    repetition_penalty: f64,
    /// Seed of everything random
    #[arg(long, default_value_t = 1337)]
    seed: u64,
    /// Completions of each prompt
    #[arg(long, alias = "num_samples", default_value_t = 1, value_name = "N")]
    num_samples: usize,
    /// A text that ends a completion; can be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on behind the end-of-text token
    #[arg(long)]
    ignore_eos: bool,
    /// What happens when the context is full: `slide` keeps the newest token and KEEP before it and computes them again,
    /// by default all that fit, which costs a prefill of the whole context for every token
    #[arg(long, default_value = "stop", value_parser = context_end, value_name = "stop|error|slide[:KEEP]")]
    on_context_end: ContextEnd,
    /// Most memory of a request beside the weights; default: three quarters of what the system has left, where it says (Linux)
    /// and except for a GPU's
    #[arg(long, value_name = "MB")]
    memory_mb: Option<usize>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DecoderName {
    Naive,
    Kv,
    Speculative,
}

/// Rules by which proposals are accepted.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum AcceptanceName {
    Rejection,
    Match,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum CacheName {
    Paged,
    Preallocated,
    Growing,
}

fn context_end(text: &str) -> Result<ContextEnd, String> {
    match (text, text.strip_prefix("slide:")) {
        ("stop", _) => Ok(ContextEnd::Stop),
        ("error", _) => Ok(ContextEnd::Error),
        ("slide", _) => Ok(ContextEnd::Slide { keep: None }),
        (_, Some(keep)) => {
            let keep = keep.parse().map_err(|error| format!("`{keep}`: {error}"))?;
            Ok(ContextEnd::Slide { keep: Some(keep) })
        }
        _ => Err("neither `stop`, `error`, `slide` nor `slide:KEEP`".to_owned()),
    }
}

impl Args {
    fn decoder(&self) -> Decoder {
        let storage = match self.cache {
            CacheName::Paged => CacheStorage::Paged,
            CacheName::Preallocated => CacheStorage::Preallocated,
            CacheName::Growing => CacheStorage::Growing,
        };
        let default = if self.draft.draft.is_some() { DecoderName::Speculative } else { DecoderName::Kv };
        match self.decoder.unwrap_or(default) {
            DecoderName::Naive => Decoder::Naive,
            DecoderName::Kv => Decoder::Kv(storage),
            DecoderName::Speculative => {
                let acceptance = match self.acceptance {
                    AcceptanceName::Rejection => Acceptance::Rejection,
                    AcceptanceName::Match => Acceptance::Match,
                };
                Decoder::Speculative(Speculation { storage, draft_len: self.draft.draft_len, acceptance })
            }
        }
    }

    /// Refuses flags that would be ignored. Greedy decoding ignores none: it is the limit of what they say about sampling.
    fn check(&self, given: &Given) -> Result<(), Failure> {
        self.model.check(given)?;
        self.prefixes.check(given)?;
        match self.decoder() {
            Decoder::Speculative(_) => return Ok(()),
            Decoder::Naive => given.refuse(&["cache", "cache_dtype"], "has no effect: naive decoding has no cache")?,
            _ => {}
        }
        DraftArgs::refuse(given)
    }

    fn request(&self) -> Result<GenerateRequest, Failure> {
        Ok(GenerateRequest {
            max_new_tokens: self.max_new_tokens,
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k.0,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
            },
            num_samples: self.num_samples,
            seed: self.seed,
            stop: Stop { texts: self.stop.clone(), ignore_eos: self.ignore_eos },
            on_context_end: self.on_context_end,
            cache_generated: self.prefixes.cache_generated,
            ..GenerateRequest::new(self.prompts.read()?)
        })
    }
}

/// Runs the command.
pub fn run(args: &Args, given: &Given) -> Result<(), Failure> {
    args.check(given)?;
    args.model.with_threads(|| generate(args))
}

fn generate(args: &Args) -> Result<(), Failure> {
    let request = args.request()?;
    request.sampling.validate()?; // before minutes go into loading
    let (model, tokenizer) = args.model.load()?;
    let model = model.with_determinism(args.deterministic)?;
    let mut generator = Generator::new(model).with_tokenizer(tokenizer).with_decoder(args.decoder());
    if let Decoder::Speculative(_) = generator.decoder() {
        let draft = args.draft.load_on(&args.model, &args.model.device()?, args.deterministic)?;
        generator = generator.with_draft(draft)?;
    }
    if let Some(megabytes) = args.memory_mb {
        generator = generator.with_memory_limit(MemoryLimit::bytes(megabytes.saturating_mul(1_000_000)));
    }
    if let Some(dtype) = args.cache_dtype {
        generator = generator.with_cache_dtype(dtype.into())?;
    }
    let (generator, prefixes) = args.prefixes.attach(generator)?;
    let generation = generator.generate(&request)?;
    if args.json {
        let output = generation.finish()?;
        args.prefixes.save(prefixes.as_ref())?;
        writeln!(std::io::stdout(), "{}", output::as_json(&output))?;
        return Ok(());
    }
    let report = output::print_stream(generation, &generator, &request)?;
    args.prefixes.save(prefixes.as_ref())?;
    if std::io::stdout().is_terminal() {
        eprintln!("{}", output::speed(&report));
    }
    Ok(())
}
