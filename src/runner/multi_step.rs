//! [`Runner::multi_step`]: greedy steps that a GPU takes while nobody looks at their tokens.

use super::Runner;
use crate::{CacheStorage, Error, Result};

impl Runner<'_> {
    /// Whether [`multi_step`](Self::multi_step) saves waiting.
    pub fn can_multi_step(&self) -> bool {
        let is_in_place = self.config.uses_cache && self.config.cache.storage != CacheStorage::Growing;
        is_in_place && self.cache.is_some() && self.model.can_multi_step()
    }

    /// The `steps` most likely next tokens of each row, `[steps][rows]`, at most `max` of them: see
    /// [`Gpt2::decode_steps`](crate::Gpt2::decode_steps). `rows[b]` is what stands in the context of row b; all but its last token is
    /// known, and so is afterwards what comes out, but for the last of it.
    ///
    /// None: the device failed at what was only to save time, and nothing is known of the rows.
    pub fn multi_step(&mut self, rows: &[&[u32]], steps: usize, max: usize) -> Result<Option<Vec<Vec<i32>>>> {
        for (row, tokens) in rows.iter().enumerate() {
            let known = self.known(row, tokens).min(tokens.len().saturating_sub(1));
            self.truncate(row, known)?;
        }
        let Some(cache) = &mut self.cache else { return Err(Error::EmptyBatch) };
        let last: Vec<u32> = rows.iter().filter_map(|tokens| tokens.last().copied()).collect();
        let mut multi_step = match self.multi_step.take() {
            Some(multi_step) if multi_step.is_at(&last, cache.lens()) => multi_step,
            _ => self.model.start_multi_step(&last, cache, max, self.may_capture),
        };
        let Some(chosen) = self.model.decode_steps(&mut multi_step, cache, steps)? else {
            self.cache = None;
            self.held.iter_mut().for_each(Vec::clear);
            self.may_capture = false;
            return Ok(None);
        };
        self.computed_tokens += steps * rows.len();
        for (row, (held, last)) in self.held.iter_mut().zip(last).enumerate() {
            held.push(last);
            // What is no token ends its row, of which nothing is asked any more.
            held.extend(chosen[..steps.saturating_sub(1)].iter().map(|ids| ids[row].max(0) as u32));
        }
        self.multi_step = Some(multi_step);
        Ok(Some(chosen))
    }
}
