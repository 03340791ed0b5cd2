//! [`Runner`]: one model at work on rows, with the cache of what it has computed of them.
//!
//! Everything that decodes goes through [`Runner::forward`]: prompts, plain steps, verification of drafts, and draft models. A
//! runner remembers which tokens its cache holds of each row; so whoever wants logits says what a row's tokens are, and what of
//! them is not known is computed: nothing has to be rolled back where a draft was wrong, or emptied where a context slides.

mod logits;
mod multi_step;
mod prefill;

use burn::tensor::{DType, Tensor};

use crate::cache::{PageCounts, retain};
use crate::model::MultiStep;
use crate::prefix::Prefixes;
use crate::{CacheStorage, Error, Gpt2, KvCache, KvCacheConfig, Logits, Result, TokenBatch};
pub use logits::RowLogits;
pub use prefill::Pending;

/// What a runner keeps of rows.
#[derive(Clone, Debug)]
pub struct RunnerConfig {
    /// The cache of keys and values, with the rows for which there is room from the start.
    pub cache: KvCacheConfig,
    /// Whether there is one; if not, each forward computes all tokens of a row.
    pub uses_cache: bool,
    /// What is known of rows from before.
    pub prefixes: Option<Prefixes>,
}

/// One model at work on rows.
pub struct Runner<'a> {
    model: &'a Gpt2,
    config: RunnerConfig,
    /// Made with the first forward, so that what it costs is a part of what that costs.
    cache: Option<KvCache>,
    /// The tokens of each row that are computed, from its context's start on.
    held: Vec<Vec<u32>>,
    /// Rows that are decoded several steps at a time; what changes the cache's buffers ends that.
    multi_step: Option<MultiStep>,
    /// Whether the device has not failed at capturing yet.
    may_capture: bool,
    /// Whether rows have left, whose slots may hold anything.
    has_left: bool,
    computed_tokens: usize,
}

/// What a forward does for a row.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'t> {
    /// The row.
    pub row: usize,
    /// Its tokens from the start of its context up to the last that is computed now.
    pub tokens: &'t [u32],
    /// Behind how many of the last of them logits are wanted.
    pub logits: usize,
}

impl<'a> Runner<'a> {
    /// Without rows.
    pub fn new(model: &'a Gpt2, config: RunnerConfig) -> Result<Self> {
        if config.uses_cache && model.is_deterministic() && config.cache.dtype != DType::F32 {
            let what = "element type of the cache in the deterministic mode";
            return Err(Error::mismatch(what, "F32", format!("{:?}", config.cache.dtype)));
        }
        let prefixes = config.prefixes.map(|prefixes| prefixes.now());
        Ok(Self {
            model,
            config: RunnerConfig { prefixes, ..config },
            cache: None,
            held: Vec::new(),
            multi_step: None,
            may_capture: true,
            has_left: false,
            computed_tokens: 0,
        })
    }

    /// The model.
    pub fn model(&self) -> &'a Gpt2 {
        self.model
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.held.len()
    }

    /// Most tokens of a row.
    pub fn capacity(&self) -> usize {
        self.config.cache.capacity
    }

    /// How many of the first of these tokens are known of a row.
    pub fn known(&self, row: usize, tokens: &[u32]) -> usize {
        common(&self.held[row], tokens)
    }

    /// Tokens that have gone through the model.
    pub fn computed_tokens(&self) -> usize {
        self.computed_tokens
    }

    /// Bytes that the cache has reserved.
    pub fn kv_bytes(&self) -> usize {
        self.cache.as_ref().map_or(0, |cache| cache.bytes().reserved)
    }

    /// What the pages of the cache are used for.
    pub fn pages(&self) -> PageCounts {
        self.cache.as_ref().map_or(PageCounts::default(), KvCache::pages)
    }

    /// Checks that a row of so many tokens has room, at least if it is alone.
    pub fn check_row(&self, tokens: usize) -> Result<()> {
        match self.config.uses_cache {
            true => self.config.cache.check_row(self.model.config(), &self.model.device(), tokens),
            false => Ok(()),
        }
    }

    /// Whether another row of so many tokens has room.
    pub fn has_room(&self, tokens: usize) -> bool {
        self.cache.as_ref().is_none_or(|cache| cache.has_room(tokens))
    }

    /// Adds an empty row behind the last one; returns which it is.
    pub fn push(&mut self) -> Result<usize> {
        self.multi_step = None;
        let row = self.held.len();
        if let Some(cache) = &mut self.cache {
            cache.push()?;
            // Kernels read nothing that a query does not see; burn's operations multiply it by zero.
            if self.has_left && !self.model.is_packed() {
                cache.wipe(row);
            }
        }
        self.held.push(Vec::new());
        Ok(row)
    }

    /// Adds copies of the first `tokens` that are known of a row behind the last one.
    pub fn fork(&mut self, row: usize, tokens: usize, times: usize) -> Result<()> {
        self.multi_step = None;
        match &mut self.cache {
            // It copies everything with each row that comes.
            Some(cache) if cache.storage() == CacheStorage::Growing && times > 0 => {
                cache.truncate(row, tokens.min(cache.len(row)))?;
                self.held[row].truncate(tokens);
                cache.fork(row, times)?;
                self.held.extend(vec![self.held[row].clone(); times]);
            }
            _ => {
                let new = (0..times).map(|_| self.push()).collect::<Result<Vec<usize>>>()?;
                self.copy(row, &new, tokens)?;
            }
        }
        Ok(())
    }

    /// Takes out each row `b` of which `is_kept[b]` is false; those behind it move up. Where there is no room for what that copies,
    /// nothing is known any more.
    pub fn retain(&mut self, is_kept: &[bool]) {
        (self.multi_step, self.has_left) = (None, true);
        retain(&mut self.held, is_kept);
        if self.cache.as_mut().is_some_and(|cache| cache.retain(is_kept).is_err()) {
            self.cache = None;
            self.held.iter_mut().for_each(Vec::clear);
        }
    }

    /// Takes out all rows behind the first `rows`.
    pub fn truncate_rows(&mut self, rows: usize) {
        if rows < self.rows() {
            self.retain(&(0..self.rows()).map(|row| row < rows).collect::<Vec<bool>>());
        }
    }

    /// Forgets a row whose numbers are none.
    pub fn wipe(&mut self, row: usize) {
        self.multi_step = None;
        if let Some(cache) = &mut self.cache {
            cache.wipe(row);
        }
        self.held[row].clear();
    }

    /// Makes what is known of each of the rows `to` the first `tokens` that are known of row `from`.
    pub fn copy(&mut self, from: usize, to: &[usize], tokens: usize) -> Result<()> {
        self.multi_step = None;
        if let Some(cache) = &mut self.cache {
            cache.copy_prefix(from, to, tokens)?;
        }
        to.iter().for_each(|&row| self.held[row] = self.held[from][..tokens].to_vec());
        Ok(())
    }

    /// Computes what is not known of these rows, each named once; returns the logits that are wanted, by row. If it fails, all
    /// rows are as they were, or know less.
    pub fn forward(&mut self, turns: &[Turn<'_>]) -> Result<RowLogits> {
        if !self.config.uses_cache {
            return self.forward_naive(turns);
        }
        self.multi_step = None;
        self.make_cache()?;
        let starts = turns.iter().map(|turn| {
            let start = turn.tokens.len().saturating_sub(turn.logits);
            self.known(turn.row, turn.tokens).min(start)
        });
        let starts: Vec<usize> = starts.collect();
        for (turn, &start) in turns.iter().zip(&starts) {
            self.truncate(turn.row, start)?;
        }
        let (mut new, mut counts): (Vec<&[u32]>, _) = (vec![&[]; self.rows()], vec![0; self.rows()]);
        for (turn, &start) in turns.iter().zip(&starts) {
            (new[turn.row], counts[turn.row]) = (&turn.tokens[start..], turn.logits);
        }
        let logits = self.compute(&new, &counts)?;
        for (turn, &start) in turns.iter().zip(&starts) {
            self.held[turn.row].extend_from_slice(&turn.tokens[start..]);
        }
        self.computed_tokens += new.iter().map(|new| new.len()).sum::<usize>();
        Ok(logits)
    }

    /// Appends new tokens to the rows of the cache.
    fn compute(&mut self, new: &[&[u32]], counts: &[usize]) -> Result<RowLogits> {
        if new.iter().all(|new| new.is_empty()) {
            return Ok(RowLogits::default());
        }
        let tokens = TokenBatch::packed(new, self.model)?;
        let logits = self.with_room(|runner| {
            let Some(cache) = &mut runner.cache else { return Err(Error::EmptyBatch) };
            if counts.iter().all(|count| *count == 0) {
                runner.model.prefill(&tokens, cache)?;
                return Ok(None);
            }
            Ok(Some(runner.model.forward(&tokens, cache, Logits::Counts(counts))?)) // [M, V]
        })?;
        logits.map_or(Ok(RowLogits::default()), |logits| self.on_host(logits, counts))
    }

    /// Computes all tokens of the rows whose logits are wanted, and keeps nothing.
    fn forward_naive(&mut self, turns: &[Turn<'_>]) -> Result<RowLogits> {
        let wanted: Vec<&Turn<'_>> = turns.iter().filter(|turn| turn.logits > 0).collect();
        let mut logits = RowLogits::default();
        if !wanted.is_empty() {
            let (config, limit) = (self.model.config(), self.config.cache.limit);
            let cache = KvCacheConfig::for_one_forward(wanted.len(), config.n_positions);
            let cache = cache.with_dtype(self.model.dtype()).with_limit(limit);
            let mut cache = cache.init(config, &self.model.device())?;
            let rows: Vec<&[u32]> = wanted.iter().map(|turn| turn.tokens).collect();
            let of_turns: Vec<usize> = wanted.iter().map(|turn| turn.logits).collect();
            let tokens = TokenBatch::new(&rows, self.model)?;
            let values = self.model.forward(&tokens, &mut cache, Logits::Counts(&of_turns))?; // [M, V]
            logits = self.on_host(values, &of_turns)?.of_rows(wanted.iter().map(|turn| turn.row));
            self.computed_tokens += rows.iter().map(|row| row.len()).sum::<usize>();
        }
        // As if they were kept: what is to be computed next is told from that.
        turns.iter().for_each(|turn| self.held[turn.row] = turn.tokens.to_vec());
        Ok(logits)
    }

    /// Forgets what is known of a row beside these tokens, and the last of them, so that the first layers can go on from there: see
    /// [`exit_forward`](Self::exit_forward).
    pub fn begin_exit(&mut self, row: usize, tokens: &[u32]) -> Result<()> {
        let known = self.known(row, tokens).min(tokens.len().saturating_sub(1));
        self.truncate(row, known)
    }

    /// Forgets what the first layers have computed of a row.
    pub fn end_exit(&mut self, row: usize) -> Result<()> {
        self.truncate(row, self.held[row].len())
    }

    /// Logits behind the last token of each turn that the model's first `layers` layers and its head give.
    ///
    /// The keys and values of what they compute are in those layers of the cache only. So none of it is known afterwards, but for
    /// the next call of this, which goes on from there, until [`end_exit`](Self::end_exit).
    pub fn exit_forward(&mut self, turns: &[Turn<'_>], layers: usize) -> Result<RowLogits> {
        self.multi_step = None;
        let rows = self.rows();
        let Some(cache) = &mut self.cache else { return Err(Error::EmptyBatch) };
        let mut new: Vec<&[u32]> = vec![&[]; rows];
        turns.iter().for_each(|turn| new[turn.row] = &turn.tokens[cache.len(turn.row).min(turn.tokens.len())..]);
        let counts: Vec<usize> = new.iter().map(|new| new.len().min(1)).collect();
        let logits = self.model.forward_exit(&TokenBatch::packed(&new, self.model)?, cache, layers)?; // [M, V]
        self.on_host(logits, &counts)
    }

    fn on_host(&self, logits: Tensor<2>, counts: &[usize]) -> Result<RowLogits> {
        let values = logits.try_into_vec_as().map_err(|error| Error::Execution(error.to_string()))?;
        Ok(RowLogits::new(values, self.model.config().vocab_size, counts))
    }

    /// Makes the cache now, and not with the first forward.
    pub fn make_cache(&mut self) -> Result<()> {
        if self.config.uses_cache && self.cache.is_none() {
            let rows = self.config.cache.rows.max(self.rows());
            let config = KvCacheConfig { rows, ..self.config.cache };
            let prefixes = self.config.prefixes.as_ref();
            let pool = prefixes.map(|prefixes| prefixes.pool(self.model, config.dtype));
            let mut cache = config.init_in(self.model.config(), &self.model.device(), pool.as_ref())?;
            cache.remove_all();
            self.held.iter().try_for_each(|_| cache.push())?;
            self.cache = Some(cache);
        }
        Ok(())
    }

    /// Forgets what is known of a row behind its first `len` tokens.
    fn truncate(&mut self, row: usize, len: usize) -> Result<()> {
        self.held[row].truncate(len);
        self.cache.as_mut().map_or(Ok(()), |cache| cache.truncate(row, len.min(cache.len(row))))
    }
}

/// How many tokens both begin with.
fn common(one: &[u32], other: &[u32]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}
