//! [`Plan`]: where the new tokens of one forward stand, what they see, and how that is computed.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Bool, Int, Tensor, TensorData};

use super::Gpt2;
use super::tokens::Chunk;
use crate::backends::{AttentionMetadata, PackedRow, PagedRow, RowGroup};
use crate::cache::KvCache;

/// Computed once, and shared by all layers.
pub struct Plan {
    /// `[N]`: the position of each new token.
    positions: Tensor<1, Int>,
    metadata: AttentionMetadata,
    mode: Mode,
    is_packed: bool,
    is_batch_invariant: bool,
}

/// How attention over the cache is computed.
pub enum Mode {
    /// By burn's operations, rows that make a rectangle all at once.
    Together(Vec<MaskedGroup>),
    /// By burn's operations, each token by itself: the deterministic mode.
    BatchInvariant,
    /// By the kernels of a packed model.
    Kernels,
    /// By kernels, over the pages of these rows.
    Pages(Arc<[PagedRow]>),
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
            slot: cache.map_or(*row, |cache| cache.slot(*row)),
            context_len: cache.map_or(0, |cache| cache.len(*row)),
            query_len: tokens.len(),
        };
        let rows: Vec<PackedRow> = chunk.rows.iter().map(row).collect();
        let positions: Vec<i32> = rows.iter().flat_map(|row| row.context_len as i32..row.seq_len() as i32).collect();
        let positions = Tensor::from_data(TensorData::new(positions, chunk.ids.dims()), &device);
        let metadata = AttentionMetadata::new(rows, &device);
        let new = chunk.rows.iter().map(|(row, tokens)| (*row, tokens.len()));
        let pages = cache.and_then(|cache| cache.paged_rows(new));
        let (is_packed, is_deterministic) = (model.is_packed(), model.is_deterministic());
        let mode = match (pages, is_packed, is_deterministic) {
            (Some(rows), ..) => Mode::Pages(rows),
            (None, true, _) => Mode::Kernels,
            (None, false, true) => Mode::BatchInvariant,
            (None, false, false) => {
                Mode::Together(metadata.groups().into_iter().map(|group| MaskedGroup::new(group, &metadata)).collect())
            }
        };
        Self { positions, metadata, mode, is_packed, is_batch_invariant: is_deterministic && !is_packed }
    }

    /// Of one new token of each row behind what `context_lens`, `[B]`, says on the device, for kernels.
    pub fn on_device(metadata: AttentionMetadata, context_lens: Tensor<1, Int>) -> Self {
        let metadata = metadata.with_context_lens(context_lens.clone());
        Self { positions: context_lens, metadata, mode: Mode::Kernels, is_packed: true, is_batch_invariant: false }
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

    /// Whether it is for the kernels of a packed model.
    pub fn is_packed(&self) -> bool {
        self.is_packed
    }

    /// Whether burn's operations compute every token by itself.
    pub fn is_batch_invariant(&self) -> bool {
        self.is_batch_invariant
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
