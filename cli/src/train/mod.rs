//! Trains a GPT-2 on a text file, and a draft on a target.
//!
//!     gpt2 train --text tinyshakespeare.txt --out runs/target
//!     gpt2 train --text tinyshakespeare.txt --out runs/draft --n-layer 1 --distill runs/target
//!     gpt2 generate --model runs/target "ROMEO:"
//!
//! What is written to `--out` is the layout that `generate --model` reads, the tokenizer with it, a line of `log.jsonl` for
//! each step, and `checkpoint/`, from which the same command goes on if it was interrupted, as if it had not been.

mod data;
mod optimize;
mod state;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use data::Dataset;
use gpt2_burn::burn::module::Module;
use gpt2_burn::burn::tensor::{DType, Device};
use gpt2_burn::checkpoint::SaveOptions;
use gpt2_burn::generate::{GenerateRequest, Generator};
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{Checkpoint, Gpt2, Gpt2Config, Threads};
use indicatif::{ProgressBar, ProgressStyle};
use optimize::{Schedule, Trainer};
use serde_json::json;
use state::State;

use crate::args::model::FloatType;
use crate::args::prompts::read_text;
use crate::args::{Failure, Given, at_least_one, misuse};

/// Trains a GPT-2 on a text file, and a draft on a target.
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub struct Args {
    /// The text; the last tenth of its bytes is held out for validation
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Where the model goes; what is there already is gone on with
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A model whose distribution is learned besides the text; its tokenizer is used
    #[arg(long, value_name = "DIR")]
    distill: Option<PathBuf>,
    /// Share of the target's distribution in the loss when distilling; the rest is the text's
    #[arg(long, default_value_t = 0.9)]
    distill_weight: f64,
    /// Entries of the byte-level BPE that is trained on the text; at least 257; default: 512, or those of the model that is
    /// distilled
    #[arg(long)]
    vocab_size: Option<usize>,
    /// Transformer blocks
    #[arg(long, default_value_t = 7)]
    n_layer: usize,
    /// Attention heads of a block
    #[arg(long, default_value_t = 6)]
    n_head: usize,
    /// Width of the residual stream
    #[arg(long, default_value_t = 192)]
    n_embd: usize,
    /// Positions of the context
    #[arg(long, default_value_t = 512, value_parser = at_least_one())]
    n_positions: usize,
    /// Tokens of a sequence in the first steps: attention costs its square (no more than --n-positions)
    #[arg(long, default_value_t = 128, value_name = "TOKENS", value_parser = at_least_one())]
    sequence_length: usize,
    /// Before --long-from, one in so many steps has sequences of --n-positions tokens, in about as many tokens together
    #[arg(long, default_value_t = 5, value_name = "STEPS", value_parser = at_least_one())]
    long_interval: usize,
    /// From this step on all sequences are --n-positions long
    #[arg(long, default_value_t = 1800, value_name = "STEP")]
    long_from: usize,
    /// Dropout behind the embeddings and at the end of each residual branch
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,
    /// Dropout on the attention weights, of which there are n_head x n_positions^2 a sequence and layer
    #[arg(long, default_value_t = 0.0)]
    attention_dropout: f64,
    /// Sequences of --sequence-length tokens in a step
    #[arg(long, default_value_t = 16, value_parser = at_least_one())]
    batch_size: usize,
    /// Batches to learn from
    #[arg(long, default_value_t = 3500)]
    steps: usize,
    /// Largest learning rate
    #[arg(long, default_value_t = 1.5e-3)]
    learning_rate: f64,
    /// Learning rate at the end of the cosine
    #[arg(long, default_value_t = 1e-4)]
    min_learning_rate: f64,
    /// Steps over which the learning rate rises
    #[arg(long, default_value_t = 200)]
    warmup: usize,
    /// Weight decay of the matrices
    #[arg(long, default_value_t = 0.1)]
    weight_decay: f32,
    /// The gradient is shortened to this norm
    #[arg(long, default_value_t = 1.0)]
    grad_clip: f64,
    /// Steps between validations (and samples)
    #[arg(long, default_value_t = 250)]
    eval_interval: usize,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 250)]
    checkpoint_interval: usize,
    /// Go no further than this step for now; the same command without it goes on
    #[arg(long)]
    pause_at: Option<usize>,
    /// Seed of everything random
    #[arg(long, default_value_t = 1337)]
    seed: u64,
    /// The device that computes
    #[arg(long, default_value = "flex")]
    device: String,
    /// Threads of the CPU; 0: one a core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Element type of the file that is written
    #[arg(long, value_enum, default_value = "f16")]
    save_dtype: FloatType,
}

/// Runs the command.
pub fn run(args: &Args, given: &Given) -> Result<(), Failure> {
    if args.distill.is_none() {
        given.refuse(&["distill_weight"], "has no effect without --distill")?;
    }
    match args.threads {
        0 => train(args),
        threads => Threads::new(threads).map_err(gpt2_burn::Error::from)?.install(|| train(args)),
    }
}

fn train(args: &Args) -> Result<(), Failure> {
    let device = gpt2_burn::device(&args.device)?;
    std::fs::create_dir_all(&args.out).map_err(|error| format!("{}: {error}", args.out.display()))?;
    let text = read_text(&args.text)?;
    let (teacher, tokenizer) = args.teacher_and_tokenizer(&device, &text)?;
    let config = args.config(tokenizer.vocab_size());
    let dataset = Dataset::new(&text, &tokenizer, config.n_positions, args.seed)?;

    let autodiff = device.clone().autodiff();
    autodiff.seed(args.seed);
    let fresh = config.init(&autodiff)?;
    let trainer = |model: &Gpt2| Trainer::new(model, args.weight_decay, args.grad_clip);
    let mut state = State::resume(&args.out, fresh, trainer)?;
    let schedule = Schedule {
        warmup: args.warmup,
        steps: args.steps,
        largest: args.learning_rate,
        smallest: args.min_learning_rate,
    };
    let mut log = open_log(&args.out.join("log.jsonl"), state.step)?;
    let bar = ProgressBar::new(args.steps as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} step {pos}/{len}, {eta} left; {msg}")?);

    let last = args.pause_at.unwrap_or(args.steps).min(args.steps);
    while state.step < last {
        let step = state.step;
        // Dropout draws from the device's generator: what it draws in a step depends on the step alone, so that an
        // interrupted run can be gone on with.
        autodiff.seed(args.seed ^ (step as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (size, time) = args.batch_shape(step);
        let batch = dataset.batch(step, size, time);
        let target = teacher.as_ref().map(|teacher| (teacher, args.distill_weight));
        let (model, loss) = state.trainer.step(state.model, &batch, target, schedule.learning_rate(step))?;
        state.model = model;
        state.step += 1;
        let mut line = json!({"step": state.step, "loss": loss, "sequences": size, "sequence_length": time});
        bar.set_position(state.step as u64);
        bar.set_message(format!("loss {loss:.4}"));

        if state.step.is_multiple_of(args.eval_interval) || state.step == args.steps {
            let model = state.model.valid();
            let loss = model.perplexity(dataset.validation_ids(), config.n_positions, |_| {})?;
            let per_byte = loss.loss * loss.tokens as f64 / dataset.validation_bytes() as f64;
            line["validation_loss"] = loss.loss.into();
            line["validation_nats_per_byte"] = per_byte.into();
            bar.println(format!("step {}: validation {:.4} nats per byte", state.step, per_byte));
            bar.println(sample(model, &tokenizer)?);
        }
        writeln!(log, "{line}")?;
        if state.step.is_multiple_of(args.checkpoint_interval) || state.step == last {
            state.save(&args.out)?;
        }
    }
    bar.finish_and_clear();
    let options = SaveOptions { dtype: DType::from(args.save_dtype), max_shard_bytes: None };
    state.model.valid().save(&args.out, options)?;
    Ok(())
}

impl Args {
    /// The model to learn from and its tokenizer, or no model and a tokenizer for the text.
    fn teacher_and_tokenizer(&self, device: &Device, text: &str) -> Result<(Option<Gpt2>, Tokenizer), Failure> {
        let path = self.out.join("tokenizer.json");
        if let Some(teacher) = &self.distill {
            let entries = Tokenizer::open(teacher.join("tokenizer.json"))?.vocab_size();
            if let Some(other) = self.vocab_size.filter(|wanted| *wanted != entries) {
                return Err(misuse(format!(
                    "--vocab-size {other}: the tokenizer of --distill is used, which has {entries} entries"
                )));
            }
            std::fs::copy(teacher.join("tokenizer.json"), &path)
                .map_err(|error| format!("{}: {error}", teacher.join("tokenizer.json").display()))?;
            let teacher = Checkpoint::open(teacher)?.load(device, DType::F32)?;
            return Ok((Some(teacher), Tokenizer::open(path)?));
        }
        if !path.exists() {
            data::train_tokenizer(data::training_part(text), self.vocab_size.unwrap_or(512), &path)?;
        }
        let tokenizer = Tokenizer::open(path)?;
        // A short text can have fewer than were asked for.
        let entries = tokenizer.vocab_size();
        if let Some(fewer) = self.vocab_size.filter(|wanted| *wanted < entries) {
            return Err(format!("--vocab-size {fewer}: the tokenizer in --out has {entries} entries").into());
        }
        Ok((None, tokenizer))
    }

    /// Sequences of a step, and the tokens of each: about as many tokens in every step.
    fn batch_shape(&self, step: usize) -> (usize, usize) {
        let (size, short, long) = (self.batch_size, self.sequence_length.min(self.n_positions), self.n_positions);
        match step >= self.long_from || (step + 1).is_multiple_of(self.long_interval) {
            true => ((size * short / long).max(1), long),
            false => (size, short),
        }
    }

    fn config(&self, vocab_size: usize) -> Gpt2Config {
        Gpt2Config {
            vocab_size,
            n_positions: self.n_positions,
            n_embd: self.n_embd,
            n_layer: self.n_layer,
            n_head: self.n_head,
            embd_pdrop: self.dropout,
            attn_pdrop: self.attention_dropout,
            resid_pdrop: self.dropout,
            eos_token_id: vec![0],
            ..Gpt2Config::default()
        }
    }
}

/// The log of a run that has done `steps` steps; what an interrupted one did after its last checkpoint is done again.
fn open_log(path: &Path, steps: usize) -> Result<File, Failure> {
    let kept: String = match path.exists() {
        true => read_text(path)?.split_inclusive('\n').take(steps).collect(),
        false => String::new(),
    };
    std::fs::write(path, kept)?;
    Ok(OpenOptions::new().append(true).open(path)?)
}

/// Some text of the model as it is.
fn sample(model: Gpt2, tokenizer: &Tokenizer) -> Result<String, Failure> {
    let generator = Generator::new(model).with_tokenizer(tokenizer.clone());
    let request = GenerateRequest { max_new_tokens: 60, ..GenerateRequest::new(["\n"]) };
    let completion = generator.complete(&request)?.completions.pop();
    Ok(completion.and_then(|completion| completion.text).unwrap_or_default())
}
