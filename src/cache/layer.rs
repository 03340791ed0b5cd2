//! [`LayerCache`]: one layer's keys and values, and how new ones are appended to them.

use burn::tensor::{DType, Device, Int, Tensor};

use super::States;
use super::states::{rectangle, rounded};
use crate::backends::{AttentionMetadata, PackedRow, append, has_kernels};

/// The buffers of one layer, `[rows, heads, capacity, head_dim]` each; none before the first append to a growing
/// cache.
#[derive(Debug, Default)]
pub struct LayerCache {
    held: Option<States>,
}

impl LayerCache {
    pub fn preallocated(shape: [usize; 4], dtype: DType, device: &Device) -> Self {
        let buffer = || written_buffer(shape, dtype, device);
        Self { held: Some(States { keys: buffer(), values: buffer() }) }
    }

    pub fn bytes(&self) -> usize {
        let bytes = |buffer: &Tensor<4>| buffer.shape().num_elements() * buffer.dtype().size();
        self.held.as_ref().map_or(0, |held| bytes(&held.keys) + bytes(&held.values))
    }

    /// Positions for which the buffers have room; 0 without buffers.
    pub fn positions(&self) -> usize {
        self.held.as_ref().map_or(0, |held| held.keys.dims()[2])
    }

    /// Rows of the buffers, if there are some.
    pub fn rows(&self) -> Option<usize> {
        self.held.as_ref().map(|held| held.keys.dims()[0])
    }

    pub fn buffers(&self) -> Option<(Tensor<4>, Tensor<4>)> {
        self.held.as_ref().map(|held| (held.keys.clone(), held.values.clone()))
    }

    /// Replaces the rows by the selected ones.
    pub fn select(&mut self, rows: &Tensor<1, Int>) {
        self.held = self.held.take().map(|held| States {
            keys: held.keys.select(0, rows.clone()),
            values: held.values.select(0, rows.clone()),
        });
    }

    /// Adds rows behind the last one of buffers that are there, which are copied.
    pub fn add_rows(&mut self, rows: usize) {
        self.held = self.held.take().map(|held| {
            let add = |buffer: Tensor<4>| {
                let [_, heads, positions, head_dim] = buffer.dims();
                let new = written_buffer([rows, heads, positions, head_dim], buffer.dtype(), &buffer.device());
                Tensor::cat(vec![buffer, new], 0)
            };
            States { keys: add(held.keys), values: add(held.values) }
        });
    }

    /// Writes the first `len` positions of row `from` over those of the rows `to`, in place.
    pub fn copy_within(&mut self, from: usize, to: &[usize], len: usize) {
        self.held = self.held.take().map(|held| {
            let copy = |buffer: Tensor<4>| {
                let [_, heads, _, head_dim] = buffer.dims();
                // In memory of its own: a view would be a second reference, for which the assignment copied the buffer.
                let row = own(buffer.clone().narrow(0, from, 1).narrow(2, 0, len));
                to.iter().fold(buffer, |buffer, &to| {
                    buffer.slice_assign([to..to + 1, 0..heads, 0..len, 0..head_dim], row.clone())
                })
            };
            States { keys: copy(held.keys), values: copy(held.values) }
        });
    }

    /// Writes something finite over all of a row.
    pub fn wipe(&mut self, row: usize) {
        self.held = self.held.take().map(|held| {
            let wipe = |buffer: Tensor<4>| {
                let [_, heads, positions, head_dim] = buffer.dims();
                let clean = written_buffer([1, heads, positions, head_dim], buffer.dtype(), &buffer.device());
                buffer.slice_assign([row..row + 1, 0..heads, 0..positions, 0..head_dim], clean)
            };
            States { keys: wipe(held.keys), values: wipe(held.values) }
        });
    }

    /// Makes the buffers `capacity` long, with what they hold up to `filled` in them.
    pub fn extend(&mut self, filled: usize, capacity: usize) {
        self.held = self.held.take().map(|held| States {
            keys: extend(held.keys, filled, capacity),
            values: extend(held.values, filled, capacity),
        });
    }

    /// Writes `new`, `[1, H, n, D]`, over the beginning of a row of buffers of `shape`, which are made if there are none
    /// and lengthened if they are shorter.
    pub fn write_row(&mut self, row: usize, new: States, shape: [usize; 4], filled: usize) {
        let [_, heads, len, head_dim] = new.keys.dims();
        if self.held.is_none() {
            *self = Self::preallocated(shape, new.keys.dtype(), &new.keys.device());
        }
        self.held = self.held.take().map(|held| {
            let write = |buffer: Tensor<4>, new: Tensor<4>| {
                let capacity = buffer.dims()[2].max(len);
                extend(buffer, filled, capacity).slice_assign([row..row + 1, 0..heads, 0..len, 0..head_dim], new)
            };
            States { keys: write(held.keys, new.keys), values: write(held.values, new.values) }
        });
    }

    /// Buffers of `shape` that hold the parts `rows[b]`, `[1, H, n, D]` each, one after the other from the beginning of each
    /// row on.
    pub fn with_rows(rows: &[Vec<States>], shape: [usize; 4], dtype: DType, device: &Device) -> Self {
        // All of it is written below, and once.
        let slots_and_lens: Vec<(usize, usize)> = (0..rows.len()).map(|row| (row, 0)).collect();
        let write =
            |part: KeysOrValues| write_rows(Tensor::empty(shape, (device, dtype)), rows, &slots_and_lens, part, true);
        Self { held: Some(States { keys: write(|part| &part.keys), values: write(|part| &part.values) }) }
    }

    /// Writes the parts `rows[b]`, `[1, H, n, D]` each, one after the other to `slots_and_lens[b]`, a row of the buffers and the first
    /// position in it, into buffers that are lengthened if they are shorter than `capacity`.
    pub fn append_rows(&mut self, rows: &[Vec<States>], slots_and_lens: &[(usize, usize)], capacity: usize) {
        let filled = slots_and_lens.iter().map(|(_, len)| *len).max().unwrap_or(0);
        self.held = self.held.take().map(|held| {
            let capacity = held.keys.dims()[2].max(capacity);
            let write = |buffer: Tensor<4>, part: KeysOrValues| {
                write_rows(extend(buffer, filled, capacity), rows, slots_and_lens, part, false)
            };
            States { keys: write(held.keys, |part| &part.keys), values: write(held.values, |part| &part.values) }
        });
    }

    /// Whether there are buffers.
    pub fn is_made(&self) -> bool {
        self.held.is_some()
    }

    /// Writes `new`, `[N, H, D]` both, in place where its rows' contexts end, and returns the buffers.
    pub fn write(&mut self, new: [Tensor<3>; 2], metadata: &AttentionMetadata) -> States {
        // Taken out, so that no second reference makes the assignment copy the buffer.
        let held = self.held.take().expect("a preallocated layer has its buffers from the start");
        let held = assign(held, new, metadata);
        self.held = Some(held.clone());
        held
    }

    /// The old rows, of `lens` positions, with `new`, `[N, H, D]` both, behind them: in new buffers, unless the old ones are just as
    /// long.
    pub fn grow(&mut self, new: [Tensor<3>; 2], dtype: DType, lens: &[usize], metadata: &AttentionMetadata) -> States {
        let held = self.held.take().filter(|_| lens.iter().any(|len| *len > 0));
        let held = match (held, metadata.groups().as_slice()) {
            // All rows grow alike: new positions follow those that there are.
            (held, [group]) if group.rows.len() == lens.len() && is_uniform(lens) => {
                let [keys, values] = new.map(|new| rounded(rectangle(&new, group), dtype));
                match held {
                    // Buffers of their own: a view would keep what it is a part of.
                    None => States { keys: own(keys), values: own(values) },
                    Some(held) => {
                        let behind = |held: Tensor<4>, new| Tensor::cat(vec![held.narrow(2, 0, lens[0]), new], 2);
                        States { keys: behind(held.keys, keys), values: behind(held.values, values) }
                    }
                }
            }
            (held, _) => {
                let [_, heads, head_dim] = new[0].dims();
                let seq_lens = metadata.rows().iter().map(PackedRow::seq_len);
                let max_len = seq_lens.chain(lens.iter().copied()).max().unwrap_or(0);
                let filled = lens.iter().copied().max().unwrap_or(0);
                let longer = match held {
                    None => Self::preallocated([lens.len(), heads, max_len, head_dim], dtype, &new[0].device()).held,
                    Some(held) => Some(States {
                        keys: extend(held.keys, filled, max_len),
                        values: extend(held.values, filled, max_len),
                    }),
                };
                assign(longer.expect("there are buffers"), new, metadata)
            }
        };
        self.held = Some(held.clone());
        held
    }
}

/// A buffer with something finite in it that was written, and not only asked for: an operating system gives zeros out as
/// promises, and the memory would be found missing in the middle of a text.
fn written_buffer(shape: [usize; 4], dtype: DType, device: &Device) -> Tensor<4> {
    Tensor::ones(shape, (device, dtype))
}

/// A copy in memory of its own.
pub(super) fn own(tensor: Tensor<4>) -> Tensor<4> {
    let shape = tensor.dims();
    let ranges = shape.map(|len| 0..len);
    Tensor::empty(shape, (&tensor.device(), tensor.dtype())).slice_assign(ranges, tensor)
}

/// `buffer[.., ..held_len]` in a buffer that is `capacity` long; itself if it is.
fn extend(buffer: Tensor<4>, held_len: usize, capacity: usize) -> Tensor<4> {
    let [batch, heads, held, head_dim] = buffer.dims();
    if held == capacity {
        return buffer;
    }
    let longer = written_buffer([batch, heads, capacity, head_dim], buffer.dtype(), &buffer.device());
    match held_len {
        0 => longer,
        _ => longer.slice_assign([0..batch, 0..heads, 0..held_len, 0..head_dim], buffer.narrow(2, 0, held_len)),
    }
}

/// The keys or the values of a segment.
type KeysOrValues = fn(&States) -> &Tensor<4>;

/// Writes parts, `[1, H, n, D]` each, one after the other to `slots_and_lens[b]`, a row and the first position in it, and then, if
/// `to_the_end`, something finite.
fn write_rows(
    buffer: Tensor<4>,
    rows: &[Vec<States>],
    slots_and_lens: &[(usize, usize)],
    part: KeysOrValues,
    to_the_end: bool,
) -> Tensor<4> {
    let shape = buffer.dims();
    let [batch, heads, capacity, head_dim] = shape;
    let one = Tensor::<2>::ones([1, 1], (&buffer.device(), buffer.dtype()));
    // As a matrix, all positions of a head lie in one range of memory and are copied at once.
    let mut flat: Tensor<2> = buffer.reshape([batch * heads, capacity * head_dim]);
    for (parts, &(slot, len)) in rows.iter().zip(slots_and_lens) {
        let heads_of_row = slot * heads..(slot + 1) * heads;
        let mut start = len * head_dim;
        for part in parts.iter().map(part) {
            let end = start + part.dims()[2] * head_dim;
            let part = part.clone().reshape([heads, end - start]);
            flat = flat.slice_assign([heads_of_row.clone(), start..end], part);
            start = end;
        }
        let end = capacity * head_dim;
        if to_the_end && start < end {
            flat = flat.slice_assign([heads_of_row, start..end], one.clone().expand([heads, end - start]));
        }
    }
    flat.reshape(shape)
}

fn is_uniform(lens: &[usize]) -> bool {
    lens.iter().all(|len| *len == lens[0])
}

/// `buffers` with `new`, `[N, H, D]`, of keys and of values, where the contexts of its rows end.
fn assign(buffers: States, new: [Tensor<3>; 2], metadata: &AttentionMetadata) -> States {
    if has_kernels(&buffers.keys.device()) {
        // They round what they write.
        let [keys, values] = append([buffers.keys, buffers.values], new, metadata);
        return States { keys, values };
    }
    let [new_keys, new_values] = new;
    States {
        keys: assign_each(buffers.keys, new_keys, metadata),
        values: assign_each(buffers.values, new_values, metadata),
    }
}

fn assign_each(buffer: Tensor<4>, new: Tensor<3>, metadata: &AttentionMetadata) -> Tensor<4> {
    let [_, heads, head_dim] = new.dims();
    let new = rounded(new, buffer.dtype());
    metadata.groups().iter().fold(buffer, |buffer, group| {
        let (new, rows) = (rectangle(&new, group), &metadata.rows()[group.rows.clone()]);
        if rows.iter().all(|row| row.context_len == rows[0].context_len) {
            let positions = rows[0].context_len..rows[0].seq_len();
            return buffer.slice_assign([group.slots.clone(), 0..heads, positions, 0..head_dim], new);
        }
        rows.iter().enumerate().fold(buffer, |buffer, (index, row)| {
            let positions = row.context_len..row.seq_len();
            let part = new.clone().narrow(0, index, 1);
            buffer.slice_assign([row.slot..row.slot + 1, 0..heads, positions, 0..head_dim], part)
        })
    })
}
