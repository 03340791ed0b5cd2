//! [`Plan`]: where the new tokens of one forward stand, what they see, and how that is computed.

use std::ops::Range;

use burn::tensor::{Bool, Int, Tensor, TensorData};

use super::Gpt2;
use super::tokens::Chunk;
use crate::backends::{AttentionMetadata, PackedRow, RowGroup};
use crate::cache::KvCache;

/// Computed once, and shared by all layers.
pub struct Plan {
    /// `[N]`: the position of each new token.
    positions: Tensor<1, Int>,
    metadata: AttentionMetadata,
    mode: Mode,
}

/// How attention over the cache is computed.
pub enum Mode {
    /// By burn's operations, rows that make a rectangle all at once.
    Together(Vec<MaskedGroup>),
    /// By burn's operations, each token by itself: the deterministic mode.
    BatchInvariant,
    /// By the kernels of a packed model.
    Kernels,
}

/// A rectangle of queries.
pub struct MaskedGroup {
    pub group: RowGroup,
    /// Keys that the longest of its rows has then.
    pub keys: usize,
    /// `[B or 1, 1, T, L]`: true where query t may not see key l. None: every query sees every key.
    pub mask: Option<Tensor<4, Bool>>,
}

impl Plan {
    /// Of a chunk of new tokens of a batch, for which there may be a cache.
    pub fn new(cache: Option<&KvCache>, chunk: &Chunk, model: &Gpt2) -> Self {
        let device = chunk.ids.device();
        let row = |(row, tokens): &(usize, Range<usize>)| PackedRow {
            slot: cache.map_or(*row, |cache| cache.slots()[*row]),
            context_len: cache.map_or(0, |cache| cache.len(*row)),
            query_len: tokens.len(),
        };
        let rows: Vec<PackedRow> = chunk.rows.iter().map(row).collect();
        let positions: Vec<i32> = rows.iter().flat_map(|row| row.context_len as i32..row.seq_len() as i32).collect();
        let positions = Tensor::from_data(TensorData::new(positions, chunk.ids.dims()), &device);
        let metadata = AttentionMetadata::new(rows, &device);
        let mode = match (model.is_packed(), model.is_deterministic()) {
            (true, _) => Mode::Kernels,
            (false, true) => Mode::BatchInvariant,
            (false, false) => {
                Mode::Together(metadata.groups().into_iter().map(|group| MaskedGroup::new(group, &metadata)).collect())
            }
        };
        Self { positions, metadata, mode }
    }

    /// Of one new token of each row behind what `context_lens`, `[B]`, says on the device, for kernels.
    pub fn on_device(metadata: AttentionMetadata, context_lens: Tensor<1, Int>) -> Self {
        let metadata = metadata.with_context_lens(context_lens.clone());
        Self { positions: context_lens, metadata, mode: Mode::Kernels }
    }

    /// Position of each new token, `[N]`.
    pub fn positions(&self) -> &Tensor<1, Int> {
        &self.positions
    }

    /// Whose the new tokens are.
    pub fn metadata(&self) -> &AttentionMetadata {
        &self.metadata
    }

    /// How attention is computed.
    pub fn mode(&self) -> &Mode {
        &self.mode
    }

    /// Whether it is computed by the kernels of a packed model.
    pub fn is_for_kernels(&self) -> bool {
        matches!(self.mode, Mode::Kernels)
    }

    /// Whether burn's operations compute every token by itself.
    pub fn is_batch_invariant(&self) -> bool {
        matches!(self.mode, Mode::BatchInvariant)
    }
}

impl MaskedGroup {
    fn new(group: RowGroup, metadata: &AttentionMetadata) -> Self {
        let rows = &metadata.rows()[group.rows.clone()];
        let keys = rows.iter().map(PackedRow::seq_len).max().unwrap_or(0);
        let is_uniform = rows.iter().all(|row| row.context_len == rows[0].context_len);
        let mask = (!is_uniform || group.query_len > 1).then(|| {
            let device = metadata.device();
            let rows = if is_uniform { &rows[..1] } else { rows };
            let last: Vec<i32> = rows.iter().flat_map(|row| row.context_len as i32..row.seq_len() as i32).collect();
            let shape = [rows.len(), 1, group.query_len, keys];
            let last = Tensor::<4, Int>::from_data(TensorData::new(last, [rows.len(), 1, group.query_len, 1]), &device);
            let key = Tensor::<1, Int>::arange(0..keys as i64, &device).reshape([1, 1, 1, keys]);
            key.expand(shape).greater(last.expand(shape))
        });
        Self { group, keys, mask }
    }
}
