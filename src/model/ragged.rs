//! [`Gpt2::forward_ragged`]: logits of as many tokens of each row as are wanted of it.

use burn::tensor::Tensor;

use super::{Gpt2, Logits, TokenBatch};
use crate::cache::KvCache;
use crate::{Error, Result};

impl Gpt2 {
    /// As [`forward`](Self::forward), with the logits of each row's own last `counts[b]` new tokens: the verification of
    /// drafts of unequal length.
    ///
    /// # Shapes
    ///
    /// - tokens: `[batch, T_max]`, of which row `b` counts `new_lens[b]`
    /// - result: `[sum of counts, vocab_size]`, one row after the other
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward); [`Error::Mismatch`] if there is not one count a row, or one is 0 or more than the
    /// row's new tokens. The cache is then as it was.
    pub fn forward_ragged(&self, tokens: &TokenBatch, cache: &mut KvCache, counts: &[usize]) -> Result<Tensor<2>> {
        let new_lens = tokens.new_lens();
        if counts.len() != new_lens.len() {
            return Err(Error::mismatch("counts of logits", new_lens.len(), counts.len()));
        }
        if let Some(row) = (0..counts.len()).find(|&row| !(1..=new_lens[row]).contains(&counts[row])) {
            let expected = format!("1 to {} (new tokens of row {row})", new_lens[row]);
            return Err(Error::mismatch("positions with logits", expected, counts[row]));
        }
        let total: usize = counts.iter().sum();
        let [width, vocab_size] = [self.config().n_embd, self.config().vocab_size];
        if counts.iter().all(|count| *count == counts[0]) {
            return Ok(self.forward(tokens, cache, Logits::LastK(counts[0]))?.reshape([total, vocab_size]));
        }
        let hidden = self.states_for(tokens, cache, total)?; // [B, T, d]
        let [batch, time, _] = hidden.dims();
        let ends = new_lens.iter().enumerate().map(|(row, len)| row * time + len);
        let rows: Vec<i32> = ends.zip(counts).flat_map(|(end, count)| (end - count) as i32..end as i32).collect();
        let rows = Tensor::from_data(rows.as_slice(), &hidden.device());
        let hidden = hidden.reshape([batch * time, width]).select(0, rows); // [N, d]
        Ok(self.make_logits(hidden.reshape([1, total, width]))?.reshape([total, vocab_size]))
    }
}
