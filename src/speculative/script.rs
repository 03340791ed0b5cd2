//! Drafts that agree with a known text as often as is wanted.

use std::sync::Arc;

use super::autoregressive::ModelProposer;
use super::proposer::{DraftRow, Proposal, Proposer, RowDraft};
use crate::runner::Runner;
use crate::sampling::{Purpose, uniform};
use crate::{Gpt2, Result};

/// Drafts for tests and benchmarks: each token is, with a given probability, that of a text that the target is known to
/// write, and else another. A model can run beside them, so that they cost what a draft of its size costs.
#[derive(Clone)]
pub struct Scripted {
    pub(super) texts: Arc<[Vec<u32>]>,
    pub(super) agreement: f64,
    pub(super) model: Option<Gpt2>,
}

impl Scripted {
    /// `texts[p]` is what follows prompt `p`; `agreement` the probability of each of its tokens, independent of the others.
    pub fn new(texts: impl Into<Arc<[Vec<u32>]>>, agreement: f64) -> Self {
        Self { texts: texts.into(), agreement, model: None }
    }

    /// Runs a model for each token that is proposed, and makes nothing of what it says.
    pub fn with_model(self, model: Gpt2) -> Self {
        Self { model: Some(model), ..self }
    }
}

/// [`Scripted`] at work.
pub struct ScriptProposer<'a> {
    pub script: &'a Scripted,
    pub model: Option<ModelProposer<'a>>,
    pub vocab_size: usize,
}

impl ScriptProposer<'_> {
    /// The token behind `text`.
    fn token(&self, row: &DraftRow<'_>, text: &[u32]) -> Proposal {
        let scripted =
            self.script.texts.get(row.prompt_index).and_then(|script| script.get(text.len() - row.prompt_tokens));
        let id = scripted.copied().unwrap_or(0);
        // Rows of a batch have the same stream: their prompts make them differ.
        let prompt = row.tokens[..row.prompt_tokens].iter();
        let rng_stream = prompt.fold(row.rng_stream, |hash, &id| (hash ^ u64::from(id)).wrapping_mul(0x0100_0000_01b3));
        let agrees = uniform(row.seed, rng_stream, text.len() as u64, Purpose::Draft) < self.script.agreement;
        Proposal::certain(if agrees { id } else { (id + 1) % self.vocab_size as u32 })
    }

    /// How many tokens the script has left for a row.
    fn left(&self, row: &DraftRow<'_>) -> usize {
        let script = self.script.texts.get(row.prompt_index).map_or(0, Vec::len);
        (script + row.prompt_tokens).saturating_sub(row.tokens.len())
    }
}

impl Proposer for ScriptProposer<'_> {
    fn prefill(&mut self, rows: &[DraftRow<'_>]) -> Result<()> {
        let rows: Vec<DraftRow<'_>> = rows.iter().filter(|row| self.left(row) > 0).copied().collect();
        self.model.as_mut().map_or(Ok(()), |model| model.prefill(&rows))
    }

    fn propose(&mut self, rows: &[DraftRow<'_>], _: &mut Runner<'_>) -> Result<Vec<RowDraft>> {
        let mut rows = rows.to_vec();
        rows.iter_mut().for_each(|row| row.len = row.len.min(self.left(row)));
        let Some(mut model) = self.model.take() else {
            let draft = |row: &DraftRow<'_>| {
                let mut text = row.tokens.to_vec();
                let token = |_| {
                    let proposal = self.token(row, &text);
                    text.push(proposal.id);
                    proposal
                };
                Ok((0..row.len).map(token).collect())
            };
            return Ok(rows.iter().map(draft).collect());
        };
        let drafts = model.propose_with(&rows, |row, text, logits| {
            row.draw(text, logits)?; // what a draft would do
            Ok(self.token(row, text))
        });
        self.model = Some(model);
        drafts
    }

    fn push(&mut self) -> Result<()> {
        self.model.as_mut().map_or(Ok(()), Proposer::push)
    }

    fn wipe(&mut self, row: usize) {
        if let Some(model) = &mut self.model {
            model.wipe(row);
        }
    }

    fn retain(&mut self, is_kept: &[bool]) {
        if let Some(model) = &mut self.model {
            model.retain(is_kept);
        }
    }

    fn make_cache(&mut self) -> Result<()> {
        self.model.as_mut().map_or(Ok(()), Proposer::make_cache)
    }

    fn insert(&self, row: usize, window: &[u32]) {
        if let Some(model) = &self.model {
            model.insert(row, window);
        }
    }

    fn computed_tokens(&self) -> usize {
        self.model.as_ref().map_or(0, Proposer::computed_tokens)
    }

    fn kv_bytes(&self) -> usize {
        self.model.as_ref().map_or(0, Proposer::kv_bytes)
    }
}
