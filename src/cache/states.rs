//! [`States`]: keys and values, as attention gives and takes them.

use burn::tensor::{DType, Tensor};

use crate::backends::{RowGroup, int8_width};
use crate::memory::product;

/// Keys and values of consecutive positions in one layer.
#[derive(Clone, Debug)]
pub struct States {
    /// `[B, H, L, D]`; B may be 1 for all rows.
    pub keys: Tensor<4>,
    /// `[B, H, L, D]`; B may be 1 for all rows.
    pub values: Tensor<4>,
}

impl States {
    /// The same in another element type; nothing happens if it is theirs.
    pub fn cast(self, dtype: DType) -> Self {
        if self.keys.dtype() == dtype {
            return self;
        }
        Self { keys: self.keys.cast(dtype), values: self.values.cast(dtype) }
    }

    /// The same as a cache in `dtype` holds it.
    pub fn rounded(self, dtype: DType) -> Self {
        Self { keys: rounded(self.keys, dtype), values: rounded(self.values, dtype) }
    }
}

/// Bytes of a head's key, or value, at a position of a cache in `dtype`: integers have a scale beside them.
pub fn head_bytes(head_dim: usize, dtype: DType) -> usize {
    match dtype {
        DType::I8 => product([int8_width(head_dim), size_of::<f32>()]),
        dtype => product([head_dim, dtype.size()]),
    }
}

/// In which numbers keys and values are handed out that a cache in `dtype` holds: what integers stand for, in f32.
pub fn number_type(dtype: DType) -> DType {
    if dtype == DType::I8 { DType::F32 } else { dtype }
}

/// Keys or values as a cache in `dtype` holds them. What is more than the largest half is NaN in halves, and not infinite: a key
/// could get a score of minus infinity, and would be left out without a word.
pub fn rounded<const D: usize>(states: Tensor<D>, dtype: DType) -> Tensor<D> {
    // Pages make integers of numbers where they are written.
    let number = number_type(dtype);
    let states = if states.dtype() == number { states } else { states.cast(number) };
    if dtype != DType::F16 {
        return states;
    }
    let infinite = states.clone().is_inf();
    states.mask_fill(infinite, f32::NAN)
}

/// A group's part of what is packed, `[N, H, D]`, as `[B, H, T, D]`.
pub fn rectangle(packed: &Tensor<3>, group: &RowGroup) -> Tensor<4> {
    let [_, heads, head_dim] = packed.dims();
    let part = packed.clone().narrow(0, group.tokens.start, group.tokens.len());
    part.reshape([group.rows.len(), group.query_len, heads, head_dim]).swap_dims(1, 2)
}
