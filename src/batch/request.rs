//! What a row is asked for.

use crate::sampling::Sampling;
use crate::speculative::Acceptance;
use crate::{Error, Gpt2Config, Result};

/// Where a text begins.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prompt {
    /// Token ids.
    Ids(Vec<u32>),
    /// Text, where there is a tokenizer.
    Text(String),
}

impl From<Vec<u32>> for Prompt {
    fn from(ids: Vec<u32>) -> Self {
        Self::Ids(ids)
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// What ends a text before its time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stop {
    /// The completion ends before the first of these that occurs in it. A tokenizer that spells text in single bytes, as
    /// SentencePiece's may, shows one that is spelled so only with the token behind it.
    pub texts: Vec<String>,
    /// Whether the model's end-of-text tokens are tokens like any other.
    pub ignore_eos: bool,
}

/// What happens when a row has filled the model's positions. They are absolute, so a cache cannot slide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ContextEnd {
    /// The text ends, with [`FinishReason::Context`](super::FinishReason::Context).
    #[default]
    Stop,
    /// A request that could come to the end is refused before anything is computed.
    Error,
    /// The oldest tokens are forgotten and the rest is computed again at its new positions.
    Slide {
        /// Tokens that are kept, from 0 to `n_positions - 1`; none: `n_positions - 1`, nanoGPT's crop. Each slide costs a
        /// prefill of `keep + 1` tokens and makes room for `n_positions - keep`, so nanoGPT's crop costs a prefill of
        /// the whole context for every token.
        keep: Option<usize>,
    },
}

impl ContextEnd {
    /// How many of the last tokens of a row of `tokens` stand in a context of `n_positions`, from where they are computed anew.
    pub(crate) fn window(self, tokens: usize, n_positions: usize) -> usize {
        match self {
            Self::Slide { keep } if tokens > n_positions => keep.unwrap_or(n_positions - 1) + 1,
            _ => tokens,
        }
    }
}

/// A prompt and how to go on with it: one completion.
///
/// What makes one invalid: an empty prompt, an id outside the vocabulary, a prompt longer than the context (unless it
/// [slides](ContextEnd::Slide)), text or a stop text without a tokenizer, an empty stop text, sampling parameters outside their
/// ranges, `keep` of `n_positions` or more, and more tokens than a row of the batch can ever hold.
#[derive(Clone, Debug, PartialEq)]
pub struct RowRequest {
    /// The prompt.
    pub prompt: Prompt,
    /// Most tokens to add to it.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Seed of everything random.
    pub seed: u64,
    /// Which of a seed's random numbers are drawn. Two rows with the same prompt, seed and stream get the same tokens.
    pub rng_stream: u64,
    /// What ends the text early.
    pub stop: Stop,
    /// What happens at the end of the context.
    pub on_context_end: ContextEnd,
    /// Which tokens of a draft stand. With [`Acceptance::Match`], the default, a row's tokens depend on nothing but the row.
    pub acceptance: Acceptance,
    /// Whether keys and values of the new tokens go to the cache of prefixes too, if there is one: then the next turn of a
    /// conversation begins with something known.
    pub cache_generated: bool,
    /// Whether to report log-probabilities, and of how many of the most likely tokens besides the chosen one.
    pub logprobs: Option<usize>,
}

impl RowRequest {
    /// Up to 100 new tokens, sampled from the model's own distribution.
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        Self {
            prompt: prompt.into(),
            max_new_tokens: 100,
            sampling: Sampling::default(),
            seed: 1337,
            rng_stream: 0,
            stop: Stop::default(),
            on_context_end: ContextEnd::default(),
            acceptance: Acceptance::Match,
            cache_generated: false,
            logprobs: None,
        }
    }
}

/// Checks what does not depend on a prompt.
pub(crate) fn check_options(
    sampling: &Sampling,
    stop: &Stop,
    on_context_end: ContextEnd,
    config: &Gpt2Config,
    has_tokenizer: bool,
) -> Result<()> {
    sampling.validate()?;
    if !stop.texts.is_empty() && !has_tokenizer {
        return Err(Error::NoTokenizer { what: "a stop text" });
    }
    if stop.texts.iter().any(String::is_empty) {
        return Err(Error::mismatch("a stop text", "at least one character", "none"));
    }
    match on_context_end {
        ContextEnd::Slide { keep: Some(keep) } if keep >= config.n_positions => {
            let expected = format!("less than n_positions, {}", config.n_positions);
            Err(Error::mismatch("tokens kept when the context slides", expected, keep))
        }
        _ => Ok(()),
    }
}

/// Checks the ids of prompt `index`.
pub(crate) fn check_prompt(
    index: usize,
    ids: &[u32],
    max_new_tokens: usize,
    on_context_end: ContextEnd,
    config: &Gpt2Config,
) -> Result<()> {
    let (vocab_size, n_positions) = (config.vocab_size, config.n_positions);
    if ids.is_empty() {
        return Err(Error::EmptyPrompt { index });
    }
    if let Some(position) = ids.iter().position(|&id| id as usize >= vocab_size) {
        return Err(Error::TokenOutOfRange { id: ids[position], row: index, position, vocab_size });
    }
    let slides = matches!(on_context_end, ContextEnd::Slide { .. });
    if ids.len() > n_positions && !slides {
        return Err(Error::ContextOverflow { row: index, tokens: ids.len(), n_positions });
    }
    // The last token is never fed back: a request fits when prompt + new - 1 <= n_positions.
    let last = ids.len().saturating_add(max_new_tokens.saturating_sub(1));
    if on_context_end == ContextEnd::Error && last > n_positions {
        return Err(Error::RequestTooLong { prompt: index, prompt_tokens: ids.len(), max_new_tokens, n_positions });
    }
    Ok(())
}
