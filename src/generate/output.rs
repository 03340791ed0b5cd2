//! What comes out.

use super::Decoder;
use crate::batch::{FinishReason, TokenLogprobs};
use crate::cache::PageCounts;
use crate::prefix::Sharing;
use crate::speculative::SpeculationReport;
use crate::summary::median;

/// One token, as soon as it is there.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TokenEvent {
    /// The prompt that it continues.
    pub prompt_index: usize,
    /// Which of that prompt's samples.
    pub sample: usize,
    /// The token.
    pub id: u32,
    /// The text that has become certain with it, possibly none: characters are never split, and what may be the start
    /// of a stop text is held back. Empty without a tokenizer.
    pub text: String,
    /// Its log-probabilities, if asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// Why the completion ends with it, if it does.
    pub finish: Option<FinishReason>,
}

/// A prompt's continuation.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Completion {
    /// The prompt that it continues.
    pub prompt_index: usize,
    /// Which of that prompt's samples.
    pub sample: usize,
    /// The prompt's tokens.
    pub prompt_ids: Vec<u32>,
    /// The new tokens; one that ended the text is the last of them.
    pub ids: Vec<u32>,
    /// The new text, without what ended it; none without a tokenizer.
    pub text: Option<String>,
    /// Log-probabilities of each new token, if asked for.
    pub logprobs: Option<Vec<TokenLogprobs>>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// All completions of a request, and what they took.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Output {
    /// Ordered by prompt, then by sample.
    pub completions: Vec<Completion>,
    /// What they took.
    pub report: Report,
}

/// What a request took.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// How tokens were computed.
    pub decoder: Decoder,
    /// Tokens of the prompts, each prompt counted once.
    pub prompt_tokens: usize,
    /// Of those, tokens that were computed. Where a prompt is longer than the context, and its end alone counts, what is
    /// before that is neither computed nor reused.
    pub computed_prompt_tokens: usize,
    /// Of those, tokens that were known from earlier prompts, or from others of the same request: see
    /// [`Generator::with_prefix_cache`](super::Generator::with_prefix_cache).
    pub reused_prompt_tokens: usize,
    /// What sharing the prompts' prefixes took and saved; none without a cache of prefixes.
    pub sharing: Option<Sharing>,
    /// New tokens of all completions.
    pub new_tokens: usize,
    /// Tokens that went through the model, prompts and new ones; a cache is there to make them few.
    pub computed_tokens: usize,
    /// Seconds from the start to the first token of every row: the time to first token.
    pub prefill_seconds: f64,
    /// Seconds of everything after that: the sum of the steps'.
    pub decode_seconds: f64,
    /// Seconds of each decode step after that, in order; a step gives every live row a token, and more if a draft is
    /// accepted. A GPU decodes several greedy steps at a time (multi-step decoding): each of those is given an equal share of their
    /// time.
    pub step_seconds: Vec<f64>,
    /// Steps of multi-step decoding.
    pub multi_steps: usize,
    /// Most bytes that the key-value cache had reserved, and a draft model's; 0 without one.
    pub kv_bytes: usize,
    /// Most pages of the model's cache that were in use, and that several rows shared; and those that were copied.
    pub pages: PageCounts,
    /// What drafts were worth; none if there were none.
    pub speculation: Option<SpeculationReport>,
}

impl Report {
    /// New tokens of all rows per second of wall time, prefill included.
    pub fn tokens_per_second(&self) -> f64 {
        per_second(self.new_tokens, self.prefill_seconds + self.decode_seconds)
    }

    /// The time per output token of each row: median seconds of a decode step, or mean ones over the mean number of tokens
    /// that a row got in it, where drafts make that another than 1. None if there was no step.
    pub fn seconds_per_token(&self) -> Option<f64> {
        let tokens = self.speculation.as_ref().and_then(SpeculationReport::tokens_per_round);
        match tokens {
            Some(tokens) => Some(self.decode_seconds / self.step_seconds.len() as f64 / tokens),
            None => median(&self.step_seconds),
        }
    }
}

fn per_second(count: usize, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}
