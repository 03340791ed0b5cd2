//! [`KvSegment`]: keys and values of some tokens, apart from any cache.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};

use super::layer::own;
use super::{Held, KvCache, States};
use crate::device::is_same_device;
use crate::memory::{check_buffer, product};
use crate::{Error, Result};

/// Keys and values of consecutive tokens of one sequence, for each layer of a model. It owns its memory; a clone shares it.
#[derive(Clone, Debug)]
pub struct KvSegment {
    /// `[layers, H, n, D]` both.
    states: Arc<States>,
}

impl KvSegment {
    /// From keys and values of all layers, `[layers, H, n, D]`, in memory of their own.
    pub(crate) fn new(keys: Tensor<4>, values: Tensor<4>) -> Self {
        Self { states: Arc::new(States { keys, values }) }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        let [_, _, tokens, _] = self.states.keys.dims();
        tokens
    }

    /// Bytes that it takes: 2 x layers x tokens x width x element size.
    pub fn bytes(&self) -> usize {
        let bytes = |tensor: &Tensor<4>| tensor.shape().num_elements() * tensor.dtype().size();
        bytes(&self.states.keys) + bytes(&self.states.values)
    }

    /// Element type of the keys and values.
    pub fn dtype(&self) -> DType {
        self.states.keys.dtype()
    }

    /// `[layers, H, n, D]`.
    pub(crate) fn keys(&self) -> &Tensor<4> {
        &self.states.keys
    }

    /// `[layers, H, n, D]`.
    pub(crate) fn values(&self) -> &Tensor<4> {
        &self.states.values
    }

    /// Some of the tokens, copied.
    pub(crate) fn part(&self, tokens: Range<usize>) -> Self {
        let part = |all: &Tensor<4>| own(all.clone().narrow(2, tokens.start, tokens.len()));
        Self::new(part(self.keys()), part(self.values()))
    }

    /// The first tokens' keys and values in one layer, `[1, H, tokens, D]`, copied.
    pub(super) fn layer(&self, layer: usize, tokens: usize, dtype: DType) -> States {
        let part = |all: &Tensor<4>| own(all.clone().narrow(0, layer, 1).narrow(2, 0, tokens));
        States { keys: part(self.keys()), values: part(self.values()) }.rounded(dtype)
    }

    /// How many layers.
    pub(super) fn layers(&self) -> usize {
        self.keys().dims()[0]
    }

    /// The same for all clones of it, and for no other.
    pub(super) fn states(&self) -> &Arc<States> {
        &self.states
    }

    /// `[layers, heads, width of a head]`, and where it is.
    fn shape_and_device(&self) -> ([usize; 3], Device) {
        let [layers, heads, _, head_dim] = self.keys().dims();
        ([layers, heads, head_dim], self.keys().device())
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
        if row >= self.batch() {
            return Err(Error::mismatch("row of the cache", format!("less than {}", self.batch()), row));
        }
        if positions.is_empty() || positions.end > self.len(row) {
            let expected = format!("some of 0..{}", self.len(row));
            return Err(Error::mismatch("positions of a row", expected, format!("{positions:?}")));
        }
        let [layers, heads, head_dim, _] = self.shape;
        let bytes = product([layers, heads, positions.len(), head_dim, self.config.dtype.size()]);
        check_buffer("bytes of a segment's keys", bytes, &self.device)?;
        let layers = self.read(row, positions).into_iter();
        let (keys, values): (Vec<_>, Vec<_>) = layers.map(|states| (states.keys, states.values)).unzip();
        Ok(KvSegment::new(stack(&keys), stack(&values)))
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
        let new: Vec<usize> = lens.iter().zip(&self.lens).map(|(len, held)| len - held).collect();
        self.prepare(&new)?;
        let dtype = self.config.dtype;
        match &mut self.held {
            Held::Buffers(buffers) if positions > 0 => {
                buffers.append_segments(rows, &self.lens, positions, [heads, head_dim]);
            }
            Held::Buffers(_) => {}
            Held::Pages(pages) => {
                rows.iter().enumerate().for_each(|(row, segments)| pages.append_segments(row, segments, dtype));
            }
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

/// Layers, `[1, H, n, D]` each and at least one, one behind the other in memory of their own.
fn stack(layers: &[Tensor<4>]) -> Tensor<4> {
    let [_, heads, tokens, head_dim] = layers[0].dims();
    let all = Tensor::empty([layers.len(), heads, tokens, head_dim], (&layers[0].device(), layers[0].dtype()));
    layers.iter().enumerate().fold(all, |all, (index, layer)| {
        all.slice_assign([index..index + 1, 0..heads, 0..tokens, 0..head_dim], layer.clone())
    })
}
