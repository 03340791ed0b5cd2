//! [`Gpt2Ops`]: what a GPT-2 needs beyond burn's own operations.
//!
//! Default bodies compose burn's operations, so that every backend has all of it; a backend with kernels overrides them.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};

pub(crate) mod default;
pub(crate) mod default_int8;

/// Columns of a tile of a packed matrix.
pub(crate) const TILE: usize = 32;

/// Inputs of a column of a quantized matrix that have a scale in common.
pub(crate) const GROUP: usize = 64;

/// Inputs of a column of a quantized matrix that are in one word.
pub(crate) const QUAD: usize = 4;

/// The forms of the Gaussian error linear unit (Hendrycks and Gimpel, 2016).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    Tanh,
    /// `0.5 x (1 + erf(x / sqrt 2))`.
    Erf,
}

/// Operations on packed matrices and key-value caches.
///
/// A packed matrix `[inputs, outputs]` is a tensor `[tiles, inputs, 32]`: each tile has 32 columns, those behind the last
/// are 0.
///
/// A quantized matrix `[inputs, outputs]` is two tensors. The weights are whole numbers from -127 to 127, `[tiles, quads, 32]`
/// in i32: a word holds four consecutive inputs of a column, each with 128 added, the first in its lowest byte. The scales
/// are `[tiles, groups, 32]` in f16: a weight times the scale of its group of 64 inputs is the element. Products with it
/// round `x` in the same way: of each row, every 64 numbers have a scale in common, the largest of them divided by 127.
#[backend_extension(Flex: cfg(feature = "flex"))]
pub trait Gpt2Ops: Backend {
    /// Packs a matrix `[inputs, outputs]`.
    fn pack(matrix: FloatTensor<Self>) -> FloatTensor<Self> {
        default::pack::<Self>(matrix)
    }

    /// `gelu?(x W + b)`: `x` is `[N, inputs]`, `tiles` a packed matrix with `outputs` columns, `bias` `[outputs]`.
    fn packed_linear(
        x: FloatTensor<Self>,
        tiles: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        outputs: usize,
        gelu: Option<Gelu>,
    ) -> FloatTensor<Self> {
        default::packed_linear::<Self>(x, tiles, bias, outputs, gelu)
    }

    /// `x W + b + residual`, with `residual` `[N, outputs]` and the rest as for [`packed_linear`](Self::packed_linear).
    fn packed_linear_add(
        x: FloatTensor<Self>,
        tiles: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        residual: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        default::packed_linear_add::<Self>(x, tiles, bias, residual)
    }

    /// Columns `ids`, `[N]`, of a packed matrix, as rows `[N, inputs]` in f32.
    fn packed_columns(tiles: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        default::packed_columns::<Self>(tiles, ids)
    }

    /// Quantizes a matrix `[inputs, outputs]`.
    fn quantize(matrix: FloatTensor<Self>) -> (IntTensor<Self>, FloatTensor<Self>) {
        default_int8::quantize::<Self>(matrix)
    }

    /// As [`packed_linear`](Self::packed_linear), with a quantized matrix.
    fn quantized_linear(
        x: FloatTensor<Self>,
        weights: IntTensor<Self>,
        scales: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        outputs: usize,
        gelu: Option<Gelu>,
    ) -> FloatTensor<Self> {
        default_int8::linear::<Self>(x, weights, scales, bias, outputs, gelu)
    }

    /// As [`packed_linear_add`](Self::packed_linear_add), with a quantized matrix.
    fn quantized_linear_add(
        x: FloatTensor<Self>,
        weights: IntTensor<Self>,
        scales: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        residual: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        default_int8::linear_add::<Self>(x, weights, scales, bias, residual)
    }

    /// Columns `ids`, `[N]`, of a quantized matrix with `inputs` rows, as rows `[N, inputs]` in f32.
    fn quantized_columns(
        weights: IntTensor<Self>,
        scales: FloatTensor<Self>,
        ids: IntTensor<Self>,
        inputs: usize,
    ) -> FloatTensor<Self> {
        default_int8::columns::<Self>(weights, scales, ids, inputs)
    }

    /// Writes new keys or values, `[B, H, T, D]`, into the buffer of a cache, `[B, H, C, D]` and of the same element type: of
    /// row `b`, the first `counts[b]` positions go to `starts[b]..starts[b] + counts[b]`.
    fn append(
        buffer: FloatTensor<Self>,
        new: FloatTensor<Self>,
        starts: Vec<usize>,
        counts: Vec<usize>,
    ) -> FloatTensor<Self> {
        default::append::<Self>(buffer, new, starts, counts)
    }

    /// `softmax(q k^T / sqrt D) v`: `query` is `[B, H, T, D]`, `keys` and `values` are `[B, H, L, D]`, of which query `t` of
    /// row `b` sees the first `past[b] + t + 1`; the result is `[B, T, H D]`.
    fn attend(
        query: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        past: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        default::attend::<Self>(query, keys, values, past)
    }

    /// As [`attend`](Self::attend), over shared keys before each row's own: `shared_keys` and `shared_values` are
    /// `[1, H, S, D]`, and every query sees all of them.
    fn attend_shared(
        query: FloatTensor<Self>,
        shared_keys: FloatTensor<Self>,
        shared_values: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        past: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        default::attend_shared::<Self>(query, shared_keys, shared_values, keys, values, past)
    }
}
