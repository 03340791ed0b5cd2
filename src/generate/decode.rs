//! Decoders: how the logits of the next position are obtained.

use std::fmt;

use burn::tensor::DType;

use crate::{CacheStorage, Error, Gpt2, KvCache, Logits, Result, TokenBatch};

/// How tokens are computed. Which tokens does not depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Decoder {
    /// The whole sequence again at each step.
    Naive,
    /// Only the new token, with the keys and values of the others from a cache.
    Kv(CacheStorage),
}

impl Default for Decoder {
    fn default() -> Self {
        Self::Kv(CacheStorage::default())
    }
}

impl fmt::Display for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Naive => "naive",
            Self::Kv(CacheStorage::Growing) => "kv-growing",
            Self::Kv(CacheStorage::Preallocated) => "kv-preallocated",
        })
    }
}

/// A decoder at work: what it knows of the rows' windows, which are the tokens that stand in the context.
pub struct Decoding<'a> {
    model: &'a Gpt2,
    /// None: naive.
    storage: Option<CacheStorage>,
    batch: usize,
    capacity: usize,
    dtype: DType,
    /// Made with the first logits, so that what it costs is a part of what they cost.
    cache: Option<KvCache>,
    computed: Computed,
}

/// What has gone through the model.
#[derive(Clone, Copy, Default)]
pub struct Computed {
    pub tokens: usize,
    /// Places behind the ends of rows that were shorter than others in their forward.
    pub padding: usize,
}

impl Computed {
    fn add(&mut self, rows: &[&[u32]]) {
        let tokens: usize = rows.iter().map(|row| row.len()).sum();
        let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        self.tokens += tokens;
        self.padding += rows.len() * longest - tokens;
    }
}

impl<'a> Decoding<'a> {
    /// For `batch` rows of up to `capacity` tokens; a cache holds its keys and values in `dtype`.
    pub fn new(model: &'a Gpt2, decoder: &Decoder, batch: usize, capacity: usize, dtype: DType) -> Result<Self> {
        let storage = match decoder {
            Decoder::Naive => None,
            Decoder::Kv(storage) => Some(*storage),
        };
        if storage.is_some() && model.is_deterministic() && dtype != DType::F32 {
            let what = "element type of the cache in the deterministic mode";
            return Err(Error::mismatch(what, "F32", format!("{dtype:?}")));
        }
        Ok(Self { model, storage, batch, capacity, dtype, cache: None, computed: Computed::default() })
    }

    /// Logits behind each row's window, one row after the other. What of a window is in the cache is not computed
    /// again.
    pub fn next_logits(&mut self, windows: &[&[u32]]) -> Result<Vec<f32>> {
        if let (Some(storage), None) = (self.storage, &self.cache) {
            let (config, device) = (self.model.config(), self.model.device());
            self.cache = Some(KvCache::new(config, storage, self.batch, self.capacity, self.dtype, &device)?);
        }
        self.refill(windows)?;
        let logits = match &mut self.cache {
            Some(cache) => {
                let new: Vec<&[u32]> = windows.iter().enumerate().map(|(row, ids)| &ids[cache.len(row)..]).collect();
                self.computed.add(&new);
                self.model.forward(&TokenBatch::new(&new, self.model)?, cache, Logits::Last)?
            }
            None => {
                let capacity = self.model.config().n_positions;
                let mut cache = self.model.cache(CacheStorage::Growing, windows.len(), capacity)?;
                self.computed.add(windows);
                self.model.forward(&TokenBatch::new(windows, self.model)?, &mut cache, Logits::Last)?
            }
        };
        logits.try_into_vec_as().map_err(|error| Error::Execution(error.to_string()))
    }

    /// Computes rows that start anew beside others that go on, all but their last token, by themselves: in one forward
    /// with the others, each of those would cost as much as they do.
    fn refill(&mut self, windows: &[&[u32]]) -> Result<()> {
        let Some(cache) = &mut self.cache else { return Ok(()) };
        let starts = |row: &usize| cache.len(*row) == 0 && windows[*row].len() > 1;
        let rows: Vec<usize> = (0..windows.len()).filter(starts).collect();
        if rows.is_empty() || rows.len() == windows.len() {
            return Ok(());
        }
        let heads: Vec<&[u32]> = rows.iter().map(|&row| &windows[row][..windows[row].len() - 1]).collect();
        let longest = heads.iter().map(|head| head.len()).max().unwrap_or(1);
        let device = self.model.device();
        let mut filled =
            KvCache::new(self.model.config(), CacheStorage::Growing, rows.len(), longest, cache.dtype(), &device)?;
        self.computed.add(&heads);
        self.model.hidden_states(&TokenBatch::new(&heads, self.model)?, &mut filled)?;
        rows.iter().enumerate().try_for_each(|(from, &row)| cache.copy_row(row, &filled, from))
    }

    /// Makes row `i` what row `rows[i]` was.
    pub fn gather(&mut self, rows: &[usize]) -> Result<()> {
        self.cache.as_mut().map_or(Ok(()), |cache| cache.gather(rows))
    }

    /// Forgets a row: its window begins elsewhere now.
    pub fn restart(&mut self, row: usize) -> Result<()> {
        self.cache.as_mut().map_or(Ok(()), |cache| cache.truncate(row, 0))
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
