//! Prompt lookup: what followed the last time the text went like this.

use super::proposer::{DraftRow, Proposal, Proposer, Rules};
use crate::Result;
use crate::contexts::Contexts;

/// Drafts that are copied from the text itself (Saxena, *Prompt Lookup Decoding*, 2023): the longest end of the text, of
/// `longest` to `shortest` tokens, that occurred before is looked up, at its latest place, and what followed it there is
/// proposed. No model is needed; it pays where texts repeat themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ngram {
    /// Most tokens at the end of the text that are looked up.
    pub longest: usize,
    /// Fewest; at least 1.
    pub shortest: usize,
}

impl Default for Ngram {
    fn default() -> Self {
        Self { longest: 4, shortest: 2 }
    }
}

impl Ngram {
    /// Up to `len` tokens that might follow `text`. A draft that reaches the end of the text goes on in itself.
    pub fn draft(&self, text: &[u32], len: usize) -> Vec<u32> {
        let Some(start) = self.find(text) else { return Vec::new() };
        let mut draft: Vec<u32> = Vec::with_capacity(len);
        for at in start..start.saturating_add(len) {
            draft.push(if at < text.len() { text[at] } else { draft[at - text.len()] });
        }
        draft
    }

    /// Where the text goes on behind the latest earlier place of its end.
    fn find(&self, text: &[u32]) -> Option<usize> {
        (self.shortest.max(1)..=self.longest).rev().filter(|n| *n < text.len()).find_map(|n| {
            let end = &text[text.len() - n..];
            text[..text.len() - 1].windows(n).rposition(|window| window == end).map(|at| at + n)
        })
    }
}

impl Proposer for Ngram {
    fn propose(&mut self, rows: &[DraftRow<'_>], _: &Rules, _: &mut Contexts<'_>) -> Result<Vec<Vec<Proposal>>> {
        let draft = |row: &DraftRow<'_>| self.draft(row.tokens, row.len).into_iter().map(Proposal::certain).collect();
        Ok(rows.iter().map(draft).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_end_at_its_latest_place_is_continued() {
        let ngram = Ngram::default();
        assert_eq!(ngram.draft(&[1, 2, 3, 9, 1, 2, 4, 8, 1, 2], 3), [4, 8, 1], "the latest place");
        assert_eq!(ngram.draft(&[7, 1, 2, 3, 9, 5, 1, 2, 4, 7, 1, 2], 2), [3, 9], "three tokens rather than two");
        assert!(ngram.draft(&[1, 2, 3, 4], 3).is_empty());
        assert!(ngram.draft(&[5, 6, 5], 3).is_empty(), "one token is too little");
        assert_eq!(Ngram { shortest: 1, longest: 4 }.draft(&[5, 6, 5], 3), [6, 5, 6]);
        assert!(ngram.draft(&[1], 3).is_empty());
        assert!(ngram.draft(&[], 3).is_empty());
        assert!(ngram.draft(&[1, 2, 1, 2], 0).is_empty());
    }

    #[test]
    fn a_draft_goes_on_in_itself() {
        assert_eq!(Ngram::default().draft(&[1, 2, 1, 2], 5), [1, 2, 1, 2, 1]);
        assert_eq!(Ngram::default().draft(&[3, 3, 3], 4), [3, 3, 3, 3]);
    }
}
