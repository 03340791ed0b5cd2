//! [`Row`]: one completion.

use super::text::TextTail;
use super::{ContextEnd, FinishReason, RowId, RowRequest, RowToken, TokenLogprobs};
use crate::sampling::{Purpose, log_softmax, uniform};
use crate::speculative::proposer::{DraftRow, Proposal};
use crate::speculative::{Speculating, VerifiedToken};
use crate::{Error, Gpt2Config, Result};

/// One completion.
pub struct Row<'a> {
    pub id: RowId,
    /// Its prompt is moved to the tokens.
    pub request: RowRequest,
    /// How it is named in errors, and to a script of drafts.
    pub prompt_index: usize,
    pub sample: usize,
    /// The prompt and what follows it.
    pub tokens: Vec<u32>,
    pub prompt_tokens: usize,
    /// The context holds `tokens[window_start..]`.
    window_start: usize,
    tail: Option<TextTail<'a>>,
    /// Which row of the runner it is; none: it waits.
    pub runner_row: Option<usize>,
    /// The row with the same prompt that computes it.
    pub leader: Option<RowId>,
    /// Steps since it had a turn.
    pub waited: usize,
    /// Tokens of its prompt that were computed for it.
    pub computed: usize,
    pub finish: Option<FinishReason>,
}

impl<'a> Row<'a> {
    pub fn new(
        id: RowId,
        request: RowRequest,
        ids: Vec<u32>,
        [prompt_index, sample]: [usize; 2],
        tail: Option<TextTail<'a>>,
        config: &Gpt2Config,
    ) -> Self {
        let window_start = ids.len() - request.on_context_end.window(ids.len(), config.n_positions);
        Self {
            id,
            request,
            prompt_index,
            sample,
            prompt_tokens: ids.len(),
            tokens: ids,
            window_start,
            tail,
            runner_row: None,
            leader: None,
            waited: 0,
            computed: 0,
            finish: None,
        }
    }

    /// What stands in the context.
    pub fn window(&self) -> &[u32] {
        &self.tokens[self.window_start..]
    }

    pub fn new_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Forgets the oldest tokens where the context is full; returns whether it was.
    pub fn slide(&mut self, config: &Gpt2Config) -> bool {
        let window = self.window().len();
        let kept = self.request.on_context_end.window(window, config.n_positions);
        self.window_start += window - kept;
        kept < window
    }

    /// As a row that can get a draft: of no more tokens than the context has room for, and than can be wanted besides the one that
    /// the target adds.
    pub fn draft(&self, runner_row: usize, config: &Gpt2Config) -> DraftRow<'_> {
        let wanted = self.request.max_new_tokens.saturating_sub(self.new_tokens() + 1);
        DraftRow {
            row: runner_row,
            prompt_index: self.prompt_index,
            sample: self.sample,
            sampling: self.request.sampling,
            seed: self.request.seed,
            rng_stream: self.request.rng_stream,
            acceptance: self.request.acceptance,
            tokens: &self.tokens,
            prompt_tokens: self.prompt_tokens,
            window_start: self.window_start,
            len: wanted.min(config.n_positions.saturating_sub(self.window().len())),
        }
    }

    /// Tokens that can be chosen before any of them is looked at; 0 if each has to be looked at.
    pub fn steps_unseen(&self, known: usize, config: &Gpt2Config) -> usize {
        let is_argmax = self.request.sampling.is_argmax() && self.request.logprobs.is_none();
        // Behind the context's end, a row ends or its window slides: that is for single steps.
        let decodes = self.new_tokens() > 0 && known + 1 == self.window().len();
        let room = match is_argmax && decodes {
            true => (config.n_positions + 1).saturating_sub(self.window().len()),
            false => 0,
        };
        room.min(self.request.max_new_tokens - self.new_tokens())
    }

    /// Chooses the next tokens, one for each position with logits, until the row ends or a proposal was wrong.
    pub fn extend<'l>(
        &mut self,
        draft: &[Proposal],
        logits: impl Iterator<Item = &'l [f32]>,
        mut speculating: Option<&mut Speculating<'_>>,
        config: &Gpt2Config,
        tokens: &mut Vec<RowToken>,
    ) -> Result<()> {
        for (at, (proposal, logits)) in draft.iter().map(Some).chain([None]).zip(logits).enumerate() {
            let position = self.tokens.len();
            let request = &self.request;
            // The parameters have been checked: only the logits can be at fault.
            let distribution =
                request.sampling.distribution(logits, &self.tokens).map_err(|_| self.not_finite(position))?;
            let random = |purpose| uniform(request.seed, request.rng_stream, position as u64, purpose);
            let VerifiedToken { id, accepted } = match speculating.as_deref_mut().zip(proposal) {
                Some((speculating, proposal)) => {
                    speculating.verify(request.acceptance, at, proposal, &distribution, random)
                }
                None => VerifiedToken { id: distribution.sample(random(Purpose::Token)), accepted: false },
            };
            let logprobs = request.logprobs.map(|top| logprobs(logits, id, top));
            tokens.push(self.push(id, logprobs, config)?);
            if !accepted || self.finish.is_some() {
                break;
            }
        }
        Ok(())
    }

    /// That the logits at a position are no numbers.
    pub fn not_finite(&self, position: usize) -> Error {
        Error::NotFinite { prompt: self.prompt_index, sample: self.sample, position }
    }

    /// Adds a token, and says what is to be told of it.
    pub fn push(&mut self, id: u32, logprobs: Option<TokenLogprobs>, config: &Gpt2Config) -> Result<RowToken> {
        self.tokens.push(id);
        let ended = !self.request.stop.ignore_eos && config.eos_token_id.contains(&id);
        let (mut text, stopped) = match &mut self.tail {
            Some(tail) if !ended => tail.push(id)?,
            _ => (String::new(), false),
        };
        let full = self.window().len() > config.n_positions;
        self.finish = if ended || stopped {
            Some(FinishReason::Stop)
        } else if self.new_tokens() >= self.request.max_new_tokens {
            Some(FinishReason::Length)
        } else if full && !matches!(self.request.on_context_end, ContextEnd::Slide { .. }) {
            Some(FinishReason::Context)
        } else {
            None
        };
        if let (Some(tail), Some(_), false) = (&mut self.tail, self.finish, stopped) {
            let (rest, stopped) = tail.finish()?;
            text += &rest;
            if stopped {
                self.finish = Some(FinishReason::Stop);
            }
        }
        Ok(RowToken { row: self.id, id, text, logprobs, finish: self.finish })
    }
}

fn logprobs(logits: &[f32], chosen: u32, count: usize) -> TokenLogprobs {
    let all = log_softmax(logits);
    let mut order: Vec<u32> = (0..all.len() as u32).collect();
    let most_likely_first =
        |left: &u32, right: &u32| all[*right as usize].total_cmp(&all[*left as usize]).then(left.cmp(right));
    let count = count.min(order.len());
    if (1..order.len()).contains(&count) {
        order.select_nth_unstable_by(count - 1, most_likely_first);
    }
    order.truncate(count);
    order.sort_unstable_by(most_likely_first);
    TokenLogprobs { chosen: all[chosen as usize], top: order.into_iter().map(|id| (id, all[id as usize])).collect() }
}
