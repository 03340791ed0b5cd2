//! What inference costs on paper: operations, bytes, seconds, memory, and what speculation is worth.
//!
//!     gpt2 math
//!     gpt2 math --config gpt2 --hardware h100 --case 1,128 --case 32,1000
//!     gpt2 math --hardware measured --precision f32 --count kernels
//!
//! Without a flag: GPT2-XL on a T4 in 16 bit, as the course assignment on key-value caches and speculative decoding asks.

mod tables;

use std::path::Path;
use std::str::FromStr;

use clap::ValueEnum;
use clap::builder::RangedU64ValueParser;
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::cost::{
    BestDraft, ClosedForm, Cost, Counted, Hardware, Pass, Precision, SpeculationCost, Term, bytes_from_text,
};
use gpt2_burn::measure::{Repeats, peaks};
use gpt2_burn::{Error, Gpt2Config};
use serde::Serialize;

use crate::args::model::{ModelArgs, OnOff};
use crate::args::prompts::read_text;
use crate::args::{Failure, Given};

/// What inference costs on paper: operations, bytes, seconds, memory, and what speculation is worth.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The shape of the model: gpt2, gpt2-medium, gpt2-large, gpt2-xl, embedded, or a folder or file of a config.json
    #[arg(long, default_value = "gpt2-xl", value_name = "NAME|DIR|FILE")]
    config: String,
    /// The shape of the draft
    #[arg(long, default_value = "gpt2", value_name = "NAME|DIR|FILE")]
    draft_config: String,
    /// The machine: t4, v100, l4, rtx4090, a100-40gb, a100-80gb, h100, h200, or `measured`: the one that this runs on
    #[arg(long, default_value = "t4", value_name = "NAME|measured")]
    hardware: String,
    /// Its memory bandwidth, if it is another
    #[arg(long, value_name = "GB/s")]
    bandwidth: Option<f64>,
    /// Its operations per second, if they are others
    #[arg(long, value_name = "TFLOP/s")]
    tflops: Option<f64>,
    /// Its memory, if it is another
    #[arg(long, value_name = "16GB", value_parser = bytes_from_text)]
    memory_limit: Option<f64>,
    /// Rows and length of a case; can be repeated
    #[arg(long = "case", value_name = "B,N", default_values = ["1,32", "1,1024", "64,32", "64,1024"])]
    cases: Vec<Case>,
    /// Element type of weights, activations, keys and values
    #[arg(long, value_enum, default_value = "f16")]
    precision: ElementType,
    /// Element type of the weights, if it is another
    #[arg(long, value_enum)]
    weights: Option<ElementType>,
    /// Element type of the keys and values, if it is another
    #[arg(long, value_enum)]
    cache: Option<ElementType>,
    /// Which terms are counted: the assignment's, all that textbook code does, or what kernels leave of it
    #[arg(long, value_enum, default_value = "assignment")]
    count: Count,
    /// Count the head too, where `--count assignment` does not
    #[arg(long)]
    head: bool,
    /// Print the table of terms of each case
    #[arg(long, conflicts_with = "json")]
    terms: bool,
    /// Probability that a drafted token is accepted
    #[arg(long, default_value_t = 0.75, value_name = "A", allow_negative_numbers = true)]
    acceptance: f64,
    /// The draft's step in units of the target's; default: what the constants of their decode steps say
    #[arg(long, value_name = "C", allow_negative_numbers = true)]
    draft_cost: Option<f64>,
    /// Most drafted tokens a round
    #[arg(long, default_value_t = 32, value_name = "M", value_parser = RangedU64ValueParser::<usize>::new().range(..=10_000))]
    max_drafted: usize,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Temperatures at which the acceptance of a real pair is computed; `off` leaves it out
    #[arg(long, default_value = "0,0.25,0.5,0.75,1,1.25,1.5,2", value_name = "T,T,..|off")]
    temperatures: Temperatures,
    /// The text on which it is computed; default: the embedded pair's held-out text
    #[arg(long, value_name = "FILE")]
    text: Option<std::path::PathBuf>,
    /// Tokens of that text that are read
    #[arg(long, default_value_t = 4096, value_name = "N")]
    text_tokens: usize,
    /// The draft of that pair; its target is --model
    #[arg(long, default_value = "embedded", value_name = "embedded|NAME|DIR|FILE.pt")]
    draft: String,
    #[command(flatten, next_help_heading = "The pair whose acceptance is computed")]
    model: ModelArgs,
}

/// Rows and length.
#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    length: usize,
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not B,N: rows and length, both at least 1");
        let (batch, length) = text.split_once(',').ok_or_else(wrong)?;
        let number = |text: &str| text.trim().parse().ok().filter(|number| *number > 0).ok_or_else(wrong);
        Ok(Self { batch: number(batch)?, length: number(length)? })
    }
}

/// None: `off`.
#[derive(Clone, Debug)]
struct Temperatures(Option<Vec<f64>>);

impl FromStr for Temperatures {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        let number = |text: &str| text.trim().parse().map_err(|error| format!("`{text}`: {error}"));
        Ok(Self(Some(text.split(',').map(number).collect::<Result<_, _>>()?)))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ElementType {
    F32,
    F16,
    Bf16,
    /// Of weights only; their scales are not counted
    Int8,
}

impl From<ElementType> for DType {
    fn from(dtype: ElementType) -> Self {
        match dtype {
            ElementType::F32 => Self::F32,
            ElementType::F16 => Self::F16,
            ElementType::Bf16 => Self::BF16,
            ElementType::Int8 => Self::I8,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Count {
    Assignment,
    All,
    Kernels,
}

/// All that is printed.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    parameters: usize,
    parameter_bytes: f64,
    dtype: String,
    counted: String,
    hardware: HardwareJson,
    naive: Coefficients,
    cached: Coefficients,
    cases: Vec<CaseReport>,
    decode_constants: Vec<Constant>,
    speculation: SpeculationReport,
    temperatures: Option<Vec<TemperatureReport>>,
}

#[derive(Debug, Serialize)]
struct HardwareJson {
    name: String,
    bytes_per_second: f64,
    flops_per_second: f64,
    /// None if it is not known.
    memory_bytes: Option<f64>,
    ridge_point: f64,
}

/// Closed forms, as text.
#[derive(Debug, Serialize)]
struct Coefficients {
    flops: String,
    bytes: String,
}

impl From<ClosedForm> for Coefficients {
    fn from(form: ClosedForm) -> Self {
        Self { flops: form.flops.to_string(), bytes: form.bytes.to_string() }
    }
}

#[derive(Debug, Serialize)]
struct CaseReport {
    batch: usize,
    length: usize,
    naive: Step,
    cached: Step,
    speedup: f64,
    kv_bytes_per_layer: f64,
    kv_bytes: f64,
}

/// A decode step at a length.
#[derive(Debug, Serialize)]
struct Step {
    flops: f64,
    bytes: f64,
    seconds: f64,
    bound: String,
    memory_bytes: f64,
    fits: bool,
    fit: String,
    #[serde(skip)]
    terms: Vec<Term>,
}

/// What a decode step with a cache takes at least.
#[derive(Debug, Serialize)]
struct Constant {
    model: String,
    without_head_seconds: f64,
    with_head_seconds: f64,
}

#[derive(Debug, Serialize)]
struct SpeculationReport {
    acceptance: f64,
    draft_cost: f64,
    lengths: Vec<LengthReport>,
    best_without_bonus: Best,
    best_with_bonus: Best,
}

#[derive(Debug, Serialize)]
struct LengthReport {
    drafted: usize,
    tokens_without_bonus: f64,
    speedup_without_bonus: f64,
    tokens_with_bonus: f64,
    speedup_with_bonus: f64,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Best {
    drafted: usize,
    speedup: f64,
}

impl From<BestDraft> for Best {
    fn from(length: BestDraft) -> Self {
        Self { drafted: length.draft_len, speedup: length.speedup }
    }
}

#[derive(Debug, Serialize)]
struct TemperatureReport {
    temperature: f64,
    acceptance: f64,
    best_without_bonus: Best,
    best_with_bonus: Best,
}

/// Runs the command.
pub fn run(args: &Args, given: &Given) -> Result<(), Failure> {
    args.check(given)?;
    args.model.with_threads(|| math(args))
}

impl Args {
    /// Refuses flags that would be ignored.
    fn check(&self, given: &Given) -> Result<(), Failure> {
        self.model.check(given)?;
        if self.count != Count::Assignment {
            given.refuse(&["head"], "has no effect: only `--count assignment` leaves the head out")?;
        }
        if self.bandwidth.is_some() && self.tflops.is_some() && self.memory_limit.is_some() {
            given.refuse(&["hardware"], "has no effect: its bandwidth, operations and memory are all given")?;
        }
        if self.temperatures.0.is_none() {
            let pair = ["text", "text_tokens", "draft", "model", "init_from", "tokenizer"];
            given.refuse(&pair, "has no effect: it is for the pair of --temperatures, which are off")?;
            if self.hardware != "measured" {
                let how = ["device", "dtype", "kernels", "threads", "fast_f32"];
                given.refuse(
                    &how,
                    "has no effect: without --temperatures and --hardware measured nothing is computed",
                )?;
            }
        }
        Ok(())
    }
}

fn math(args: &Args) -> Result<(), Failure> {
    let report = report(args)?;
    tables::print(&report, args.json, args.terms)
}

fn report(args: &Args) -> Result<Report, Failure> {
    let config = read_config(&args.config)?;
    let draft_config = read_config(&args.draft_config)?;
    let hardware = hardware(args, &config)?;
    let cost = cost(args, &config)?;
    let draft = constant(&args.draft_config, &self::cost(args, &draft_config)?, &hardware);
    let target = constant(&args.config, &cost, &hardware);
    // As the assignment has it: the draft's head counts, the target's does not.
    let draft_cost = args.draft_cost.unwrap_or(draft.with_head_seconds / target.without_head_seconds);
    let speculation = SpeculationCost::new(args.acceptance, draft_cost)?;
    Ok(Report {
        model: args.config.clone(),
        parameters: config.num_params(),
        parameter_bytes: cost.parameter_bytes(),
        dtype: name_of(cost.precision()),
        counted: format!("{:?}", args.count).to_lowercase() + if args.head { " with head" } else { "" },
        hardware: HardwareJson {
            name: hardware.name.to_string(),
            bytes_per_second: hardware.bandwidth,
            flops_per_second: hardware.flops,
            memory_bytes: Some(hardware.memory).filter(|bytes| bytes.is_finite()),
            ridge_point: hardware.ridge_point(),
        },
        naive: cost.naive().into(),
        cached: cost.cached().into(),
        cases: args.cases.iter().map(|&at| case(&cost, &hardware, at)).collect::<Result<_, _>>()?,
        decode_constants: vec![draft, target],
        speculation: speculation_report(&speculation, args, draft_cost),
        temperatures: temperatures(args, draft_cost)?,
    })
}

/// A shape by name, or from a file.
fn read_config(name: &str) -> Result<Gpt2Config, Failure> {
    if name == "embedded" {
        return Ok(Gpt2Config::from_json(gpt2_burn_pair::TARGET.config)?);
    }
    if let Some(config) = Gpt2Config::published(name) {
        return Ok(config);
    }
    let path = Path::new(name);
    let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    if !path.exists() {
        let known: Vec<&str> = Gpt2Config::published_names().collect();
        return Err(format!("`{name}` is neither a file nor one of: {}, embedded", known.join(", ")).into());
    }
    Ok(Gpt2Config::from_json(&read_text(&path)?)?)
}

fn hardware(args: &Args, config: &Gpt2Config) -> Result<Hardware, Failure> {
    let base = match args.hardware.as_str() {
        "measured" => {
            let format = (args.model.kernels == OnOff::On).then(|| args.model.dtype.into());
            peaks(&args.model.device()?, config, format, Repeats::default())?
        }
        name => Hardware::preset(name).ok_or_else(|| {
            let known: Vec<&str> = Hardware::preset_names().collect();
            format!("`{name}` is none of: {}, measured", known.join(", "))
        })?,
    };
    let changed = args.bandwidth.is_some() || args.tflops.is_some();
    let name = if changed { "given".into() } else { base.name };
    let bandwidth = args.bandwidth.map_or(base.bandwidth, |gigabytes| gigabytes * 1e9);
    let flops = args.tflops.map_or(base.flops, |tera| tera * 1e12);
    Ok(Hardware::new(name, bandwidth, flops, args.memory_limit.unwrap_or(base.memory))?)
}

fn cost(args: &Args, config: &Gpt2Config) -> Result<Cost, Failure> {
    let counted = match args.count {
        Count::Assignment => Counted { head: args.head, ..Counted::assignment() },
        Count::All => Counted::all(),
        Count::Kernels => Counted::kernels(),
    };
    let precision = Precision {
        weights: args.weights.unwrap_or(args.precision).into(),
        cache: args.cache.unwrap_or(args.precision).into(),
        activations: args.precision.into(),
    };
    Ok(Cost::new(config, precision)?.counting(counted))
}

fn name_of(precision: Precision) -> String {
    let name = |dtype: DType| format!("{dtype:?}").to_lowercase();
    let Precision { weights, activations, cache } = precision;
    if weights == activations && cache == activations {
        return name(weights);
    }
    format!("{} (weights {}, cache {})", name(activations), name(weights), name(cache))
}

fn constant(name: &str, cost: &Cost, hardware: &Hardware) -> Constant {
    let seconds = |head: bool| {
        let counted = Counted { head, ..cost.counted() };
        cost.clone().counting(counted).cached().bytes.constant / hardware.bandwidth
    };
    Constant { model: name.to_owned(), without_head_seconds: seconds(false), with_head_seconds: seconds(true) }
}

fn case(cost: &Cost, hardware: &Hardware, Case { batch, length }: Case) -> Result<CaseReport, Error> {
    let step = |pass| {
        let (work, fit) = (cost.work(pass)?, cost.fits(hardware, pass)?);
        let roofline = hardware.roofline(work);
        Ok::<_, Error>(Step {
            flops: work.flops,
            bytes: work.bytes,
            seconds: roofline.seconds(),
            bound: roofline.bound().to_string(),
            memory_bytes: fit.needed.total(),
            fits: fit.is_enough(),
            fit: fit.to_string(),
            terms: cost.terms(pass)?,
        })
    };
    Ok(CaseReport {
        batch,
        length,
        naive: step(Pass::naive(batch, length))?,
        cached: step(Pass::decode(batch, length))?,
        speedup: cost.kv_speedup(hardware, batch, length)?,
        kv_bytes_per_layer: cost.kv_bytes_per_layer(batch, length),
        kv_bytes: cost.kv_bytes(batch, length),
    })
}

fn speculation_report(pair: &SpeculationCost, args: &Args, draft_cost: f64) -> SpeculationReport {
    let without = pair.without_bonus();
    let (best_without, best_with) = (without.best(args.max_drafted), pair.best(args.max_drafted));
    // As far as it takes to see both maxima.
    let shown = (best_without.draft_len.max(best_with.draft_len) + 2).min(args.max_drafted);
    let length = |m| LengthReport {
        drafted: m,
        tokens_without_bonus: without.expected_tokens(m),
        speedup_without_bonus: without.speedup(m),
        tokens_with_bonus: pair.expected_tokens(m),
        speedup_with_bonus: pair.speedup(m),
    };
    SpeculationReport {
        acceptance: args.acceptance,
        draft_cost,
        lengths: (1..=shown).map(length).collect(),
        best_without_bonus: best_without.into(),
        best_with_bonus: best_with.into(),
    }
}

/// What a real pair's draft has accepted at each temperature, and the best draft lengths with that.
fn temperatures(args: &Args, draft_cost: f64) -> Result<Option<Vec<TemperatureReport>>, Failure> {
    let Some(temperatures) = &args.temperatures.0 else { return Ok(None) };
    let (target, tokenizer) = args.model.load()?;
    let draft = args.model.load_draft(&args.draft)?;
    let tokenizer = tokenizer.ok_or(Error::NoTokenizer { what: "a text" })?;
    let text = args.text.as_deref().map(read_text).transpose()?;
    let mut ids = tokenizer.encode(text.as_deref().unwrap_or(gpt2_burn_pair::HELD_OUT))?;
    ids.truncate(args.text_tokens);
    let n_positions = target.config().n_positions.min(draft.config().n_positions);
    let accepted = target.acceptance(&draft, &ids, n_positions.div_ceil(2), temperatures, |_| {})?;
    let report = |(&temperature, acceptance): (&f64, f64)| {
        // Sums of probabilities can round to a little more than 1.
        let pair = SpeculationCost::new(acceptance.min(1.0), draft_cost)?;
        let best_without_bonus = pair.without_bonus().best(args.max_drafted).into();
        let best_with_bonus = pair.best(args.max_drafted).into();
        Ok::<_, Error>(TemperatureReport { temperature, acceptance, best_without_bonus, best_with_bonus })
    };
    Ok(Some(temperatures.iter().zip(accepted).map(report).collect::<Result<_, _>>()?))
}
