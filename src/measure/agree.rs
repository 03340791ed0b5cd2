//! Whether a decoder gives naive decoding's tokens.

use crate::generate::{GenerateRequest, Generator, Stop};
use crate::perplexity::chunks;
use crate::runner::{Runner, RunnerConfig, Turn};
use crate::sampling::Sampling;
use crate::{Error, Gpt2, KvCacheConfig, Result};

/// Where naive decoding preferred its token to the decoder's by less than this, it is a tie: shapes change the order of
/// sums, and with it the last digits of a logit.
pub const TIE: f64 = 1e-4;

/// How a decoder's tokens compare with naive decoding's, greedy, over all rows.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Verdict {
    /// Tokens of all rows; those behind a row's first difference were not compared.
    pub tokens: usize,
    /// Tokens that differed by a [`TIE`]; comparing went on from naive decoding's token.
    pub ties: usize,
    /// Rows that differed by more.
    pub diverged_rows: usize,
    /// The first of those differences, in the order of the rows.
    pub first_divergence: Option<Divergence>,
}

impl Verdict {
    /// Whether all rows are equal, ties aside.
    pub fn is_equal(&self) -> bool {
        self.diverged_rows == 0
    }
}

/// A token that is another than naive decoding's.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Divergence {
    /// Its row.
    pub row: usize,
    /// Its position among the row's new tokens, counted from 0.
    pub step: usize,
    /// Naive decoding's logit of its own token, less that of the decoder's.
    pub margin: f64,
    /// Largest difference of any logit at that step, with the row computed again by itself; where that is tiny, the row
    /// differs only in its batch.
    pub max_logit_diff: f64,
}

/// Compares greedy continuations, `outputs[b]` of `prompts[b]`, that `generator` made with naive decoding's.
///
/// A naive forward over a whole row tells for each of its tokens what naive decoding would have chosen there, since no
/// position sees a later one. So a row costs one forward, not one a token.
///
/// # Errors
///
/// [`Error::Mismatch`] if there are not as many outputs as prompts; [`Error::EmptyPrompt`],
/// [`Error::TokenOutOfRange`]; [`Error::ContextOverflow`] if a row is longer than the context: what slid is not compared;
/// [`Error::NotFinite`] if logits are no numbers.
pub fn check_greedy(generator: &Generator, prompts: &[Vec<u32>], outputs: &[Vec<u32>]) -> Result<Verdict> {
    check_greedy_against(generator.model(), generator, prompts, outputs)
}

/// As [`check_greedy`], with the naive decoding of `reference`: the same weights on another device, or in another type.
///
/// # Errors
///
/// As [`check_greedy`]; [`Error::Mismatch`] if the models have vocabularies or contexts of different sizes.
pub fn check_greedy_against(
    reference: &Gpt2,
    generator: &Generator,
    prompts: &[Vec<u32>],
    outputs: &[Vec<u32>],
) -> Result<Verdict> {
    check_alike(reference, generator.model())?;
    if prompts.len() != outputs.len() {
        return Err(Error::mismatch("outputs to compare", prompts.len(), outputs.len()));
    }
    for (row, (prompt, output)) in prompts.iter().zip(outputs).enumerate() {
        check_ids(generator.model(), row, prompt, output)?;
    }
    let mut verdict = Verdict::default();
    for (row, (prompt, output)) in prompts.iter().zip(outputs).enumerate() {
        check_row(reference, generator, row, prompt, output.clone(), &mut verdict)?;
    }
    Ok(verdict)
}

fn check_ids(model: &Gpt2, row: usize, prompt: &[u32], output: &[u32]) -> Result<()> {
    let (vocab_size, n_positions) = (model.config().vocab_size, model.config().n_positions);
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt { index: row });
    }
    let ids = || prompt.iter().chain(output);
    if let Some((position, &id)) = ids().enumerate().find(|(_, id)| **id as usize >= vocab_size) {
        return Err(Error::TokenOutOfRange { id, row, position, vocab_size });
    }
    // The last token is never fed back.
    let tokens = ids().count() - usize::from(!output.is_empty());
    if tokens > n_positions {
        return Err(Error::ContextOverflow { row, tokens, n_positions });
    }
    Ok(())
}

/// The largest difference of any logit behind any token of `text` but the last that two models give: the same weights on two
/// devices, or in two types.
///
/// # Errors
///
/// [`Error::Mismatch`] if the models have vocabularies or contexts of different sizes, or `text` has less than two tokens;
/// [`Error::TokenOutOfRange`], [`Error::ContextOverflow`]; [`Error::NotFinite`] if logits are not numbers; [`Error::Execution`] if a
/// device does not hand them over.
pub fn logit_drift(reference: &Gpt2, model: &Gpt2, text: &[u32]) -> Result<f64> {
    check_alike(reference, model)?;
    let Some((_, fed)) = text.split_last().filter(|(_, fed)| !fed.is_empty()) else {
        return Err(Error::mismatch("tokens of a text", "2 or more", text.len()));
    };
    check_ids(model, 0, fed, &text[fed.len()..])?;
    let (expected, found) = (reference.scored_states(fed, fed.len())?, model.scored_states(fed, fed.len())?);
    let mut drift = 0.0_f64;
    for (start, count) in chunks(fed.len()) {
        let [expected, found] = [&expected, &found].map(|states| {
            let logits = states.logits(start, count)?.try_into_vec_as::<f32>();
            logits.map_err(|error| Error::Execution(error.to_string()))
        });
        for (at, (expected, found)) in expected?.into_iter().zip(found?).enumerate() {
            let difference = f64::from((expected - found).abs());
            if difference.is_nan() {
                let position = start + at / model.config().vocab_size;
                return Err(Error::NotFinite { prompt: 0, sample: 0, position });
            }
            drift = drift.max(difference);
        }
    }
    Ok(drift)
}

fn check_alike(reference: &Gpt2, model: &Gpt2) -> Result<()> {
    let shape = |model: &Gpt2| [model.config().vocab_size, model.config().n_positions];
    match shape(reference) == shape(model) {
        true => Ok(()),
        false => Err(Error::mismatch(
            "[vocabulary, context] of the reference",
            format!("{:?}", shape(model)),
            format!("{:?}", shape(reference)),
        )),
    }
}

fn check_row(
    reference: &Gpt2,
    generator: &Generator,
    row: usize,
    prompt: &[u32],
    mut output: Vec<u32>,
    verdict: &mut Verdict,
) -> Result<()> {
    verdict.tokens += output.len();
    while let Some(found) = first_difference(reference, row, prompt, &output)? {
        if found.margin >= TIE {
            verdict.diverged_rows += 1;
            let logits = logits_of(generator, prompt, &output[..found.step])?;
            let differences = logits.iter().zip(&found.logits).map(|(a, b)| f64::from((a - b).abs()));
            let max_logit_diff = differences.fold(0.0, f64::max);
            let divergence = Divergence { row, step: found.step, margin: found.margin, max_logit_diff };
            verdict.first_divergence.get_or_insert(divergence);
            return Ok(());
        }
        verdict.ties += 1;
        let wanted = output.len();
        output.truncate(found.step);
        output.push(found.id);
        continue_greedily(generator, prompt, &mut output, wanted)?;
    }
    Ok(())
}

/// Where naive decoding chooses another token.
struct Difference {
    step: usize,
    id: u32,
    margin: f64,
    logits: Vec<f32>,
}

fn first_difference(model: &Gpt2, row: usize, prompt: &[u32], output: &[u32]) -> Result<Option<Difference>> {
    let Some((_, fed)) = output.split_last() else { return Ok(None) };
    let states = model.scored_states(&[prompt, fed].concat(), output.len())?;
    for (start, count) in chunks(output.len()) {
        let logits = states.logits(start, count)?; // [n, V]
        let logits = logits.try_into_vec_as::<f32>().map_err(|error| Error::Execution(error.to_string()))?;
        for (at, logits) in logits.chunks_exact(model.config().vocab_size).enumerate() {
            let step = start + at;
            let id = argmax(logits, row, prompt.len() + step)?;
            if id != output[step] {
                let margin = f64::from(logits[id as usize]) - f64::from(logits[output[step] as usize]);
                return Ok(Some(Difference { step, id, margin, logits: logits.to_vec() }));
            }
        }
    }
    Ok(None)
}

/// The decoder's own logits behind `fed`, computed as it does: the prompt, then a token at a time.
fn logits_of(generator: &Generator, prompt: &[u32], fed: &[u32]) -> Result<Vec<f32>> {
    let model = generator.model();
    let capacity = (prompt.len() + fed.len()).min(model.config().n_positions);
    let storage = generator.decoder().storage();
    let cache = KvCacheConfig::new(1, capacity).with_dtype(generator.cache_dtype());
    let cache = cache.with_storage(storage.unwrap_or_default());
    let mut runner = Runner::new(model, RunnerConfig { cache, uses_cache: storage.is_some(), prefixes: None })?;
    let row = runner.push()?;
    let text = [prompt, fed].concat();
    let mut last = Vec::new();
    for end in prompt.len()..=text.len() {
        let logits = runner.forward(&[Turn { row, tokens: &text[..end], logits: 1 }])?;
        last = logits.row(row).flatten().copied().collect();
    }
    Ok(last)
}

/// Lets the decoder go on behind `output` until that has `wanted` tokens.
fn continue_greedily(generator: &Generator, prompt: &[u32], output: &mut Vec<u32>, wanted: usize) -> Result<()> {
    // A row may end with the context: there is no room for a prompt of all of it.
    if output.len() == wanted {
        return Ok(());
    }
    let request = GenerateRequest {
        max_new_tokens: wanted - output.len(),
        sampling: Sampling::greedy(),
        stop: Stop { ignore_eos: true, ..Stop::default() },
        ..GenerateRequest::new([[prompt, output].concat()])
    };
    let completions = generator.complete(&request)?.completions;
    output.extend(completions.into_iter().flat_map(|completion| completion.ids));
    Ok(())
}

fn argmax(logits: &[f32], row: usize, position: usize) -> Result<u32> {
    let distribution = Sampling::greedy().distribution(logits, &[]);
    let distribution = distribution.map_err(|_| Error::NotFinite { prompt: row, sample: 0, position })?;
    Ok(distribution.sample(0.0))
}
