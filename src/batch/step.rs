//! [`Batch::step`]: what is computed next.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use web_time::Instant;

use super::{Batch, RowEvent, RowId, StepReport};
use crate::runner::{self, RowLogits, Turn};
use crate::schedule::{self, Schedule};
use crate::speculative::Speculating;
use crate::speculative::proposer::Proposal;
use crate::{Error, KvCache, Result};

/// Most steps that a device takes before their tokens are looked at: enough to hide the waiting, few enough to be shown as
/// they come, and to be thrown away past the end of a text.
const MAX_MULTI_STEPS: usize = 8;

/// A row whose next tokens can be chosen.
struct Outcome {
    row: RowId,
    /// Which forward of the step has its logits, and which row of the runner they are of.
    round: usize,
    runner_row: usize,
}

impl Batch<'_> {
    /// Lets rows join, computes what is next of each, and says what became of them, in the order of their arrival.
    ///
    /// # Errors
    ///
    /// If the device fails, or a forward would take more memory than there may be. No row has got a token then, and the next step
    /// tries again.
    pub fn step(&mut self) -> Result<Vec<RowEvent>> {
        let started = Instant::now();
        let computed = self.runner.computed_tokens();
        let mut step = StepReport::default();
        self.admit()?;
        let mut events = Vec::new();
        let steps = self.steps_unseen();
        let mut decoded = None;
        if steps < 2 || !self.multi_step(steps, &mut step, &mut events)? {
            decoded = self.compute_with_room(&mut step, &mut events)?;
        }
        self.note_memory();
        self.remove_ended(&events);
        self.end_empty(&mut events);
        self.note_memory();
        step.new_tokens = events.iter().filter(|event| matches!(event, RowEvent::Token(_))).count();
        step.computed_tokens = self.runner.computed_tokens() - computed;
        step.seconds = started.elapsed().as_secs_f64();
        if let (Some(speculating), Some(tokens)) = (&mut self.speculating, decoded) {
            speculating.note_step(step.seconds, tokens);
        }
        self.report.steps += 1;
        self.report.new_tokens += step.new_tokens;
        self.report.computed_tokens = self.runner.computed_tokens();
        self.last_step = step;
        Ok(events)
    }

    /// Steps that can be taken before any of their tokens is looked at; 0 if it has to be looked at each.
    fn steps_unseen(&self) -> usize {
        if self.speculating.is_some() || self.row_ids.len() < self.rows.len() || !self.runner.can_multi_step() {
            return 0;
        }
        let steps = self.row_ids.iter().enumerate().map(|(runner_row, id)| {
            let row = &self.rows[id];
            row.steps_unseen(self.runner.known(runner_row, row.window()), self.config())
        });
        steps.min().unwrap_or(0).min(MAX_MULTI_STEPS)
    }

    /// Takes steps without waiting for their tokens, and looks at those then; what was computed past the end of a row is dropped.
    /// False: nothing came of it.
    fn multi_step(&mut self, steps: usize, step: &mut StepReport, events: &mut Vec<RowEvent>) -> Result<bool> {
        let windows: Vec<&[u32]> = self.row_ids.iter().map(|id| self.rows[id].window()).collect();
        let Some(chosen) = self.runner.multi_step(&windows, steps, MAX_MULTI_STEPS)? else { return Ok(false) };
        (step.multi_steps, step.rows) = (steps, self.row_ids.len());
        let config = self.runner.model().config();
        let mut ended = vec![false; self.row_ids.len()];
        let mut by_arrival: Vec<usize> = (0..self.row_ids.len()).collect();
        by_arrival.sort_unstable_by_key(|runner_row| self.row_ids[*runner_row]);
        for ids in chosen {
            for &runner_row in &by_arrival {
                let id = ids[runner_row];
                let Some(row) = self.rows.get_mut(&self.row_ids[runner_row]).filter(|_| !ended[runner_row]) else {
                    continue;
                };
                let token = u32::try_from(id).ok().filter(|id| (*id as usize) < config.vocab_size);
                let token = token.ok_or_else(|| row.not_finite(row.tokens.len()));
                let event = match token.and_then(|id| row.push(id, None, config)) {
                    Ok(token) => RowEvent::Token(token),
                    Err(error) => RowEvent::Failed { row: row.id, error },
                };
                ended[runner_row] = row.finish.is_some() || matches!(event, RowEvent::Failed { .. });
                events.push(event);
            }
        }
        Ok(true)
    }

    /// As [`compute`](Self::compute), of fewer rows if there is too little memory for all.
    fn compute_with_room(&mut self, step: &mut StepReport, events: &mut Vec<RowEvent>) -> Result<Option<usize>> {
        loop {
            match self.compute(step, events) {
                Err(error) if KvCache::is_short(&error) && self.preempt() => {}
                computed => return computed,
            }
        }
    }

    /// Computes what rows lack of their tokens, and chooses the next one of those that lack none; or more, where a draft is right.
    /// Returns how many tokens rows got that had some already; none if there was no such row.
    fn compute(&mut self, step: &mut StepReport, events: &mut Vec<RowEvent>) -> Result<Option<usize>> {
        self.slide()?;
        let mut by_arrival = self.row_ids.clone();
        by_arrival.sort_unstable();
        let has_begun = by_arrival.iter().any(|id| self.rows[id].new_tokens() > 0);
        let (ready, mut pending): (Vec<RowId>, Vec<RowId>) =
            by_arrival.into_iter().partition(|id| self.lacking(*id) <= 1);
        let decoding: Vec<RowId> = ready.iter().copied().filter(|id| self.rows[id].new_tokens() > 0).collect();
        let (drafts, failures) = if has_begun { self.draft(&decoding)? } else { Default::default() };
        let ready: Vec<RowId> = ready.into_iter().filter(|id| !failures.contains_key(id)).collect();

        let mut taken = ready.iter().map(|id| 1 + drafts.get(id).map_or(0, Vec::len)).sum::<usize>();
        let (mut rounds, mut outcomes): (Vec<RowLogits>, Vec<Outcome>) = (Vec::new(), Vec::new());
        // Again while there are prompts that waited for others of this step.
        loop {
            let round = rounds.len();
            // Prompts of which the last token alone is not known are computed in the first forward: others may wait for them.
            let ready = if round == 0 { &ready[..] } else { &[] };
            let mut prompts: Vec<RowId> = ready.iter().copied().filter(|id| self.rows[id].new_tokens() == 0).collect();
            prompts.extend(&pending);
            prompts.sort_unstable();
            let waiting = match self.share(&prompts) {
                Ok(waiting) => waiting,
                Err(error) if round == 0 => return Err(error),
                // What is there is told; the next step tries again.
                Err(_) => break,
            };
            let going: Vec<RowId> = pending.iter().copied().filter(|id| !waiting.contains(id)).collect();
            let chunks = self.chunks(&going, taken, round);
            if ready.is_empty() && chunks.iter().all(|chunk| *chunk == 0) {
                break;
            }
            let started = Instant::now();
            let logits = match self.forward(ready, &drafts, &going, &chunks) {
                Ok(logits) => logits,
                Err(error) if round == 0 => return Err(error),
                Err(_) => break,
            };
            step.forwards += 1;
            taken += chunks.iter().sum::<usize>();
            if let (Some(speculating), 0, true) = (&mut self.speculating, round, has_begun) {
                speculating.note_verified(started.elapsed().as_secs_f64(), chunks.iter().all(|chunk| *chunk == 0));
            }
            for (&id, chunk) in ready.iter().zip(std::iter::repeat(1)).chain(going.iter().zip(chunks)) {
                if let Some(row) = self.rows.get_mut(&id).filter(|row| row.new_tokens() == 0) {
                    row.computed += chunk;
                }
            }
            let followers = self.followers();
            for &id in ready.iter().chain(&going) {
                if self.lacking(id) == 0 {
                    self.finish_prompt(id, round, followers.get(&id).map_or(&[], Vec::as_slice), &mut outcomes);
                }
            }
            pending.retain(|id| self.lacking(*id) > 0);
            rounds.push(logits);
            if waiting.is_empty() {
                break;
            }
        }
        let decoded = self.choose(outcomes, &rounds, &drafts, &decoding, step, events);
        events.extend(failures.into_iter().map(|(row, error)| RowEvent::Failed { row, error }));
        events.sort_by_key(RowEvent::row);
        Ok(has_begun.then_some(decoded))
    }

    /// Lets contexts slide that are full.
    fn slide(&mut self) -> Result<()> {
        let config = self.config();
        for (runner_row, id) in self.row_ids.iter().enumerate() {
            if let Some(row) = self.rows.get_mut(id)
                && row.slide(config)
            {
                self.runner.look_up(runner_row, row.window(), 1)?;
            }
        }
        Ok(())
    }

    /// Tokens of a row's context that are not known.
    fn lacking(&self, id: RowId) -> usize {
        let row = &self.rows[&id];
        row.runner_row
            .map_or(row.window().len(), |runner_row| row.window().len() - self.runner.known(runner_row, row.window()))
    }

    /// Drafts of rows that decode, and why some of these rows cannot go on.
    #[expect(clippy::type_complexity, reason = "two maps by row")]
    fn draft(&mut self, decoding: &[RowId]) -> Result<(BTreeMap<RowId, Vec<Proposal>>, BTreeMap<RowId, Error>)> {
        let config = self.config();
        let (mut drafts, mut failures) = (BTreeMap::new(), BTreeMap::new());
        if let Some(speculating) = &mut self.speculating {
            let rows = decoding.iter().map(|id| &self.rows[id]);
            let rows = rows.filter_map(|row| row.runner_row.map(|runner_row| row.draft(runner_row, config))).collect();
            for (id, draft) in decoding.iter().zip(speculating.propose(rows, &mut self.runner)?) {
                match draft {
                    Ok(draft) => drop(drafts.insert(*id, draft)),
                    Err(error) => drop(failures.insert(*id, error)),
                }
            }
        }
        Ok((drafts, failures))
    }

    /// Lets prompts take what others have computed of their tokens; which of them wait for what others will compute.
    fn share(&mut self, prompts: &[RowId]) -> Result<BTreeSet<RowId>> {
        let rows = prompts.iter().map(|id| &self.rows[id]);
        let pending: Vec<runner::Pending<'_>> = rows
            .filter_map(|row| {
                row.runner_row.map(|runner_row| runner::Pending {
                    row: runner_row,
                    tokens: row.window(),
                    prompt: row.window().len(),
                })
            })
            .collect();
        let waits = self.runner.share(&pending, 1)?;
        Ok(prompts.iter().zip(waits).filter(|(_, waits)| *waits).map(|(id, _)| *id).collect())
    }

    /// How many tokens of these prompts go into a forward beside `taken` others.
    fn chunks(&mut self, going: &[RowId], taken: usize, round: usize) -> Vec<usize> {
        let pending = |id: &RowId| schedule::Pending { tokens: self.lacking(*id), waited: self.rows[id].waited };
        let pending: Vec<schedule::Pending> = going.iter().map(pending).collect();
        let schedule = self.options.schedule();
        // Nobody is overdue twice in a step.
        let max_wait = if round == 0 { schedule.max_wait } else { usize::MAX };
        let chunks = Schedule { max_wait, ..schedule }.chunks(taken, &pending);
        for (id, chunk) in going.iter().zip(&chunks) {
            if let Some(row) = self.rows.get_mut(id) {
                row.waited = if *chunk > 0 { 0 } else { row.waited + usize::from(round == 0) };
            }
        }
        chunks
    }

    /// One forward over the newest tokens of rows that are ready, with their drafts, and chunks of others.
    fn forward(
        &mut self,
        ready: &[RowId],
        drafts: &BTreeMap<RowId, Vec<Proposal>>,
        going: &[RowId],
        chunks: &[usize],
    ) -> Result<RowLogits> {
        let Self { rows, runner, .. } = self;
        let mut texts: Vec<(usize, Cow<'_, [u32]>, usize)> = Vec::new();
        for row in ready.iter().map(|id| &rows[id]) {
            let Some(runner_row) = row.runner_row else { continue };
            let draft = drafts.get(&row.id).map_or(&[][..], Vec::as_slice);
            let text = match draft.is_empty() {
                true => Cow::Borrowed(row.window()),
                false => row.window().iter().copied().chain(draft.iter().map(|proposal| proposal.id)).collect(),
            };
            texts.push((runner_row, text, draft.len() + 1));
        }
        for (row, chunk) in going.iter().map(|id| &rows[id]).zip(chunks).filter(|(_, chunk)| **chunk > 0) {
            let Some(runner_row) = row.runner_row else { continue };
            let end = (runner.known(runner_row, row.window()) + chunk).min(row.window().len());
            texts.push((runner_row, Cow::Borrowed(&row.window()[..end]), usize::from(end == row.window().len())));
        }
        let turns: Vec<Turn<'_>> =
            texts.iter().map(|(row, tokens, logits)| Turn { row: *row, tokens, logits: *logits }).collect();
        runner.forward(&turns)
    }

    /// Rows that wait for the prompt of another one, by that.
    fn followers(&self) -> BTreeMap<RowId, Vec<RowId>> {
        let mut followers: BTreeMap<RowId, Vec<RowId>> = BTreeMap::new();
        for (leader, id) in self.rows.values().filter_map(|row| Some((row.leader?, row.id))) {
            followers.entry(leader).or_default().push(id);
        }
        followers
    }

    /// Notes that all of a row's tokens are computed. If they are its prompt, it goes to the cache of prefixes, and rows with the
    /// same prompt join.
    fn finish_prompt(&mut self, id: RowId, round: usize, followers: &[RowId], outcomes: &mut Vec<Outcome>) {
        let row = &self.rows[&id];
        let Some(runner_row) = row.runner_row else { return };
        outcomes.push(Outcome { row: id, round, runner_row });
        if row.new_tokens() > 0 {
            return;
        }
        let tokens = row.window().len();
        self.runner.insert(runner_row, row.window());
        self.runner.mark(row.window());
        self.report.computed_prompt_tokens += row.computed;
        self.report.reused_prompt_tokens += tokens.saturating_sub(row.computed);
        self.report.prefix_hits += usize::from(row.computed < tokens);
        for follower in self.join_followers(runner_row, tokens, followers) {
            outcomes.push(Outcome { row: follower, round, runner_row });
            self.report.reused_prompt_tokens += tokens;
            self.report.prefix_hits += 1;
        }
    }

    /// Chooses the next tokens of rows with logits; returns how many those got that had some already.
    fn choose(
        &mut self,
        mut outcomes: Vec<Outcome>,
        rounds: &[RowLogits],
        drafts: &BTreeMap<RowId, Vec<Proposal>>,
        decoding: &[RowId],
        step: &mut StepReport,
        events: &mut Vec<RowEvent>,
    ) -> usize {
        let config = self.config();
        outcomes.sort_by_key(|outcome| outcome.row);
        step.rows = outcomes.len();
        let (mut tokens, mut decoded) = (Vec::new(), 0);
        for Outcome { row: id, round, runner_row } in outcomes {
            let Some(row) = self.rows.get_mut(&id) else { continue };
            let is_prompt = row.new_tokens() == 0;
            if let (Some(speculating), false, Err(_)) = (&mut self.speculating, is_prompt, decoding.binary_search(&id))
            {
                speculating.note_slide();
            }
            let draft = drafts.get(&id).map_or(&[][..], Vec::as_slice);
            let logits = rounds[round].row(runner_row);
            let failed = row.extend(draft, logits, self.speculating.as_mut(), config, &mut tokens).err();
            decoded += if is_prompt { 0 } else { tokens.len() };
            events.extend(tokens.drain(..).map(RowEvent::Token));
            events.extend(failed.map(|error| RowEvent::Failed { row: id, error }));
        }
        decoded
    }

    fn note_memory(&mut self) {
        let of_draft = self.speculating.as_ref().map_or(0, Speculating::kv_bytes);
        self.report.kv_bytes = self.report.kv_bytes.max(self.runner.kv_bytes() + of_draft);
        let (now, most) = (self.runner.pages(), &mut self.report.pages);
        (most.used, most.shared, most.copied) = (most.used.max(now.used), most.shared.max(now.shared), now.copied);
    }
}
