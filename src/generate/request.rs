//! What is asked for.

use super::{Generator, reckon};
use crate::sampling::Sampling;
use crate::{Error, Result};

/// Where a text begins.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prompt {
    /// Token ids.
    Ids(Vec<u32>),
    /// Text, for a generator with a tokenizer.
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
    pub(super) fn window(self, tokens: usize, n_positions: usize) -> usize {
        match self {
            Self::Slide { keep } if tokens > n_positions => keep.unwrap_or(n_positions - 1) + 1,
            _ => tokens,
        }
    }
}

/// A batch of prompts and how to go on with them.
///
/// A row's tokens depend on the others no more than on the [decoder](super::Decoder); but logits that are not numbers, of one row, end the
/// request for all. What makes a request invalid: no prompt, an empty one, an id outside the vocabulary, a prompt longer than
/// the context (unless it [slides](ContextEnd::Slide)), text or a stop text without a tokenizer, an empty stop text, no samples,
/// sampling parameters outside their ranges, `keep` of `n_positions` or more, and more memory than the generator's
/// [limit](Generator::with_memory_limit).
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateRequest {
    /// The prompts.
    pub prompts: Vec<Prompt>,
    /// Most tokens to add to each.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Completions of each prompt; the prompt is computed once.
    pub num_samples: usize,
    /// Seed of everything random.
    pub seed: u64,
    /// Random stream of each prompt's first sample; sample `s` draws from stream `first_stream + s`.
    pub first_stream: u64,
    /// What ends a text early.
    pub stop: Stop,
    /// What happens at the end of the context.
    pub on_context_end: ContextEnd,
    /// Whether keys and values of the new tokens go to the generator's cache of prefixes too, if it has one: then the next
    /// turn of a conversation begins with something known. Without it, a draft model's entries may have the first new tokens
    /// too, since a prompt and those are what it computes first.
    pub keep_generated: bool,
    /// Whether to report log-probabilities, and of how many of the likeliest tokens besides the chosen one.
    pub logprobs: Option<usize>,
}

impl GenerateRequest {
    /// Up to 100 new tokens for each prompt, sampled from the model's own distribution.
    pub fn new<P: Into<Prompt>>(prompts: impl IntoIterator<Item = P>) -> Self {
        Self {
            prompts: prompts.into_iter().map(Into::into).collect(),
            max_new_tokens: 100,
            sampling: Sampling::default(),
            num_samples: 1,
            seed: 1337,
            first_stream: 0,
            stop: Stop::default(),
            on_context_end: ContextEnd::default(),
            keep_generated: false,
            logprobs: None,
        }
    }

    /// The prompts' ids, once everything about the request has been checked.
    pub(super) fn check(&self, generator: &Generator) -> Result<Vec<Vec<u32>>> {
        self.sampling.validate()?;
        if self.prompts.is_empty() {
            return Err(Error::EmptyBatch);
        }
        if self.num_samples == 0 {
            return Err(Error::mismatch("samples of each prompt", "at least 1", 0));
        }
        if !self.stop.texts.is_empty() && generator.tokenizer().is_none() {
            return Err(Error::NoTokenizer { what: "a stop text" });
        }
        if self.stop.texts.iter().any(String::is_empty) {
            return Err(Error::mismatch("a stop text", "at least one character", "none"));
        }
        let n_positions = generator.model().config().n_positions;
        if let ContextEnd::Slide { keep: Some(keep) } = self.on_context_end
            && keep >= n_positions
        {
            let expected = format!("less than n_positions, {n_positions}");
            return Err(Error::mismatch("tokens kept when the context slides", expected, keep));
        }
        // Ids as they are given, before any are copied, or made of text.
        let (mut bytes_of_ids, mut bytes_of_text) = (0_usize, 0_usize);
        for (index, prompt) in self.prompts.iter().enumerate() {
            match prompt {
                Prompt::Ids(ids) => {
                    self.check_prompt(index, ids, generator)?;
                    bytes_of_ids = bytes_of_ids.saturating_add(size_of_val(&ids[..]));
                }
                Prompt::Text(text) => bytes_of_text = bytes_of_text.saturating_add(text.len()),
            }
        }
        reckon::check_prompts(generator, bytes_of_ids, bytes_of_text)?;
        let checked = |(index, prompt): (usize, &Prompt)| {
            let ids = generator.prompt_ids(prompt)?;
            self.check_prompt(index, &ids, generator).map(|()| ids)
        };
        self.prompts.iter().enumerate().map(checked).collect()
    }

    fn check_prompt(&self, index: usize, ids: &[u32], generator: &Generator) -> Result<()> {
        let config = generator.model().config();
        let (vocab_size, n_positions) = (config.vocab_size, config.n_positions);
        if ids.is_empty() {
            return Err(Error::EmptyPrompt { index });
        }
        if let Some(position) = ids.iter().position(|&id| id as usize >= vocab_size) {
            return Err(Error::TokenOutOfRange { id: ids[position], row: index, position, vocab_size });
        }
        let slides = matches!(self.on_context_end, ContextEnd::Slide { .. });
        if ids.len() > n_positions && !slides {
            return Err(Error::ContextOverflow { row: index, tokens: ids.len(), n_positions });
        }
        // The last token is never fed back: a request fits when prompt + new - 1 <= n_positions.
        let last = ids.len().saturating_add(self.max_new_tokens.saturating_sub(1));
        if self.on_context_end == ContextEnd::Error && last > n_positions {
            return Err(Error::RequestTooLong {
                prompt: index,
                prompt_tokens: ids.len(),
                max_new_tokens: self.max_new_tokens,
                n_positions,
            });
        }
        Ok(())
    }
}
