//! [`Prefixes`]: a prefix cache as one model uses it.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::DType;

use super::store::Lease;
use super::{Fingerprint, Plan, PrefixCache};
use crate::cache::KvPool;
#[cfg(feature = "files")]
use crate::{CacheStorage, backends::has_page_kernels};
use crate::{Gpt2, KvSegment, Result};

/// A prefix cache as one model uses it.
#[derive(Clone, Debug)]
pub(crate) struct Prefixes {
    cache: PrefixCache,
    fingerprint: Fingerprint,
}

impl Prefixes {
    pub fn new(cache: &PrefixCache, fingerprint: Fingerprint) -> Self {
        Self { cache: cache.clone(), fingerprint }
    }

    pub fn cache(&self) -> &PrefixCache {
        &self.cache
    }

    /// As the model computes now: whether fast f32 is allowed may have changed since.
    pub fn now(&self) -> Self {
        Self { fingerprint: self.fingerprint(), ..self.clone() }
    }

    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint.now()
    }

    /// The pages of the model's caches in an element type.
    pub fn pool(&self, model: &Gpt2, dtype: DType) -> Arc<KvPool> {
        let config = model.config();
        let shape = [config.n_layer, config.n_head, config.head_dim(), config.n_positions];
        self.cache.pool(shape, dtype, &model.device())
    }

    /// How prompts would be computed now.
    pub fn plan(&self, prompts: &[&[u32]]) -> Plan {
        Plan::new(prompts, self.cache.reuse(), |ids| self.cache.usable(self.fingerprint(), ids, ids.len() - 1))
    }

    /// What is held of the first `max` tokens of a prompt. It stays until that is dropped.
    pub fn take(&self, prompt: &[u32], max: usize) -> Lease {
        self.cache.take(self.fingerprint, prompt, max)
    }

    /// Inserts a sequence, of which `segment` gives the keys and values of what is new.
    pub fn insert(&self, ids: &[u32], segment: impl FnOnce(Range<usize>) -> Result<KvSegment>) -> Result<()> {
        let held = self.cache.held(self.fingerprint, ids);
        if held == ids.len() {
            return Ok(());
        }
        self.cache.insert(self.fingerprint, ids, held, segment(held..ids.len())?)?;
        Ok(())
    }

    /// Notes that these ids are a whole prompt, if they are held.
    pub fn mark(&self, ids: &[u32]) {
        self.cache.mark(self.fingerprint, ids);
    }

    /// Operations per second at which the model computed its last prompts.
    pub fn rate(&self) -> Option<f64> {
        self.cache.rate(self.fingerprint)
    }

    /// Notes at how many operations per second it computed some.
    pub fn set_rate(&self, rate: f64) {
        self.cache.set_rate(self.fingerprint, rate);
    }

    /// What a file must hold for this model, and the pages that it goes to, if its caches are stored so.
    #[cfg(feature = "files")]
    pub fn reader(&self, model: &Gpt2, dtype: DType, storage: Option<CacheStorage>) -> super::Reader {
        let is_paged = storage == Some(CacheStorage::Paged) && has_page_kernels(&model.device());
        super::Reader {
            fingerprint: self.fingerprint(),
            config: model.config().clone(),
            dtype,
            device: model.device(),
            pool: is_paged.then(|| self.pool(model, dtype)),
        }
    }
}
