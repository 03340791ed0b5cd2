//! [`Pages`]: keys and values in pages, of which each row of a cache is a list.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use gpt2_burn_core::pages::{PagePool, PageRow};

use super::pool::{KeptPages, KvPool};
use super::slabs::Slabs;
use super::{CacheStorage, KvSegment, States, retain};
use crate::backends::PagedRow;
use crate::memory::product;
use crate::{Error, MemoryLimit, Result};

/// Positions of a page of a model of so many. Both are whole registers of the kernels; the shorter one is for models so small that
/// rows would have one page, and share none.
pub fn page_len(n_positions: usize) -> usize {
    if n_positions > 64 { 64 } else { 16 }
}

/// The pages of all rows: which are whose, and their memory.
#[derive(Debug)]
pub struct Pages {
    pool: Arc<KvPool>,
    rows: Vec<PageRow>,
    /// The pool's memory. Where it is shared, only while this cache has its turn.
    slabs: Slabs,
    is_shared: bool,
    has_turn: bool,
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
    /// Without rows, and with a pool to itself, for layers, heads, width of a head and positions of a model.
    pub fn new(storage: CacheStorage, shape: [usize; 4], dtype: DType, device: &Device) -> Self {
        let pool = KvPool::new(storage, shape, dtype, device, 0);
        let slabs = std::mem::replace(&mut *pool.slabs(), pool.no_slabs());
        let (is_shared, has_turn) = (false, true);
        Self { pool: Arc::new(pool), rows: Vec::new(), slabs, is_shared, has_turn, storage, copied: 0 }
    }

    /// Without rows, and with pages of a pool that others take from, too.
    pub fn of_pool(pool: &Arc<KvPool>) -> Self {
        let (storage, is_shared, has_turn) = (CacheStorage::Paged, true, false);
        Self { pool: pool.clone(), rows: Vec::new(), slabs: pool.no_slabs(), is_shared, has_turn, storage, copied: 0 }
    }

    /// Whether others take pages from its pool.
    pub fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// The pool whose turn it has to wait for before it computes; none if it has it.
    pub fn to_wait_for(&self) -> Option<Arc<KvPool>> {
        (!self.has_turn).then(|| self.pool.clone())
    }

    /// Takes or gives back the pool's memory.
    pub fn turn(&mut self, slabs: &mut Slabs) {
        std::mem::swap(&mut self.slabs, slabs);
        self.has_turn = !self.has_turn;
    }

    /// Pages that rows of `capacity` tokens have at most.
    pub fn needed(&self, rows: usize, capacity: usize) -> usize {
        rows.saturating_mul(capacity.div_ceil(self.slabs.page_len()))
    }

    /// Pages that take so many bytes.
    pub fn pages_of(&self, bytes: usize) -> usize {
        bytes.div_ceil(self.slabs.bytes(1).max(1))
    }

    /// Whether another row of so many tokens has room for its pages, and for a copy of one, once nothing is kept that no row has.
    pub fn has_room(&self, tokens: usize, limit: MemoryLimit) -> bool {
        let books = self.pool.books();
        let rows = books.used() - books.idle() + tokens.div_ceil(books.page_len()) + 1;
        // A step of a growing cache has the pages that it copies from, too.
        let most = if self.storage == CacheStorage::Growing { 2 * rows } else { rows };
        if most <= books.most_used() || self.slabs.is_written() {
            return true;
        }
        let [from, to] = [books.most_used(), most].map(|pages| self.pool.bytes(pages));
        limit.check_growth(super::WHAT, from, to).is_ok()
    }

    /// Makes the memory of so many pages.
    pub fn preallocate(&mut self, pages: usize) {
        let held = self.pool.books().most_used() + 1;
        self.slabs.make_room(pages + 1, held);
    }

    /// What they are used for; where others take pages from the pool, by all of them.
    pub fn counts(&self) -> PageCounts {
        let books = self.pool.books();
        PageCounts { used: books.used(), shared: books.shared(), copied: self.copied }
    }

    /// Bytes of all pages once there is memory for so many, and of what is there twice until then; none if there is.
    pub fn to_preallocate(&self, pages: usize) -> (usize, usize) {
        match pages < self.slabs.pages() {
            true => (0, 0),
            false => (self.slabs.bytes(pages), self.slabs.copied(self.pool.books().most_used())),
        }
    }

    /// Bytes of the lists of a row with so many pages: twice, since those that there were are there until the new ones are.
    pub fn row_bytes(pages: usize) -> usize {
        2 * (size_of::<PageRow>() + product([pages, size_of::<u32>()]))
    }

    /// Bytes that are taken from the system: of all pages if they are preallocated, else of those of the pool that were in use at
    /// once.
    pub fn bytes(&self) -> usize {
        let pages = match self.storage {
            CacheStorage::Preallocated => self.slabs.pages().saturating_sub(1),
            _ => self.pool.books().most_used(),
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
        self.check_is_whole()?;
        let expected = match self.is_shared {
            // More may come than this cache's rows. Room that is made later is a copy; room that is not used takes no memory.
            true => expected.saturating_add(self.pool.max_kept()).saturating_mul(2),
            false => expected,
        };
        let mut rows: Vec<(&mut PageRow, usize)> = self.rows.iter_mut().zip(new.iter().copied()).collect();
        let mut books = self.pool.books();
        let most = books.used().saturating_add(books.needed(&rows));
        make_room(&books, &mut self.slabs, expected, most, limit)?;
        let copies = books.reserve(&mut rows).expect("there is no limit but the one that was checked");
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
        let mut books = self.pool.books();
        let most = books.used().saturating_add(books.needed(&rows));
        make_room(&books, &mut self.slabs, expected, most, limit)?;
        books.reserve(&mut rows).expect("there is no limit but the one that was checked");
        let pairs = |(row, renewed): (&PageRow, &PageRow)| {
            let pairs = row.pages().iter().zip(renewed.pages()).take(row.len().div_ceil(books.page_len()));
            pairs.map(|(from, to)| [from, to].map(|page| page.index() as u32)).collect::<Vec<_>>()
        };
        let copies: Arc<[[u32; 2]]> = self.rows.iter().zip(&renewed).flat_map(pairs).collect();
        self.copied += copies.len();
        self.slabs.copy(&copies);
        for ((row, mut renewed), _) in self.rows.iter_mut().zip(renewed).zip(new).filter(|(_, new)| **new > 0) {
            books.advance(&mut renewed, row.len());
            std::mem::swap(row, &mut renewed);
            books.release(&mut renewed);
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
        let mut books = self.pool.books();
        books.advance(&mut self.rows[row], tokens);
        debug_assert!(self.is_shared || books.check(&self.rows, &[]) == Ok(()), "{:?}", books.check(&self.rows, &[]));
    }

    /// Adds rows without tokens.
    pub fn push(&mut self, rows: usize) {
        self.rows.extend(std::iter::repeat_with(PageRow::default).take(rows));
    }

    /// Forgets the tokens of a row beyond the first `len`.
    pub fn truncate(&mut self, row: usize, len: usize) {
        self.pool.books().truncate(&mut self.rows[row], len);
    }

    /// Makes rows hold the first `len` tokens of another one.
    pub fn copy_prefix(&mut self, from: usize, to: &[usize], len: usize) {
        let mut books = self.pool.books();
        for &row in to {
            books.release(&mut self.rows[row]);
            self.rows[row] = books.row_of(self.rows[from].pages(), len);
        }
    }

    /// Makes row `i` what row `rows[i]` was.
    pub fn gather(&mut self, rows: &[usize]) {
        let mut books = self.pool.books();
        let gathered = rows.iter().map(|&row| books.fork(&self.rows[row])).collect();
        let mut before = std::mem::replace(&mut self.rows, gathered);
        before.iter_mut().for_each(|row| books.release(row));
    }

    /// Takes the rows out that are not kept.
    pub fn retain(&mut self, is_kept: &[bool]) {
        let leaving = self.rows.iter_mut().zip(is_kept).filter(|(_, is_kept)| !**is_kept);
        let mut books = self.pool.books();
        leaving.for_each(|(row, _)| books.release(row));
        drop(books);
        retain(&mut self.rows, is_kept);
    }

    /// Some positions of a row, kept beside it.
    pub fn keep(&self, row: usize, positions: Range<usize>) -> KeptPages {
        KeptPages::new(&self.pool, self.rows[row].pages(), positions)
    }

    /// Some positions of a row in each layer, `[1, H, n, D]`. Waits for the turn of another cache.
    pub fn read(&self, row: usize, positions: Range<usize>) -> Vec<States> {
        if !self.has_turn {
            let tokens = positions.len();
            return self.keep(row, positions).read(tokens);
        }
        let page_len = self.slabs.page_len();
        let (first, skipped) = (positions.start / page_len, positions.start % page_len);
        let pages = &self.rows[row].pages()[first..positions.end.div_ceil(page_len)];
        let pages: Arc<[u32]> = pages.iter().map(|page| page.index() as u32).collect();
        self.slabs.read(&pages, skipped..skipped + positions.len())
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
            self.advance(last, len);
            self.rows.swap(row, last);
        });
        if let Some(mut last) = self.rows.pop() {
            self.pool.books().release(&mut last);
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

    /// Appends to each row so many tokens of each of its segments: what is in pages of the pool is not copied.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; the rows have the tokens that they had.
    pub fn append_segments(
        &mut self,
        rows: &[Vec<(KvSegment, usize)>],
        dtype: DType,
        expected: usize,
        limit: MemoryLimit,
    ) -> Result<()> {
        let before: Vec<usize> = self.rows.iter().map(PageRow::len).collect();
        let copied = |segments: &Vec<(KvSegment, usize)>| {
            let copied = segments.iter().filter(|(segment, _)| segment.pages_of(&self.pool).is_none());
            copied.map(|(_, tokens)| tokens).sum()
        };
        let new: Vec<usize> = rows.iter().map(copied).collect();
        self.reserve(&new, expected, limit)?;
        let mut is_reserved = vec![true; rows.len()];
        let each = rows.iter().enumerate().flat_map(|(row, segments)| segments.iter().map(move |part| (row, part)));
        let appended = each.filter(|(_, (_, tokens))| *tokens > 0).try_for_each(|(row, (segment, tokens))| {
            if let Some(pages) = segment.pages_of(&self.pool) {
                self.append_pages(row, pages, *tokens);
                is_reserved[row] = false;
                return Ok(());
            }
            if !is_reserved[row] {
                let new: Vec<usize> = (0..rows.len()).map(|other| if other == row { *tokens } else { 0 }).collect();
                self.reserve(&new, expected, limit)?;
            }
            self.write(row, segment.layers(*tokens, dtype), dtype);
            self.advance(row, *tokens);
            Ok(())
        });
        if appended.is_err() {
            before.into_iter().enumerate().for_each(|(row, len)| self.truncate(row, len));
        }
        appended
    }

    /// Appends tokens that are in pages of the pool. What the first of these holds before them is what the row holds there.
    fn append_pages(&mut self, row: usize, new: &KeptPages, tokens: usize) {
        let mut books = self.pool.books();
        let row = &mut self.rows[row];
        let (page_len, len) = (books.page_len(), row.len());
        assert_eq!(new.start(), len % page_len, "position in a page");
        let pages = [&row.pages()[..len / page_len], new.pages(tokens)].concat();
        let mut before = std::mem::replace(row, books.row_of(&pages, len + tokens));
        books.release(&mut before);
    }

    fn check_is_whole(&self) -> Result<()> {
        match self.is_shared && self.pool.is_broken() {
            true => Err(Error::Execution(
                "a forward has panicked that wrote to the pages which this cache shares".to_owned(),
            )),
            false => Ok(()),
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let mut books = self.pool.books();
        self.rows.iter_mut().for_each(|row| books.release(row));
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
