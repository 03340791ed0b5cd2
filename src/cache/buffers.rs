//! [`Buffers`]: keys and values in one buffer of a layer, of which each row of a cache has a row.

use std::collections::HashMap;
use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor};

use super::layer::LayerCache;
use super::{CacheStorage, KvSegment, States, retain};
use crate::backends::AttentionMetadata;

/// The buffers of all layers, and which of their rows is whose.
#[derive(Debug)]
pub struct Buffers {
    layers: Vec<LayerCache>,
    /// Which of the buffers' rows each row is. In a growing cache, row b is the buffers' row b.
    slots: Vec<usize>,
    /// The buffers' rows that are none's, the first of them last.
    free: Vec<usize>,
    storage: CacheStorage,
    dtype: DType,
    device: Device,
}

impl Buffers {
    /// Of so many layers, without rows and memory.
    pub fn new(layers: usize, storage: CacheStorage, dtype: DType, device: &Device) -> Self {
        let layers = std::iter::repeat_with(LayerCache::default).take(layers).collect();
        Self { layers, slots: Vec::new(), free: Vec::new(), storage, dtype, device: device.clone() }
    }

    /// The first rows of buffers that are not made yet.
    pub fn begin(&mut self, rows: usize) {
        self.slots = (0..rows).collect();
    }

    /// Makes all buffers, `[rows, H, L, D]`.
    pub fn preallocate(&mut self, shape: [usize; 4]) {
        self.layers.fill_with(|| LayerCache::preallocated(shape, self.dtype, &self.device));
    }

    /// Whether a layer's buffers are made again with each append.
    pub fn is_growing(&self) -> bool {
        self.storage == CacheStorage::Growing
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
    }

    /// Positions for which there is room.
    pub fn positions(&self) -> usize {
        self.layers.iter().map(LayerCache::positions).max().unwrap_or(0)
    }

    /// Whether each layer has room for so many positions.
    pub fn have_room(&self, positions: usize) -> bool {
        self.layers.iter().all(|layer| layer.positions() >= positions)
    }

    /// Rows of the buffers, those of rows that were removed included.
    pub fn rows(&self) -> usize {
        self.layers.first().and_then(LayerCache::rows).unwrap_or(self.slots.len())
    }

    /// Rows of the buffers once one more has come.
    pub fn rows_with_another(&self) -> usize {
        self.rows().max(self.next_slot() + 1)
    }

    fn next_slot(&self) -> usize {
        self.free.last().copied().unwrap_or_else(|| self.rows().max(self.slots.len()))
    }

    /// Which of the buffers' rows a row is.
    pub fn slot(&self, row: usize) -> usize {
        self.slots[row]
    }

    /// Adds a row; the buffers are copied to longer ones if none of theirs is free.
    pub fn push(&mut self) {
        let slot = self.next_slot();
        if self.layers.first().is_some_and(|layer| layer.rows().is_some_and(|rows| rows <= slot)) {
            self.layers.iter_mut().for_each(|layer| layer.add_rows(1));
        }
        self.free.pop();
        self.slots.push(slot);
    }

    /// Copies the first `len` positions of a row to others.
    pub fn copy_prefix(&mut self, from: usize, to: &[usize], len: usize) {
        let (from, slots) = (self.slots[from], to.iter().map(|&row| self.slots[row]).collect::<Vec<usize>>());
        if len > 0 && !slots.is_empty() {
            self.layers.iter_mut().for_each(|layer| layer.copy_within(from, &slots, len));
        }
    }

    /// Writes something finite over all of a row.
    pub fn wipe(&mut self, row: usize) {
        let slot = self.slots[row];
        self.layers.iter_mut().for_each(|layer| layer.wipe(slot));
    }

    /// Frees the rows that are not kept; buffers that grow have to be [gathered](Self::gather) instead.
    pub fn retain(&mut self, is_kept: &[bool]) {
        let rows = 0..self.slots.len();
        self.free.extend(rows.filter(|&row| !is_kept[row]).map(|row| self.slots[row]));
        self.free.sort_unstable_by(|one, other| other.cmp(one));
        retain(&mut self.slots, is_kept);
    }

    /// Makes row `i` a copy of what row `rows[i]` was.
    pub fn gather(&mut self, rows: &[usize]) {
        let indices: Vec<i32> = rows.iter().map(|&row| self.slots[row] as i32).collect();
        let indices = Tensor::<1, Int>::from_data(indices.as_slice(), &self.device);
        self.layers.iter_mut().for_each(|layer| layer.select(&indices));
        self.slots = (0..rows.len()).collect();
        self.free.clear();
    }

    /// Takes all rows out, so that their slots are there for others; buffers that grow go.
    pub fn remove_all(&mut self) {
        self.free = (0..self.rows()).rev().collect();
        self.slots.clear();
        if self.is_growing() {
            self.layers.fill_with(LayerCache::default);
            self.free.clear();
        }
    }

    /// Makes buffers of fixed capacity longer, with what they hold up to `filled` in them.
    pub fn extend(&mut self, filled: usize, capacity: usize) {
        self.layers.iter_mut().for_each(|layer| layer.extend(filled, capacity));
    }

    /// Writes the new keys and values, `[N, H, D]`, of one layer behind what each row holds, and returns the layer's buffers,
    /// `[S, H, L, D]`. Rows hold `lens`.
    pub fn append(
        &mut self,
        layer: usize,
        new: [Tensor<3>; 2],
        lens: &[usize],
        metadata: &AttentionMetadata,
    ) -> States {
        let layer = &mut self.layers[layer];
        match self.storage {
            CacheStorage::Growing => layer.grow(new, self.dtype, lens, metadata),
            _ => layer.write(new, metadata),
        }
    }

    /// Some positions of a row in each layer that has buffers, `[1, H, n, D]`, as views.
    pub fn read(&self, row: usize, positions: Range<usize>) -> Vec<States> {
        let slot = self.slots[row];
        let part = |all: Tensor<4>| all.narrow(0, slot, 1).narrow(2, positions.start, positions.len());
        let buffers = self.layers.iter().filter_map(LayerCache::buffers);
        buffers.map(|(keys, values)| States { keys: part(keys), values: part(values) }).collect()
    }

    /// Writes `new`, `[1, H, n, D]` of each layer, over the beginning of a row. Buffers are made for n positions if there are none, and
    /// rows hold `filled` at most.
    pub fn write_row(&mut self, row: usize, new: Vec<States>, filled: usize) {
        let (slot, rows) = (self.slots[row], self.slots.len());
        for (layer, new) in self.layers.iter_mut().zip(new) {
            let [_, heads, len, head_dim] = new.keys.dims();
            layer.write_row(slot, new.rounded(self.dtype), [rows, heads, len, head_dim], filled);
        }
    }

    /// Appends to each row, of `lens[b]` tokens, so many tokens of each of its segments. Buffers of `positions` are made if there are none, and
    /// lengthened if they are shorter.
    pub fn append_segments(
        &mut self,
        rows: &[Vec<(KvSegment, usize)>],
        lens: &[usize],
        positions: usize,
        [heads, head_dim]: [usize; 2],
    ) {
        let shape = [self.slots.len(), heads, positions, head_dim];
        let slots_and_lens: Vec<(usize, usize)> = self.slots.iter().copied().zip(lens.iter().copied()).collect();
        for (index, layer) in self.layers.iter_mut().enumerate() {
            // Rows that begin alike have the same segments: each is brought into the buffers' form once.
            let mut known: HashMap<(usize, usize), States> = HashMap::new();
            let mut part = |(segment, tokens): &(KvSegment, usize)| {
                known
                    .entry((segment.id(), *tokens))
                    .or_insert_with(|| segment.layer(index, *tokens, self.dtype))
                    .clone()
            };
            let rows: Vec<Vec<States>> =
                rows.iter().map(|parts| parts.iter().filter(|part| part.1 > 0).map(&mut part).collect()).collect();
            match layer.is_made() {
                true => layer.append_rows(&rows, &slots_and_lens, positions),
                false => *layer = LayerCache::with_rows(&rows, shape, self.dtype, &self.device),
            }
        }
    }

    /// The buffers `(keys, values)` of all layers that have some.
    pub fn all(&self) -> Vec<(Tensor<4>, Tensor<4>)> {
        self.layers.iter().filter_map(LayerCache::buffers).collect()
    }

    /// The buffers `(keys, values)` of a layer.
    pub fn of_layer(&self, layer: usize) -> Option<(Tensor<4>, Tensor<4>)> {
        self.layers.get(layer)?.buffers()
    }
}
