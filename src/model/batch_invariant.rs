//! The deterministic mode: every row of every matrix product by itself.
//!
//! burn's matrix products add in an order that depends on how many rows they have, so the same token gets slightly other
//! logits in another batch, behind another chunk of its prompt, or from another decoder. A product of one row has only
//! one order, whatever stands beside it; that costs reading each weight once a token instead of once a batch.

use burn::tensor::Tensor;

use crate::backends::AttentionMetadata;
use crate::cache::States;

/// `product` of `x`, `[N, d]`; of each row by itself if `batch_invariant`.
pub(super) fn batch_invariant_rows(
    x: Tensor<2>,
    batch_invariant: bool,
    product: impl Fn(Tensor<2>) -> Tensor<2>,
) -> Tensor<2> {
    let [rows, _] = x.dims();
    if !batch_invariant || rows == 1 {
        return product(x);
    }
    Tensor::cat((0..rows).map(|row| product(x.clone().narrow(0, row, 1))).collect(), 0)
}

/// `attend` for each query by itself, with the keys that it sees and no others.
///
/// # Shapes
///
/// - query: `[N, H, D]`
/// - states: `[S, H, L, D]`
/// - result: `[N, H D]`
pub(super) fn batch_invariant_attention(
    query: &Tensor<3>,
    states: &States,
    metadata: &AttentionMetadata,
    attend: impl Fn(Tensor<4>, States) -> Tensor<4>,
) -> Tensor<2> {
    let [_, heads, head_dim] = query.dims();
    let one = |slot: usize, token: usize, visible: usize| {
        let part = |all: &Tensor<4>| contiguous(all.clone().narrow(0, slot, 1).narrow(2, 0, visible));
        let query = query.clone().narrow(0, token, 1).reshape([1, heads, 1, head_dim]);
        attend(query, States { keys: part(&states.keys), values: part(&states.values) }).reshape([1, heads * head_dim])
    };
    let rows = metadata.rows().iter().zip(metadata.firsts());
    let queries =
        rows.flat_map(|(row, first)| (0..row.query_len).map(move |t| (row, first + t, row.context_len + t + 1)));
    Tensor::cat(queries.map(|(row, token, visible)| one(row.slot, token, visible)).collect(), 0)
}

/// The same elements in the order of their indices, since a product may add in another order if they lie otherwise.
fn contiguous(x: Tensor<4>) -> Tensor<4> {
    let dims = x.dims();
    x.reshape([dims.iter().product::<usize>()]).reshape(dims)
}
