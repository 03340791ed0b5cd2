//! [`Contexts`]: a model at work on the rows of a batch, with what it keeps of them.
//!
//! Everything that decodes goes through [`Contexts::logits`]: prefill, plain steps, verification of drafts, and draft
//! models.

use std::ops::Range;

use burn::tensor::{DType, Tensor};

use crate::model::RunAhead;
use crate::prefix::{NewCache, Prefixes, Sharing};
use crate::{CacheStorage, Error, Gpt2, KvCache, Logits, MemoryLimit, Result, TokenBatch};

/// What a model knows of the rows' windows, which are the tokens that stand in the context.
pub struct Contexts<'a> {
    model: &'a Gpt2,
    /// None: naive, nothing is kept.
    storage: Option<CacheStorage>,
    capacity: usize,
    dtype: DType,
    /// Made with the first logits, so that what it costs is a part of what they cost.
    cache: Option<KvCache>,
    /// Rows that are decoded ahead; what changes the cache's buffers ends that.
    ahead: Option<RunAhead>,
    /// Whether the device has not failed at capturing yet.
    may_capture: bool,
    computed: Computed,
    /// What a cache, and a forward, may take.
    limit: MemoryLimit,
    /// What is known of rows before the first logits.
    prefixes: Option<Prefixes>,
    sharing: Option<Sharing>,
}

/// What has gone through the model.
#[derive(Clone, Copy, Default)]
pub struct Computed {
    pub tokens: usize,
}

impl Computed {
    fn add(&mut self, rows: &[&[u32]]) {
        self.tokens += rows.iter().map(|row| row.len()).sum::<usize>();
    }
}

/// Logits behind some tokens of each row, on the host.
pub struct RowLogits {
    values: Vec<f32>,
    vocab_size: usize,
    /// Which of the positions in `values` are each row's.
    rows: Vec<Range<usize>>,
}

impl RowLogits {
    fn new(values: Vec<f32>, vocab_size: usize, counts: &[usize]) -> Self {
        let starts = counts.iter().scan(0, |end, count| {
            *end += count;
            Some(*end - count..*end)
        });
        Self { values, vocab_size, rows: starts.collect() }
    }

    /// Those of a row, `[vocab_size]` for each of its positions.
    pub fn row(&self, row: usize) -> impl Iterator<Item = &[f32]> {
        let Range { start, end } = self.rows[row].clone();
        self.values[start * self.vocab_size..end * self.vocab_size].chunks_exact(self.vocab_size)
    }

    /// Makes row `i` what row `rows[i]` was.
    pub fn gather(&mut self, rows: &[usize]) {
        self.rows = rows.iter().map(|&row| self.rows[row].clone()).collect();
    }
}

impl<'a> Contexts<'a> {
    /// For rows of up to `capacity` tokens; a cache, stored as `storage` says, holds their keys and values in `dtype`.
    pub fn new(model: &'a Gpt2, storage: Option<CacheStorage>, capacity: usize, dtype: DType) -> Result<Self> {
        if storage.is_some() && model.is_deterministic() && dtype != DType::F32 {
            let what = "element type of the cache in the deterministic mode";
            return Err(Error::mismatch(what, "F32", format!("{dtype:?}")));
        }
        let computed = Computed::default();
        Ok(Self {
            model,
            storage,
            capacity,
            dtype,
            cache: None,
            ahead: None,
            may_capture: true,
            computed,
            limit: MemoryLimit::system(),
            prefixes: None,
            sharing: None,
        })
    }

    /// With a cache of prefixes, the first logits compute only what no earlier row has computed, and of what several rows
    /// share each token once.
    pub fn with_prefixes(self, prefixes: Option<Prefixes>) -> Self {
        Self { prefixes: prefixes.map(|prefixes| prefixes.now()), ..self }
    }

    /// With this limit for a cache, and for a forward, instead of the system's.
    pub fn with_limit(self, limit: MemoryLimit) -> Self {
        Self { limit, ..self }
    }

    /// Logits behind the last `counts[b]` tokens of each row's window. What of a window is in the cache before those is
    /// not computed again; what else the cache holds of the row is forgotten.
    pub fn logits(&mut self, windows: &[&[u32]], counts: &[usize]) -> Result<RowLogits> {
        let Some(storage) = self.storage else { return self.naive_logits(windows, counts) };
        if let (None, Some(prefixes), true) = (&self.cache, &self.prefixes, counts.iter().all(|count| *count == 1)) {
            return self.first_logits(prefixes.clone(), storage, windows);
        }
        self.ahead = None;
        self.make_cache(storage, windows.len())?;
        self.cut_to(windows, counts)?;
        let Some(cache) = &mut self.cache else { unreachable!("it was made") };
        let new: Vec<&[u32]> = windows.iter().enumerate().map(|(row, ids)| &ids[cache.len(row)..]).collect();
        self.computed.add(&new);
        let logits = self.model.forward(&TokenBatch::new(&new, self.model)?, cache, Logits::Counts(counts))?; // [N, V]
        self.on_host(logits, counts)
    }

    /// Logits behind each row's window that the model's first `layers` layers and its head give.
    ///
    /// The keys and values of what they compute are in those layers of the cache only. So the rows have to be truncated to
    /// what they held before, ere the other layers have a turn.
    pub fn exit_logits(&mut self, windows: &[&[u32]], layers: usize) -> Result<RowLogits> {
        let counts = vec![1; windows.len()];
        self.cut_to(windows, &counts)?;
        let Some(cache) = &mut self.cache else { return Err(Error::EmptyBatch) };
        let new: Vec<&[u32]> = windows.iter().enumerate().map(|(row, ids)| &ids[cache.len(row)..]).collect();
        let logits = self.model.forward_exit(&TokenBatch::new(&new, self.model)?, cache, layers)?; // [B, V]
        self.on_host(logits, &counts)
    }

    /// Whether [`greedy`](Self::greedy) saves waiting.
    pub fn can_run_ahead(&self) -> bool {
        let keeps = matches!(self.storage, Some(CacheStorage::Preallocated)) && self.cache.is_some();
        keeps && self.model.can_run_ahead()
    }

    /// The `steps` likeliest next tokens of each row, `[steps][rows]`, at most `most` of them: see
    /// [`Gpt2::run_ahead`]. Of each window, all but the last token are in the cache; so are they of what comes out.
    ///
    /// None: the device failed at what was only to save time, and everything has to be computed anew.
    pub fn greedy(&mut self, windows: &[&[u32]], steps: usize, most: usize) -> Result<Option<Vec<Vec<i32>>>> {
        self.cut_to(windows, &vec![1; windows.len()])?;
        let Some(cache) = &mut self.cache else { return Err(Error::EmptyBatch) };
        let last: Vec<u32> = windows.iter().filter_map(|window| window.last().copied()).collect();
        let mut ahead = match self.ahead.take() {
            Some(ahead) if ahead.is_at(&last, cache.lens()) => ahead,
            _ => self.model.start_ahead(&last, cache, most, self.may_capture),
        };
        let Some(chosen) = self.model.run_ahead(&mut ahead, cache, steps)? else {
            self.cache = None;
            self.may_capture = false;
            return Ok(None);
        };
        for _ in 0..steps {
            self.computed.add(&vec![&[0][..]; windows.len()]);
        }
        self.ahead = Some(ahead);
        Ok(Some(chosen))
    }

    /// Fills the rows with tokens, whose logits nobody wants.
    pub fn fill(&mut self, windows: &[&[u32]]) -> Result<()> {
        let Some(storage) = self.storage else { return Ok(()) };
        self.make_cache(storage, windows.len())?;
        let Some(cache) = &mut self.cache else { unreachable!("it was made") };
        self.computed.add(windows);
        self.model.prefill(&TokenBatch::new(windows, self.model)?, cache)
    }

    /// Forgets what the cache holds behind the tokens before those whose logits are wanted.
    fn cut_to(&mut self, windows: &[&[u32]], counts: &[usize]) -> Result<()> {
        let mut lens = windows.iter().zip(counts).map(|(window, count)| window.len() - count).enumerate();
        lens.try_for_each(|(row, len)| self.truncate(row, len))
    }

    fn first_logits(&mut self, prefixes: Prefixes, storage: CacheStorage, windows: &[&[u32]]) -> Result<RowLogits> {
        let new = NewCache { storage, capacity: self.capacity, dtype: self.dtype, limit: self.limit };
        let filled = prefixes.fill(self.model, windows, &new)?;
        let counts = vec![1; filled.plan.distinct().len()];
        let mut logits = RowLogits::new(filled.logits, self.model.config().vocab_size, &counts);
        logits.gather(filled.plan.of_prompt());
        self.computed.tokens += filled.plan.computed_tokens();
        self.cache = Some(filled.cache);
        self.sharing = Some(filled.sharing);
        Ok(logits)
    }

    fn naive_logits(&mut self, windows: &[&[u32]], counts: &[usize]) -> Result<RowLogits> {
        let (config, device) = (self.model.config(), self.model.device());
        let (batch, capacity, dtype) = (windows.len(), config.n_positions, self.model.dtype());
        let growing = CacheStorage::Growing;
        let mut cache = KvCache::new_within(config, growing, batch, capacity, dtype, &device, self.limit)?;
        self.computed.add(windows);
        let tokens = TokenBatch::new(windows, self.model)?;
        let logits = self.model.forward(&tokens, &mut cache, Logits::Counts(counts))?; // [N, V]
        self.on_host(logits, counts)
    }

    fn on_host(&self, logits: Tensor<2>, counts: &[usize]) -> Result<RowLogits> {
        let values = logits.try_into_vec_as().map_err(|error| Error::Execution(error.to_string()))?;
        Ok(RowLogits::new(values, self.model.config().vocab_size, counts))
    }

    fn make_cache(&mut self, storage: CacheStorage, batch: usize) -> Result<()> {
        if self.cache.is_none() {
            let (config, device) = (self.model.config(), self.model.device());
            let cache = KvCache::new_within(config, storage, batch, self.capacity, self.dtype, &device, self.limit)?;
            self.cache = Some(cache);
        }
        Ok(())
    }

    /// Makes row `i` what row `rows[i]` was.
    pub fn gather(&mut self, rows: &[usize]) -> Result<()> {
        let is_the_same = self.cache.as_ref().is_some_and(|cache| rows.iter().copied().eq(0..cache.batch()));
        if is_the_same {
            return Ok(());
        }
        self.ahead = None;
        self.cache.as_mut().map_or(Ok(()), |cache| cache.gather(rows))
    }

    /// Takes row `row` out; those behind it move up.
    pub fn remove(&mut self, row: usize) -> Result<()> {
        self.ahead = None;
        self.cache.as_mut().map_or(Ok(()), |cache| cache.remove(row))
    }

    /// Forgets what is known of a row behind its first `len` tokens.
    pub fn truncate(&mut self, row: usize, len: usize) -> Result<()> {
        self.cache.as_mut().map_or(Ok(()), |cache| cache.truncate(row, len.min(cache.len(row))))
    }

    /// Whether nothing was computed yet.
    pub fn is_new(&self) -> bool {
        self.cache.is_none()
    }

    /// Whether the first logits compute what rows share once.
    pub fn shares_prefixes(&self) -> bool {
        self.prefixes.is_some()
    }

    /// Tokens of a row that are known; 0 before the first logits.
    pub fn len(&self, row: usize) -> usize {
        self.cache.as_ref().map_or(0, |cache| cache.len(row))
    }

    /// Most tokens that a row can have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Keeps what is known of a row for rows to come, if there is a cache of prefixes.
    pub fn keep(&self, row: usize, window: &[u32]) -> Result<()> {
        match (&self.prefixes, &self.cache) {
            (Some(prefixes), Some(cache)) => prefixes.keep(cache, row, window),
            _ => Ok(()),
        }
    }

    /// What the first logits took, if there is a cache of prefixes.
    pub fn sharing(&self) -> Option<&Sharing> {
        self.sharing.as_ref()
    }

    /// What has gone through the model.
    pub fn computed(&self) -> Computed {
        self.computed
    }

    /// Bytes that the cache has reserved.
    pub fn kv_bytes(&self) -> usize {
        self.cache.as_ref().map_or(0, |cache| cache.bytes().reserved)
    }
}
