//! How rows of a [`KvCache`] come, go and are copied.

use std::ops::Range;

use super::{Held, KvCache, States};
use crate::device::is_same_device;
use crate::{Error, Result};

impl KvCache {
    /// Adds an empty row behind the last one. Preallocated buffers are copied to longer ones if no row was [removed](Self::remove) whose
    /// place it can take.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if a buffer would be larger than what the device reads as one; [`Error::OutOfMemory`]. The cache is then
    /// as it was.
    pub fn push(&mut self) -> Result<()> {
        if let Held::Buffers(buffers) = &self.held {
            let rows = buffers.rows_with_another();
            if rows > buffers.rows() {
                self.check_buffers(rows, buffers.positions())?;
            }
        } else {
            self.check_buffers(self.batch() + 1, self.config.capacity)?;
        }
        match &mut self.held {
            Held::Buffers(buffers) => buffers.push(),
            Held::Pages(pages) => pages.push(1),
        }
        self.lens.push(0);
        self.preallocate();
        Ok(())
    }

    /// Makes each of the rows `to` hold the first `len` tokens of row `from`; nothing else is copied, nor is that of pages.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if there are no such rows, row `from` is one of the others, or it is shorter. The cache is then as it was.
    pub fn copy_prefix(&mut self, from: usize, to: &[usize], len: usize) -> Result<()> {
        let rows = self.batch();
        if let Some(row) = to.iter().chain([&from]).find(|row| **row >= rows) {
            return Err(Error::mismatch("row of the cache", format!("less than {rows}"), row));
        }
        if to.contains(&from) {
            return Err(Error::mismatch("row to copy a prefix to", format!("another one than row {from}"), from));
        }
        if len > self.lens[from] {
            return Err(Error::mismatch("tokens to copy of a row", format!("at most {}", self.lens[from]), len));
        }
        match &mut self.held {
            Held::Buffers(buffers) => buffers.copy_prefix(from, to, len),
            Held::Pages(pages) => pages.copy_prefix(from, to, len),
        }
        to.iter().for_each(|&row| self.lens[row] = len);
        Ok(())
    }

    /// Forgets what row `row` holds, numbers that are none included: attention may multiply by zero what it does not see.
    pub(crate) fn wipe(&mut self, row: usize) {
        if row < self.batch() {
            match &mut self.held {
                Held::Buffers(buffers) => buffers.wipe(row),
                Held::Pages(pages) => pages.truncate(row, 0),
            }
            self.lens[row] = 0;
        }
    }

    /// Adds `times` copies of row `row` behind the last row.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if there is no such row, or a buffer would be larger than what the device reads as one;
    /// [`Error::OutOfMemory`]. The cache is then as it was.
    pub fn fork(&mut self, row: usize, times: usize) -> Result<()> {
        if row >= self.batch() {
            return Err(Error::mismatch("row of the cache", format!("less than {}", self.batch()), row));
        }
        self.check_gathered(self.batch().saturating_add(times))?;
        let rows: Vec<usize> = (0..self.batch()).chain(std::iter::repeat_n(row, times)).collect();
        self.gather(&rows)
    }

    /// Takes row `row` out; those behind it move up. Nothing is copied, and its memory stays reserved; a growing cache, which copies
    /// everything with each token anyhow, gives it back.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if there is no such row; [`Error::OutOfMemory`] if a growing cache has no room for what it copies. The
    /// cache is then as it was.
    pub fn remove(&mut self, row: usize) -> Result<()> {
        let rows = self.batch();
        if row >= rows {
            return Err(Error::mismatch("row of the cache", format!("less than {rows}"), row));
        }
        self.retain(&(0..rows).map(|kept| kept != row).collect::<Vec<bool>>())
    }

    /// Takes out each row `b` of which `is_kept[b]` is false, as [`remove`](Self::remove) does one by one.
    ///
    /// # Errors
    ///
    /// As [`remove`](Self::remove).
    pub(crate) fn retain(&mut self, is_kept: &[bool]) -> Result<()> {
        if !is_kept.contains(&true) {
            self.remove_all();
            return Ok(());
        }
        match &mut self.held {
            Held::Buffers(buffers) if buffers.is_growing() => {
                return self.gather(&(0..self.batch()).filter(|&row| is_kept[row]).collect::<Vec<_>>());
            }
            Held::Buffers(buffers) => buffers.retain(is_kept),
            Held::Pages(pages) => pages.retain(is_kept),
        }
        retain(&mut self.lens, is_kept);
        Ok(())
    }

    /// Makes row `i` what row `rows[i]` was: rows can be reordered, repeated and left out.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if there is no such row, or a buffer would be larger than what the device reads as one,
    /// [`Error::EmptyBatch`] if no row would be left; [`Error::OutOfMemory`]. The cache is then as it was.
    pub fn gather(&mut self, rows: &[usize]) -> Result<()> {
        if rows.is_empty() {
            return Err(Error::EmptyBatch);
        }
        if let Some(&row) = rows.iter().find(|row| **row >= self.batch()) {
            return Err(Error::mismatch("row of the cache", format!("less than {}", self.batch()), row));
        }
        let is_same = rows.iter().copied().eq(0..self.batch());
        if is_same && self.buffer_rows() == self.batch() {
            return Ok(());
        }
        self.check_gathered(rows.len())?;
        match &mut self.held {
            Held::Buffers(buffers) => buffers.gather(rows),
            Held::Pages(pages) => pages.gather(rows),
        }
        self.lens = rows.iter().map(|&row| self.lens[row]).collect();
        self.preallocate();
        Ok(())
    }

    /// Rows for which there is memory, those that were removed included.
    fn buffer_rows(&self) -> usize {
        match &self.held {
            Held::Buffers(buffers) => buffers.rows(),
            Held::Pages(_) => self.batch(),
        }
    }

    /// Checks that there may be so many rows, of which each may be one of those that there are.
    fn check_gathered(&self, rows: usize) -> Result<()> {
        match &self.held {
            Held::Buffers(buffers) => self.check_buffers(rows, buffers.positions()),
            Held::Pages(_) => self.check_buffers(rows, self.config.capacity),
        }
    }

    /// Takes all rows out, so that their memory is there for others.
    pub(crate) fn remove_all(&mut self) {
        match &mut self.held {
            Held::Buffers(buffers) => buffers.remove_all(),
            Held::Pages(pages) => pages.retain(&vec![false; self.lens.len()]),
        }
        self.lens.clear();
    }

    /// Some positions of a row in each layer that holds something, `[1, H, n, D]`.
    pub(super) fn read(&self, row: usize, positions: Range<usize>) -> Vec<States> {
        match &self.held {
            Held::Buffers(buffers) => buffers.read(row, positions),
            Held::Pages(pages) => pages.read(row, positions),
        }
    }

    /// Makes row `row` a copy of row `from` of another cache of the same model, which may be stored in another way.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if there is no such row, or the caches are not of models of the same shape on the same device;
    /// [`Error::CacheFull`] if the other row is longer than the capacity; [`Error::OutOfMemory`]. The cache is then as it was.
    pub fn copy_row(&mut self, row: usize, other: &Self, from: usize) -> Result<()> {
        for (cache, row) in [(&*self, row), (other, from)] {
            if row >= cache.batch() {
                return Err(Error::mismatch("row of the cache", format!("less than {}", cache.batch()), row));
            }
        }
        if self.shape != other.shape || !is_same_device(&self.device, &other.device) {
            let describe = |cache: &Self| format!("{:?} on {:?}", cache.shape, cache.device);
            let what = "[layers, heads, width of a head, positions] of the other cache";
            return Err(Error::mismatch(what, describe(self), describe(other)));
        }
        let len = other.len(from);
        if len > self.config.capacity {
            return Err(Error::CacheFull { row, tokens: len, capacity: self.config.capacity });
        }
        match &self.held {
            Held::Buffers(buffers) if buffers.is_growing() && len > self.max_len() => {
                self.check_buffers(self.batch(), len)?;
            }
            _ => {}
        }
        let (filled, dtype, limit) = (self.max_len(), self.config.dtype, self.config.limit);
        let states = if len > 0 { other.read(from, 0..len) } else { Vec::new() };
        self.in_turn(|cache| {
            match &mut cache.held {
                Held::Buffers(buffers) => buffers.write_row(row, states, filled),
                Held::Pages(pages) => pages.replace(row, len, states, dtype, limit)?,
            }
            cache.lens[row] = len;
            Ok(())
        })
    }
}

/// Takes out what is not to be kept, one after the other.
pub(crate) fn retain<T>(items: &mut Vec<T>, is_kept: &[bool]) {
    let mut is_kept = is_kept.iter();
    items.retain(|_| is_kept.next().copied().unwrap_or(true));
}
