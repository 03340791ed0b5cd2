//! [`KvCache`]: keys and values of the tokens that a model has seen.

mod config;
mod layer;
mod rows;
mod segment;
mod states;

use burn::tensor::{DType, Device, Tensor};

use crate::backends::{AttentionMetadata, has_kernels, is_asynchronous};
use crate::device::is_same_device;
use crate::memory::{check_buffer, product};
use crate::{Error, Gpt2Config, MemoryLimit, Result, Threads};
pub use config::KvCacheConfig;
use layer::LayerCache;
pub(crate) use rows::retain;
pub use segment::KvSegment;
pub(crate) use states::{States, rectangle};

/// How a cache holds its keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheStorage {
    /// Buffers of a fixed capacity, written in place: nothing is allocated or moved while decoding.
    #[default]
    Preallocated,
    /// Tensors that are concatenated with the new ones at each step, as in textbook code: each step copies all.
    Growing,
}

/// Keys and values of each layer, for rows (sequences) of unequal length.
///
/// Row `b` holds positions `0..len(b)`. What a buffer holds past a row's length means nothing and is never seen.
/// There is no `Clone`, which would hide a copy of everything: [`fork`](Self::fork) and [`gather`](Self::gather) copy
/// rows when that is wanted. [`remove`](Self::remove) copies none: the row's slot in the buffers stays empty.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    lens: Vec<usize>,
    /// Which of the buffers' rows each row is. In a growing cache, row b is the buffers' row b.
    slots: Vec<usize>,
    /// The buffers' rows that are none's, the first of them last.
    free: Vec<usize>,
    config: KvCacheConfig,
    /// Layers, heads, width of a head and positions of the model that this cache is for.
    shape: [usize; 4],
    device: Device,
}

/// Bytes that a cache takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheBytes {
    /// Bytes of the tokens that the rows hold: 2 x layers x width x element size for each.
    pub live: usize,
    /// Bytes of the buffers, the spare capacity included.
    pub reserved: usize,
}

impl KvCache {
    /// Positions by which the buffers grow on request: growing a token at a time would copy everything each time.
    pub const BLOCK: usize = 64;

    /// Checks that there may be buffers for `batch` rows of `positions`, instead of those that there are: every place that makes
    /// or lengthens some asks here first.
    fn check_buffers(&self, batch: usize, positions: usize) -> Result<()> {
        let [layers, heads, head_dim, _] = self.shape;
        let buffer = product([batch, heads, positions, head_dim, self.config.dtype.size()]);
        let what = "bytes of a layer's keys (fewer rows, or a shorter capacity, take less)";
        check_buffer(what, buffer, &self.device)?;
        let layer = buffer.saturating_mul(2);
        let held = self.bytes().reserved;
        // Layer after layer, the old buffers go when the new ones are there.
        let copied = if held > 0 { layer } else { 0 };
        let all = product([layers, layer]).saturating_add(copied);
        // The system has given what is held.
        let asked = if self.config.limit.is_system() { all.saturating_sub(held) } else { all };
        // What is kept of a row besides.
        let rows = product([batch, 4 * size_of::<usize>()]);
        self.config.limit.check_on(&self.device, "a key-value cache", rows, asked)
    }

    /// Does `work` for each layer: by several threads where the processor computes with kernels, as most of the time goes into asking for
    /// memory, which threads do faster.
    fn for_each_layer(&mut self, work: impl Fn(usize, &mut LayerCache) + Sync) {
        let layers = self.layers.iter_mut().enumerate();
        match has_kernels(&self.device) && !is_asynchronous(&self.device) {
            true => Threads::for_each(layers.collect(), |(index, layer)| work(index, layer)),
            false => layers.for_each(|(index, layer)| work(index, layer)),
        }
    }

    /// Positions for which the buffers have room.
    fn positions(&self) -> usize {
        self.layers.iter().map(LayerCache::positions).max().unwrap_or(0)
    }

    /// Rows of the buffers, those of rows that were removed included.
    fn buffer_rows(&self) -> usize {
        self.layers.first().and_then(LayerCache::rows).unwrap_or(self.lens.len())
    }

    /// Which of the buffers' rows each row is.
    pub(crate) fn slots(&self) -> &[usize] {
        &self.slots
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
            live: 2 * layers * heads * head_dim * self.config.dtype.size() * tokens,
            reserved: self.layers.iter().map(LayerCache::bytes).sum(),
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
        Ok(())
    }

    /// Empties every row and keeps the buffers.
    pub fn clear(&mut self) {
        self.lens.fill(0);
    }

    /// Makes room for rows of `capacity` tokens: whole blocks of [`BLOCK`](Self::BLOCK) positions are added, up to the
    /// model's context. Preallocated buffers are copied once; a growing cache only learns that it may.
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
        if self.config.storage == CacheStorage::Preallocated {
            self.check_buffers(self.buffer_rows(), capacity)?;
            let filled = self.max_len();
            self.layers.iter_mut().for_each(|layer| layer.extend(filled, capacity));
        }
        self.config.capacity = capacity;
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
        match self.config.storage {
            CacheStorage::Preallocated => Ok(()),
            CacheStorage::Growing => {
                let tokens = self.lens.iter().zip(query_lens).map(|(held, new)| held + new);
                self.check_buffers(self.batch(), tokens.max().unwrap_or(0))
            }
        }
    }

    /// Bytes that may be asked for.
    pub(crate) fn limit(&self) -> MemoryLimit {
        self.config.limit
    }

    /// Writes the new keys and values, `[N, H, D]`, of one layer behind what each row holds, and returns the layer's buffers in
    /// the cache's element type, `[S, H, L, D]`: L is at least what the longest row with new tokens has then. The lengths change
    /// only with [`advance`](Self::advance).
    pub(crate) fn append(&mut self, layer: usize, new: [Tensor<3>; 2], metadata: &AttentionMetadata) -> States {
        let layer = &mut self.layers[layer];
        match self.config.storage {
            CacheStorage::Preallocated => layer.write(new, metadata),
            CacheStorage::Growing => layer.grow(new, self.config.dtype, &self.lens, metadata),
        }
    }

    /// Makes the tokens that were appended to every layer count: so many of each of these rows.
    pub(crate) fn advance(&mut self, new: impl IntoIterator<Item = (usize, usize)>) {
        for (row, tokens) in new {
            self.lens[row] += tokens;
        }
    }

    /// The buffers `(keys, values)` of all layers that have some.
    pub(crate) fn all_buffers(&self) -> Vec<(Tensor<4>, Tensor<4>)> {
        self.layers.iter().filter_map(LayerCache::buffers).collect()
    }

    /// The buffers `(keys, values)` of a layer, for tests that look at where they lie.
    #[doc(hidden)]
    pub fn buffers(&self, layer: usize) -> Option<(Tensor<4>, Tensor<4>)> {
        self.layers.get(layer)?.buffers()
    }
}
