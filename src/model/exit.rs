//! [`Gpt2::forward_exit`]: a model that is left before its last layer.

use burn::tensor::Tensor;

use super::{Gpt2, TokenBatch};
use crate::cache::KvCache;
use crate::{Error, Result};

impl Gpt2 {
    /// What the first `layers` layers, the final norm and the head make of the last new token of each row that has one:
    /// `[M, vocab_size]`.
    ///
    /// The cache is appended to in those layers only, and counts the tokens nevertheless: the rows have to be truncated to
    /// what they held before any other use of it.
    pub(crate) fn forward_exit(&self, tokens: &TokenBatch, cache: &mut KvCache, layers: usize) -> Result<Tensor<2>> {
        if !(1..=self.h.len()).contains(&layers) {
            return Err(Error::mismatch("layers before the exit", format!("1 to {}", self.h.len()), layers));
        }
        self.check_in_place()?;
        tokens.check(self)?;
        cache.check_append(&self.config, &self.device(), tokens.query_lens())?;
        let counts: Vec<usize> = tokens.query_lens().iter().map(|len| *len.min(&1)).collect();
        self.check_room(tokens, Some(cache), counts.iter().sum())?;
        let hidden = self.run_in_turn(tokens, cache, layers, &counts)?; // [M, d]
        self.make_logits(hidden.ok_or(Error::EmptyBatch)?) // [M, V]
    }
}
