//! What the kernels take for granted of their tensors, checked before each launch: [`Gpt2Ops`](crate::Gpt2Ops) is a safe trait,
//! so its callers may be anybody, and the kernels read and write without looking at bounds.
//!
//! # Panics
//!
//! All of these functions, if shapes do not fit together, with both of them.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use crate::ops::{GROUP, QUAD, TILE};

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

/// New keys and values, `[B, H, T, D]`, into buffers, `[B, H, C, D]`; `starts` are on the device, and looked at by the kernel.
pub fn append(
    [keys, values]: [&CubeTensor; 2],
    [new_keys, new_values]: [&CubeTensor; 2],
    past: &CubeTensor,
    starts: &[usize],
    counts: &[usize],
) {
    let [batch, heads, time, head_dim] = dims("new keys", new_keys);
    let [_, _, capacity, _] = dims("a buffer of keys", keys);
    is("a buffer of keys", keys, [batch, heads, capacity, head_dim]);
    is("a buffer of values", values, [batch, heads, capacity, head_dim]);
    is("new values", new_values, [batch, heads, time, head_dim]);
    is("lengths", past, [batch]);
    assert_eq!([starts.len(), counts.len()], [batch; 2], "rows with a start and a count");
    let fits = |(start, count): (&usize, &usize)| {
        start.checked_add(*count).is_some_and(|end| end <= capacity) && *count <= time
    };
    assert!(
        starts.iter().zip(counts).all(fits),
        "{counts:?} of {time} new positions from {starts:?} on, of {capacity}"
    );
}

/// Queries, `[B, H, T, D]`, over keys and values, `[B, H, L, D]`; returns the shape of the queries.
pub fn attention(query: &CubeTensor, keys: &CubeTensor, values: &CubeTensor, past: &CubeTensor) -> [usize; 4] {
    let shape = dims("queries", query);
    let ([batch, heads, _, head_dim], [_, _, count, _]) = (shape, dims("keys", keys));
    is("keys", keys, [batch, heads, count, head_dim]);
    is("values", values, [batch, heads, count, head_dim]);
    is("lengths", past, [batch]);
    shape
}

/// Shared keys and values, `[1, H, S, D]`, beside queries of this shape; returns S.
pub fn shared([_, heads, _, head_dim]: [usize; 4], keys: &CubeTensor, values: &CubeTensor) -> usize {
    let [_, _, count, _] = dims("shared keys", keys);
    is("shared keys", keys, [1, heads, count, head_dim]);
    is("shared values", values, [1, heads, count, head_dim]);
    count
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

/// Logits, `[B, V]`, with `ids` and `past`, `[B]`, and `chosen`, `[B, N]`, which has a place.
pub fn advance(of_rows: &CubeTensor, ids: &CubeTensor, past: &CubeTensor, chosen: &CubeTensor) {
    let batch = logits(of_rows);
    let [_, places] = dims("what is chosen", chosen);
    is("ids", ids, [batch]);
    is("lengths", past, [batch]);
    is("what is chosen", chosen, [batch, places]);
    assert!(places > 0, "there is no place for what is chosen");
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
