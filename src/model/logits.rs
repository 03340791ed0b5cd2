//! [`Logits`]: for which of the new tokens logits are computed.

use super::TokenBatch;
use crate::{Error, Result};

/// For which of the new tokens logits are computed, always each row's last ones: `[M, vocab_size]`, those of a row behind those of
/// the row before. The head is the largest matrix of a small GPT-2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Logits<'a> {
    /// Each row's last new token: one row of logits each.
    Last,
    /// Each row's last k new tokens, in order: k rows of logits each.
    LastK(usize),
    /// As many of each row's last new tokens as stand here for it: the verification of drafts of unequal length. A row may want
    /// none.
    Counts(&'a [usize]),
    /// Every new token.
    All,
}

impl Logits<'_> {
    /// How many of each row's last new tokens are wanted.
    pub(super) fn counts(self, tokens: &TokenBatch) -> Result<Vec<usize>> {
        let query_lens = tokens.query_lens();
        match self {
            Self::Last => Ok(vec![1; query_lens.len()]),
            Self::All => Ok(query_lens.to_vec()),
            Self::LastK(k) => {
                let min_len = query_lens.iter().copied().min().unwrap_or(0);
                match (1..=min_len).contains(&k) {
                    true => Ok(vec![k; query_lens.len()]),
                    false => {
                        Err(Error::mismatch("positions with logits", format!("1 to {min_len} (the shortest row)"), k))
                    }
                }
            }
            Self::Counts(counts) => {
                if counts.len() != query_lens.len() {
                    return Err(Error::mismatch("counts of logits", query_lens.len(), counts.len()));
                }
                if let Some(row) = (0..counts.len()).find(|&row| counts[row] > query_lens[row]) {
                    let expected = format!("at most {} (new tokens of row {row})", query_lens[row]);
                    return Err(Error::mismatch("positions with logits", expected, counts[row]));
                }
                if counts.iter().all(|count| *count == 0) {
                    return Err(Error::mismatch("positions with logits", "at least 1 of all rows", 0));
                }
                Ok(counts.to_vec())
            }
        }
    }
}
