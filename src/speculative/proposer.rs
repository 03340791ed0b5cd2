//! [`Proposer`]: a source of drafts at work on the rows of a generation.

use super::Acceptance;
use crate::contexts::{Computed, Contexts};
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

/// A row that can get a draft.
#[derive(Clone, Copy)]
pub struct DraftRow<'a> {
    pub prompt_index: usize,
    pub sample: usize,
    /// The row's random stream.
    pub stream: u64,
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
}

/// How tokens are drawn and judged.
#[derive(Clone, Copy)]
pub struct Rules {
    pub sampling: Sampling,
    pub seed: u64,
    pub acceptance: Acceptance,
}

impl Rules {
    /// Draws the token behind `text`, the row's text with what was proposed so far, from a draft model's logits. It goes
    /// through the target's filters: what those would drop need not be proposed.
    pub fn draw(&self, row: &DraftRow<'_>, text: &[u32], logits: &[f32]) -> Result<Proposal> {
        let position = text.len();
        let distribution = self.sampling.distribution(logits, text).map_err(|_| Error::DraftNotFinite {
            prompt: row.prompt_index,
            sample: row.sample,
            position,
        })?;
        let purpose = self.acceptance.draft_purpose();
        let id = distribution.sample(uniform(self.seed, row.stream, position as u64, purpose));
        Ok(Proposal { id, distribution })
    }
}

/// A source of drafts at work. Rows are numbered as the target's contexts are.
pub trait Proposer: Send {
    /// Proposes up to `rows[b].len` tokens for each row. A source may use the target's contexts, and leaves them with the
    /// lengths that it found.
    fn propose(
        &mut self,
        rows: &[DraftRow<'_>],
        rules: &Rules,
        target: &mut Contexts<'_>,
    ) -> Result<Vec<Vec<Proposal>>>;

    /// Forgets what is known of a row's window behind its first `len` tokens.
    fn truncate(&mut self, _row: usize, _len: usize) -> Result<()> {
        Ok(())
    }

    /// Takes row `row` out; those behind it move up.
    fn remove(&mut self, _row: usize) -> Result<()> {
        Ok(())
    }

    /// Keeps what a model of its own knows of a row for rows to come, if there is a cache of prefixes.
    fn keep(&self, _row: usize, _window: &[u32]) -> Result<()> {
        Ok(())
    }

    /// What has gone through a model of its own.
    fn computed(&self) -> Computed {
        Computed::default()
    }

    /// Bytes that a cache of its own has reserved.
    fn kv_bytes(&self) -> usize {
        0
    }
}
