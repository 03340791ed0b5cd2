//! [`KvCacheConfig`]: how large a cache is, and of what.

use std::sync::Arc;

use burn::tensor::{DType, Device};

use super::{Buffers, CacheStorage, Held, KvCache, KvPool, KvSegment, Pages, head_bytes, page_len};
use crate::backends::has_page_kernels;
use crate::memory::product;
use crate::{Error, Gpt2Config, MemoryLimit, Result};

/// Rows, capacity, storage and element type of a [`KvCache`], and what it may take.
///
/// ```
/// use gpt2_burn::burn::tensor::Device;
/// use gpt2_burn::{Gpt2Config, KvCacheConfig};
///
/// let cache = KvCacheConfig::new(2, 16).init(&Gpt2Config::default(), &Device::flex())?;
/// assert_eq!((cache.batch(), cache.capacity()), (2, 16));
/// # Ok::<(), gpt2_burn::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct KvCacheConfig {
    /// Rows that it begins with, and for which there is room.
    pub rows: usize,
    /// Tokens that a row can hold.
    pub capacity: usize,
    /// How keys and values are held.
    pub storage: CacheStorage,
    /// Element type of the keys and values: f32, f16, bf16; or, on CPUs with kernels, I8: a byte for each number, and for each
    /// head and position the scale that makes the largest of them 127.
    pub dtype: DType,
    /// What all buffers together may take, with one layer's that are copied when they grow. What a forward takes beside the cache
    /// is held against the same limit, by itself.
    pub limit: MemoryLimit,
}

impl KvCacheConfig {
    /// In pages and f32, within what [the system](MemoryLimit::system) gives.
    pub fn new(rows: usize, capacity: usize) -> Self {
        let (storage, dtype) = (CacheStorage::default(), DType::F32);
        Self { rows, capacity, storage, dtype, limit: MemoryLimit::system() }
    }

    /// For a cache that is dropped after its first forward: its memory is asked for once it is known how much that takes.
    pub(crate) fn for_one_forward(rows: usize, capacity: usize) -> Self {
        Self::new(rows, capacity).with_storage(CacheStorage::Growing)
    }

    /// The same, held in another way.
    pub fn with_storage(self, storage: CacheStorage) -> Self {
        Self { storage, ..self }
    }

    /// The same, of another element type.
    pub fn with_dtype(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// The same, within another limit.
    pub fn with_limit(self, limit: MemoryLimit) -> Self {
        Self { limit, ..self }
    }

    /// An empty cache for models of this shape.
    ///
    /// A preallocated cache takes 2 x layers x rows x capacity x width x element size bytes at once, with the capacity rounded up to
    /// whole [pages](CacheStorage::Paged) where there are some. Others take nothing yet, and the capacity only bounds their rows.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyBatch`] for no rows; [`Error::Mismatch`] for a capacity that is 0 or beyond the model's context, or with
    /// which a buffer would be larger than what the device reads as one; [`Error::OutOfMemory`] if the buffers take more than
    /// the limit; [`Error::Device`] for an unsupported element type.
    pub fn init(&self, model: &Gpt2Config, device: &Device) -> Result<KvCache> {
        self.init_in(model, device, None)
    }

    /// As [`init`](Self::init), with pages of a pool that others take from, too; if it is one for such a cache.
    pub(crate) fn init_in(&self, model: &Gpt2Config, device: &Device, pool: Option<&Arc<KvPool>>) -> Result<KvCache> {
        let mut cache = self.without_rows(model, device)?;
        if let (Some(pool), Held::Pages(pages)) = (pool, &mut cache.held)
            && self.storage == CacheStorage::Paged
            && pool.is_for(cache.shape, self.dtype, device)
        {
            *pages = Pages::of_pool(pool);
        }
        let positions = if self.storage == CacheStorage::Growing { 0 } else { self.capacity };
        cache.check_buffers(self.rows, positions)?;
        cache.begin(self.rows);
        let shape = [self.rows, model.n_head, self.capacity, model.head_dim()];
        match &mut cache.held {
            Held::Buffers(buffers) if !buffers.is_growing() => buffers.preallocate(shape),
            Held::Buffers(_) => {}
            Held::Pages(_) => cache.preallocate(),
        }
        Ok(cache)
    }

    /// As [`init`](Self::init), followed by [`append_segments`](KvCache::append_segments), without writing the same memory twice.
    ///
    /// # Errors
    ///
    /// As both.
    pub fn init_with_segments(
        &self,
        model: &Gpt2Config,
        device: &Device,
        segments: &[Vec<(KvSegment, usize)>],
    ) -> Result<KvCache> {
        let mut cache = self.without_rows(model, device)?;
        cache.check_buffers(self.rows, 0)?;
        // Buffers are made with the segments in them.
        cache.begin(self.rows);
        if let Held::Pages(_) = cache.held {
            cache.check_buffers(self.rows, self.capacity)?;
            cache.preallocate();
        }
        cache.append_segments(segments)?;
        Ok(cache)
    }

    /// Checks that a row of so many tokens can have its pages, at least if it is alone.
    pub(crate) fn check_row(&self, model: &Gpt2Config, device: &Device, tokens: usize) -> Result<()> {
        if self.storage == CacheStorage::Preallocated || !has_page_kernels(device) {
            return Ok(());
        }
        let page_len = page_len(model.n_positions);
        // A step of a growing cache has the pages that it copies from, too.
        let copies = if self.storage == CacheStorage::Growing { 2 } else { 1 };
        let token = product([2, model.n_layer, model.n_head, head_bytes(model.head_dim(), self.dtype)]);
        self.limit.check(super::WHAT, product([copies, tokens.div_ceil(page_len), page_len, token]))
    }

    /// A cache without rows yet: the lengths of so many may not fit either.
    fn without_rows(&self, model: &Gpt2Config, device: &Device) -> Result<KvCache> {
        model.validate()?;
        check_cache_dtype(device, self.dtype)?;
        if self.rows == 0 {
            return Err(Error::EmptyBatch);
        }
        if !(1..=model.n_positions).contains(&self.capacity) {
            let expected = format!("1 to {} (n_positions)", model.n_positions);
            return Err(Error::mismatch("capacity of the cache", expected, self.capacity));
        }
        let shape = [model.n_layer, model.n_head, model.head_dim(), model.n_positions];
        Ok(KvCache {
            config: *self,
            lens: Vec::new(),
            held: match has_page_kernels(device) {
                true => Held::Pages(Pages::new(self.storage, shape, self.dtype, device)),
                false => Held::Buffers(Buffers::new(model.n_layer, self.storage, self.dtype, device)),
            },
            shape,
            device: device.clone(),
        })
    }
}

/// Checks that a device holds keys and values in an element type.
pub(crate) fn check_cache_dtype(device: &Device, dtype: DType) -> Result<()> {
    match dtype {
        DType::I8 if has_page_kernels(device) => Ok(()),
        dtype => Ok(gpt2_burn_backends::check_dtype(device, dtype)?),
    }
}

impl KvCache {
    /// Makes the first rows, without memory for what they hold.
    fn begin(&mut self, rows: usize) {
        self.lens = vec![0; rows];
        match &mut self.held {
            Held::Buffers(buffers) => buffers.begin(rows),
            Held::Pages(pages) => pages.push(rows),
        }
    }

    /// Makes the pages of all rows up to their capacity, if they are to be there from the start.
    pub(super) fn preallocate(&mut self) {
        let (rows, capacity) = (self.rows_to_expect(), self.config.capacity);
        if let (CacheStorage::Preallocated, Held::Pages(pages)) = (self.config.storage, &mut self.held) {
            pages.preallocate(pages.needed(rows, capacity));
        }
    }
}
