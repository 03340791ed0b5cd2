//! Prompt lookup: what followed the last time the text went like this.

use super::proposer::{DraftRow, Proposal, Proposer, RowDraft};
use crate::Result;
use crate::runner::Runner;

/// Drafts that are copied from the text itself (Saxena, *Prompt Lookup Decoding*, 2023): the longest end of the text, of
/// `max_len` to `min_len` tokens, that occurred before is looked up, at its latest occurrence, and what followed it there is
/// proposed. No model is needed; it pays where texts repeat themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ngram {
    /// Most tokens at the end of the text that are looked up.
    pub max_len: usize,
    /// Fewest; at least 1.
    pub min_len: usize,
}

impl Default for Ngram {
    fn default() -> Self {
        Self { max_len: 4, min_len: 2 }
    }
}

/// A draft goes round in itself for ever: no more is used than a row has room for.
const MAX_DRAFT: usize = 1 << 16;

impl Ngram {
    /// Up to `len` tokens that might follow `text`, and no more than 65,536. A draft that reaches the end of the text goes on in
    /// itself.
    pub fn draft(&self, text: &[u32], len: usize) -> Vec<u32> {
        let Some(start) = self.find(text) else { return Vec::new() };
        // It comes round to `start` again, as often as is wanted.
        text[start..].iter().copied().cycle().take(len.min(MAX_DRAFT)).collect()
    }

    /// Where the text goes on behind the latest earlier occurrence of its longest end that occurred before.
    ///
    /// In one pass, whatever `max_len` is: the Z-algorithm (Gusfield, *Algorithms on Strings, Trees and Sequences*, 1997, section
    /// 1.4) on the text read backwards, which gives for every position how much of the text's end ends there too.
    fn find(&self, text: &[u32]) -> Option<usize> {
        let len = text.len();
        let backwards = |at: usize| text[len - 1 - at];
        // `common[i]`: how many tokens before `len - i` are those before `len`.
        let mut common = vec![0; len];
        let (mut from, mut to) = (0, 0);
        let (mut best, mut position) = (0, None);
        for at in 1..len {
            let known = if at < to { common[at - from].min(to - at) } else { 0 };
            let more = (known..len - at).take_while(|&n| backwards(n) == backwards(at + n)).count();
            common[at] = known + more;
            if at + common[at] > to {
                (from, to) = (at, at + common[at]);
            }
            // Read backwards, the latest occurrence comes first.
            let usable = common[at].min(self.max_len);
            if usable > best && usable >= self.min_len.max(1) {
                (best, position) = (usable, Some(len - at));
            }
        }
        position
    }
}

impl Proposer for Ngram {
    fn propose(&mut self, rows: &[DraftRow<'_>], _: &mut Runner<'_>) -> Result<Vec<RowDraft>> {
        let draft =
            |row: &DraftRow<'_>| Ok(self.draft(row.tokens, row.len).into_iter().map(Proposal::certain).collect());
        Ok(rows.iter().map(draft).collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_latest_occurrence_of_the_longest_end_is_continued() {
        let ngram = Ngram::default();
        assert_eq!(ngram.draft(&[1, 2, 3, 9, 1, 2, 4, 8, 1, 2], 3), [4, 8, 1], "the latest occurrence");
        assert_eq!(ngram.draft(&[7, 1, 2, 3, 9, 5, 1, 2, 4, 7, 1, 2], 2), [3, 9], "three tokens rather than two");
        assert!(ngram.draft(&[1, 2, 3, 4], 3).is_empty());
        assert!(ngram.draft(&[5, 6, 5], 3).is_empty(), "one token is too little");
        assert_eq!(Ngram { min_len: 1, max_len: 4 }.draft(&[5, 6, 5], 3), [6, 5, 6]);
        assert!(ngram.draft(&[1], 3).is_empty());
        assert!(ngram.draft(&[], 3).is_empty());
        assert!(ngram.draft(&[1, 2, 1, 2], 0).is_empty());
    }

    /// Word by word what the documentation says.
    fn find_slowly(ngram: Ngram, text: &[u32]) -> Option<usize> {
        let max = ngram.max_len.min(text.len().saturating_sub(1));
        (ngram.min_len.max(1)..=max).rev().find_map(|n| {
            let end = &text[text.len() - n..];
            text[..text.len() - 1].windows(n).rposition(|window| window == end).map(|at| at + n)
        })
    }

    proptest! {
        #[test]
        fn the_occurrence_is_the_one_that_is_documented(
            text in proptest::collection::vec(0_u32..3, 0..40),
            max_len in prop_oneof![0_usize..6, Just(usize::MAX)],
            min_len in 0_usize..4,
        ) {
            let ngram = Ngram { max_len, min_len };
            prop_assert_eq!(ngram.find(&text), find_slowly(ngram, &text));
        }
    }

    #[test]
    fn a_longest_end_without_a_bound_is_found_at_once() {
        let ngram = Ngram { max_len: usize::MAX, ..Ngram::default() };
        assert_eq!(ngram.draft(&[1, 2, 3, 9, 1, 2, 3], 2), [9, 1]);
        // Nothing to be found, and as long as texts get that slide.
        let text: Vec<u32> = (0..200_000).collect();
        assert!(ngram.draft(&text, 4).is_empty());
        assert_eq!(ngram.draft(&vec![7; 200_000], 3), [7; 3]);
        assert_eq!(ngram.draft(&[1, 2, 1, 2], usize::MAX).len(), MAX_DRAFT);
    }

    #[test]
    fn a_draft_goes_on_in_itself() {
        assert_eq!(Ngram::default().draft(&[1, 2, 1, 2], 5), [1, 2, 1, 2, 1]);
        assert_eq!(Ngram::default().draft(&[3, 3, 3], 4), [3, 3, 3, 3]);
    }
}
