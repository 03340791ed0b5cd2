//! [`Pages`]: keys and values in pages, of which each row of a cache is a list.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use gpt2_burn_core::pages::{PagePool, PageRow};

use super::slabs::Slabs;
use super::{CacheStorage, KvSegment, States, retain};
use crate::backends::PagedRow;
use crate::memory::product;
use crate::{MemoryLimit, Result};

/// Positions of a page of a model of so many. Both are whole registers of the kernels; the shorter one is for models so small that
/// rows would have one page, and share none.
pub fn page_len(n_positions: usize) -> usize {
    if n_positions > 64 { 64 } else { 16 }
}

/// The pages of all rows: which are whose, and their memory.
#[derive(Debug)]
pub struct Pages {
    pool: PagePool,
    rows: Vec<PageRow>,
    slabs: Slabs,
    storage: CacheStorage,
    /// Pages that were copied.
    copied: usize,
}

/// What the pages of a cache are used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageCounts {
    /// Pages that some row refers to.
    pub used: usize,
    /// Of those, pages that several rows refer to.
    pub shared: usize,
    /// Pages that were copied, since rows went on with what others see.
    pub copied: usize,
}

impl Pages {
    /// Without rows, for layers, heads, width of a head and positions of a model.
    pub fn new(
        storage: CacheStorage,
        [layers, heads, head_dim, n_positions]: [usize; 4],
        dtype: DType,
        device: &Device,
    ) -> Self {
        let page_len = page_len(n_positions);
        let is_written = storage == CacheStorage::Preallocated;
        Self {
            pool: PagePool::new(page_len, usize::MAX),
            rows: Vec::new(),
            slabs: Slabs::new(layers, [heads, page_len, head_dim], is_written, dtype, device),
            storage,
            copied: 0,
        }
    }

    /// Pages that rows of `capacity` tokens have at most.
    pub fn needed(&self, rows: usize, capacity: usize) -> usize {
        rows.saturating_mul(capacity.div_ceil(self.pool.page_len()))
    }

    /// Makes the memory of so many pages.
    pub fn preallocate(&mut self, pages: usize) {
        self.slabs.make_room(pages + 1, self.pool.most_used() + 1);
    }

    /// What they are used for.
    pub fn counts(&self) -> PageCounts {
        PageCounts { used: self.pool.used(), shared: self.pool.shared(), copied: self.copied }
    }

    /// Bytes of all pages once there is memory for so many, and of what is there twice until then; none if there is.
    pub fn to_preallocate(&self, pages: usize) -> (usize, usize) {
        match pages < self.slabs.pages() {
            true => (0, 0),
            false => (self.slabs.bytes(pages), self.slabs.copied(self.pool.most_used())),
        }
    }

    /// Bytes of the lists of a row with so many pages: twice, since those that there were are there until the new ones are.
    pub fn row_bytes(pages: usize) -> usize {
        2 * (size_of::<PageRow>() + product([pages, size_of::<u32>()]))
    }

    /// Bytes that are taken from the system: of all pages if they are preallocated, else of those that were in use at once.
    pub fn bytes(&self) -> usize {
        let pages = match self.storage {
            CacheStorage::Preallocated => self.slabs.pages().saturating_sub(1),
            _ => self.pool.most_used(),
        };
        self.slabs.bytes(pages)
    }

    /// Takes the pages that so many new tokens of each row need, and copies what others see of those that they are written to. When
    /// memory is made, it is for `expected` pages, if the limit lets us.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); nothing is changed then.
    pub fn reserve(&mut self, new: &[usize], expected: usize, limit: MemoryLimit) -> Result<()> {
        if self.storage == CacheStorage::Growing {
            return self.renew(new, expected.saturating_mul(2), limit);
        }
        let mut rows: Vec<(&mut PageRow, usize)> = self.rows.iter_mut().zip(new.iter().copied()).collect();
        let most = self.pool.used().saturating_add(self.pool.needed(&rows));
        make_room(&self.pool, &mut self.slabs, expected, most, limit)?;
        let copies = self.pool.reserve(&mut rows).expect("there is no limit but the one that was checked");
        self.copied += copies.len();
        let copies = copies.iter().map(|copy| [copy.from, copy.to].map(|page| page.index() as u32));
        self.slabs.copy(&copies.collect());
        Ok(())
    }

    /// The same in new pages, to which all that the rows hold is copied.
    fn renew(&mut self, new: &[usize], expected: usize, limit: MemoryLimit) -> Result<()> {
        let mut renewed: Vec<PageRow> = self.rows.iter().map(|_| PageRow::default()).collect();
        let lens = self.rows.iter().zip(new).map(|(row, &new)| if new > 0 { row.len().saturating_add(new) } else { 0 });
        let mut rows: Vec<(&mut PageRow, usize)> = renewed.iter_mut().zip(lens).collect();
        let most = self.pool.used().saturating_add(self.pool.needed(&rows));
        make_room(&self.pool, &mut self.slabs, expected, most, limit)?;
        self.pool.reserve(&mut rows).expect("there is no limit but the one that was checked");
        let pairs = |(row, renewed): (&PageRow, &PageRow)| {
            let pairs = row.pages().iter().zip(renewed.pages()).take(row.len().div_ceil(self.pool.page_len()));
            pairs.map(|(from, to)| [from, to].map(|page| page.index() as u32)).collect::<Vec<_>>()
        };
        let copies: Arc<[[u32; 2]]> = self.rows.iter().zip(&renewed).flat_map(pairs).collect();
        self.copied += copies.len();
        self.slabs.copy(&copies);
        for ((row, mut renewed), _) in self.rows.iter_mut().zip(renewed).zip(new).filter(|(_, new)| **new > 0) {
            self.pool.advance(&mut renewed, row.len());
            std::mem::swap(row, &mut renewed);
            self.pool.release(&mut renewed);
        }
        Ok(())
    }

    /// The pages of a row, of whose next `new_len` tokens the last `query_len` attend.
    pub fn row(&self, row: usize, new_len: usize, query_len: usize) -> PagedRow {
        let row = &self.rows[row];
        let pages = row.pages().iter().map(|page| page.index() as u32).collect();
        PagedRow { pages, context_len: row.len(), new_len, query_len }
    }

    /// The memory that pages are in.
    pub fn slabs(&mut self) -> &mut Slabs {
        &mut self.slabs
    }

    /// A layer's slabs `(keys, values)`.
    pub fn of_layer(&self, layer: usize) -> Option<(Tensor<4>, Tensor<4>)> {
        self.slabs.of_layer(layer)
    }

    /// Makes so many of the tokens that were written for a row count.
    pub fn advance(&mut self, row: usize, tokens: usize) {
        self.pool.advance(&mut self.rows[row], tokens);
        debug_assert_eq!(self.pool.check(&self.rows, &[]), Ok(()));
    }

    /// Adds rows without tokens.
    pub fn push(&mut self, rows: usize) {
        self.rows.extend(std::iter::repeat_with(PageRow::default).take(rows));
    }

    /// Forgets the tokens of a row beyond the first `len`.
    pub fn truncate(&mut self, row: usize, len: usize) {
        self.pool.truncate(&mut self.rows[row], len);
    }

    /// Makes rows hold the first `len` tokens of another one.
    pub fn copy_prefix(&mut self, from: usize, to: &[usize], len: usize) {
        for &row in to {
            self.pool.release(&mut self.rows[row]);
            self.rows[row] = self.pool.row_of(self.rows[from].pages(), len);
        }
    }

    /// Makes row `i` what row `rows[i]` was.
    pub fn gather(&mut self, rows: &[usize]) {
        let gathered = rows.iter().map(|&row| self.pool.fork(&self.rows[row])).collect();
        let mut before = std::mem::replace(&mut self.rows, gathered);
        before.iter_mut().for_each(|row| self.pool.release(row));
    }

    /// Takes the rows out that are not kept.
    pub fn retain(&mut self, is_kept: &[bool]) {
        let leaving = self.rows.iter_mut().zip(is_kept).filter(|(_, is_kept)| !**is_kept);
        leaving.for_each(|(row, _)| self.pool.release(row));
        retain(&mut self.rows, is_kept);
    }

    /// Some positions of a row in each layer, `[1, H, n, D]`.
    pub fn read(&self, row: usize, positions: Range<usize>) -> Vec<States> {
        let page_len = self.pool.page_len();
        let (first, skipped) = (positions.start / page_len, positions.start % page_len);
        let pages = &self.rows[row].pages()[first..positions.end.div_ceil(page_len)];
        let pages: Arc<[u32]> = pages.iter().map(|page| page.index() as u32).collect();
        let part = |states: Tensor<4>| states.narrow(2, skipped, positions.len());
        let layers = self.slabs.read(&pages, skipped + positions.len()).into_iter();
        layers.map(|states| States { keys: part(states.keys), values: part(states.values) }).collect()
    }

    /// Makes a row hold `new`, `[1, H, n, D]` of each layer, of `len` positions, and nothing else.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); nothing is changed then.
    pub fn replace(
        &mut self,
        row: usize,
        len: usize,
        new: Vec<States>,
        dtype: DType,
        limit: MemoryLimit,
    ) -> Result<()> {
        // There is room for what a row may have, but not for two of it.
        if self.slabs.is_written() {
            self.truncate(row, 0);
        }
        // Behind the last row, until it is whole.
        let last = self.rows.len();
        self.push(1);
        let mut tokens = vec![0; last];
        tokens.push(len);
        let made = self.reserve(&tokens, 0, limit).map(|()| {
            self.write(last, new, dtype);
            self.pool.advance(&mut self.rows[last], len);
            self.rows.swap(row, last);
        });
        if let Some(mut last) = self.rows.pop() {
            self.pool.release(&mut last);
        }
        made
    }

    /// Writes `new`, `[1, H, n, D]` of each layer, behind what a row holds, whose pages are [reserved](Self::reserve).
    pub fn write(&mut self, row: usize, new: Vec<States>, dtype: DType) {
        for (layer, new) in new.into_iter().enumerate() {
            let new = new.rounded(dtype);
            let [_, _, len, _] = new.keys.dims();
            let packed = |states: Tensor<4>| states.squeeze_dim::<3>(0).swap_dims(0, 1); // [n, H, D]
            let rows = Arc::new([self.row(row, len, 0)]);
            self.slabs.append(layer, [packed(new.keys), packed(new.values)], rows);
        }
    }

    /// Appends to a row, whose pages are [reserved](Self::reserve), so many tokens of each of some segments.
    pub fn append_segments(&mut self, row: usize, segments: &[(KvSegment, usize)], dtype: DType) {
        for (segment, tokens) in segments.iter().filter(|(_, tokens)| *tokens > 0) {
            let layers = (0..segment.layers()).map(|layer| segment.layer(layer, *tokens, dtype)).collect();
            self.write(row, layers, dtype);
            self.advance(row, *tokens);
        }
    }
}

/// Makes room for `most` pages in use, if the limit lets us.
fn make_room(pool: &PagePool, slabs: &mut Slabs, expected: usize, most: usize, limit: MemoryLimit) -> Result<()> {
    // The first page is nobody's.
    let has_room = most < slabs.pages();
    // What was written when it was made is the system's no more.
    if most <= pool.most_used() || has_room && slabs.is_written() {
        return Ok(());
    }
    // While a layer's slabs become longer, the old ones are there, too.
    let copied = if has_room { 0 } else { slabs.copied(pool.most_used()) };
    let needed = slabs.bytes(most).saturating_add(copied);
    limit.check_growth(super::WHAT, slabs.bytes(pool.most_used()), needed)?;
    if !has_room {
        // Room that is not used takes no memory, and room that is made later is a copy.
        let wanted = if slabs.is_written() { 0 } else { expected.max(2 * slabs.pages()).saturating_sub(most) };
        let more = limit.at_most(needed, slabs.bytes(wanted)) / slabs.bytes(1).max(1);
        slabs.make_room(most + more + 1, pool.most_used() + 1);
    }
    Ok(())
}
