//! How rows join a [`Batch`], and leave it.

use std::collections::HashMap;

use super::row::Row;
use super::{Batch, FinishReason, RowEvent, RowId};
use crate::Result;
use crate::cache::retain;
use crate::speculative::Speculating;

impl Batch<'_> {
    /// Ends rows that want no token.
    pub(super) fn end_empty(&mut self, events: &mut Vec<RowEvent>) {
        let told = events.len();
        let empty = self.rows.extract_if(.., |_, row| row.request.max_new_tokens == 0);
        events.extend(empty.map(|(row, _)| RowEvent::Finished { row, finish: FinishReason::Length }));
        if events.len() > told {
            events.sort_by_key(RowEvent::row);
        }
    }

    /// Gives rows that wait a row of the runner, as far as there is room; one whose prompt another row computes joins when that is done.
    pub(super) fn admit(&mut self) -> Result<()> {
        let is_waiting =
            |row: &&Row<'_>| row.runner_row.is_none() && row.leader.is_none() && row.request.max_new_tokens > 0;
        let room = self.options.max_rows.saturating_sub(self.rows.len() - self.waiting());
        let joining: Vec<RowId> = self.rows.values().filter(is_waiting).take(room).map(|row| row.id).collect();
        if joining.is_empty() {
            return Ok(());
        }
        let computing = self.rows.values().filter(|row| row.runner_row.is_some() && row.new_tokens() == 0);
        let mut leaders: HashMap<&[u32], RowId> = computing.map(|row| (row.window(), row.id)).collect();
        let leader = |id: &RowId| {
            let leader = *leaders.entry(self.rows[id].window()).or_insert(*id);
            Some(leader).filter(|leader| leader != id)
        };
        let leaders: Vec<Option<RowId>> = joining.iter().map(leader).collect();
        let is_join = self.row_ids.iter().any(|id| self.rows[id].new_tokens() > 0);
        for (id, leader) in joining.into_iter().zip(leaders) {
            match leader {
                // It comes when others have left.
                None if !self.row_ids.is_empty() && !self.runner.has_room(self.rows[&id].window().len()) => break,
                None => match self.push(id) {
                    Ok(runner_row) => self.runner.look_up(runner_row, self.rows[&id].window(), 1)?,
                    // There is room when others have left.
                    Err(_) if !self.row_ids.is_empty() => break,
                    Err(error) => return Err(error),
                },
                Some(leader) => {
                    if let Some(row) = self.rows.get_mut(&id) {
                        row.leader = Some(leader);
                    }
                }
            }
            self.report.joins += usize::from(is_join);
        }
        Ok(())
    }

    /// Makes a row one of the runner's.
    fn push(&mut self, id: RowId) -> Result<usize> {
        let runner_row = self.runner.push()?;
        if let Err(error) = self.take_runner_row(id, runner_row) {
            self.runner.truncate_rows(runner_row);
            return Err(error);
        }
        Ok(runner_row)
    }

    /// Notes that a row is the last of the runner's, and makes it one of the draft's.
    fn take_runner_row(&mut self, id: RowId, runner_row: usize) -> Result<()> {
        self.speculating.as_mut().map_or(Ok(()), Speculating::push)?;
        self.row_ids.push(id);
        if let Some(row) = self.rows.get_mut(&id) {
            (row.runner_row, row.leader) = (Some(runner_row), None);
        }
        Ok(())
    }

    /// Lets rows with the same prompt join the one that has computed it; returns those that did. If there is no room for all, the
    /// others wait until there is, and compute it themselves.
    pub(super) fn join_followers(&mut self, runner_row: usize, tokens: usize, followers: &[RowId]) -> Vec<RowId> {
        let first = self.row_ids.len();
        let forked = self.runner.fork(runner_row, tokens, followers.len()).map_or(0, |()| followers.len());
        let mut joined = Vec::new();
        for &id in followers {
            if joined.len() < forked && self.take_runner_row(id, first + joined.len()).is_ok() {
                joined.push(id);
            } else if let Some(row) = self.rows.get_mut(&id) {
                row.leader = None;
            }
        }
        // Rows of the runner that nobody has taken.
        self.runner.truncate_rows(first + joined.len());
        joined
    }

    /// Ends a row, of which nothing more is told; returns whether it was there.
    pub fn cancel(&mut self, id: RowId) -> bool {
        let Some(row) = self.rows.get(&id) else { return false };
        let follower = self.rows.values().find(|other| other.leader == Some(id)).map(|other| other.id);
        match (row.runner_row, follower) {
            // Somebody else wants what it has computed.
            (Some(runner_row), Some(heir)) => {
                let (computed, waited) = (row.computed, row.waited);
                self.row_ids[runner_row] = heir;
                for other in self.rows.values_mut().filter(|other| other.leader == Some(id)) {
                    other.leader = Some(heir).filter(|heir| *heir != other.id);
                }
                if let Some(heir) = self.rows.get_mut(&heir) {
                    (heir.runner_row, heir.computed, heir.waited) = (Some(runner_row), computed, waited);
                }
            }
            (Some(runner_row), None) => self.vacate(&[runner_row]),
            (None, _) => {}
        }
        self.rows.remove(&id);
        true
    }

    /// Takes rows out that have ended. Those that asked for it leave their tokens in the cache of prefixes, those that failed nothing.
    pub(super) fn remove_ended(&mut self, events: &[RowEvent]) {
        let mut ended = Vec::new();
        for event in events {
            let id = event.row();
            let Some((row, runner_row)) = self.rows.get(&id).and_then(|row| Some((row, row.runner_row?))) else {
                continue;
            };
            let failed = matches!(event, RowEvent::Failed { .. });
            if !failed && !matches!(event, RowEvent::Token(token) if token.finish.is_some()) {
                continue;
            }
            if failed {
                self.runner.wipe(runner_row);
            } else if row.request.cache_generated {
                self.runner.insert(runner_row, row.window());
            }
            match &mut self.speculating {
                Some(speculating) if failed => speculating.wipe(runner_row),
                Some(speculating) if row.request.cache_generated => speculating.insert(runner_row, row.window()),
                _ => {}
            }
            ended.push(runner_row);
            self.rows.remove(&id);
        }
        self.vacate(&ended);
    }

    /// Takes the youngest row out, for whose pages the others have a use; returns whether there was one beside the oldest. What is
    /// known of it goes to the cache of prefixes. It comes back when there is room, and the rest is computed again.
    pub(super) fn preempt(&mut self) -> bool {
        if self.row_ids.len() < 2 {
            return false;
        }
        let youngest = self.row_ids.iter().enumerate().max_by_key(|(_, id)| **id);
        let Some((runner_row, &id)) = youngest else { return false };
        self.runner.insert(runner_row, self.rows[&id].window());
        for row in self.rows.values_mut().filter(|row| row.id == id || row.leader == Some(id)) {
            (row.runner_row, row.leader) = (None, None);
        }
        self.vacate(&[runner_row]);
        self.report.leaves -= 1;
        self.report.preemptions += 1;
        true
    }

    /// Takes rows out of the runner; those after them move up.
    fn vacate(&mut self, runner_rows: &[usize]) {
        if runner_rows.is_empty() {
            return;
        }
        let mut is_kept = vec![true; self.row_ids.len()];
        runner_rows.iter().for_each(|&runner_row| is_kept[runner_row] = false);
        self.runner.retain(&is_kept);
        if let Some(speculating) = &mut self.speculating {
            speculating.retain(&is_kept);
        }
        retain(&mut self.row_ids, &is_kept);
        for (runner_row, id) in self.row_ids.iter().enumerate() {
            if let Some(row) = self.rows.get_mut(id) {
                row.runner_row = Some(runner_row);
            }
        }
        self.report.leaves += if self.row_ids.is_empty() { 0 } else { runner_rows.len() };
    }
}
