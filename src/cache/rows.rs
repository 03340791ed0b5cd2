//! How rows of a [`KvCache`] come, go and are copied.

use burn::tensor::{Int, Tensor};

use super::layer::LayerCache;
use super::{CacheStorage, KvCache, States};
use crate::device::is_same_device;
use crate::{Error, Result};

impl KvCache {
    /// Adds an empty row behind the last one: in the slot of one that was [removed](Self::remove), if there is one. Otherwise the
    /// buffers are copied to longer ones.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if a buffer would be larger than what the device reads as one; [`Error::OutOfMemory`]. The cache is then
    /// as it was.
    pub fn push(&mut self) -> Result<()> {
        let slot = self.free.last().copied().unwrap_or_else(|| self.buffer_rows().max(self.batch()));
        if self.layers.first().is_some_and(|layer| layer.rows().is_some_and(|rows| rows <= slot)) {
            self.check_buffers(slot + 1, self.positions())?;
            self.layers.iter_mut().for_each(|layer| layer.add_rows(1));
        }
        self.free.pop();
        self.slots.push(slot);
        self.lens.push(0);
        Ok(())
    }

    /// Makes each of the rows `to` hold the first `len` tokens of row `from`; nothing else is copied.
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
        if len > 0 && !to.is_empty() {
            let (from, slots) = (self.slots[from], to.iter().map(|&row| self.slots[row]).collect::<Vec<usize>>());
            self.for_each_layer(|_, layer| layer.copy_within(from, &slots, len));
        }
        to.iter().for_each(|&row| self.lens[row] = len);
        Ok(())
    }

    /// Forgets what row `row` holds, numbers that are none included: attention may multiply by zero what it does not see.
    pub(crate) fn wipe(&mut self, row: usize) {
        if let Some(&slot) = self.slots.get(row) {
            self.layers.iter_mut().for_each(|layer| layer.wipe(slot));
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
        self.check_buffers(self.batch().saturating_add(times), self.positions())?;
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
        let rows = 0..self.batch();
        if self.config.storage == CacheStorage::Growing {
            return self.gather(&rows.filter(|&row| is_kept[row]).collect::<Vec<_>>());
        }
        self.free.extend(rows.filter(|&row| !is_kept[row]).map(|row| self.slots[row]));
        self.free.sort_unstable_by(|one, other| other.cmp(one));
        retain(&mut self.lens, is_kept);
        retain(&mut self.slots, is_kept);
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
        if rows.iter().copied().eq(0..self.batch()) && self.buffer_rows() == self.batch() {
            return Ok(());
        }
        self.check_buffers(rows.len(), self.positions())?;
        let indices: Vec<i32> = rows.iter().map(|&row| self.slots[row] as i32).collect();
        let indices = Tensor::<1, Int>::from_data(indices.as_slice(), &self.device);
        for layer in &mut self.layers {
            layer.select(&indices);
        }
        self.lens = rows.iter().map(|&row| self.lens[row]).collect();
        self.slots = (0..rows.len()).collect();
        self.free.clear();
        Ok(())
    }

    /// Takes all rows out, so that their slots are there for others.
    pub(crate) fn remove_all(&mut self) {
        self.free = (0..self.buffer_rows()).rev().collect();
        self.lens.clear();
        self.slots.clear();
        if self.config.storage == CacheStorage::Growing {
            self.layers.fill_with(LayerCache::default);
            self.free.clear();
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
        if self.config.storage == CacheStorage::Growing && len > self.max_len() {
            self.check_buffers(self.batch(), len)?;
        }
        let [_, heads, head_dim, _] = self.shape;
        // Made only where a growing cache holds nothing yet.
        let shape = [self.batch(), heads, len, head_dim];
        let filled = self.max_len();
        let other_slot = other.slots[from];
        for (layer, other) in self.layers.iter_mut().zip(&other.layers) {
            if let Some((keys, values)) = other.buffers().filter(|_| len > 0) {
                let part = |buffer: Tensor<4>| buffer.narrow(0, other_slot, 1).narrow(2, 0, len);
                let new = States { keys: part(keys), values: part(values) };
                layer.write_row(self.slots[row], new.rounded(self.config.dtype), shape, filled);
            }
        }
        self.lens[row] = len;
        Ok(())
    }
}

/// Takes out what is not to be kept, one after the other.
pub(crate) fn retain<T>(items: &mut Vec<T>, is_kept: &[bool]) {
    let mut is_kept = is_kept.iter();
    items.retain(|_| is_kept.next().copied().unwrap_or(true));
}
