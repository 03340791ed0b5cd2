//! [`LayerCache`]: one layer's keys and values, and how new ones are appended to them.

use burn::tensor::{DType, Device, Int, Tensor};

use crate::backends::{append, has_kernels};
use crate::model::attention::Segment;

/// The buffers of one layer, `[rows, heads, capacity, head_dim]` each; none before the first append to a growing
/// cache.
#[derive(Debug, Default)]
pub struct LayerCache {
    held: Option<Segment>,
}

impl LayerCache {
    pub fn preallocated(shape: [usize; 4], dtype: DType, device: &Device) -> Self {
        let buffer = || written_buffer(shape, dtype, device);
        Self { held: Some(Segment { keys: buffer(), values: buffer() }) }
    }

    pub fn bytes(&self) -> usize {
        let bytes = |buffer: &Tensor<4>| buffer.shape().num_elements() * buffer.dtype().size();
        self.held.as_ref().map_or(0, |held| bytes(&held.keys) + bytes(&held.values))
    }

    /// Positions for which the buffers have room; 0 without buffers.
    pub fn positions(&self) -> usize {
        self.held.as_ref().map_or(0, |held| held.keys.dims()[2])
    }

    pub fn buffers(&self) -> Option<(Tensor<4>, Tensor<4>)> {
        self.held.as_ref().map(|held| (held.keys.clone(), held.values.clone()))
    }

    /// Replaces the rows by the selected ones.
    pub fn select(&mut self, rows: &Tensor<1, Int>) {
        self.held = self.held.take().map(|held| Segment {
            keys: held.keys.select(0, rows.clone()),
            values: held.values.select(0, rows.clone()),
        });
    }

    /// Makes the buffers `capacity` long, with what they hold up to `filled` in them.
    pub fn extend(&mut self, filled: usize, capacity: usize) {
        self.held = self.held.take().map(|held| Segment {
            keys: extend(held.keys, filled, capacity),
            values: extend(held.values, filled, capacity),
        });
    }

    /// Writes `new`, `[1, H, n, D]`, over the beginning of a row of buffers of `shape`, which are made if there are none
    /// and lengthened if they are shorter.
    pub fn write_row(&mut self, row: usize, new: Segment, shape: [usize; 4], filled: usize) {
        let [_, heads, len, head_dim] = new.keys.dims();
        if self.held.is_none() {
            *self = Self::preallocated(shape, new.keys.dtype(), &new.keys.device());
        }
        self.held = self.held.take().map(|held| {
            let write = |buffer: Tensor<4>, new: Tensor<4>| {
                let capacity = buffer.dims()[2].max(len);
                extend(buffer, filled, capacity).slice_assign([row..row + 1, 0..heads, 0..len, 0..head_dim], new)
            };
            Segment { keys: write(held.keys, new.keys), values: write(held.values, new.values) }
        });
    }

    /// Buffers of `shape` that hold the parts `rows[b]`, `[1, H, n, D]` each, one after the other from the beginning of each
    /// row on.
    pub fn with_rows(rows: &[Vec<Segment>], shape: [usize; 4], dtype: DType, device: &Device) -> Self {
        // All of it is written below, and once.
        let write =
            |part: Part| write_rows(Tensor::empty(shape, (device, dtype)), rows, &vec![0; rows.len()], part, true);
        Self { held: Some(Segment { keys: write(|part| &part.keys), values: write(|part| &part.values) }) }
    }

    /// Writes the parts `rows[b]`, `[1, H, n, D]` each, one after the other behind the `lens[b]` positions of each row, into
    /// buffers that are lengthened if they are shorter than `capacity`.
    pub fn append_rows(&mut self, rows: &[Vec<Segment>], lens: &[usize], capacity: usize) {
        let filled = lens.iter().copied().max().unwrap_or(0);
        self.held = self.held.take().map(|held| {
            let capacity = held.keys.dims()[2].max(capacity);
            let write =
                |buffer: Tensor<4>, part: Part| write_rows(extend(buffer, filled, capacity), rows, lens, part, false);
            Segment { keys: write(held.keys, |part| &part.keys), values: write(held.values, |part| &part.values) }
        });
    }

    /// Whether there are buffers.
    pub fn is_made(&self) -> bool {
        self.held.is_some()
    }

    /// Writes `new` in place behind `lens`, which are `past` on the device if that is there, and returns the buffers: of
    /// kernels, which find what is filled by the lengths, as a whole, and else as far as they are filled.
    pub fn write(
        &mut self,
        new: Segment,
        past: Option<&Tensor<1, Int>>,
        lens: &[usize],
        new_lens: &[usize],
    ) -> Segment {
        // Taken out, so that no second reference makes the assignment copy the buffer.
        let held = self.held.take().expect("a preallocated layer has its buffers from the start");
        let held = assign(held, new, past, lens, new_lens);
        self.held = Some(held.clone());
        match past {
            Some(_) => held,
            None => {
                let filled = longest(lens, new_lens);
                Segment { keys: held.keys.narrow(2, 0, filled), values: held.values.narrow(2, 0, filled) }
            }
        }
    }

    /// Makes new buffers that hold the old rows with `new` behind them, and returns them.
    pub fn grow(&mut self, new: Segment, lens: &[usize], new_lens: &[usize]) -> Segment {
        let held = match self.held.take().filter(|_| lens.iter().any(|len| *len > 0)) {
            // Buffers of their own: a view would keep what it is a part of.
            None => Segment { keys: own(new.keys), values: own(new.values) },
            Some(held) => concatenate(held, new, lens, new_lens),
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
type Part = fn(&Segment) -> &Tensor<4>;

/// Writes parts, `[1, H, n, D]` each, one after the other behind the `lens[b]` positions of each row, and then, if `to_the_end`,
/// something finite.
fn write_rows(buffer: Tensor<4>, rows: &[Vec<Segment>], lens: &[usize], part: Part, to_the_end: bool) -> Tensor<4> {
    let shape = buffer.dims();
    let [batch, heads, capacity, head_dim] = shape;
    let one = Tensor::<2>::ones([1, 1], (&buffer.device(), buffer.dtype()));
    // As a matrix, all positions of a head lie in one stretch of memory and are copied at once.
    let mut flat: Tensor<2> = buffer.reshape([batch * heads, capacity * head_dim]);
    for (row, (parts, &len)) in rows.iter().zip(lens).enumerate() {
        let heads_of_row = row * heads..(row + 1) * heads;
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

/// Length of the longest row once the new tokens are in.
fn longest(lens: &[usize], new_lens: &[usize]) -> usize {
    lens.iter().zip(new_lens).map(|(held, new)| held + new).max().unwrap_or(0)
}

fn is_uniform(lens: &[usize]) -> bool {
    lens.iter().all(|len| *len == lens[0])
}

/// `buffer[b, :, lens[b]..lens[b] + new_lens[b]] = new[b, :, ..new_lens[b]]`, of keys and of values.
fn assign(
    buffers: Segment,
    new: Segment,
    past: Option<&Tensor<1, Int>>,
    lens: &[usize],
    new_lens: &[usize],
) -> Segment {
    if has_kernels(&buffers.keys.device()) {
        let (buffers, new) = ([buffers.keys, buffers.values], [new.keys, new.values]);
        let [keys, values] = append(buffers, new, past, lens, new_lens);
        return Segment { keys, values };
    }
    let keys = assign_each(buffers.keys, new.keys, lens, new_lens);
    Segment { keys, values: assign_each(buffers.values, new.values, lens, new_lens) }
}

fn assign_each(buffer: Tensor<4>, new: Tensor<4>, lens: &[usize], new_lens: &[usize]) -> Tensor<4> {
    let [batch, heads, _, head_dim] = new.dims();
    if is_uniform(lens) && is_uniform(new_lens) {
        let positions = lens[0]..lens[0] + new_lens[0];
        return buffer.slice_assign([0..batch, 0..heads, positions, 0..head_dim], new);
    }
    let rows = lens.iter().zip(new_lens).enumerate();
    rows.fold(buffer, |buffer, (row, (&len, &new_len))| {
        let part = new.clone().slice([row..row + 1, 0..heads, 0..new_len, 0..head_dim]);
        buffer.slice_assign([row..row + 1, 0..heads, len..len + new_len, 0..head_dim], part)
    })
}

/// New tensors that hold `lens[b]` old positions of each row and `new_lens[b]` new ones behind them.
fn concatenate(held: Segment, new: Segment, lens: &[usize], new_lens: &[usize]) -> Segment {
    let old = lens.iter().copied().max().unwrap_or(0);
    let (keys, values) = (held.keys.narrow(2, 0, old), held.values.narrow(2, 0, old));
    let behind = |held: Tensor<4>, new: Tensor<4>| Tensor::cat(vec![held, new], 2);
    if is_uniform(lens) && is_uniform(new_lens) {
        return Segment { keys: behind(keys, new.keys), values: behind(values, new.values) };
    }
    let [batch, heads, _, head_dim] = new.keys.dims();
    let spare = [batch, heads, longest(lens, new_lens) - old, head_dim];
    let spare: Tensor<4> = Tensor::zeros(spare, (&new.keys.device(), new.keys.dtype()));
    let longer = Segment { keys: behind(keys, spare.clone()), values: behind(values, spare) };
    assign(longer, new, None, lens, new_lens)
}
