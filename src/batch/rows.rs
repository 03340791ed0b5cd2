//! How rows join a [`Batch`], and leave it.

use std::collections::HashMap;

use super::row::Row;
use super::{Batch, FinishReason, RowEvent, RowId};
use crate::Result;
use crate::speculative::Speculating;

impl Batch<'_> {
    /// Rows that want no token.
    pub(super) fn end_empty(&mut self) -> Vec<RowEvent> {
        let empty = self.rows.extract_if(.., |_, row| row.request.max_new_tokens == 0);
        empty.map(|(row, _)| RowEvent::Finished { row, finish: FinishReason::Length }).collect()
    }

    /// Gives rows that wait a place, as far as there is room; one whose prompt another row computes joins when that is done.
    pub(super) fn admit(&mut self) -> Result<()> {
        let is_waiting = |row: &&Row<'_>| row.place.is_none() && row.leader.is_none();
        let room = self.options.max_rows.saturating_sub(self.rows.len() - self.waiting());
        let joining: Vec<RowId> = self.rows.values().filter(is_waiting).take(room).map(|row| row.id).collect();
        if joining.is_empty() {
            return Ok(());
        }
        let computing = self.rows.values().filter(|row| row.place.is_some() && row.new_tokens() == 0);
        let mut leaders: HashMap<&[u32], RowId> = computing.map(|row| (row.window(), row.id)).collect();
        let leader = |id: &RowId| {
            let leader = *leaders.entry(self.rows[id].window()).or_insert(*id);
            Some(leader).filter(|leader| leader != id)
        };
        let leaders: Vec<Option<RowId>> = joining.iter().map(leader).collect();
        let is_join = self.places.iter().any(|id| self.rows[id].new_tokens() > 0);
        for (id, leader) in joining.into_iter().zip(leaders) {
            match leader {
                None => self.place(id)?,
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

    /// Makes a row one of the runner's, and looks up what is known of it.
    fn place(&mut self, id: RowId) -> Result<()> {
        let place = self.push(id)?;
        self.runner.look_up(place, self.rows[&id].window(), 1)
    }

    /// Makes a row one of the runner's.
    pub(super) fn push(&mut self, id: RowId) -> Result<usize> {
        let place = self.runner.push()?;
        if let Some(Err(error)) = self.speculating.as_mut().map(Speculating::push) {
            self.runner.remove(place)?;
            return Err(error);
        }
        self.places.push(id);
        if let Some(row) = self.rows.get_mut(&id) {
            (row.place, row.leader) = (Some(place), None);
        }
        Ok(place)
    }

    /// Ends a row, of which nothing more is told; returns whether it was there.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) if a growing cache has no room for what it copies.
    pub fn cancel(&mut self, id: RowId) -> Result<bool> {
        let Some(row) = self.rows.get(&id) else { return Ok(false) };
        let follower = self.rows.values().find(|other| other.leader == Some(id)).map(|other| other.id);
        match (row.place, follower) {
            // Somebody else wants what it has computed.
            (Some(place), Some(heir)) => {
                self.places[place] = heir;
                for other in self.rows.values_mut().filter(|other| other.leader == Some(id)) {
                    other.leader = Some(heir).filter(|heir| *heir != other.id);
                }
                if let Some(heir) = self.rows.get_mut(&heir) {
                    heir.place = Some(place);
                }
                self.rows.remove(&id);
            }
            _ => self.remove(id)?,
        }
        Ok(true)
    }

    /// Takes rows out that have ended; those that asked for it leave their tokens in the cache of prefixes.
    pub(super) fn remove_ended(&mut self, events: &[RowEvent]) -> Result<()> {
        for event in events {
            let id = event.row();
            let (Some(row), Some(place)) = (self.rows.get(&id), self.rows.get(&id).and_then(|row| row.place)) else {
                continue;
            };
            if matches!(event, RowEvent::Failed { .. }) {
                self.runner.wipe(place);
                if let Some(speculating) = &mut self.speculating {
                    speculating.wipe(place);
                }
                self.remove(id)?;
            } else if matches!(event, RowEvent::Token(token) if token.finish.is_some()) {
                if row.request.keep_generated {
                    self.runner.insert(place, row.window())?;
                    self.speculating.as_ref().map_or(Ok(()), |speculating| speculating.insert(place, row.window()))?;
                }
                self.remove(id)?;
            }
        }
        Ok(())
    }

    /// Takes a row out, wherever it is.
    fn remove(&mut self, id: RowId) -> Result<()> {
        if let Some(place) = self.rows.get(&id).and_then(|row| row.place) {
            self.runner.remove(place)?;
            self.places.remove(place);
            self.speculating.as_mut().map_or(Ok(()), |speculating| speculating.remove(place))?;
            self.report.leaves += usize::from(!self.places.is_empty());
        }
        self.rows.remove(&id);
        for (place, id) in self.places.iter().enumerate() {
            if let Some(row) = self.rows.get_mut(id) {
                row.place = Some(place);
            }
        }
        Ok(())
    }
}
