//! [`KvCache`]: keys and values of the tokens that a model has seen.

mod buffers;
mod config;
mod layer;
mod paged;
mod pool;
mod rows;
mod segment;
mod slabs;
mod states;
mod turn;

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};

use crate::backends::{AttentionMetadata, PagedRow};
use crate::device::is_same_device;
use crate::memory::{check_buffer, product};
use crate::{Error, Gpt2Config, MemoryLimit, Result};
use buffers::Buffers;
pub use config::KvCacheConfig;
pub(crate) use config::check_cache_dtype;
pub use paged::PageCounts;
use paged::Pages;
pub(crate) use paged::page_len;
pub(crate) use pool::KvPool;
pub(crate) use rows::retain;
pub use segment::KvSegment;
pub(crate) use states::{States, head_bytes, number_type, rectangle};

/// How a cache holds its keys and values.
///
/// On CPUs with kernels all of them are over pages of 64 positions (16 in models of up to 64), and the same numbers come out of all. Other devices have
/// a buffer of all rows in each layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheStorage {
    /// Pages that are taken as tokens come, and shared by rows that begin alike: nothing is copied when rows fork, are reordered, leave
    /// or are cut, but the last page of a row before its next token, if others see it. In a batch of a packed model, what rows
    /// have in common of whole pages is computed by one of them, and read once a step for all. On devices without kernels for pages, as
    /// [`Preallocated`](Self::Preallocated).
    #[default]
    Paged,
    /// Memory for all rows up to their capacity from the start, written in place: nothing is allocated or moved while decoding.
    Preallocated,
    /// Each step copies all, as in textbook code that concatenates tensors.
    Growing,
}

/// Keys and values of each layer, for rows (sequences) of unequal length.
///
/// Row `b` holds positions `0..len(b)`. What its memory holds past a row's length means nothing and is never seen.
/// There is no `Clone`, which would hide a copy of everything: [`fork`](Self::fork) and [`gather`](Self::gather) copy
/// rows when that is wanted, and pages only note whose they are. [`remove`](Self::remove) copies nothing.
#[derive(Debug)]
pub struct KvCache {
    lens: Vec<usize>,
    held: Held,
    config: KvCacheConfig,
    /// Layers, heads, width of a head and positions of the model that this cache is for.
    shape: [usize; 4],
    device: Device,
}

/// Where keys and values are.
#[derive(Debug)]
enum Held {
    Buffers(Buffers),
    Pages(Pages),
}

/// Bytes that a cache takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheBytes {
    /// Bytes of the tokens that the rows hold: 2 x layers x width x element size for each, and 4 for each head where elements are
    /// integers.
    pub live: usize,
    /// Bytes of the buffers, the spare capacity included; or of whole pages: of those that were in use at once, or of all that were
    /// preallocated.
    pub reserved: usize,
}

impl KvCache {
    /// Positions by which the buffers grow on request: growing a token at a time would copy everything each time.
    pub const BLOCK: usize = 64;

    /// Checks that there may be memory for `batch` rows of `positions`, instead of what there is: every place that makes or lengthens
    /// buffers asks here first. Pages that are not preallocated are checked when they are [taken](Self::prepare).
    fn check_buffers(&self, batch: usize, positions: usize) -> Result<()> {
        let [layers, heads, head_dim, _] = self.shape;
        let held = self.bytes().reserved;
        // Of all layers, and what is there twice while they are made, and what is kept of a row besides.
        let (all, copied, of_row) = match &self.held {
            Held::Pages(pages) => {
                let (all, copied) = match self.config.storage {
                    CacheStorage::Preallocated => pages.to_preallocate(pages.needed(batch, positions)),
                    _ => (0, 0),
                };
                (all, copied, Pages::row_bytes(pages.needed(1, self.config.capacity.max(positions))))
            }
            Held::Buffers(_) => {
                let buffer = product([batch, heads, positions, head_dim, self.config.dtype.size()]);
                let what = "bytes of a layer's keys (fewer rows, or a shorter capacity, take less)";
                check_buffer(what, buffer, &self.device)?;
                let all = product([layers, buffer.saturating_mul(2)]);
                // Layer after layer, the old buffers go when the new ones are there.
                (all, if held > 0 { all / layers.max(1) } else { 0 }, 4 * size_of::<usize>())
            }
        };
        let all = all.saturating_add(copied);
        // The system has given what is held.
        let asked = if self.config.limit.is_system() { all.saturating_sub(held) } else { all };
        self.config.limit.check_on(&self.device, WHAT, product([batch, of_row]), asked)
    }

    /// Takes the memory that so many new tokens of each row need, if they are in pages. All of it is taken, or none.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]. The cache is then as it was.
    pub(crate) fn prepare(&mut self, new: &[usize]) -> Result<()> {
        let rows = self.rows_to_expect();
        match &mut self.held {
            Held::Buffers(_) => Ok(()),
            Held::Pages(pages) => pages.reserve(new, pages.needed(rows, self.config.capacity), self.config.limit),
        }
    }

    /// Rows for which there should be room: those that left may come again.
    fn rows_to_expect(&self) -> usize {
        self.batch().max(self.config.rows)
    }

    /// Whether rows can share what they hold.
    pub(crate) fn is_paged(&self) -> bool {
        matches!(self.held, Held::Pages(_))
    }

    /// Which row of the buffers a row is.
    pub(crate) fn slot(&self, row: usize) -> usize {
        match &self.held {
            Held::Buffers(buffers) => buffers.slot(row),
            Held::Pages(_) => row,
        }
    }

    /// The pages of rows, and how many new tokens each has, if they are in pages.
    pub(crate) fn paged_rows(&self, rows: impl Iterator<Item = (usize, usize)>) -> Option<Arc<[PagedRow]>> {
        match &self.held {
            Held::Buffers(_) => None,
            Held::Pages(pages) => Some(rows.map(|(row, new)| pages.row(row, new, new)).collect()),
        }
    }

    /// How keys and values are held.
    pub fn storage(&self) -> CacheStorage {
        self.config.storage
    }

    /// Element type of the keys and values.
    pub fn dtype(&self) -> DType {
        self.config.dtype
    }

    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.lens.len()
    }

    /// Tokens that a row can hold.
    pub fn capacity(&self) -> usize {
        self.config.capacity
    }

    /// Tokens that row `row` holds, at positions `0..len(row)`; 0 for a row that does not exist.
    pub fn len(&self, row: usize) -> usize {
        self.lens.get(row).copied().unwrap_or(0)
    }

    /// Whether no row holds a token.
    pub fn is_empty(&self) -> bool {
        self.lens.iter().all(|len| *len == 0)
    }

    /// Tokens of each row.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// Bytes in use and reserved.
    pub fn bytes(&self) -> CacheBytes {
        let [layers, heads, head_dim, _] = self.shape;
        let tokens: usize = self.lens.iter().sum();
        CacheBytes {
            live: 2 * layers * heads * head_bytes(head_dim, self.config.dtype) * tokens,
            reserved: match &self.held {
                Held::Buffers(buffers) => buffers.bytes(),
                Held::Pages(pages) => pages.bytes(),
            },
        }
    }

    /// What its pages are used for; nothing where there are none.
    pub fn pages(&self) -> PageCounts {
        match &self.held {
            Held::Buffers(_) => PageCounts::default(),
            Held::Pages(pages) => pages.counts(),
        }
    }

    /// Keeps positions `0..len` of row `row` and forgets those behind; nothing is copied.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if there is no such row or it is shorter.
    pub fn truncate(&mut self, row: usize, len: usize) -> Result<()> {
        let rows = self.batch();
        let held = self
            .lens
            .get_mut(row)
            .ok_or_else(|| Error::mismatch("row of the cache", format!("less than {rows}"), row))?;
        if len > *held {
            return Err(Error::mismatch("length to truncate a row to", format!("at most {held}"), len));
        }
        *held = len;
        if let Held::Pages(pages) = &mut self.held {
            pages.truncate(row, len);
        }
        Ok(())
    }

    /// Empties every row and keeps the memory.
    pub fn clear(&mut self) {
        self.lens.fill(0);
        if let Held::Pages(pages) = &mut self.held {
            (0..self.lens.len()).for_each(|row| pages.truncate(row, 0));
        }
    }

    /// Makes room for rows of `capacity` tokens: whole blocks of [`BLOCK`](Self::BLOCK) positions are added, up to the
    /// model's context. Preallocated memory is copied once; other caches only learn that they may.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if that is beyond the model's context, or what the device reads as one buffer;
    /// [`Error::OutOfMemory`]. The cache is then as it was.
    pub fn reserve(&mut self, capacity: usize) -> Result<()> {
        let [.., n_positions] = self.shape;
        if capacity <= self.config.capacity {
            return Ok(());
        }
        if capacity > n_positions {
            let expected = format!("at most {n_positions} (n_positions)");
            return Err(Error::mismatch("capacity of the cache", expected, capacity));
        }
        let blocks = (capacity - self.config.capacity).div_ceil(Self::BLOCK);
        let capacity = (self.config.capacity + blocks * Self::BLOCK).min(n_positions);
        let filled = self.max_len();
        let rows = match &self.held {
            Held::Buffers(buffers) if buffers.is_growing() => 0,
            Held::Buffers(buffers) => buffers.rows(),
            Held::Pages(_) => self.rows_to_expect(),
        };
        self.check_buffers(rows, capacity)?;
        match &mut self.held {
            Held::Buffers(buffers) if !buffers.is_growing() => buffers.extend(filled, capacity),
            _ => {}
        }
        self.config.capacity = capacity;
        self.preallocate();
        Ok(())
    }

    fn max_len(&self) -> usize {
        self.lens.iter().copied().max().unwrap_or(0)
    }

    /// Checks that `query_lens[b]` tokens can be appended to each row `b` by a model of this shape on this device.
    pub(crate) fn check_append(&self, config: &Gpt2Config, device: &Device, query_lens: &[usize]) -> Result<()> {
        if !is_same_device(device, &self.device) {
            return Err(Error::mismatch("device of the cache", format!("{device:?}"), format!("{:?}", self.device)));
        }
        let shape = [config.n_layer, config.n_head, config.head_dim(), config.n_positions];
        if shape != self.shape {
            let what = "[layers, heads, width of a head, positions] of the cache";
            return Err(Error::mismatch(what, format!("{shape:?}"), format!("{:?}", self.shape)));
        }
        if query_lens.len() != self.batch() {
            return Err(Error::mismatch("rows of new tokens", self.batch(), query_lens.len()));
        }
        for (row, (&held, &new)) in self.lens.iter().zip(query_lens).enumerate() {
            let tokens = held + new;
            if tokens > config.n_positions {
                return Err(Error::ContextOverflow { row, tokens, n_positions: config.n_positions });
            }
            if tokens > self.config.capacity {
                return Err(Error::CacheFull { row, tokens, capacity: self.config.capacity });
            }
        }
        match &self.held {
            Held::Buffers(buffers) if buffers.is_growing() => {
                let tokens = self.lens.iter().zip(query_lens).map(|(held, new)| held + new);
                self.check_buffers(self.batch(), tokens.max().unwrap_or(0))
            }
            _ => Ok(()),
        }
    }

    /// Bytes that may be asked for.
    pub(crate) fn limit(&self) -> MemoryLimit {
        self.config.limit
    }

    /// Writes the new keys and values, `[N, H, D]`, of one layer behind what each row holds, and returns the layer's buffers in
    /// the cache's element type, `[S, H, L, D]`: L is at least what the longest row with new tokens has then. The lengths change
    /// only with [`advance`](Self::advance).
    ///
    /// # Panics
    ///
    /// If it is in pages.
    pub(crate) fn append(&mut self, layer: usize, new: [Tensor<3>; 2], metadata: &AttentionMetadata) -> States {
        match &mut self.held {
            Held::Buffers(buffers) => buffers.append(layer, new, &self.lens, metadata),
            Held::Pages(_) => unreachable!("pages are attended to where they are"),
        }
    }

    /// Writes the new keys and values, `[N, H, D]`, of one layer to the pages of its rows, which are [there](Self::prepare), and
    /// attends over all that they hold with `query`, `[M, H, D]`, if there is one: `[M, H D]`. The lengths change only with
    /// [`advance`](Self::advance).
    ///
    /// # Panics
    ///
    /// If it is not in pages, or these are not its rows.
    pub(crate) fn attend(
        &mut self,
        layer: usize,
        query: Option<Tensor<3>>,
        new: [Tensor<3>; 2],
        rows: Arc<[PagedRow]>,
    ) -> Option<Tensor<2>> {
        let Held::Pages(pages) = &mut self.held else { unreachable!("buffers have no pages") };
        match query {
            Some(query) => Some(pages.slabs().attend(layer, query, new, rows)),
            None => {
                pages.slabs().append(layer, new, rows);
                None
            }
        }
    }

    /// Makes the tokens that were appended to every layer count: so many of each of these rows.
    pub(crate) fn advance(&mut self, new: impl IntoIterator<Item = (usize, usize)>) {
        for (row, tokens) in new {
            self.lens[row] += tokens;
            if let Held::Pages(pages) = &mut self.held {
                pages.advance(row, tokens);
            }
        }
    }

    /// The buffers `(keys, values)` of all layers that have some.
    pub(crate) fn all_buffers(&self) -> Vec<(Tensor<4>, Tensor<4>)> {
        match &self.held {
            Held::Buffers(buffers) => buffers.all(),
            Held::Pages(_) => Vec::new(),
        }
    }

    /// The buffers or slabs `(keys, values)` of a layer, for tests that look at where they lie.
    #[doc(hidden)]
    pub fn buffers(&self, layer: usize) -> Option<(Tensor<4>, Tensor<4>)> {
        match &self.held {
            Held::Buffers(buffers) => buffers.of_layer(layer),
            Held::Pages(pages) => pages.of_layer(layer),
        }
    }
}

/// What is checked against the limit.
const WHAT: &str = "a key-value cache";
