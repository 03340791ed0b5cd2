//! [`KvPool`]: pages that several caches take from, and their memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::{DType, Device};
use gpt2_burn_core::pages::{PageId, PagePool};

use super::slabs::Slabs;
use super::{CacheStorage, States, page_len};
use crate::Threads;
use crate::device::is_same_device;

/// Pages of keys and values, and which of them are whose.
///
/// Caches that share a pool take turns by the step: who computes, or appends what was found, has the memory meanwhile. What only says
/// whose a page is, a row that leaves, is copied or inserted, waits for nobody.
#[derive(Debug)]
pub struct KvPool {
    books: Mutex<PagePool>,
    /// Nothing while a cache has its turn, or forever if one has it to itself.
    slabs: Mutex<Slabs>,
    /// Whether a thread has panicked during its turn: what is in the pages is not known then.
    is_broken: AtomicBool,
    /// Layers, heads, width of a head and positions of the models that it is for.
    shape: [usize; 4],
    /// Bytes of a page of all layers.
    page_bytes: usize,
    /// Bytes that may be kept beside rows.
    kept_budget: usize,
    dtype: DType,
    device: Device,
}

impl KvPool {
    /// Without pages, of which so many bytes may be kept beside rows.
    pub fn new(storage: CacheStorage, shape: [usize; 4], dtype: DType, device: &Device, kept_budget: usize) -> Self {
        let [layers, heads, head_dim, n_positions] = shape;
        let page_len = page_len(n_positions);
        let is_written = storage == CacheStorage::Preallocated;
        let slabs = Slabs::new(layers, [heads, page_len, head_dim], is_written, dtype, device);
        Self {
            books: Mutex::new(PagePool::new(page_len, usize::MAX)),
            page_bytes: slabs.bytes(1),
            slabs: Mutex::new(slabs),
            is_broken: AtomicBool::new(false),
            kept_budget,
            shape,
            dtype,
            device: device.clone(),
        }
    }

    /// Whether it is for models of this shape, in this element type and on this device.
    pub fn is_for(&self, shape: [usize; 4], dtype: DType, device: &Device) -> bool {
        self.shape == shape && self.dtype == dtype && is_same_device(&self.device, device)
    }

    /// Which pages are whose.
    pub fn books(&self) -> MutexGuard<'_, PagePool> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory, for a turn: others wait until it is given back.
    pub fn slabs(&self) -> MutexGuard<'_, Slabs> {
        self.slabs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what is in the pages is not known any more.
    pub fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Relaxed)
    }

    /// Notes that a thread has panicked during its turn.
    pub fn set_broken(&self) {
        self.is_broken.store(true, Ordering::Relaxed);
    }

    /// Slabs without memory.
    pub fn no_slabs(&self) -> Slabs {
        let [layers, heads, head_dim, n_positions] = self.shape;
        Slabs::new(layers, [heads, page_len(n_positions), head_dim], false, self.dtype, &self.device)
    }

    /// Bytes of so many pages.
    pub fn bytes(&self, pages: usize) -> usize {
        self.page_bytes.saturating_mul(pages)
    }

    /// Pages that may be kept beside rows.
    pub fn max_kept(&self) -> usize {
        self.kept_budget / self.page_bytes.max(1)
    }

    /// Bytes of the pages that are kept, those included that rows have, too.
    pub fn kept_bytes(&self) -> usize {
        self.bytes(self.books().kept())
    }
}

/// Pages of a [`KvPool`] with consecutive tokens of one sequence, kept until this is dropped.
#[derive(Debug)]
pub struct KeptPages {
    pool: Arc<KvPool>,
    pages: Vec<PageId>,
    /// Tokens of the sequence in the first page that are before these.
    start: usize,
    tokens: usize,
}

impl KeptPages {
    /// Keeps some positions of a sequence whose pages, from its first position on, somebody refers to.
    pub fn new(pool: &Arc<KvPool>, pages: &[PageId], positions: std::ops::Range<usize>) -> Self {
        let mut books = pool.books();
        let page_len = books.page_len();
        let pages = pages[positions.start / page_len..positions.end.div_ceil(page_len)].to_vec();
        books.keep(&pages);
        let (start, tokens) = (positions.start % page_len, positions.len());
        Self { pool: pool.clone(), pages, start, tokens }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes of its pages.
    pub fn bytes(&self) -> usize {
        self.pool.bytes(self.pages.len())
    }

    /// Whose pages they are.
    pub fn pool(&self) -> &Arc<KvPool> {
        &self.pool
    }

    /// The pages that hold the first so many tokens, those of their sequence before them in the first page included.
    pub fn pages(&self, tokens: usize) -> &[PageId] {
        let page_len = page_len(self.pool.shape[3]);
        &self.pages[..(self.start + tokens).div_ceil(page_len)]
    }

    /// Tokens of the sequence in the first page that are before these.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Some of the tokens, of which nothing is copied.
    pub fn part(&self, tokens: std::ops::Range<usize>) -> Self {
        Self::new(&self.pool, &self.pages, self.start + tokens.start..self.start + tokens.end)
    }

    /// Keys and values of the first so many tokens in each layer, `[1, H, n, D]`.
    ///
    /// Waits for the turn of a cache that computes.
    pub fn read(&self, tokens: usize) -> Vec<States> {
        let pages: Arc<[u32]> = self.pages(tokens).iter().map(|page| page.index() as u32).collect();
        let slabs = self.pool.slabs();
        Threads::apart(|| slabs.read(&pages, self.start..self.start + tokens))
    }

    /// Layers, heads and width of a head.
    pub fn shape(&self) -> [usize; 3] {
        let [layers, heads, head_dim, _] = self.pool.shape;
        [layers, heads, head_dim]
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.pool.dtype
    }

    /// Where they are.
    pub fn device(&self) -> &Device {
        &self.pool.device
    }
}

impl Drop for KeptPages {
    fn drop(&mut self) {
        self.pool.books().give_up(&self.pages);
    }
}
