//! The deterministic mode: every row of every matrix product by itself.
//!
//! burn's matrix products add in an order that depends on how many rows they have, so the same token gets slightly other
//! logits in another batch, behind another chunk of its prompt, or from another decoder. A product of one row has only
//! one order, whatever stands beside it; that costs reading each weight once a token instead of once a batch.

use burn::tensor::Tensor;

use super::attention::Segment;

/// `product` of `x`, `[N, d]`; of each row by itself if `apart`.
pub(super) fn rows_apart(x: Tensor<2>, apart: bool, product: impl Fn(Tensor<2>) -> Tensor<2>) -> Tensor<2> {
    let [rows, _] = x.dims();
    if !apart || rows == 1 {
        return product(x);
    }
    Tensor::cat((0..rows).map(|row| product(x.clone().narrow(0, row, 1))).collect(), 0)
}

/// `attend` for each query by itself, with the keys that it sees and no others.
///
/// # Shapes
///
/// - query: `[B, H, T, D]`
/// - own: `[B, H, L, D]`, of which row `b` held `past[b]` before its new tokens
/// - result: `[B, H, T, D]`
pub(super) fn queries_apart(
    query: &Tensor<4>,
    own: &Segment,
    past: &[usize],
    attend: impl Fn(Tensor<4>, Segment) -> Tensor<4>,
) -> Tensor<4> {
    let [batch, _, time, _] = query.dims();
    let [_, _, keys, _] = own.keys.dims();
    let one = |row: usize, t: usize| {
        // What stands behind the end of a shorter row counts for nothing, and has no key of its own.
        let visible = (past[row] + t + 1).min(keys);
        let part = |all: &Tensor<4>| contiguous(all.clone().narrow(0, row, 1).narrow(2, 0, visible));
        let query = contiguous(query.clone().narrow(0, row, 1).narrow(2, t, 1));
        attend(query, Segment { keys: part(&own.keys), values: part(&own.values) })
    };
    let row = |row: usize| Tensor::cat((0..time).map(|t| one(row, t)).collect(), 2);
    Tensor::cat((0..batch).map(row).collect(), 0)
}

/// The same elements in the order of their indices, since a product may add in another order if they lie otherwise.
fn contiguous(x: Tensor<4>) -> Tensor<4> {
    let dims = x.dims();
    x.reshape([dims.iter().product::<usize>()]).reshape(dims)
}
