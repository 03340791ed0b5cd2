//! [`KvSegment`]: keys and values of some tokens, apart from any cache.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};

use super::layer::own;
use super::pool::{KeptPages, KvPool};
use super::{Held, KvCache, States, number_type};
use crate::device::is_same_device;
use crate::memory::{check_buffer, product};
use crate::{Error, Result};

/// Keys and values of consecutive tokens of one sequence, for each layer of a model. A clone shares its memory.
#[derive(Clone, Debug)]
pub struct KvSegment {
    states: Arc<Memory>,
}

#[derive(Debug)]
enum Memory {
    /// Its own: `[layers, H, n, D]` both.
    Own(Box<States>),
    /// Pages that caches share.
    Pages(KeptPages),
}

impl KvSegment {
    /// From keys and values of all layers, `[layers, H, n, D]`, in memory of their own.
    pub(crate) fn new(keys: Tensor<4>, values: Tensor<4>) -> Self {
        Self { states: Arc::new(Memory::Own(Box::new(States { keys, values }))) }
    }

    fn of_pages(pages: KeptPages) -> Self {
        Self { states: Arc::new(Memory::Pages(pages)) }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        match &*self.states {
            Memory::Own(states) => states.keys.dims()[2],
            Memory::Pages(pages) => pages.tokens(),
        }
    }

    /// Bytes that it takes: 2 x layers x tokens x width x element size, or those of whole pages.
    pub fn bytes(&self) -> usize {
        let bytes = |tensor: &Tensor<4>| tensor.shape().num_elements() * tensor.dtype().size();
        match &*self.states {
            Memory::Own(states) => bytes(&states.keys) + bytes(&states.values),
            Memory::Pages(pages) => pages.bytes(),
        }
    }

    /// Bytes that it takes outside of pages, which others may share.
    pub(crate) fn own_bytes(&self) -> usize {
        match &*self.states {
            Memory::Own(_) => self.bytes(),
            Memory::Pages(_) => 0,
        }
    }

    /// Element type of the keys and values; of integers, that of the numbers that they stand for.
    pub fn dtype(&self) -> DType {
        match &*self.states {
            Memory::Own(states) => states.keys.dtype(),
            Memory::Pages(pages) => number_type(pages.dtype()),
        }
    }

    /// Layers, heads, tokens and width of a head.
    #[cfg(feature = "files")]
    pub(crate) fn shape(&self) -> [usize; 4] {
        let ([layers, heads, head_dim], _) = self.shape_and_device();
        [layers, heads, self.tokens(), head_dim]
    }

    /// Keys and values of all layers, `[layers, H, n, D]`; copied out of pages.
    pub(crate) fn states(&self) -> States {
        match &*self.states {
            Memory::Own(states) => (**states).clone(),
            Memory::Pages(pages) => stacked(pages.read(pages.tokens())),
        }
    }

    /// Some of the tokens; copied, if they are not in pages.
    pub(crate) fn part(&self, tokens: Range<usize>) -> Self {
        let part = |all: &Tensor<4>| own(all.clone().narrow(2, tokens.start, tokens.len()));
        match &*self.states {
            Memory::Own(states) => Self::new(part(&states.keys), part(&states.values)),
            Memory::Pages(pages) => Self::of_pages(pages.part(tokens)),
        }
    }

    /// The first tokens' keys and values in one layer, `[1, H, tokens, D]`, copied.
    pub(super) fn layer(&self, layer: usize, tokens: usize, dtype: DType) -> States {
        let States { keys, values } = self.states();
        let part = |all: Tensor<4>| own(all.narrow(0, layer, 1).narrow(2, 0, tokens));
        States { keys: part(keys), values: part(values) }.rounded(dtype)
    }

    /// The same in each layer.
    pub(super) fn layers(&self, tokens: usize, dtype: DType) -> Vec<States> {
        match &*self.states {
            Memory::Pages(pages) => pages.read(tokens).into_iter().map(|states| states.rounded(dtype)).collect(),
            Memory::Own(states) => (0..states.keys.dims()[0]).map(|layer| self.layer(layer, tokens, dtype)).collect(),
        }
    }

    /// Its pages, if they are of this pool.
    pub(super) fn pages_of(&self, pool: &Arc<KvPool>) -> Option<&KeptPages> {
        match &*self.states {
            Memory::Pages(pages) => Some(pages).filter(|pages| Arc::ptr_eq(pages.pool(), pool)),
            Memory::Own(_) => None,
        }
    }

    /// The same for all clones of it, and for no other.
    pub(super) fn id(&self) -> usize {
        Arc::as_ptr(&self.states) as usize
    }

    /// `[layers, heads, width of a head]`, and where it is.
    fn shape_and_device(&self) -> ([usize; 3], Device) {
        match &*self.states {
            Memory::Own(states) => {
                let [layers, heads, _, head_dim] = states.keys.dims();
                ([layers, heads, head_dim], states.keys.device())
            }
            Memory::Pages(pages) => (pages.shape(), pages.device().clone()),
        }
    }
}

impl KvCache {
    /// Keys and values of some of the positions of a row, copied.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if there is no such row, or it does not hold these positions, or they are none, or their keys in all
    /// layers are more than the device reads as one buffer.
    pub fn segment(&self, row: usize, positions: Range<usize>) -> Result<KvSegment> {
        self.check_positions(row, &positions)?;
        let [layers, heads, head_dim, _] = self.shape;
        let bytes = product([layers, heads, positions.len(), head_dim, number_type(self.config.dtype).size()]);
        check_buffer("bytes of a segment's keys", bytes, &self.device)?;
        let States { keys, values } = stacked(self.read(row, positions));
        Ok(KvSegment::new(keys, values))
    }

    /// As [`segment`](Self::segment), without a copy where the cache's pages are shared.
    pub(crate) fn share(&self, row: usize, positions: Range<usize>) -> Result<KvSegment> {
        self.check_positions(row, &positions)?;
        match &self.held {
            Held::Pages(pages) if pages.is_shared() => Ok(KvSegment::of_pages(pages.keep(row, positions))),
            _ => self.segment(row, positions),
        }
    }

    fn check_positions(&self, row: usize, positions: &Range<usize>) -> Result<()> {
        if row >= self.batch() {
            return Err(Error::mismatch("row of the cache", format!("less than {}", self.batch()), row));
        }
        if positions.is_empty() || positions.end > self.len(row) {
            let expected = format!("some of 0..{}", self.len(row));
            return Err(Error::mismatch("positions of a row", expected, format!("{positions:?}")));
        }
        Ok(())
    }

    /// Appends to each row `b` the segments `rows[b]`, one after the other, and of each so many tokens from its beginning
    /// as stand beside it.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if there is not one list a row, a segment is shorter than said, or is of a model of another
    /// shape or on another device; [`Error::CacheFull`] if a row would be longer than the capacity; [`Error::OutOfMemory`]. The
    /// cache is then as it was.
    pub fn append_segments(&mut self, rows: &[Vec<(KvSegment, usize)>]) -> Result<()> {
        let lens = self.check_segments(rows)?;
        let [_, heads, head_dim, _] = self.shape;
        // What buffers must hold.
        let positions = match &self.held {
            Held::Buffers(buffers) if buffers.is_growing() => lens.iter().copied().max().unwrap_or(0),
            _ => self.config.capacity,
        };
        match &self.held {
            Held::Buffers(buffers) if !buffers.have_room(positions) => self.check_buffers(buffers.rows(), positions)?,
            _ => {}
        }
        self.in_turn(|cache| {
            let (dtype, limit, expected) = (cache.config.dtype, cache.config.limit, cache.rows_to_expect());
            match &mut cache.held {
                Held::Buffers(buffers) if positions > 0 => {
                    buffers.append_segments(rows, &cache.lens, positions, [heads, head_dim]);
                }
                Held::Buffers(_) => {}
                Held::Pages(pages) => {
                    let expected = pages.needed(expected, cache.config.capacity);
                    pages.append_segments(rows, dtype, expected, limit)?;
                }
            }
            cache.lens = lens;
            Ok(())
        })
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
                let ((shape, device), here) = (segment.shape_and_device(), [layers, heads, head_dim]);
                if shape != here || !is_same_device(&device, &self.device) {
                    let what = "[layers, heads, width of a head] and device of a segment";
                    let (expected, found) = (format!("{:?}", (here, &self.device)), format!("{:?}", (shape, device)));
                    return Err(Error::mismatch(what, expected, found));
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
            if lens[row] > self.config.capacity {
                return Err(Error::CacheFull { row, tokens: lens[row], capacity: self.config.capacity });
            }
        }
        Ok(lens)
    }
}

/// Layers, `[1, H, n, D]` each and at least one, one behind the other in memory of their own: `[layers, H, n, D]`.
fn stacked(layers: Vec<States>) -> States {
    let (keys, values): (Vec<_>, Vec<_>) = layers.into_iter().map(|states| (states.keys, states.values)).unzip();
    States { keys: stack(&keys), values: stack(&values) }
}

fn stack(layers: &[Tensor<4>]) -> Tensor<4> {
    let [_, heads, tokens, head_dim] = layers[0].dims();
    let all = Tensor::empty([layers.len(), heads, tokens, head_dim], (&layers[0].device(), layers[0].dtype()));
    layers.iter().enumerate().fold(all, |all, (index, layer)| {
        all.slice_assign([index..index + 1, 0..heads, 0..tokens, 0..head_dim], layer.clone())
    })
}
