//! Mean next-token cross-entropy of a text, with a sliding window.

use burn::tensor::{DType, Int, Tensor, activation};

use crate::{CacheStorage, Error, Gpt2, Result, TokenBatch};

/// Positions whose logits are computed at a time: those of a whole context would take more memory than the model.
const HEAD_CHUNK: usize = 64;

/// The loss of a model on a text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Perplexity {
    /// Mean cross-entropy, in nats per predicted token.
    pub loss: f64,
    /// Tokens that were predicted: all but the first.
    pub tokens: usize,
}

impl Perplexity {
    /// `exp(loss)`.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

impl Gpt2 {
    /// Predicts each token of `ids` but the first from those before it, and returns the mean loss.
    ///
    /// A text that is longer than the context is read through windows of `n_positions` tokens that start `stride`
    /// apart. Each token is scored once, in the first window that reaches it; so with a stride of `n_positions` every
    /// token is computed once and some have little context, and with a shorter one every scored token but those of
    /// the first window has at least `n_positions - stride` tokens before it. `progress` is told how many tokens have
    /// been predicted.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] for fewer than two ids, or a stride outside `1..=n_positions`;
    /// [`Error::TokenOutOfRange`]; [`Error::NotFinite`] if a window's loss is no number.
    pub fn perplexity(&self, ids: &[u32], stride: usize, mut progress: impl FnMut(usize)) -> Result<Perplexity> {
        let n_positions = self.config().n_positions;
        if ids.len() < 2 {
            return Err(Error::mismatch("tokens of the text", "at least 2", ids.len()));
        }
        if !(1..=n_positions).contains(&stride) {
            return Err(Error::mismatch("stride", format!("1 to {n_positions} (n_positions)"), stride));
        }
        if let Some(position) = ids.iter().position(|&id| id as usize >= self.config().vocab_size) {
            let vocab_size = self.config().vocab_size;
            return Err(Error::TokenOutOfRange { id: ids[position], row: 0, position, vocab_size });
        }
        let (mut total, mut scored) = (0.0, 0);
        let last = ids.len() - 1;
        for start in (0..last).step_by(stride) {
            let end = (start + n_positions).min(last);
            if end > scored {
                let loss = self.window_loss(&ids[start..end], &ids[scored + 1..end + 1])?;
                if !loss.is_finite() {
                    return Err(Error::NotFinite { prompt: 0, sample: 0, position: end });
                }
                total += loss;
                scored = end;
                progress(scored);
            }
        }
        Ok(Perplexity { loss: total / scored as f64, tokens: scored })
    }

    /// Sum of the losses of `targets`, which follow the last inputs.
    fn window_loss(&self, inputs: &[u32], targets: &[u32]) -> Result<f64> {
        let tokens = TokenBatch::new(&[inputs], self)?;
        let wanted = TokenBatch::new(&[targets], self)?; // [1, n]
        let mut cache = self.cache(CacheStorage::Growing, 1, inputs.len())?;
        let hidden = self.hidden_states(&tokens, &mut cache)?; // [1, T, d]
        let first = inputs.len() - targets.len();
        let mut total = 0.0;
        for start in (0..targets.len()).step_by(HEAD_CHUNK) {
            let count = HEAD_CHUNK.min(targets.len() - start);
            let logits = self.head(hidden.clone().narrow(1, first + start, count))?; // [1, n, V]
            let logits = logits.cast(DType::F32); // a sum over a vocabulary is too much for a half
            let ids: Tensor<3, Int> = wanted.ids().clone().narrow(1, start, count).reshape([1, count, 1]);
            let losses = activation::log_softmax(logits, 2).gather(2, ids); // [1, n, 1]
            let losses = losses.try_into_vec_as::<f32>();
            let losses = losses.map_err(|error| Error::Execution(error.to_string()))?;
            total -= losses.into_iter().map(f64::from).sum::<f64>();
        }
        Ok(total)
    }
}
