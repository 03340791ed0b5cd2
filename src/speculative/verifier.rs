//! [`Verified`]: drafts, and what the target says at each of their places.

use std::borrow::Cow;

use super::proposer::Proposal;
use crate::Result;
use crate::contexts::{Contexts, RowLogits};

/// The drafts of all rows with the target's logits: behind each row's newest token, and behind each token of its draft.
pub struct Verified {
    drafts: Vec<Vec<Proposal>>,
    logits: RowLogits,
}

impl Verified {
    /// Rows without drafts.
    pub fn plain(logits: RowLogits, rows: usize) -> Self {
        Self { drafts: vec![Vec::new(); rows], logits }
    }

    /// One forward of the target over the newest token and the draft of every row: a row with m draft tokens is m + 1
    /// prefixes, and a row with none a decode step.
    pub fn new(target: &mut Contexts<'_>, windows: &[&[u32]], drafts: Vec<Vec<Proposal>>) -> Result<Self> {
        let rows = windows.iter().zip(&drafts).map(|(window, draft)| match draft.is_empty() {
            true => Cow::Borrowed(*window),
            false => Cow::Owned(window.iter().copied().chain(draft.iter().map(|proposal| proposal.id)).collect()),
        });
        let texts: Vec<Cow<'_, [u32]>> = rows.collect();
        let texts: Vec<&[u32]> = texts.iter().map(AsRef::as_ref).collect();
        let counts: Vec<usize> = drafts.iter().map(|draft| draft.len() + 1).collect();
        let logits = target.logits(&texts, &counts)?;
        Ok(Self { drafts, logits })
    }

    /// What was proposed for each of a row's next positions, with the target's logits there; nothing for the last.
    pub fn row(&self, row: usize) -> impl Iterator<Item = (Option<&Proposal>, &[f32])> {
        self.drafts[row].iter().map(Some).chain([None]).zip(self.logits.row(row))
    }
}
