//! What is asked for.

use super::{Generator, reckon};
use crate::batch::request::{check_options, check_prompt};
use crate::batch::{ContextEnd, Prompt, RowRequest, Stop};
use crate::sampling::Sampling;
use crate::speculative::Acceptance;
use crate::{Error, Result};

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
    /// Random stream of each prompt's first sample; sample `s` draws from stream `first_rng_stream + s`.
    pub first_rng_stream: u64,
    /// What ends a text early.
    pub stop: Stop,
    /// What happens at the end of the context.
    pub on_context_end: ContextEnd,
    /// Whether keys and values of the new tokens go to the generator's cache of prefixes too, if it has one: then the next
    /// turn of a conversation begins with something known.
    pub cache_generated: bool,
    /// Whether to report log-probabilities, and of how many of the most likely tokens besides the chosen one.
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
            first_rng_stream: 0,
            stop: Stop::default(),
            on_context_end: ContextEnd::default(),
            cache_generated: false,
            logprobs: None,
        }
    }

    /// The prompts' ids, once everything about the request has been checked.
    pub(super) fn check(&self, generator: &Generator) -> Result<Vec<Vec<u32>>> {
        let config = generator.model().config();
        check_options(&self.sampling, &self.stop, self.on_context_end, config, generator.tokenizer().is_some())?;
        if self.prompts.is_empty() {
            return Err(Error::EmptyBatch);
        }
        if self.num_samples == 0 {
            return Err(Error::mismatch("samples of each prompt", "at least 1", 0));
        }
        let check =
            |index: usize, ids: &[u32]| check_prompt(index, ids, self.max_new_tokens, self.on_context_end, config);
        // Ids as they are given, before any are copied, or made of text.
        let (mut bytes_of_ids, mut bytes_of_text) = (0_usize, 0_usize);
        for (index, prompt) in self.prompts.iter().enumerate() {
            match prompt {
                Prompt::Ids(ids) => {
                    check(index, ids)?;
                    bytes_of_ids = bytes_of_ids.saturating_add(size_of_val(&ids[..]));
                }
                Prompt::Text(text) => bytes_of_text = bytes_of_text.saturating_add(text.len()),
            }
        }
        reckon::check_prompts(generator, bytes_of_ids, bytes_of_text)?;
        let checked = |(index, prompt): (usize, &Prompt)| {
            let ids = generator.prompt_ids(prompt)?;
            check(index, &ids).map(|()| ids)
        };
        self.prompts.iter().enumerate().map(checked).collect()
    }

    /// What is asked of a sample of each prompt.
    pub(super) fn row(&self, sample: usize, acceptance: Acceptance) -> RowRequest {
        RowRequest {
            max_new_tokens: self.max_new_tokens,
            sampling: self.sampling,
            seed: self.seed,
            rng_stream: self.first_rng_stream.wrapping_add(sample as u64),
            stop: self.stop.clone(),
            on_context_end: self.on_context_end,
            acceptance,
            cache_generated: self.cache_generated,
            logprobs: self.logprobs,
            ..RowRequest::new(Vec::<u32>::new())
        }
    }
}
