//! Drafts that a model makes token by token: a draft model with a cache of its own, and the target's first layers.

use super::proposer::{DraftRow, Proposal, Proposer, RowDraft};
use crate::runner::{Pending, RowLogits, Runner, RunnerConfig, Turn};
use crate::{Gpt2, KvCacheConfig, Result};

/// Proposes `lens[i]` tokens for each row: `forward` gives the logits behind turns, `choose` makes proposals of them. All rows that
/// want one more token go through the model together.
fn propose_each(
    rows: &[DraftRow<'_>],
    lens: &[usize],
    mut forward: impl FnMut(&[Turn<'_>]) -> Result<RowLogits>,
    choose: impl Fn(&DraftRow<'_>, &[u32], &[f32]) -> Result<Proposal>,
) -> Result<Vec<RowDraft>> {
    let mut drafts: Vec<RowDraft> = rows.iter().map(|_| Ok(Vec::new())).collect();
    let mut texts: Vec<Vec<u32>> = rows.iter().map(|row| row.tokens.to_vec()).collect();
    for at in 0..lens.iter().copied().max().unwrap_or(0) {
        let going: Vec<usize> = (0..rows.len()).filter(|&index| lens[index] > at && drafts[index].is_ok()).collect();
        let turn = |&index: &usize| {
            let DraftRow { row, window_start, .. } = rows[index];
            Turn { row, tokens: &texts[index][window_start..], logits: 1 }
        };
        let logits = match going.is_empty() {
            true => break,
            false => forward(&going.iter().map(turn).collect::<Vec<_>>())?,
        };
        for index in going {
            let of_row = logits.row(rows[index].row).next().unwrap_or_default();
            match (choose(&rows[index], &texts[index], of_row), &mut drafts[index]) {
                (Ok(proposal), Ok(draft)) => {
                    texts[index].push(proposal.id);
                    draft.push(proposal);
                }
                (Err(error), draft) => *draft = Err(error),
                (Ok(_), Err(_)) => {}
            }
        }
    }
    Ok(drafts)
}

/// A draft model.
pub struct ModelProposer<'a> {
    runner: Runner<'a>,
}

impl<'a> ModelProposer<'a> {
    pub fn new(model: &'a Gpt2, config: RunnerConfig) -> Result<Self> {
        let capacity = config.cache.capacity.min(model.config().n_positions);
        let cache = KvCacheConfig { capacity, ..config.cache };
        Ok(Self { runner: Runner::new(model, RunnerConfig { cache, ..config })? })
    }

    /// How many of the tokens that a row wants there is room for; the last token of a draft is not fed back.
    fn room(&self, row: &DraftRow<'_>) -> usize {
        row.len.min((self.runner.capacity() + 1).saturating_sub(row.window().len()))
    }

    /// As [`Proposer::propose`], with proposals that `choose` makes of a row, its text and logits.
    pub fn propose_with(
        &mut self,
        rows: &[DraftRow<'_>],
        choose: impl Fn(&DraftRow<'_>, &[u32], &[f32]) -> Result<Proposal>,
    ) -> Result<Vec<RowDraft>> {
        let lens: Vec<usize> = rows.iter().map(|row| self.room(row)).collect();
        propose_each(rows, &lens, |turns| self.runner.forward(turns), choose)
    }
}

impl Proposer for ModelProposer<'_> {
    fn prefill(&mut self, rows: &[DraftRow<'_>]) -> Result<()> {
        let mut pending = Vec::new();
        for row in rows.iter().filter(|row| self.room(row) > 0) {
            let (_, tokens) = row.window().split_last().unwrap_or((&0, &[]));
            // Where all of a draft was accepted its last token is not known yet: it goes with the newest one.
            if self.runner.known(row.row, tokens) + 1 < tokens.len() {
                let prompt = row.prompt_tokens.saturating_sub(row.window_start).min(tokens.len());
                pending.push(Pending { row: row.row, tokens, prompt });
            }
        }
        self.runner.prefill(&pending)
    }

    fn propose(&mut self, rows: &[DraftRow<'_>], _: &mut Runner<'_>) -> Result<Vec<RowDraft>> {
        self.propose_with(rows, |row, text, logits| row.draw(text, logits))
    }

    fn push(&mut self) -> Result<()> {
        self.runner.push().map(|_| ())
    }

    fn wipe(&mut self, row: usize) {
        self.runner.wipe(row);
    }

    fn retain(&mut self, is_kept: &[bool]) {
        self.runner.retain(is_kept);
    }

    fn make_cache(&mut self) -> Result<()> {
        self.runner.make_cache()
    }

    fn insert(&self, row: usize, window: &[u32]) {
        self.runner.insert(row, window);
    }

    fn computed_tokens(&self) -> usize {
        self.runner.computed_tokens()
    }

    fn kv_bytes(&self) -> usize {
        self.runner.kv_bytes()
    }
}

/// The first layers of the target, on its own cache.
pub struct ExitProposer {
    pub layers: usize,
}

impl Proposer for ExitProposer {
    fn propose(&mut self, rows: &[DraftRow<'_>], target: &mut Runner<'_>) -> Result<Vec<RowDraft>> {
        rows.iter().try_for_each(|row| target.begin_exit(row.row, row.window()))?;
        let lens: Vec<usize> = rows.iter().map(|row| row.len).collect();
        let forward = |turns: &[Turn<'_>]| target.exit_forward(turns, self.layers);
        let drafts = propose_each(rows, &lens, forward, |row, text, logits| row.draw(text, logits));
        rows.iter().try_for_each(|row| target.end_exit(row.row))?;
        drafts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::Sampling;
    use crate::speculative::Acceptance;
    use crate::{CacheStorage, Gpt2Config};

    fn proposer(model: &Gpt2, storage: CacheStorage, rows: usize) -> ModelProposer<'_> {
        let cache = KvCacheConfig::new(rows, 40).with_storage(storage).with_dtype(model.dtype());
        let config = RunnerConfig { cache, uses_cache: true, prefixes: None };
        let mut proposer = ModelProposer::new(model, config).unwrap();
        (0..rows).for_each(|_| proposer.push().unwrap());
        proposer
    }

    fn draft(proposer: &mut ModelProposer<'_>, rows: &[DraftRow<'_>]) -> Vec<Vec<u32>> {
        proposer.prefill(rows).unwrap();
        ids(proposer.propose_with(rows, |row, text, logits| row.draw(text, logits)).unwrap())
    }

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

    fn row(row: usize, tokens: &[u32], len: usize) -> DraftRow<'_> {
        let sampling = Sampling::default();
        let (seed, rng_stream, acceptance) = (3, 0, Acceptance::Rejection);
        let (prompt_index, sample, prompt_tokens, window_start) = (0, 0, 1, 0);
        DraftRow {
            row,
            prompt_index,
            sample,
            sampling,
            seed,
            rng_stream,
            acceptance,
            tokens,
            prompt_tokens,
            window_start,
            len,
        }
    }

    fn ids(drafts: Vec<RowDraft>) -> Vec<Vec<u32>> {
        drafts.into_iter().map(|draft| draft.unwrap().iter().map(|proposal| proposal.id).collect()).collect()
    }

    /// What a proposer that has seen nothing proposes for each row alone.
    fn fresh(model: &Gpt2, rows: &[DraftRow<'_>]) -> Vec<Vec<u32>> {
        let alone = |row: &DraftRow<'_>| {
            let mut proposer = proposer(model, CacheStorage::Growing, 1);
            draft(&mut proposer, &[DraftRow { row: 0, ..*row }]).pop().unwrap()
        };
        rows.iter().map(alone).collect()
    }

    #[test]
    fn what_was_rejected_is_forgotten_and_what_was_missed_is_caught_up() {
        let model = model();
        for storage in [CacheStorage::Growing, CacheStorage::Preallocated] {
            let mut proposer = proposer(&model, storage, 3);
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
                let texts_and_lens = texts.iter().zip(lens).enumerate();
                let rows: Vec<DraftRow<'_>> = texts_and_lens.map(|(at, (text, len))| row(at, text, len)).collect();
                let drafts = draft(&mut proposer, &rows);
                assert_eq!(drafts, fresh(&model, &rows), "{storage:?}, round {round}");
                for (at, text) in texts.iter_mut().enumerate() {
                    text.extend(&drafts[at][..accepted[at]]);
                    text.push((60 + 10 * at + round) as u32);
                }
            }
        }
    }

    #[test]
    fn what_rows_have_in_common_is_computed_once() {
        let model = model();
        let mut proposer = proposer(&model, CacheStorage::Preallocated, 4);
        let texts: [Vec<u32>; 4] =
            [[4, 5, 6, 7, 8, 1], [4, 5, 6, 7, 8, 2], [4, 5, 6, 7, 9, 3], [4, 5, 6, 7, 8, 3]].map(|text| text.to_vec());
        let rows: Vec<DraftRow<'_>> = texts.iter().enumerate().map(|(at, text)| row(at, text, 2)).collect();
        assert_eq!(draft(&mut proposer, &rows), fresh(&model, &rows));
        assert_eq!(proposer.computed_tokens(), 2 * 5 + 4 * 2);
    }
}
