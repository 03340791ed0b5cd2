//! A burn application of its own around a GPT-2: a head on its hidden states tells Shakespeare's lines from shuffled words.
//!
//!     cargo run --release -p gpt2-burn-embed
//!     cargo run --release -p gpt2-burn-embed -- --thaw
//!
//! Its Cargo.toml has `burn` with the features `autodiff` and `optim` beside `gpt2-burn`.
//!
//! By default the GPT-2 is frozen and only the head learns: a step needs no gradient of the large part, and the text that
//! the model generates stays what it was, to the last id. With `--thaw` all of it learns, the head's judgement is better,
//! and the text pays for it.

use std::io::Write;
use std::process::ExitCode;

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation};
use clap::Parser;
use clap::builder::RangedU64ValueParser;
use gpt2_burn::generate::{GenerateRequest, Generator, Stop};
use gpt2_burn::sampling::{Purpose, Sampling, uniform};
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{Checkpoint, Gpt2, Result, TokenBatch, WeightFormat};
use gpt2_burn_pair::{HELD_OUT, TARGET};

/// Trains a head on the hidden states of the embedded model, and generates with the same weights.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// Batches to learn from; 120 are all lines once
    #[arg(long, default_value_t = 120, value_name = "N")]
    steps: usize,
    /// Lines of a batch, each as it was written and shuffled
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    batch_size: usize,
    /// The GPT-2 learns too
    #[arg(long)]
    thaw: bool,
    /// The device that computes
    #[arg(long, default_value = "flex")]
    device: String,
    /// Seed of everything random
    #[arg(long, default_value_t = 1337)]
    seed: u64,
}

/// Why it failed: the message is all that is shown.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Steps of which a mean loss is printed.
const REPORTED: usize = 20;

/// A GPT-2 and a linear classifier on what its head would read.
#[derive(Module, Debug)]
struct Judge {
    gpt2: Gpt2,
    head: Linear,
}

/// A line as token ids, and whether it is as it was written: 1, or 0 if its words were shuffled.
type Example = (Vec<u32>, i32);

/// Mean cross-entropy, and the share of examples that it tells right.
struct Score {
    loss: f64,
    accuracy: f64,
}

impl Judge {
    fn new(gpt2: Gpt2, device: &Device) -> Self {
        let head = LinearConfig::new(gpt2.config().n_embd, 2).init(device);
        Self { gpt2, head }
    }

    /// Logits `[B, 2]` of lines of any lengths.
    fn forward(&self, lines: &[&[u32]]) -> Result<Tensor<2>> {
        let tokens = TokenBatch::new(lines, &self.gpt2)?;
        let hidden = self.gpt2.hidden_states(&tokens, None)?; // [N, d]
        // The mean of each row over its own tokens, which stand one row behind the other.
        let mut shares = vec![0.0_f32; lines.len() * tokens.tokens()];
        let mut first = 0;
        for (row, len) in tokens.query_lens().iter().enumerate() {
            shares[row * tokens.tokens() + first..][..*len].fill(1.0 / *len as f32);
            first += len;
        }
        let shares = TensorData::new(shares, [lines.len(), tokens.tokens()]);
        let mean = Tensor::<2>::from_data(shares, &hidden.device()).matmul(hidden); // [B, d]
        Ok(self.head.forward(mean)) // [B, 2]
    }

    /// Mean cross-entropy `[1]`, and logits `[B, 2]`.
    fn loss(&self, batch: &[Example]) -> Result<(Tensor<1>, Tensor<2>)> {
        let (lines, labels): (Vec<&[u32]>, Vec<i32>) = batch.iter().map(|(ids, label)| (&ids[..], *label)).unzip();
        let logits = self.forward(&lines)?;
        let labels = Tensor::<1, Int>::from_data(labels.as_slice(), &logits.device());
        let loss = CrossEntropyLossConfig::new().init(&logits.device()).forward(logits.clone(), labels);
        Ok((loss, logits))
    }

    /// How well it judges many examples.
    fn evaluate(&self, examples: &[Example]) -> Result<Score> {
        let (mut loss, mut right) = (0.0, 0);
        for batch in examples.chunks(64) {
            let (mean, logits) = self.loss(batch)?;
            loss += f64::from(mean.into_scalar::<f32>()) * batch.len() as f64;
            let found = probabilities(logits);
            right += found.iter().zip(batch).filter(|(p, (_, label))| (**p > 0.5) == (*label == 1)).count();
        }
        Ok(Score { loss: loss / examples.len() as f64, accuracy: right as f64 / examples.len() as f64 })
    }
}

/// Of each row of logits `[B, 2]`, the probability that the line is as it was written.
fn probabilities(logits: Tensor<2>) -> Vec<f32> {
    activation::softmax(logits, 1).narrow(1, 1, 1).into_data().iter::<f32>().collect()
}

fn main() -> ExitCode {
    match embed(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn embed(args: &Args) -> std::result::Result<(), Failure> {
    let device = gpt2_burn::device(&args.device)?;
    let autodiff = device.clone().autodiff();
    autodiff.seed(args.seed);
    let tokenizer = Tokenizer::from_bytes(TARGET.tokenizer)?;
    let (training, held_out) = examples(&tokenizer, args.seed)?;
    let rows = args.batch_size.saturating_mul(2);
    if rows > training.len() {
        let (wanted, lines) = (args.batch_size, training.len() / 2);
        return Err(format!("a batch of {wanted} lines is more than the {lines} that there are to learn from").into());
    }

    // As it was written, on a device that keeps what gradients need. Frozen parts ask for none, and drop nothing out.
    let gpt2 = Checkpoint::from_bytes(TARGET.config, TARGET.weights)?.load(&autodiff, DType::F32)?;
    let (gpt2, learning_rate) = if args.thaw { (gpt2, 5e-4) } else { (gpt2.freeze(), 1e-2) };
    let mut judge = Judge::new(gpt2, &autodiff);
    let before = judge.valid().evaluate(&held_out)?;
    let text_before = continuation(judge.valid().gpt2, &tokenizer)?;

    let mut out = std::io::stdout().lock();
    let mut optimizer = AdamWConfig::new().init();
    let batches = training.chunks_exact(rows).cycle();
    let mut losses = Vec::new();
    for batch in batches.take(args.steps) {
        let (loss, _) = judge.loss(batch)?;
        losses.push(loss.clone().into_scalar::<f32>());
        if losses.len() % REPORTED == 0 {
            let mean = losses.iter().rev().take(REPORTED).sum::<f32>() / REPORTED as f32;
            writeln!(out, "step {:3}: loss {mean:.3}", losses.len())?;
        }
        let grads = GradientsParams::from_grads(loss.backward(), &judge);
        judge = optimizer.step(learning_rate, judge, grads);
    }

    // Off the autodiff device, and then into the layout of its kernels: from here on it is for inference.
    let judge = judge.valid();
    let judge = Judge { gpt2: judge.gpt2.pack(WeightFormat::F32)?, ..judge };
    let after = judge.evaluate(&held_out)?;
    writeln!(
        out,
        "{} held-out lines, and as many shuffled: loss {:.3} -> {:.3}, accuracy {:.1}% -> {:.1}%",
        held_out.len() / 2,
        before.loss,
        after.loss,
        100.0 * before.accuracy,
        100.0 * after.accuracy
    )?;
    let text = continuation(judge.gpt2.clone(), &tokenizer)?;
    let same = if text == text_before { "the text that it was before" } else { "another text than before" };
    writeln!(out, "\nThe same weights go on with a text, greedily: {same}.\n{text}\n")?;
    show_judgements(&judge, &tokenizer, args.seed, &mut out)
}

/// Lines with their shuffled doubles, to learn from and to be held out. The GPT-2 has seen none of this text.
fn examples(tokenizer: &Tokenizer, seed: u64) -> Result<(Vec<Example>, Vec<Example>)> {
    let mut examples = Vec::new();
    for (number, line) in HELD_OUT.lines().enumerate() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let shuffled = shuffle(&words, seed, number as u64);
        if words.len() >= 4 && shuffled != words {
            examples.push((tokenizer.encode(&words.join(" "))?, 1));
            examples.push((tokenizer.encode(&shuffled.join(" "))?, 0));
        }
    }
    let held_out = examples.split_off(examples.len() / 10 * 8);
    Ok((examples, held_out))
}

/// The words in a random order (Fisher and Yates), the same at each call.
fn shuffle<'a>(words: &[&'a str], seed: u64, line: u64) -> Vec<&'a str> {
    let mut words = words.to_vec();
    for last in (1..words.len()).rev() {
        let other = uniform(seed, line, last as u64, Purpose::Token) * (last + 1) as f64;
        words.swap(last, other as usize);
    }
    words
}

/// What the model says next, greedily.
fn continuation(gpt2: Gpt2, tokenizer: &Tokenizer) -> Result<String> {
    let generator = Generator::new(gpt2).with_tokenizer(tokenizer.clone());
    let sampling = Sampling::greedy();
    let request = GenerateRequest { max_new_tokens: 40, sampling, ..GenerateRequest::new(["JULIET:\n"]) };
    let completion = generator.complete(&request)?.completions.pop();
    Ok(completion.and_then(|completion| completion.text).unwrap_or_default())
}

/// One model, both of its uses: lines that it writes, and what it thinks of them.
fn show_judgements(
    judge: &Judge,
    tokenizer: &Tokenizer,
    seed: u64,
    out: &mut impl Write,
) -> std::result::Result<(), Failure> {
    let generator = Generator::new(judge.gpt2.clone()).with_tokenizer(tokenizer.clone());
    let stop = Stop { texts: vec!["\n".to_owned()], ..Stop::default() };
    let request =
        GenerateRequest { max_new_tokens: 40, num_samples: 6, seed, stop, ..GenerateRequest::new(["JULIET:\n"]) };
    writeln!(out, "Lines that it writes, and how probably Shakespeare wrote them so, as it thinks:")?;
    for completion in generator.complete(&request)?.completions {
        let line = completion.text.unwrap_or_default();
        let ids = tokenizer.encode(line.trim())?;
        if !ids.is_empty() {
            writeln!(out, "{:5.1}%  {}", 100.0 * probabilities(judge.forward(&[&ids])?)[0], line.trim())?;
        }
    }
    Ok(())
}
