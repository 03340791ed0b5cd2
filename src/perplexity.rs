//! What a model makes of a text: its next-token cross-entropy, and how far a draft agrees with it. Both slide a window.

use std::borrow::Cow;

use burn::tensor::{DType, Int, Tensor, activation};

use crate::{Error, Gpt2, Result, TokenBatch};

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

/// How often a draft proposes what its target would choose, on a text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Agreement {
    /// Share of positions at which both find the same token the most likely: what greedy speculation accepts.
    pub greedy: f64,
    /// Mean over positions of `sum over tokens of min(p, q)`, with p and q the unfiltered distributions: what rejection
    /// sampling at temperature 1 accepts (Leviathan et al., 2023, Corollary 3.6).
    pub sampled: f64,
    /// Positions compared: those of all tokens but the first.
    pub tokens: usize,
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
        self.check_text(ids)?;
        let mut total = 0.0;
        for window in Window::all(ids.len(), self.config().n_positions, stride)? {
            let loss = self.window_loss(window.inputs(ids), window.targets(ids))?;
            total += finite(loss, window.end)?;
            progress(window.end);
        }
        Ok(Perplexity { loss: total / (ids.len() - 1) as f64, tokens: ids.len() - 1 })
    }

    /// Compares the predictions of `draft` with this model's, at every token of `ids` but the first.
    ///
    /// The text is read as by [`perplexity`](Self::perplexity), through windows of the shorter of both contexts.
    ///
    /// # Errors
    ///
    /// As [`perplexity`](Self::perplexity); [`Error::Mismatch`] if the vocabularies are not of the same size.
    pub fn agreement(
        &self,
        draft: &Self,
        ids: &[u32],
        stride: usize,
        progress: impl FnMut(usize),
    ) -> Result<Agreement> {
        let shares = self.acceptance(draft, ids, stride, &[0.0, 1.0], progress)?;
        Ok(Agreement { greedy: shares[0], sampled: shares[1], tokens: ids.len() - 1 })
    }

    /// The share of the draft's tokens that rejection sampling accepts at each of `temperatures`, which both models have:
    /// the mean over positions of `sum over tokens of min(p, q)` (Leviathan et al., 2023, Corollary 3.6). At temperature 0
    /// that is the share of positions at which both find the same token the most likely.
    ///
    /// The text is read as by [`agreement`](Self::agreement), once for all temperatures.
    ///
    /// # Errors
    ///
    /// As [`agreement`](Self::agreement); [`Error::Sampling`] for a temperature that is neither 0 nor a number from 0.001 up.
    pub fn acceptance(
        &self,
        draft: &Self,
        ids: &[u32],
        stride: usize,
        temperatures: &[f64],
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<f64>> {
        let (wanted, found) = (self.config().vocab_size, draft.config().vocab_size);
        if wanted != found {
            return Err(Error::mismatch("vocabulary of the draft", wanted, found));
        }
        self.check_text(ids)?;
        temperatures.iter().try_for_each(|temperature| check_temperature(*temperature))?;
        let n_positions = self.config().n_positions.min(draft.config().n_positions);
        let mut totals = vec![0.0; temperatures.len()];
        for window in Window::all(ids.len(), n_positions, stride)? {
            let (inputs, scored) = (window.inputs(ids), window.end - window.scored);
            let (target, draft) = (self.scored_states(inputs, scored)?, draft.scored_states(inputs, scored)?);
            for (start, count) in chunks(scored) {
                let p = target.logits(start, count)?; // [n, V]
                let q = draft.logits(start, count)?;
                // The smaller of a number and NaN can come out as the number, and so can the larger: a sum does not.
                for logits in [&p, &q] {
                    finite(sum(activation::softmax(logits.clone(), 1))?, window.end)?;
                }
                for (total, &temperature) in totals.iter_mut().zip(temperatures) {
                    *total += accepted(p.clone(), q.clone(), temperature)?;
                }
            }
            progress(window.end);
        }
        Ok(totals.into_iter().map(|total| total / (ids.len() - 1) as f64).collect())
    }

    fn check_text(&self, ids: &[u32]) -> Result<()> {
        if ids.len() < 2 {
            return Err(Error::mismatch("tokens of the text", "at least 2", ids.len()));
        }
        let vocab_size = self.config().vocab_size;
        match ids.iter().position(|&id| id as usize >= vocab_size) {
            Some(position) => Err(Error::TokenOutOfRange { id: ids[position], row: 0, position, vocab_size }),
            None => Ok(()),
        }
    }

    /// Sum of the losses of `targets`, which follow the last inputs.
    fn window_loss(&self, inputs: &[u32], targets: &[u32]) -> Result<f64> {
        let states = self.scored_states(inputs, targets.len())?;
        let wanted = TokenBatch::new(&[targets], &states.model)?; // [n]
        let mut total = 0.0;
        for (start, count) in chunks(targets.len()) {
            let ids: Tensor<2, Int> = wanted.ids().clone().narrow(0, start, count).reshape([count, 1]);
            let log_probs = activation::log_softmax(states.logits(start, count)?, 1);
            total -= sum(log_probs.gather(1, ids))?;
        }
        Ok(total)
    }

    /// Hidden states of the last `scored` inputs.
    pub(crate) fn scored_states(&self, inputs: &[u32], scored: usize) -> Result<ScoredStates<'_>> {
        // A text is scored without dropout, also in the midst of training.
        let model = self.for_inference();
        let hidden = model.last_hidden_states(&TokenBatch::new(&[inputs], &model)?, &[scored])?; // [n, d]
        Ok(ScoredStates { model, hidden })
    }
}

/// Hidden states, `[n, d]`, of which the head makes logits some at a time.
pub(crate) struct ScoredStates<'a> {
    model: Cow<'a, Gpt2>,
    hidden: Tensor<2>,
}

impl ScoredStates<'_> {
    /// `[count, V]`, in f32: a sum over a vocabulary is too much for a half.
    pub(crate) fn logits(&self, start: usize, count: usize) -> Result<Tensor<2>> {
        Ok(self.model.head(self.hidden.clone().narrow(0, start, count))?.cast(DType::F32))
    }
}

/// A window of a text that goes through a model at once.
struct Window {
    start: usize,
    /// Targets before this one, counted from the second token, have been scored in windows before.
    scored: usize,
    end: usize,
}

impl Window {
    /// The windows that score something, `stride` apart.
    fn all(tokens: usize, n_positions: usize, stride: usize) -> Result<impl Iterator<Item = Self>> {
        if !(1..=n_positions).contains(&stride) {
            return Err(Error::mismatch("stride", format!("1 to {n_positions} (n_positions)"), stride));
        }
        let (last, mut scored) = (tokens - 1, 0);
        let windows = (0..last).step_by(stride).filter_map(move |start| {
            let end = (start + n_positions).min(last);
            let window = Self { start, scored, end };
            scored = end;
            (window.end > window.scored).then_some(window)
        });
        Ok(windows)
    }

    fn inputs<'a>(&self, ids: &'a [u32]) -> &'a [u32] {
        &ids[self.start..self.end]
    }

    /// What the last inputs are followed by, as far as it has not been scored.
    fn targets<'a>(&self, ids: &'a [u32]) -> &'a [u32] {
        &ids[self.scored + 1..self.end + 1]
    }
}

/// Stretches of positions `(start, count)` whose logits are computed at a time.
pub(crate) fn chunks(count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count).step_by(HEAD_CHUNK).map(move |start| (start, HEAD_CHUNK.min(count - start)))
}

fn sum(values: Tensor<2>) -> Result<f64> {
    // Added up in double precision: a window holds thousands of them.
    let values = values.try_into_vec_as::<f32>().map_err(|error| Error::Execution(error.to_string()))?;
    Ok(values.into_iter().map(f64::from).sum())
}

fn check_temperature(temperature: f64) -> Result<()> {
    // Logits divided by less would leave single precision.
    if temperature == 0.0 || (temperature.is_finite() && temperature >= 1e-3) {
        return Ok(());
    }
    let (value, allowed) = (temperature.to_string(), "0, or a number from 0.001 up");
    Err(Error::Sampling { parameter: "temperature", value, allowed })
}

/// Sum over the positions of logits `[n, V]` of the share that the distributions have in common.
fn accepted(p: Tensor<2>, q: Tensor<2>, temperature: f64) -> Result<f64> {
    let device = p.device();
    if temperature == 0.0 {
        // Ids are compared as numbers on the host: the models may live on different devices.
        return Ok(agreeing(p, q)? as f64);
    }
    let [p, q] = [p, q].map(|logits| activation::softmax(logits / temperature, 1));
    sum(p.min_pair(q.to_device(&device)))
}

/// Rows of logits `[n, V]` whose first largest is at the same place: what [`Sampling::greedy`](crate::sampling::Sampling::greedy)
/// chooses, on any device.
fn agreeing(a: Tensor<2>, b: Tensor<2>) -> Result<usize> {
    let ids = |logits: Tensor<2>| {
        let ids = crate::backends::argmax(logits).try_into_vec_as::<i32>();
        ids.map_err(|error| Error::Execution(error.to_string()))
    };
    Ok(ids(a)?.into_iter().zip(ids(b)?).filter(|(a, b)| a == b).count())
}

fn finite(value: f64, position: usize) -> Result<f64> {
    match value.is_finite() {
        true => Ok(value),
        false => Err(Error::NotFinite { prompt: 0, sample: 0, position }),
    }
}
