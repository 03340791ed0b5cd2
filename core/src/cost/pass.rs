//! [`Pass`]: one forward.

use crate::{Error, ModelShape, Result};

/// One forward for a batch of rows of equal length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Rows: B.
    pub batch: usize,
    /// Tokens of each row that are in the cache already.
    pub context_len: usize,
    /// Tokens of each row that are computed: T.
    pub new: usize,
    /// The last new tokens of each row that get logits: K.
    pub logits: usize,
    /// Whether keys and values of all layers are kept, in a cache; if not, only those of the layer at work take memory.
    pub cached: bool,
}

impl Pass {
    /// Naive decoding's step: all `length` tokens of each row are computed to find the next one.
    pub fn naive(batch: usize, length: usize) -> Self {
        Self { batch, context_len: 0, new: length, logits: 1, cached: false }
    }

    /// The same work, with the keys and values kept.
    pub fn prefill(batch: usize, length: usize) -> Self {
        Self { cached: true, ..Self::naive(batch, length) }
    }

    /// A decode step with a cache: the last of `length` tokens is computed, and sees all of them.
    pub fn decode(batch: usize, length: usize) -> Self {
        Self { batch, context_len: length.saturating_sub(1), new: length.min(1), logits: 1, cached: true }
    }

    /// The target's pass over `draft_len` drafted tokens and the one before them, behind `context_len` tokens in the cache.
    pub fn verify(batch: usize, context_len: usize, draft_len: usize) -> Self {
        let new = draft_len.saturating_add(1);
        Self { batch, context_len, new, logits: new, cached: true }
    }

    /// Keys that the last new token sees: L.
    pub fn keys(self) -> usize {
        self.context_len.saturating_add(self.new)
    }

    /// Pairs of a key and one of the last `queries` new tokens of a row: all of them, or only those that no mask hides.
    pub(super) fn pairs(self, queries: usize, causal: bool) -> f64 {
        let (queries, keys) = (queries as f64, self.keys() as f64);
        queries * keys - if causal { queries * (queries - 1.0) / 2.0 } else { 0.0 }
    }

    pub(super) fn check(self, shape: &ModelShape) -> Result<()> {
        if self.batch == 0 {
            return Err(Error::EmptyBatch);
        }
        if self.new == 0 {
            return Err(Error::mismatch("tokens to compute", "at least 1", 0));
        }
        if self.logits > self.new {
            return Err(Error::mismatch("positions with logits", format!("at most {}", self.new), self.logits));
        }
        if self.keys() > shape.n_positions {
            return Err(Error::ContextOverflow { row: 0, tokens: self.keys(), n_positions: shape.n_positions });
        }
        Ok(())
    }
}
