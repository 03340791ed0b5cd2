//! Drafts that a model makes token by token: a draft model with a cache of its own, and the target's first layers.

use std::collections::HashMap;

use super::DraftCaches;
use super::proposer::{DraftRow, Proposal, Proposer, Rules};
use crate::contexts::{Computed, Contexts, RowLogits};
use crate::{CacheStorage, Gpt2, Result};

/// Proposes `lens[b]` tokens for each row: `logits` gives those behind windows, `choose` makes proposals of them.
///
/// All rows go through the model together. One that waits, since it wants no draft or a shorter one, computes its last
/// token again; `held[b]` tokens of its window are known when it begins.
fn propose_each(
    rows: &[DraftRow<'_>],
    lens: &[usize],
    held: &[usize],
    mut logits: impl FnMut(&[&[u32]]) -> Result<RowLogits>,
    choose: impl Fn(&DraftRow<'_>, &[u32], &[f32]) -> Result<Proposal>,
) -> Result<Vec<Vec<Proposal>>> {
    let mut drafts = vec![Vec::new(); rows.len()];
    let mut texts: Vec<Vec<u32>> = rows.iter().map(|row| row.tokens.to_vec()).collect();
    let end = |row: usize| if lens[row] > 0 { texts[row].len() } else { rows[row].window_start + held[row].max(1) };
    let mut ends: Vec<usize> = (0..rows.len()).map(end).collect();
    for at in 0..lens.iter().copied().max().unwrap_or(0) {
        let windows = rows.iter().zip(&texts).zip(&ends).map(|((row, text), &end)| &text[row.window_start..end]);
        let logits = logits(&windows.collect::<Vec<_>>())?;
        for row in (0..rows.len()).filter(|&row| lens[row] > at) {
            let proposal = choose(&rows[row], &texts[row], logits.row(row).next().unwrap_or_default())?;
            texts[row].push(proposal.id);
            drafts[row].push(proposal);
            if lens[row] > at + 1 {
                ends[row] = texts[row].len();
            }
        }
    }
    Ok(drafts)
}

/// The different ones among some texts in the order in which they first occur, and which of them each is.
fn unique<'t>(texts: impl Iterator<Item = &'t [u32]>) -> (Vec<&'t [u32]>, Vec<usize>) {
    let (mut all, mut index_of) = (Vec::new(), HashMap::new());
    let mut index = |text: &'t [u32]| {
        *index_of.entry(text).or_insert_with(|| {
            all.push(text);
            all.len() - 1
        })
    };
    let of_text = texts.map(&mut index).collect();
    (all, of_text)
}

/// A draft model.
pub struct ModelProposer<'a> {
    contexts: Contexts<'a>,
}

impl<'a> ModelProposer<'a> {
    pub fn new(model: &'a Gpt2, storage: CacheStorage, caches: DraftCaches) -> Result<Self> {
        let capacity = caches.capacity.min(model.config().n_positions);
        let dtype = caches.dtype.unwrap_or_else(|| model.dtype());
        let contexts = Contexts::new(model, Some(storage), capacity, dtype)?;
        Ok(Self { contexts: contexts.with_prefixes(caches.prefixes).with_limit(caches.limit) })
    }

    /// As [`Proposer::propose`], with proposals that `choose` makes of a row, its text and logits.
    pub fn propose_with(
        &mut self,
        rows: &[DraftRow<'_>],
        choose: impl Fn(&DraftRow<'_>, &[u32], &[f32]) -> Result<Proposal>,
    ) -> Result<Vec<Vec<Proposal>>> {
        // The last token of a draft is not fed back.
        let room = |row: &DraftRow<'_>| (self.contexts.capacity() + 1).saturating_sub(row.window().len());
        let lens: Vec<usize> = rows.iter().map(|row| row.len.min(room(row))).collect();
        if lens.iter().all(|len| *len == 0) {
            return Ok(vec![Vec::new(); rows.len()]);
        }
        self.begin(rows, &lens)?;
        let held: Vec<usize> = (0..rows.len()).map(|row| self.contexts.len(row)).collect();
        let logits = |windows: &[&[u32]]| self.contexts.logits(windows, &vec![1; windows.len()]);
        propose_each(rows, &lens, &held, logits, choose)
    }

    /// Computes at first what rows have in common, as the samples of a prompt do, once for all of them.
    fn begin(&mut self, rows: &[DraftRow<'_>], lens: &[usize]) -> Result<()> {
        if !self.contexts.is_new() || self.contexts.shares_prefixes() || lens.contains(&0) {
            return Ok(());
        }
        let (heads, of_row) =
            unique(rows.iter().map(|row| row.window().split_last().map_or(&[][..], |(_, head)| head)));
        if heads.len() == rows.len() || heads.iter().any(|head| head.is_empty()) {
            return Ok(());
        }
        self.contexts.fill(&heads)?;
        self.contexts.gather(&of_row)
    }
}

impl Proposer for ModelProposer<'_> {
    fn propose(
        &mut self,
        rows: &[DraftRow<'_>],
        rules: &Rules,
        _target: &mut Contexts<'_>,
    ) -> Result<Vec<Vec<Proposal>>> {
        self.propose_with(rows, |row, text, logits| rules.draw(row, text, logits))
    }

    fn truncate(&mut self, row: usize, len: usize) -> Result<()> {
        self.contexts.truncate(row, len)
    }

    fn remove(&mut self, row: usize) -> Result<()> {
        self.contexts.remove(row)
    }

    fn keep(&self, row: usize, window: &[u32]) -> Result<()> {
        self.contexts.keep(row, window)
    }

    fn computed(&self) -> Computed {
        self.contexts.computed()
    }

    fn kv_bytes(&self) -> usize {
        self.contexts.kv_bytes()
    }
}

/// The first layers of the target, on its own cache.
pub struct ExitProposer {
    pub layers: usize,
}

impl Proposer for ExitProposer {
    fn propose(
        &mut self,
        rows: &[DraftRow<'_>],
        rules: &Rules,
        target: &mut Contexts<'_>,
    ) -> Result<Vec<Vec<Proposal>>> {
        let held: Vec<usize> = (0..rows.len()).map(|row| target.len(row)).collect();
        // What a row that starts anew holds is to be computed by all layers first.
        let lens: Vec<usize> = rows.iter().zip(&held).map(|(row, held)| if *held > 0 { row.len } else { 0 }).collect();
        // A row that waits computes the token that comes next: what the last one left in the other layers stays.
        let next: Vec<usize> = held.iter().map(|held| held + 1).collect();
        let logits = |windows: &[&[u32]]| target.exit_logits(windows, self.layers);
        let drafts = propose_each(rows, &lens, &next, logits, |row, text, logits| rules.draw(row, text, logits))?;
        held.iter().enumerate().try_for_each(|(row, held)| target.truncate(row, *held))?;
        Ok(drafts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::Sampling;
    use crate::speculative::Acceptance;
    use crate::{CacheStorage, Gpt2Config, MemoryLimit};

    const RULES: Rules = Rules {
        sampling: Sampling { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 },
        seed: 3,
        acceptance: Acceptance::Rejection,
    };

    const CACHES: DraftCaches = DraftCaches { capacity: 40, dtype: None, prefixes: None, limit: MemoryLimit::system() };

    fn model() -> Gpt2 {
        let config = Gpt2Config {
            vocab_size: 90,
            n_positions: 40,
            n_embd: 24,
            n_layer: 2,
            n_head: 3,
            initializer_range: 0.4,
            ..Gpt2Config::default()
        };
        config.init(&crate::device("flex").unwrap()).unwrap().with_determinism(true).unwrap()
    }

    fn row(tokens: &[u32], len: usize) -> DraftRow<'_> {
        DraftRow { prompt_index: 0, sample: 0, stream: 0, tokens, prompt_tokens: 1, window_start: 0, len }
    }

    fn ids(drafts: &[Vec<Proposal>]) -> Vec<Vec<u32>> {
        drafts.iter().map(|draft| draft.iter().map(|proposal| proposal.id).collect()).collect()
    }

    /// What a proposer that has seen nothing proposes for each row alone.
    fn fresh(model: &Gpt2, rows: &[DraftRow<'_>]) -> Vec<Vec<u32>> {
        let alone = |row: &DraftRow<'_>| {
            let mut proposer = ModelProposer::new(model, CacheStorage::Growing, CACHES).unwrap();
            let draft = proposer.propose_with(&[*row], |row, text, logits| RULES.draw(row, text, logits)).unwrap();
            ids(&draft).pop().unwrap()
        };
        rows.iter().map(alone).collect()
    }

    #[test]
    fn what_was_rejected_is_forgotten_and_what_was_missed_is_caught_up() {
        let model = model();
        for storage in [CacheStorage::Growing, CacheStorage::Preallocated] {
            let mut proposer = ModelProposer::new(&model, storage, CACHES).unwrap();
            let mut texts = [vec![1, 2, 3, 4], vec![5, 6], vec![7, 8, 9]];
            // Lengths of drafts, and how much of them is accepted.
            for (round, (lens, accepted)) in [
                ([4, 2, 0], [1, 2, 0]),
                ([0, 0, 0], [0, 0, 0]),
                ([3, 0, 5], [3, 0, 0]),
                ([0, 4, 1], [0, 1, 1]),
                ([2, 2, 2], [0, 0, 0]),
            ]
            .into_iter()
            .enumerate()
            {
                let rows: Vec<DraftRow<'_>> = texts.iter().zip(lens).map(|(text, len)| row(text, len)).collect();
                let drafts =
                    ids(&proposer.propose_with(&rows, |row, text, logits| RULES.draw(row, text, logits)).unwrap());
                assert_eq!(drafts, fresh(&model, &rows), "{storage:?}, round {round}");
                for (at, text) in texts.iter_mut().enumerate() {
                    text.extend(&drafts[at][..accepted[at]]);
                    text.push((60 + 10 * at + round) as u32);
                    proposer.truncate(at, text.len() - 1).unwrap();
                }
            }
        }
    }

    /// Compared each with each other, these take minutes.
    #[test]
    fn equal_texts_are_found_in_linear_time() {
        let tokens: Vec<u32> = (0..200_000).map(|at| u32::from(at >= 199_000)).collect();
        let texts = (0..150_000).map(|at| &tokens[at..at + 500 + at % 3]);
        let (all, of_text) = unique(texts.clone());
        assert_eq!(all.len(), 3);
        assert!(texts.zip(of_text).all(|(text, index)| all[index] == text));
        let numbers: Vec<u32> = (0..300_000).collect();
        assert_eq!(unique(numbers.chunks(1)).0.len(), 300_000);
    }

    #[test]
    fn what_rows_have_in_common_is_computed_once() {
        let model = model();
        let mut proposer = ModelProposer::new(&model, CacheStorage::Preallocated, CACHES).unwrap();
        let texts: [Vec<u32>; 4] =
            [[4, 5, 6, 7, 8, 1], [4, 5, 6, 7, 8, 2], [4, 5, 6, 7, 9, 3], [4, 5, 6, 7, 8, 3]].map(|text| text.to_vec());
        let rows: Vec<DraftRow<'_>> = texts.iter().map(|text| row(text, 2)).collect();
        let drafts = ids(&proposer.propose_with(&rows, |row, text, logits| RULES.draw(row, text, logits)).unwrap());
        assert_eq!(drafts, fresh(&model, &rows));
        assert_eq!(proposer.computed().tokens, 2 * 5 + 4 * 2);
    }
}
