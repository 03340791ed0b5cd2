//! [`PrefixCache`]: keys and values of prefixes, shared by generators and threads.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use burn::tensor::{DType, Device};

use super::{Fingerprint, Payload, RadixTree, Reuse, TreeStats};
use crate::cache::KvPool;
use crate::{CacheStorage, KvSegment, Result};

impl Payload for KvSegment {
    fn tokens(&self) -> usize {
        Self::tokens(self)
    }

    fn bytes(&self) -> usize {
        // Pages are counted by their pool: several segments may have the same.
        self.own_bytes()
    }

    fn split(self, at: usize) -> (Self, Self) {
        let tokens = Self::tokens(&self);
        (self.part(0..at), self.part(at..tokens))
    }
}

/// Keys and values of what was computed before, in a [`RadixTree`] for each model, under one budget.
///
/// It is given to a [`Generator`](crate::generate::Generator), and lives as long as one of its clones, which are all the
/// same cache. Threads can share it: it is locked while something is looked up or inserted, never while a model computes.
/// After each call it holds no more bytes than its budget, unless what requests at work and [`Pin`]s hold is more.
///
/// Where keys and values are in [pages](crate::CacheStorage::Paged), the tree refers to the pages in which rows have computed them, and
/// rows that begin so refer to them, too: nothing is copied but the last page of a row that goes on in the middle of it. All
/// generators that share a cache take their pages from one pool, and take turns by the step. The memory of pages that were in use
/// once stays for those that come, while a generator is at work or a prefix is held. Where memory is [limited](crate::MemoryLimit), what
/// nobody uses goes before a row has to wait.
///
/// ```
/// use gpt2_burn::generate::{GenerateRequest, Generator};
/// use gpt2_burn::{Gpt2Config, prefix::PrefixCache};
///
/// let device = gpt2_burn::device("flex")?;
/// let config = Gpt2Config { vocab_size: 50, n_positions: 16, n_embd: 8, n_layer: 2, n_head: 2, ..Default::default() };
/// let prefixes = PrefixCache::new(100 << 20);
/// let generator = Generator::new(config.init(&device)?).with_prefix_cache(&prefixes)?;
///
/// let mut request = GenerateRequest::new([vec![3, 1, 4, 1, 5], vec![3, 1, 4, 2, 7]]);
/// request.max_new_tokens = 2;
/// let report = generator.complete(&request)?.report; // [3, 1, 4] is computed once
/// assert_eq!((report.computed_prompt_tokens, report.reused_prompt_tokens), (7, 3));
/// let report = generator.complete(&request)?.report; // of each prompt, only the last token is
/// assert_eq!((report.computed_prompt_tokens, report.reused_prompt_tokens), (2, 8));
/// assert_eq!(prefixes.tokens(), 7);
/// # Ok::<(), gpt2_burn::Error>(())
/// ```
#[derive(Clone)]
pub struct PrefixCache {
    shared: Arc<Shared>,
    reuse: Reuse,
}

/// The part of a budget, one in so many, that is left for what takes memory around the data: nodes, tensors, and gaps between
/// what was evicted and what took its place.
const HEADROOM: usize = 16;

struct Shared {
    tree: Mutex<RadixTree<Fingerprint, KvSegment>>,
    /// Pages of prompts, for caches of each shape, element type and device, while one of them or the tree has some.
    pools: Mutex<Vec<Weak<KvPool>>>,
    /// Operations per second of the last prompts that each model computed.
    rates: Mutex<HashMap<Fingerprint, f64>>,
    budget: usize,
}

impl fmt::Debug for PrefixCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (budget, bytes, tokens) = (self.budget(), self.bytes(), self.tokens());
        f.debug_struct("PrefixCache")
            .field("budget", &budget)
            .field("bytes", &bytes)
            .field("tokens", &tokens)
            .field("reuse", &self.reuse)
            .finish()
    }
}

/// The tree as a picture, the ids of each node below those before it.
impl fmt::Display for PrefixCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.shared.lock().fmt(f)
    }
}

impl PrefixCache {
    /// An empty cache that takes up to `budget` bytes of memory. Keys and values get 15/16 of that: 2 x layers x width x
    /// element size for each token, 74 kB for GPT-2 in f32, and 4.7 MB for a page of 64.
    pub fn new(budget: usize) -> Self {
        let shared = Shared { tree: Mutex::default(), pools: Mutex::default(), rates: Mutex::default(), budget };
        Self { shared: Arc::new(shared), reuse: Reuse::default() }
    }

    /// The same cache, of which this handle takes what `reuse` says.
    pub fn with_reuse(&self, reuse: Reuse) -> Self {
        Self { shared: self.shared.clone(), reuse }
    }

    /// What of a prompt is taken.
    pub fn reuse(&self) -> Reuse {
        self.reuse
    }

    /// Bytes that it may take.
    pub fn budget(&self) -> usize {
        self.shared.budget
    }

    /// Bytes of keys and values that are held. Of pages that prompts share, or have in common with rows at work, each counts once,
    /// and whole.
    pub fn bytes(&self) -> usize {
        let tree = self.shared.lock();
        self.shared.bytes(&tree)
    }

    /// The pages that caches of this shape, element type and device take theirs from.
    pub(crate) fn pool(&self, shape: [usize; 4], dtype: DType, device: &Device) -> Arc<KvPool> {
        let mut pools = self.shared.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|pool| pool.strong_count() > 0);
        let known = pools.iter().filter_map(Weak::upgrade);
        let mut known = known.filter(|pool| pool.is_for(shape, dtype, device) && !pool.is_broken());
        known.next().unwrap_or_else(|| {
            let pool = Arc::new(KvPool::new(CacheStorage::Paged, shape, dtype, device, self.shared.room()));
            pools.push(Arc::downgrade(&pool));
            pool
        })
    }

    /// Tokens that are held; a prefix of several prompts counts once.
    pub fn tokens(&self) -> usize {
        self.shared.lock().tokens()
    }

    /// What was asked for and found since the cache was made. A prompt's last token is not asked for: it is always
    /// computed, since what follows it is wanted.
    pub fn stats(&self) -> TreeStats {
        self.shared.lock().stats()
    }

    /// Forgets everything that is not pinned or in use.
    pub fn clear(&self) {
        self.shared.lock().clear();
    }

    /// Keeps the longest prefix of `prefix` that is held for a model from going, until the result is dropped.
    pub fn pin(&self, model: Fingerprint, prefix: &[u32]) -> Pin {
        let tokens = self.shared.lock().pin(model, prefix);
        Pin { shared: self.shared.clone(), model, ids: prefix[..tokens].to_vec() }
    }

    /// Tokens of the longest prefix of `ids` that is held for a model, whatever may be taken of it.
    pub fn held(&self, model: Fingerprint, ids: &[u32]) -> usize {
        self.shared.lock().peek(model, ids).len()
    }

    /// Segments of what is held of `ids`, and how many tokens of each are of it.
    #[cfg(feature = "files")]
    pub(crate) fn path(&self, model: Fingerprint, ids: &[u32]) -> Vec<(KvSegment, usize)> {
        let tree = self.shared.lock();
        let parts = tree.peek(model, ids).parts.into_iter();
        parts.map(|(segment, tokens)| (segment.clone(), tokens)).collect()
    }

    /// Tokens of a prompt that a request would take; at most `max`.
    pub(crate) fn usable(&self, model: Fingerprint, prompt: &[u32], max: usize) -> usize {
        let tree = self.shared.lock();
        match self.takes(&tree, model, prompt) {
            true => tree.peek(model, &prompt[..max]).len(),
            false => 0,
        }
    }

    /// Takes what may be taken of the first `max` tokens of a prompt, and keeps it from going until that is dropped.
    pub(crate) fn take(&self, model: Fingerprint, prompt: &[u32], max: usize) -> Lease {
        let mut tree = self.shared.lock();
        let (mut parts, mut tokens) = (Vec::new(), 0);
        if self.takes(&tree, model, prompt) {
            let found = tree.find(model, &prompt[..max]).parts;
            parts = found.into_iter().map(|(segment, tokens)| (segment.clone(), tokens)).collect();
            tokens = tree.pin(model, &prompt[..max]);
        } else {
            tree.count_miss(max);
        }
        drop(tree);
        Lease { parts, pin: Pin { shared: self.shared.clone(), model, ids: prompt[..tokens].to_vec() } }
    }

    fn takes(&self, tree: &RadixTree<Fingerprint, KvSegment>, model: Fingerprint, prompt: &[u32]) -> bool {
        // What was computed in one way is not mixed with the rest of a prompt, computed in another.
        if model != model.now() {
            return false;
        }
        if self.reuse == Reuse::Radix {
            return true;
        }
        let found = tree.peek(model, prompt);
        found.len() == prompt.len() && found.is_end
    }

    /// Operations per second at which the model computed its last prompts.
    pub(crate) fn rate(&self, model: Fingerprint) -> Option<f64> {
        self.shared.rates.lock().unwrap_or_else(PoisonError::into_inner).get(&model).copied()
    }

    pub(crate) fn set_rate(&self, model: Fingerprint, rate: f64) {
        self.shared.rates.lock().unwrap_or_else(PoisonError::into_inner).insert(model, rate);
    }

    /// Whether so many bytes more are within the budget, so that nothing has to go for them.
    #[cfg(feature = "files")]
    pub(crate) fn has_room(&self, bytes: usize) -> bool {
        self.bytes().saturating_add(bytes) <= self.shared.room()
    }

    /// Puts in what was computed: the keys and values of `ids[from..]`; returns how many tokens are new.
    ///
    /// Nothing is inserted if the way of computing is not `model`'s any more: part of it may have been computed in the other.
    pub(crate) fn insert(&self, model: Fingerprint, ids: &[u32], from: usize, segment: KvSegment) -> Result<usize> {
        if model != model.now() {
            return Ok(0);
        }
        // What is more than the budget would drive everything else out, and then go too.
        if segment.bytes() > self.shared.room() {
            return Ok(0);
        }
        let mut tree = self.shared.lock();
        let new = tree.insert(model, ids, from, segment)?;
        self.shared.evict(&mut tree);
        Ok(new)
    }

    /// Lets prefixes go that are not in use, those first that were not asked for the longest, while `is_over` says so.
    pub(crate) fn evict_while(&self, mut is_over: impl FnMut() -> bool) {
        self.shared.lock().evict_while(|_| is_over());
    }

    /// Remembers that `ids` is a whole prompt, if it is held.
    pub(crate) fn mark(&self, model: Fingerprint, ids: &[u32]) {
        self.shared.lock().mark(model, ids);
    }

    /// Looks at the tree as it is now.
    #[cfg(feature = "files")]
    pub(crate) fn with_tree<T>(&self, look: impl FnOnce(&RadixTree<Fingerprint, KvSegment>) -> T) -> T {
        look(&self.shared.lock())
    }
}

impl Shared {
    /// Bytes that keys and values may take.
    fn room(&self) -> usize {
        self.budget - self.budget / HEADROOM
    }

    /// Bytes of keys and values that a tree holds, in pages or not.
    fn bytes(&self, tree: &RadixTree<Fingerprint, KvSegment>) -> usize {
        tree.bytes() + self.pools().iter().map(|pool| pool.kept_bytes()).sum::<usize>()
    }

    /// Lets go what is more than the budget has room for.
    fn evict(&self, tree: &mut RadixTree<Fingerprint, KvSegment>) {
        tree.evict_while(|tree| self.bytes(tree) > self.room());
    }

    /// The pools of pages that somebody has some of.
    fn pools(&self) -> Vec<Arc<KvPool>> {
        let pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        pools.iter().filter_map(Weak::upgrade).collect()
    }

    /// The tree; if a thread has panicked that changed it, or wrote to its pages, it is empty.
    fn lock(&self) -> MutexGuard<'_, RadixTree<Fingerprint, KvSegment>> {
        let is_poisoned = self.tree.is_poisoned();
        let mut tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        if is_poisoned || !tree.is_empty() && self.pools().iter().any(|pool| pool.is_broken()) {
            *tree = RadixTree::default();
            self.tree.clear_poison();
        }
        tree
    }
}

/// A prefix that stays in its [`PrefixCache`] until this is dropped.
#[must_use = "a prefix that nothing pins may go"]
pub struct Pin {
    shared: Arc<Shared>,
    model: Fingerprint,
    ids: Vec<u32>,
}

impl Pin {
    /// The tokens that stay.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("model", &self.model).field("ids", &self.ids).finish_non_exhaustive()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if !self.ids.is_empty() {
            let mut tree = self.shared.lock();
            tree.unpin(self.model, &self.ids);
            // It may have been all that could not go.
            self.shared.evict(&mut tree);
        }
    }
}

/// The prefix of a prompt, taken from a cache.
pub(crate) struct Lease {
    /// Segments, and how many tokens of each are of the prompt.
    pub parts: Vec<(KvSegment, usize)>,
    pin: Pin,
}

impl Lease {
    /// Tokens that were taken.
    pub fn tokens(&self) -> usize {
        self.pin.ids.len()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Tensor};

    use super::*;

    #[test]
    fn what_is_computed_in_another_way_is_neither_taken_nor_inserted() {
        let cache = PrefixCache::new(1 << 20);
        let (now, other) = (Fingerprint::of_another_way().now(), Fingerprint::of_another_way());
        let device = crate::device("flex").unwrap();
        let states = || Tensor::<4>::zeros([1, 1, 2, 4], (&device, DType::F32));
        let segment = || KvSegment::new(states(), states());
        assert_eq!(cache.insert(other, &[1, 2], 0, segment()).unwrap(), 0);
        assert_eq!(cache.insert(now, &[1, 2], 0, segment()).unwrap(), 2);
        assert_eq!((cache.held(now, &[1, 2]), cache.held(other, &[1, 2])), (2, 0));
        // As if it had been computed before fast f32 was allowed, or forbidden.
        cache.shared.lock().insert(other, &[1, 2], 0, segment()).unwrap();
        assert_eq!(cache.held(other, &[1, 2]), 2);
        assert_eq!((cache.usable(other, &[1, 2, 3], 2), cache.take(other, &[1, 2, 3], 2).tokens()), (0, 0));
        assert_eq!((cache.usable(now, &[1, 2, 3], 2), cache.take(now, &[1, 2, 3], 2).tokens()), (2, 2));
    }
}
