//! [`KvSegment`]: keys and values of some tokens, apart from any cache.

use std::ops::Range;

use burn::tensor::{DType, Device, Tensor};

use super::layer::{LayerCache, own};
use super::{CacheStorage, KvCache};
use crate::model::attention::Segment;
use crate::{Error, Gpt2Config, Result, Threads};

/// Keys and values of consecutive tokens of one sequence, for each layer of a model. It owns its memory; a clone shares it.
#[derive(Clone, Debug)]
pub struct KvSegment {
    /// `[1, H, n, D]` each.
    layers: Vec<Segment>,
}

impl KvSegment {
    /// From the keys and the values of all layers, `[layers, H, n, D]` each with at least one layer.
    pub(crate) fn from_layers(keys: &Tensor<4>, values: &Tensor<4>) -> Self {
        let layer = |all: &Tensor<4>, index| own(all.clone().narrow(0, index, 1));
        let [layers, ..] = keys.dims();
        let both = |index| Segment { keys: layer(keys, index), values: layer(values, index) };
        Self { layers: (0..layers).map(both).collect() }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        let [_, _, tokens, _] = self.layers[0].keys.dims();
        tokens
    }

    /// Bytes that it takes: 2 x layers x tokens x width x element size.
    pub fn bytes(&self) -> usize {
        let bytes = |tensor: &Tensor<4>| tensor.shape().num_elements() * tensor.dtype().size();
        self.layers.iter().map(|layer| bytes(&layer.keys) + bytes(&layer.values)).sum()
    }

    /// Element type of the keys and values.
    pub fn dtype(&self) -> DType {
        self.layers[0].keys.dtype()
    }

    /// Keys and values, `[1, H, n, D]`, of each layer.
    pub(crate) fn layers(&self) -> impl Iterator<Item = (&Tensor<4>, &Tensor<4>)> {
        self.layers.iter().map(|layer| (&layer.keys, &layer.values))
    }

    /// Some of the tokens, copied.
    pub(crate) fn part(&self, tokens: Range<usize>) -> Self {
        let part = |all: &Tensor<4>| own(all.clone().narrow(2, tokens.start, tokens.len()));
        let part = |layer: &Segment| Segment { keys: part(&layer.keys), values: part(&layer.values) };
        Self { layers: self.layers.iter().map(part).collect() }
    }

    /// `[layers, heads, width of a head]`.
    pub(crate) fn shape(&self) -> [usize; 3] {
        let [_, heads, _, head_dim] = self.layers[0].keys.dims();
        [self.layers.len(), heads, head_dim]
    }

    fn device(&self) -> Device {
        self.layers[0].keys.device()
    }
}

impl KvCache {
    /// Keys and values of some of the positions of a row, copied.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if there is no such row, or it does not hold these positions, or they are none.
    pub fn segment(&self, row: usize, positions: Range<usize>) -> Result<KvSegment> {
        if row >= self.batch() {
            return Err(Error::mismatch("row of the cache", format!("less than {}", self.batch()), row));
        }
        if positions.is_empty() || positions.end > self.len(row) {
            let expected = format!("some of 0..{}", self.len(row));
            return Err(Error::mismatch("positions of a row", expected, format!("{positions:?}")));
        }
        let part = |all: Tensor<4>| own(all.narrow(0, row, 1).narrow(2, positions.start, positions.len()));
        let both = |(keys, values)| Segment { keys: part(keys), values: part(values) };
        Ok(KvSegment { layers: self.layers.iter().filter_map(|layer| layer.buffers()).map(both).collect() })
    }

    /// As [`new`](Self::new) for `rows.len()` rows, followed by [`append_segments`](Self::append_segments), without writing
    /// the same memory twice.
    ///
    /// # Errors
    ///
    /// As both.
    pub fn with_segments(
        config: &Gpt2Config,
        storage: CacheStorage,
        capacity: usize,
        dtype: DType,
        device: &Device,
        rows: &[Vec<(KvSegment, usize)>],
    ) -> Result<Self> {
        // A growing cache has no buffers yet.
        let mut cache = Self::new(config, CacheStorage::Growing, rows.len(), capacity, dtype, device)?;
        cache.storage = storage;
        cache.append_segments(rows)?;
        Ok(cache)
    }

    /// Appends to each row `b` the segments `rows[b]`, one after the other, and of each so many tokens from its beginning
    /// as stand beside it.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if there is not one list a row, a segment is shorter than said, or is of a model of another
    /// shape or on another device; [`Error::CacheFull`] if a row would be longer than the capacity. The cache is then as it
    /// was.
    pub fn append_segments(&mut self, rows: &[Vec<(KvSegment, usize)>]) -> Result<()> {
        let lens = self.check_segments(rows)?;
        let [_, heads, head_dim, _] = self.shape;
        // What the buffers must hold.
        let positions = match self.storage {
            CacheStorage::Preallocated => self.capacity,
            CacheStorage::Growing => lens.iter().copied().max().unwrap_or(0),
        };
        let shape = [self.batch(), heads, positions, head_dim];
        let fill = |(index, layer): (usize, &mut LayerCache)| {
            let part = |(segment, tokens): &(KvSegment, usize)| {
                let Segment { keys, values } = segment.layers[index].clone();
                Segment { keys: keys.narrow(2, 0, *tokens), values: values.narrow(2, 0, *tokens) }.cast(self.dtype)
            };
            let rows: Vec<Vec<Segment>> =
                rows.iter().map(|parts| parts.iter().filter(|part| part.1 > 0).map(part).collect()).collect();
            match layer.is_made() {
                true => layer.append_rows(&rows, &self.lens, positions),
                false => *layer = LayerCache::with_rows(&rows, shape, self.dtype, &self.device),
            }
        };
        let layers = self.layers.iter_mut().enumerate().filter(|_| positions > 0);
        match crate::backends::has_kernels(&self.device) {
            // Most of the time goes into asking for memory, which threads do faster.
            true => Threads::for_each(layers.collect(), fill),
            false => layers.for_each(fill),
        }
        self.lens = lens;
        Ok(())
    }

    /// The rows' lengths once the segments are behind them.
    fn check_segments(&self, rows: &[Vec<(KvSegment, usize)>]) -> Result<Vec<usize>> {
        if rows.len() != self.batch() {
            return Err(Error::mismatch("rows of segments", self.batch(), rows.len()));
        }
        let [layers, heads, head_dim, _] = self.shape;
        let mut lens = self.lens.clone();
        for (row, parts) in rows.iter().enumerate() {
            for (segment, tokens) in parts {
                if (segment.shape(), segment.device()) != ([layers, heads, head_dim], self.device.clone()) {
                    let what = "[layers, heads, width of a head] of a segment";
                    let expected = format!("{:?} on {:?}", [layers, heads, head_dim], self.device);
                    return Err(Error::mismatch(
                        what,
                        expected,
                        format!("{:?} on {:?}", segment.shape(), segment.device()),
                    ));
                }
                if *tokens > segment.tokens() {
                    return Err(Error::mismatch(
                        "tokens of a segment",
                        format!("at most {}", segment.tokens()),
                        tokens,
                    ));
                }
                lens[row] += tokens;
            }
            if lens[row] > self.capacity {
                return Err(Error::CacheFull { row, tokens: lens[row], capacity: self.capacity });
            }
        }
        Ok(lens)
    }
}
