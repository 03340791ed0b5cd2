//! Pages folded from the left, in the order in which they are: `M = max(m1, m2)`, `a = exp(m1 - M)`, `b = exp(m2 - M)`,
//! `l = fma(l1, a, l2 b)`, `o = fma(o1, a, o2 b)`. The first page is taken as it is, which is what the formula makes of
//! (-inf, 0, 0) and it.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::page::{self, Sizes, THREADS};
use super::{PageTable, Queries};
use crate::cube::{address_type, empty_beside};

/// Pages that a thread asks for before it waits for the first of them.
const PAGES_AT_ONCE: usize = 4;

/// What pages gave, `[M, H, W, D + 2]` (the weighted sums of the values, and behind them the largest score and the sum of the weights), as
/// `[M, H D]`.
pub fn fold(partials: CubeTensor, table: &PageTable, queries: &Queries, sizes: Sizes) -> CubeTensor {
    let [count, heads, _, _]: [usize; 4] = partials.meta.shape().dims();
    let output = empty_beside(&partials, [count, heads * sizes.head_dim], DType::F32);
    let [blocks, _]: [usize; 2] = queries.blocks.meta.shape().dims();
    let address = address_type(&[&partials, &output]);
    // SAFETY: the caller made `partials` and `output` for all queries. Blocks are of queries that are there, and pages of those that
    // the partials have, whatever the lengths and the blocks say.
    unsafe {
        fold_kernel::launch_unchecked(
            &output.client,
            CubeCount::Static(heads as u32, blocks as u32, sizes.queries as u32),
            CubeDim::new_1d(THREADS as u32),
            address,
            partials.into_tensor_arg(),
            table.context_lens.clone().into_tensor_arg(),
            queries.blocks.clone().into_tensor_arg(),
            output.clone().into_tensor_arg(),
            sizes,
        );
    }
    output
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn fold_kernel(
    partials: &Tensor<f32>,
    context_lens: &Tensor<i32>,
    blocks: &Tensor<i32>,
    output: &mut Tensor<f32>,
    #[comptime] sizes: Sizes,
) {
    let (head, q) = (CUBE_POS_X as usize, CUBE_POS_Z as usize);
    let (count, heads, width) = (partials.shape(0), partials.shape(1), partials.shape(2));
    let (page_len, head_dim) = (comptime!(sizes.page_len), comptime!(sizes.head_dim));
    let block =
        page::block(blocks, context_lens, CUBE_POS_Y as usize, width * page_len, count, comptime!(sizes.queries));
    let mut max_scores = Array::<f32>::new(PAGES_AT_ONCE);
    let mut totals = Array::<f32>::new(PAGES_AT_ONCE);
    let mut sums = Array::<f32>::new(PAGES_AT_ONCE);
    if q < block.count {
        let query = (block.first + q) * heads + head;
        let pages = page::pages_seen(block.seen + q, width, page_len);
        let mut column = UNIT_POS as usize;
        while column < head_dim {
            let at = query * width * comptime!(head_dim + 2);
            let mut max_score = partials[at + head_dim];
            let mut total = partials[at + comptime!(head_dim + 1)];
            let mut sum = partials[at + column];
            let mut page = 1_usize;
            while page < pages {
                #[unroll]
                for i in 0..PAGES_AT_ONCE {
                    // Of those that are not there, the last again.
                    let at = at + usize::min(page + i, pages - 1) * comptime!(head_dim + 2);
                    max_scores[i] = partials[at + head_dim];
                    totals[i] = partials[at + comptime!(head_dim + 1)];
                    sums[i] = partials[at + column];
                }
                #[unroll]
                for i in 0..PAGES_AT_ONCE {
                    if page + i < pages {
                        let larger = f32::max(max_score, max_scores[i]);
                        let (a, b) = (f32::exp(max_score - larger), f32::exp(max_scores[i] - larger));
                        total = folded(total, a, totals[i], b);
                        sum = folded(sum, a, sums[i], b);
                        max_score = larger;
                    }
                }
                page += PAGES_AT_ONCE;
            }
            output[query * head_dim + column] = sum / total;
            column += THREADS;
        }
    }
}

/// Two sums, each times how much what was subtracted from its scores has become more.
#[cube]
pub fn folded(one: f32, a: f32, other: f32, b: f32) -> f32 {
    fma(one, a, other * b)
}
