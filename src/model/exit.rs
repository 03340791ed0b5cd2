//! [`Gpt2::forward_exit`]: a model that is left before its last layer.

use burn::tensor::Tensor;

use super::{Gpt2, Logits, TokenBatch};
use crate::cache::KvCache;
use crate::{Error, Result};

impl Gpt2 {
    /// What the first `layers` layers, the final norm and the head make of each row's last new token: `[batch, vocab_size]`.
    ///
    /// The cache is appended to in those layers only, and counts the tokens nevertheless: the rows have to be truncated to
    /// what they held before any other use of it.
    pub(crate) fn forward_exit(&self, tokens: &TokenBatch, cache: &mut KvCache, layers: usize) -> Result<Tensor<2>> {
        if !(1..=self.h.len()).contains(&layers) {
            return Err(Error::mismatch("layers before the exit", format!("1 to {}", self.h.len()), layers));
        }
        self.check_in_place()?;
        tokens.check(self)?;
        cache.check_append(self, tokens.new_lens())?;
        self.check_room(tokens, cache, tokens.new_lens().len())?;
        let hidden = self.on_kernel_threads(|| self.run_blocks(tokens, cache, layers)); // [B, T, d]
        let logits = self.make_logits(Logits::Last.select(hidden, tokens))?; // [B, 1, V]
        let [batch, _, vocab_size] = logits.dims();
        Ok(logits.reshape([batch, vocab_size]))
    }
}
