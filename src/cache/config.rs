//! [`KvCacheConfig`]: how large a cache is, and of what.

use burn::tensor::{DType, Device};

use super::{CacheStorage, KvCache, KvSegment, LayerCache};
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
    /// Element type of the keys and values.
    pub dtype: DType,
    /// What all buffers together may take, with one layer's that are copied when they grow. What a forward takes beside the cache
    /// is held against the same limit, by itself.
    pub limit: MemoryLimit,
}

impl KvCacheConfig {
    /// Preallocated, in f32, within what [the system](MemoryLimit::system) gives.
    pub fn new(rows: usize, capacity: usize) -> Self {
        let (storage, dtype) = (CacheStorage::default(), DType::F32);
        Self { rows, capacity, storage, dtype, limit: MemoryLimit::system() }
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
    /// A preallocated cache takes 2 x layers x rows x capacity x width x element size bytes at once; a growing one takes nothing
    /// yet, and the capacity only bounds it.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyBatch`] for no rows; [`Error::Mismatch`] for a capacity that is 0 or beyond the model's context, or with
    /// which a buffer would be larger than what the device reads as one; [`Error::OutOfMemory`] if the buffers take more than
    /// the limit; [`Error::Device`] for an unsupported element type.
    pub fn init(&self, model: &Gpt2Config, device: &Device) -> Result<KvCache> {
        let (rows, heads, head_dim) = (self.rows, model.n_head, model.head_dim());
        let positions = if self.storage == CacheStorage::Growing { 0 } else { self.capacity };
        let mut cache = self.without_buffers(model, device)?;
        cache.check_buffers(rows, positions)?;
        cache.layers.resize_with(model.n_layer, LayerCache::default);
        if self.storage == CacheStorage::Preallocated {
            cache.for_each_layer(|_, layer| {
                *layer = LayerCache::preallocated([rows, heads, self.capacity, head_dim], self.dtype, device);
            });
        }
        cache.lens = vec![0; rows];
        cache.slots = (0..rows).collect();
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
        // A growing cache has no buffers yet.
        let mut cache = self.with_storage(CacheStorage::Growing).init(model, device)?;
        cache.config.storage = self.storage;
        cache.append_segments(segments)?;
        Ok(cache)
    }

    /// A cache without rows yet: the lengths of so many may not fit either.
    fn without_buffers(&self, model: &Gpt2Config, device: &Device) -> Result<KvCache> {
        model.validate()?;
        gpt2_burn_backends::check_dtype(device, self.dtype)?;
        if self.rows == 0 {
            return Err(Error::EmptyBatch);
        }
        if !(1..=model.n_positions).contains(&self.capacity) {
            let expected = format!("1 to {} (n_positions)", model.n_positions);
            return Err(Error::mismatch("capacity of the cache", expected, self.capacity));
        }
        Ok(KvCache {
            config: *self,
            layers: Vec::new(),
            lens: Vec::new(),
            slots: Vec::new(),
            free: Vec::new(),
            shape: [model.n_layer, model.n_head, model.head_dim(), model.n_positions],
            device: device.clone(),
        })
    }
}
