//! [`Gpt2Ops`]: what a GPT-2 needs beyond burn's own operations.
//!
//! Default bodies compose burn's operations, so that every backend has all of it; a backend with kernels overrides them.

#![cfg_attr(feature = "ndarray", allow(deprecated))] // burn's older backend is wanted, to be compared with

use std::sync::Arc;

#[cfg(feature = "fusion")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};
use burn::tensor::DType;
#[cfg(feature = "fusion")]
use burn::tensor::Shape;

use crate::{PackedRow, PagedRow};

pub(crate) mod default;
pub(crate) mod default_int8;
pub(crate) mod default_paged;

/// Columns of a tile of a packed matrix.
pub(crate) const TILE: usize = 32;

/// Inputs of a column of a quantized matrix that have a scale in common.
pub(crate) const GROUP: usize = 64;

/// Inputs of a column of a quantized matrix that are in one word.
pub(crate) const QUAD: usize = 4;

/// The least scale of a group of weights, and the step between the least ones: the smallest number above 0 in f16, 2^-24.
pub(crate) const LEAST_SCALE: f32 = 5.960_464_5e-8;

/// As many scales a weight may be away from 0 to be clamped to 127 of them at the cost of half a scale, which rounding costs anyway.
pub(crate) const MAX_STEPS: f32 = 127.5;

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
/// are `[tiles, groups, 32]` in f16, or in f32 on a GPU: a weight times the scale of its group of 64 inputs is the element. On
/// the CPU, products with it round `x` in the same way: of each row, every 64 numbers have a scale in common, the largest of
/// them divided by 127.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cube"),
    Fusion: cfg(feature = "fusion")
)]
pub trait Gpt2Ops: Backend {
    /// Packs a matrix `[inputs, outputs]`.
    #[fusion(dtype = matrix, shape = {
        let [inputs, outputs] = matrix.dims();
        Shape::new([outputs.div_ceil(TILE), inputs, TILE])
    })]
    fn pack(matrix: FloatTensor<Self>) -> FloatTensor<Self> {
        default::pack::<Self>(matrix)
    }

    /// `gelu?(x W + b)`: `x` is `[N, inputs]`, `tiles` a packed matrix with `outputs` columns, `bias` `[outputs]`.
    #[fusion(dtype = x, shape = Shape::new([x[0], *outputs]))]
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
    #[fusion(dtype = x, shape = residual)]
    fn packed_linear_add(
        x: FloatTensor<Self>,
        tiles: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        residual: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        default::packed_linear_add::<Self>(x, tiles, bias, residual)
    }

    /// Columns `ids`, `[N]`, of a packed matrix, as rows `[N, inputs]` in f32. For an id outside of it the CPU panics; a GPU
    /// gives some other column.
    #[fusion(dtype = DType::F32, shape = Shape::new([ids[0], tiles[1]]))]
    fn packed_columns(tiles: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        default::packed_columns::<Self>(tiles, ids)
    }

    /// Quantizes a matrix `[inputs, outputs]`.
    #[fusion(meta = quantized)]
    fn quantize(matrix: FloatTensor<Self>) -> (IntTensor<Self>, FloatTensor<Self>) {
        default_int8::quantize::<Self>(matrix, DType::F16)
    }

    /// As [`packed_linear`](Self::packed_linear), with a quantized matrix.
    #[fusion(dtype = x, shape = Shape::new([x[0], *outputs]))]
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
    #[fusion(dtype = x, shape = residual)]
    fn quantized_linear_add(
        x: FloatTensor<Self>,
        weights: IntTensor<Self>,
        scales: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        residual: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        default_int8::linear_add::<Self>(x, weights, scales, bias, residual)
    }

    /// Columns `ids`, `[N]`, of a quantized matrix with `inputs` rows, as rows `[N, inputs]` in f32; ids as for
    /// [`packed_columns`](Self::packed_columns).
    #[fusion(dtype = DType::F32, shape = Shape::new([ids[0], *inputs]))]
    fn quantized_columns(
        weights: IntTensor<Self>,
        scales: FloatTensor<Self>,
        ids: IntTensor<Self>,
        inputs: usize,
    ) -> FloatTensor<Self> {
        default_int8::columns::<Self>(weights, scales, ids, inputs)
    }

    /// Writes new keys and values, `[N, H, D]` each, into the buffers of a cache, `[S, H, C, D]` each: the tokens of each of
    /// `rows`, one row after the other, go to the positions of its slot that follow its context. The same is on the device:
    /// `context_lens`, `[B]`, and `layout`, `[B, 3]`, which has the slot, the first token and the number of tokens of each row.
    /// What is new is rounded to the element type of the buffers.
    #[fusion(meta = |keys, values, _, _, _, _, _| (keys.clone(), values.clone()))]
    fn append(
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        new_keys: FloatTensor<Self>,
        new_values: FloatTensor<Self>,
        context_lens: IntTensor<Self>,
        layout: IntTensor<Self>,
        rows: Arc<[PackedRow]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let _ = (context_lens, layout);
        let keys = default::append::<Self>(keys, new_keys, &rows);
        (keys, default::append::<Self>(values, new_values, &rows))
    }

    /// `softmax(q k^T / sqrt D) v`: `query` is `[N, H, D]`, `keys` and `values` are `[S, H, C, D]`; query `t` of a row sees the
    /// first `context_len + t + 1` positions of its slot, and the result is `[N, H D]`. The rest is as for
    /// [`append`](Self::append); where a GPU goes by its own lengths, one that is negative is 0.
    #[fusion(dtype = query, shape = Shape::new([query[0], query[1] * query[2]]))]
    fn attend(
        query: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        context_lens: IntTensor<Self>,
        layout: IntTensor<Self>,
        rows: Arc<[PackedRow]>,
    ) -> FloatTensor<Self> {
        let _ = layout;
        default::attend::<Self>(query, keys, values, context_lens, &rows)
    }

    /// Writes new keys and values, `[N, H, D]` each, to pages, `[P, H, L, D]` each, and attends over them with `query`, `[M, H, D]`: the
    /// tokens of each of `rows`, one row after the other, go to the positions of its pages that follow its context, and the last
    /// `query_len` of them attend, each to all positions up to its own. Returns the result, `[M, H D]`, and the pages.
    ///
    /// What is new is rounded to the element type of the pages. Where in a page and head an element lies is the backend's own affair; the
    /// order of sums is that of [`attend_pages`](crate::attend_pages).
    #[fusion(meta = |query, _, _, keys, values, _| (attended(query), keys.clone(), values.clone()))]
    fn attend_pages(
        query: FloatTensor<Self>,
        new_keys: FloatTensor<Self>,
        new_values: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        rows: Arc<[PagedRow]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        default_paged::attend::<Self>(query, [new_keys, new_values], [keys, values], &rows)
    }

    /// As [`attend_pages`](Self::attend_pages), without a query.
    #[fusion(meta = |_, _, keys, values, _| (keys.clone(), values.clone()))]
    fn append_pages(
        new_keys: FloatTensor<Self>,
        new_values: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        rows: Arc<[PagedRow]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        (default_paged::append::<Self>(keys, new_keys, &rows), default_paged::append::<Self>(values, new_values, &rows))
    }

    /// Makes pages, `[P, H, L, D]`, copies of others: of each pair, the second one of the first one, in order.
    #[fusion(dtype = pages, shape = pages)]
    fn copy_pages(pages: FloatTensor<Self>, copies: Arc<[[u32; 2]]>) -> FloatTensor<Self> {
        default_paged::copy::<Self>(pages, &copies)
    }

    /// What is at the first `len` positions of a row with these pages: of `keys` and `values`, `[P, H, L, D]`, as `[len, H, D]` each.
    #[fusion(meta = |keys, values, _, len, _| (read(keys, *len), read(values, *len)))]
    fn read_pages(
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        pages: Arc<[u32]>,
        len: usize,
        _head_dim: usize,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        (default_paged::read::<Self>(keys, &pages, len), default_paged::read::<Self>(values, &pages, len))
    }

    /// `(x - mean) / sqrt(variance + epsilon) gamma + beta` of each row of `x`, `[N, d]`; `gamma` and `beta` are `[d]`.
    #[fusion(dtype = x, shape = x)]
    fn layer_norm(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        default::layer_norm::<Self>(x, gamma, beta, epsilon)
    }

    /// The lowest id among the largest logits of each row: `[N, V]` to `[N]` in i32. A row that holds what is not a number, or
    /// plus infinity, or nothing that is finite, has -1.
    #[fusion(dtype = DType::I32, shape = Shape::new([logits[0]]))]
    fn argmax(logits: FloatTensor<Self>) -> IntTensor<Self> {
        default::argmax::<Self>(logits)
    }

    /// A step of greedy decoding that stays on the device: the most likely token of each row of `logits`, `[B, V]`, goes to
    /// `ids`, `[B]`, and to `chosen`, `[B, N]`, at column `context_lens[b] % N`; then `context_lens`, `[B]`, is one more. All are in i32, and
    /// written in place if nothing else refers to them. For a row that has no such token (see [`argmax`](Self::argmax)),
    /// `chosen` gets -1, and `ids` that of some token.
    #[fusion(meta = |_, ids, context_lens, chosen| (ids.clone(), context_lens.clone(), chosen.clone()))]
    fn advance(
        logits: FloatTensor<Self>,
        ids: IntTensor<Self>,
        context_lens: IntTensor<Self>,
        chosen: IntTensor<Self>,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        let _ = ids;
        default::advance::<Self>(logits, context_lens, chosen)
    }
}

/// What attention makes of a query, `[M, H, D]`.
#[cfg(feature = "fusion")]
fn attended(query: &TensorSpec) -> TensorSpec {
    let mut out = query.clone();
    let [queries, heads, head_dim] = query.shape.dims();
    out.shape = Shape::new([queries, heads * head_dim]);
    out
}

/// So many positions of pages, `[P, H, L, D]`.
#[cfg(feature = "fusion")]
fn read(pages: &TensorSpec, len: usize) -> TensorSpec {
    let mut out = pages.clone();
    let [_, heads, _, head_dim] = pages.shape.dims();
    out.shape = Shape::new([len, heads, head_dim]);
    out
}

/// What [`Gpt2Ops::quantize`] makes of a matrix.
#[cfg(feature = "fusion")]
fn quantized(matrix: &TensorSpec) -> (TensorSpec, TensorSpec) {
    let [inputs, outputs] = matrix.shape.dims();
    let tiles = outputs.div_ceil(TILE);
    let mut words = matrix.clone();
    words.shape = Shape::new([tiles, inputs.div_ceil(QUAD), TILE]);
    words.dtype = DType::I32;
    let mut scales = matrix.clone();
    scales.shape = Shape::new([tiles, inputs.div_ceil(GROUP), TILE]);
    scales.dtype = DType::F32;
    (words, scales)
}

#[cfg(feature = "ndarray")]
impl Gpt2Ops for burn::backend::NdArray {}
