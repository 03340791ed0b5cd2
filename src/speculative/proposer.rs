//! [`Proposer`]: a source of drafts at work on the rows of a batch.

use super::Acceptance;
use crate::runner::Runner;
use crate::sampling::{Distribution, Sampling, uniform};
use crate::{Error, Result};

/// A token that a draft proposes, and the distribution that it was drawn from.
#[derive(Clone, Debug)]
pub struct Proposal {
    pub id: u32,
    pub distribution: Distribution,
}

impl Proposal {
    /// A token that was not drawn: its source is certain of it.
    pub fn certain(id: u32) -> Self {
        Self { id, distribution: Distribution::certain(id) }
    }
}

/// A row that can get a draft, and how its tokens are drawn and verified.
#[derive(Clone, Copy)]
pub struct DraftRow<'a> {
    /// Which row of the target's runner it is.
    pub row: usize,
    pub prompt_index: usize,
    pub sample: usize,
    pub sampling: Sampling,
    pub seed: u64,
    pub rng_stream: u64,
    pub acceptance: Acceptance,
    /// The prompt and what follows it; the target has not seen the last of them.
    pub tokens: &'a [u32],
    pub prompt_tokens: usize,
    /// The context holds `tokens[window_start..]`.
    pub window_start: usize,
    /// Most tokens that may be proposed.
    pub len: usize,
}

impl<'a> DraftRow<'a> {
    /// What stands in the context.
    pub fn window(&self) -> &'a [u32] {
        &self.tokens[self.window_start..]
    }

    /// Draws the token behind `text`, the row's text with what was proposed so far, from a draft model's logits. It goes
    /// through the target's filters: what those would drop need not be proposed.
    pub fn draw(&self, text: &[u32], logits: &[f32]) -> Result<Proposal> {
        let position = text.len();
        let distribution = self.sampling.distribution(logits, text).map_err(|_| Error::DraftNotFinite {
            prompt: self.prompt_index,
            sample: self.sample,
            position,
        })?;
        let purpose = self.acceptance.draft_purpose();
        let id = distribution.sample(uniform(self.seed, self.rng_stream, position as u64, purpose));
        Ok(Proposal { id, distribution })
    }
}

/// What is proposed for a row; or why there can be nothing, which ends that row and no other.
pub type RowDraft = Result<Vec<Proposal>>;

/// A source of drafts at work. Its rows are those of the target's runner.
pub trait Proposer: Send {
    /// Computes what a model of its own lacks of the texts of rows that want a draft, before their newest tokens.
    fn prefill(&mut self, _rows: &[DraftRow<'_>]) -> Result<()> {
        Ok(())
    }

    /// Proposes up to `rows[i].len` tokens for each of these rows. A source may use the target's runner, and leaves it as it was.
    fn propose(&mut self, rows: &[DraftRow<'_>], target: &mut Runner<'_>) -> Result<Vec<RowDraft>>;

    /// Adds a row behind the last one.
    fn push(&mut self) -> Result<()> {
        Ok(())
    }

    /// Forgets a row whose numbers are none.
    fn wipe(&mut self, _row: usize) {}

    /// Takes out each row `b` of which `is_kept[b]` is false; those behind it move up.
    fn retain(&mut self, _is_kept: &[bool]) {}

    /// Asks for the memory of a cache of its own now, and not with the first draft.
    fn make_cache(&mut self) -> Result<()> {
        Ok(())
    }

    /// Puts what a model of its own knows of a row into the cache of prefixes, if there is one.
    fn insert(&self, _row: usize, _window: &[u32]) {}

    /// Tokens that have gone through a model of its own.
    fn computed_tokens(&self) -> usize {
        0
    }

    /// Bytes that a cache of its own has reserved.
    fn kv_bytes(&self) -> usize {
        0
    }
}
