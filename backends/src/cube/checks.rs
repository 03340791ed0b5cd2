//! What the kernels take for granted of their tensors, checked before each launch: [`Gpt2Ops`](crate::Gpt2Ops) is a safe trait,
//! so its callers may be anybody, and the kernels read and write without looking at bounds.
//!
//! # Panics
//!
//! All of these functions, if shapes do not fit together, with both of them.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use crate::metadata::check_rows;
use crate::ops::{GROUP, QUAD, TILE};
use crate::{PackedRow, PagedRow};

/// A matrix, as its kernels read it.
pub enum Matrix<'a> {
    /// Tiles of a packed one.
    Packed(&'a CubeTensor),
    /// Words and scales of a quantized one.
    Quantized(&'a CubeTensor, &'a CubeTensor),
}

/// What follows a product.
pub struct After<'a> {
    pub bias: &'a CubeTensor,
    pub residual: Option<&'a CubeTensor>,
}

/// Float types that kernels read weights, keys and values in.
pub fn is_stored_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

impl Matrix<'_> {
    /// Whether kernels read its element types.
    pub fn has_kernels(&self) -> bool {
        match self {
            Self::Packed(tiles) => is_stored_float(tiles.dtype),
            Self::Quantized(words, scales) => words.dtype == DType::I32 && is_stored_float(scales.dtype),
        }
    }

    /// That it has these inputs, and these tiles of columns.
    fn is(&self, inputs: usize, tiles: usize) {
        match self {
            Self::Packed(packed) => is("a packed matrix", packed, [tiles, inputs, TILE]),
            Self::Quantized(words, scales) => {
                is("words of a quantized matrix", words, [tiles, inputs.div_ceil(QUAD), TILE]);
                is("scales of a quantized matrix", scales, [tiles, inputs.div_ceil(GROUP), TILE]);
            }
        }
    }
}

/// `x`, `[N, inputs]`, times a matrix of `outputs` columns, and what follows.
pub fn product(x: &CubeTensor, matrix: &Matrix<'_>, outputs: usize, after: &After<'_>) {
    let [rows, inputs] = dims("x", x);
    matrix.is(inputs, outputs.div_ceil(TILE));
    is("a bias", after.bias, [outputs]);
    if let Some(residual) = after.residual {
        is("a residual", residual, [rows, outputs]);
    }
}

/// Columns `ids` of a matrix of these inputs. Ids themselves are looked at by the kernel.
pub fn columns(matrix: &Matrix<'_>, ids: &CubeTensor, inputs: usize) {
    let (Matrix::Packed(weights) | Matrix::Quantized(weights, _)) = matrix;
    let [tiles, _, _] = dims("a matrix", weights);
    matrix.is(inputs, tiles);
    let [count] = dims("ids", ids);
    assert!(tiles > 0 || count == 0, "{count} columns of a matrix that has none");
}

/// What is new, `[N, H, D]`, beside the buffers of a cache, `[S, H, C, D]`; returns the shape of what is new. What
/// `context_lens` and `layout` hold is looked at by the kernels.
pub fn packed(
    new: &CubeTensor,
    [keys, values]: [&CubeTensor; 2],
    [context_lens, layout]: [&CubeTensor; 2],
    rows: &[PackedRow],
) -> [usize; 3] {
    let (shape, buffer) = (dims("what is new", new), dims("a buffer of keys", keys));
    is("a buffer of values", values, buffer);
    is("context lengths", context_lens, [rows.len()]);
    is("the layout", layout, [rows.len(), 3]);
    check_rows(shape, buffer, rows);
    shape
}

/// New keys and values, `[N, H, D]`, for the buffers of a cache.
pub fn append(
    buffers: [&CubeTensor; 2],
    [new_keys, new_values]: [&CubeTensor; 2],
    layout: [&CubeTensor; 2],
    rows: &[PackedRow],
) {
    let shape = packed(new_keys, buffers, layout, rows);
    is("new values", new_values, shape);
}

/// What is new, `[N, H, D]`, beside pages, `[P, H, L, D]`, of which there is one that has something, and the queries of all rows; returns
/// the shape of the pages. What tables of pages and lengths hold is looked at by the kernels, too.
pub fn pages(
    [new_keys, new_values]: [&CubeTensor; 2],
    [keys, values]: [&CubeTensor; 2],
    queries: usize,
    rows: &[PagedRow],
) -> [usize; 4] {
    let (shape, [new, ..]) = (shape_of_pages([keys, values]), dims::<3>("new keys", new_keys));
    let [pages, heads, page_len, head_dim] = shape;
    is("new keys", new_keys, [new, heads, head_dim]);
    is("new values", new_values, [new, heads, head_dim]);
    PagedRow::check(rows, [new, queries], pages, page_len);
    shape
}

/// A query, `[M, H, D]`, over pages, `[P, H, L, D]`; returns M.
pub fn query_of_pages(query: &CubeTensor, keys: &CubeTensor) -> usize {
    let ([queries, ..], [_, heads, _, head_dim]) = (dims::<3>("a query", query), dims("pages of keys", keys));
    is("a query", query, [queries, heads, head_dim]);
    queries
}

/// Pages that become copies of others.
pub fn copies(pages: &CubeTensor, copies: &[[u32; 2]]) {
    let [count, ..] = dims::<4>("pages", pages);
    are_there(copies.as_flattened(), count);
}

/// The first `len` positions of a row with these pages.
pub fn reading([keys, values]: [&CubeTensor; 2], of_row: &[u32], len: usize) {
    let [count, _, page_len, _] = shape_of_pages([keys, values]);
    let held = of_row.len().saturating_mul(page_len);
    assert!(len <= held, "{held} positions of {} pages, and not {len}", of_row.len());
    are_there(of_row, count);
}

fn shape_of_pages([keys, values]: [&CubeTensor; 2]) -> [usize; 4] {
    let shape = dims("pages of keys", keys);
    let [_, _, page_len, _] = shape;
    is("pages of values", values, shape);
    assert!(page_len > 0, "pages of some positions, and not of {page_len}");
    shape
}

fn are_there(pages: &[u32], count: usize) {
    assert!(pages.iter().all(|page| (*page as usize) < count), "pages of {count}, and not {pages:?}");
}

/// `x`, `[N, d]`, with `gamma` and `beta`, `[d]`.
pub fn layer_norm(x: &CubeTensor, gamma: &CubeTensor, beta: &CubeTensor) {
    let [_, width] = dims("x", x);
    is("gamma", gamma, [width]);
    is("beta", beta, [width]);
}

/// Logits, `[N, V]`; returns N.
pub fn logits(logits: &CubeTensor) -> usize {
    let [rows, _] = dims("logits", logits);
    rows
}

/// Logits, `[B, V]`, with `ids` and `context_lens`, `[B]`, and `chosen`, `[B, N]`, which has a column at least.
pub fn advance(of_rows: &CubeTensor, ids: &CubeTensor, context_lens: &CubeTensor, chosen: &CubeTensor) {
    let batch = logits(of_rows);
    let [_, columns] = dims("what is chosen", chosen);
    is("ids", ids, [batch]);
    is("lengths", context_lens, [batch]);
    is("what is chosen", chosen, [batch, columns]);
    assert!(columns > 0, "there is no column for what is chosen");
}

/// The dimensions of a tensor that has to have as many.
fn dims<const D: usize>(what: &str, tensor: &CubeTensor) -> [usize; D] {
    let shape: &[usize] = tensor.meta.shape();
    let Ok(dims) = shape.try_into() else { panic!("{what} of {D} dimensions, and not {shape:?}") };
    dims
}

fn is<const D: usize>(what: &str, tensor: &CubeTensor, expected: [usize; D]) {
    let shape: &[usize] = tensor.meta.shape();
    assert!(shape == expected, "{what} of shape {expected:?}, and not {shape:?}");
}
