//! Attention over pages: each workgroup takes a head of some queries of a row, and either one page, of which it leaves
//! what it found for [`fold`](super::fold), or all pages one after the other. The bits are the same.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::fold::{fold, folded};
use super::page::{self, CHUNKS, LANES, MAX_QUERIES, Sizes, THREADS};
use super::{PageTable, Queries, vector_size};
use crate::PagedRow;
use crate::cube::{address_type, element_type, empty_beside, readable};

/// Workgroups for each of a device's multiprocessors from which on pages need not be dealt to more of them.
const WORTH_WALKING: usize = 8;
/// Multiprocessors of a device that does not say how many it has.
const MULTIPROCESSORS: usize = 32;
/// Bytes of what pages give, at most, before it is folded.
const MAX_PARTIALS: usize = 64 << 20;

/// How the queries of some rows are dealt to workgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    sizes: Sizes,
    /// Whether a workgroup takes all pages, and not one.
    is_walk: bool,
}

impl Plan {
    /// None if a device does not launch so many workgroups, or a head does not fit into one. Pages are shaped `[P, H, L, D]`, and no row
    /// may have more than `width` of them.
    pub fn new(client: &Client, pages: [usize; 4], width: usize, rows: &[PagedRow]) -> Option<Self> {
        let [_, heads, page_len, head_dim] = pages;
        let hardware = &client.properties().hardware;
        let max_query_len = rows.iter().map(|row| row.query_len).max().unwrap_or(0);
        let mut sizes = Sizes { queries: max_query_len.clamp(1, MAX_QUERIES).next_power_of_two(), page_len, head_dim };
        let fits = |sizes: Sizes| {
            sizes.queries * sizes.columns() <= MAX_QUERIES && sizes.shared_memory() <= hardware.max_shared_memory_size
        };
        while !fits(sizes) {
            sizes.queries /= 2;
            if sizes.queries == 0 {
                return None;
            }
        }
        let blocks = Queries::blocks(rows, sizes.queries);
        let (max_x, max_y, max_z) = hardware.max_cube_count;
        let [max_x, max_y, max_z] = [max_x, max_y, max_z].map(|count| count as usize);
        let is_launched = heads <= max_x && blocks <= max_y && sizes.queries <= max_z;
        let has_units = THREADS <= hardware.max_units_per_cube as usize;
        if head_dim == 0 || page_len == 0 || !page_len.is_multiple_of(LANES) || !is_launched || !has_units {
            return None;
        }
        let queries: usize = rows.iter().map(|row| row.query_len).sum();
        let partials = [queries, heads, width, (head_dim + 2) * size_of::<f32>()];
        let bytes = partials.into_iter().try_fold(1, usize::checked_mul);
        let is_too_large = bytes.is_none_or(|bytes| bytes > MAX_PARTIALS);
        let multiprocessors = hardware.num_streaming_multiprocessors.map_or(MULTIPROCESSORS, |count| count as usize);
        let is_full = heads * blocks >= WORTH_WALKING * multiprocessors;
        let is_walk = width == 1 || is_full || is_too_large || heads.saturating_mul(width) > max_x;
        Some(Self { sizes, is_walk })
    }

    /// Queries of a block.
    pub fn queries(self) -> usize {
        self.sizes.queries
    }

    /// The same, with all pages for each workgroup, or with one.
    #[cfg(test)]
    pub fn with_walk(self, is_walk: bool) -> Self {
        Self { is_walk, ..self }
    }
}

/// See [`Gpt2Ops::attend_pages`](crate::Gpt2Ops::attend_pages); all that is new has been written. `query` is in f32, and there is one.
pub fn attend(
    query: CubeTensor,
    [keys, values]: [CubeTensor; 2],
    table: &PageTable,
    queries: &Queries,
    Plan { sizes, is_walk }: Plan,
) -> CubeTensor {
    let [count, heads, head_dim]: [usize; 3] = query.meta.shape().dims();
    let width = vector_size(&keys);
    let (query, keys) = (readable(query, width), readable(keys, width));
    let pages = table.width();
    let output = match is_walk {
        true => empty_beside(&query, [count, heads * head_dim], DType::F32),
        false => empty_beside(&query, [count, heads, pages, head_dim + 2], DType::F32),
    };
    let [blocks, _]: [usize; 2] = queries.blocks.meta.shape().dims();
    let of_heads = if is_walk { heads } else { heads * pages };
    let address = address_type(&[&query, &keys, &values, &output]);
    let dtype = element_type(keys.dtype);
    // SAFETY: `checks::pages` made sure that keys and values have the same shape, with the heads and the width of the queries, and that
    // there is a page; and the caller that both are of one type, that the sizes are theirs, and that the queries are `count`. A page
    // that is not there is taken for the last, pages that the table has not are not read, and blocks are of queries that are there,
    // whatever the table, the lengths and the blocks say.
    unsafe {
        attend_kernel::launch_unchecked(
            &output.client,
            CubeCount::Static(of_heads as u32, blocks as u32, 1),
            CubeDim::new_1d(THREADS as u32),
            address,
            width,
            query.into_tensor_arg(),
            keys.into_tensor_arg(),
            values.into_tensor_arg(),
            table.pages.clone().into_tensor_arg(),
            table.context_lens.clone().into_tensor_arg(),
            queries.blocks.clone().into_tensor_arg(),
            output.clone().into_tensor_arg(),
            1.0 / (head_dim as f32).sqrt(),
            sizes,
            is_walk,
            dtype,
        );
    }
    if is_walk { output } else { fold(output, table, queries, sizes) }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn attend_kernel<C: Numeric, N: Size>(
    query: &Tensor<Vector<f32, N>>,
    keys: &Tensor<Vector<C, N>>,
    values: &Tensor<C>,
    table: &Tensor<u32>,
    context_lens: &Tensor<i32>,
    blocks: &Tensor<i32>,
    output: &mut Tensor<f32>,
    scale: f32,
    #[comptime] sizes: Sizes,
    #[comptime] is_walk: bool,
    #[define(C)] _dtype: ElemType,
) {
    let vector = keys.vector_size();
    let (queries, columns) = (comptime!(sizes.queries), comptime!(sizes.columns()));
    let (page_len, head_dim) = (comptime!(sizes.page_len), comptime!(sizes.head_dim));
    let lanes = comptime!(head_dim / vector);
    let (heads, width) = (query.shape(1), table.shape(1));
    let (head, thread) = (CUBE_POS_X as usize % heads, UNIT_POS as usize);
    let block = page::block(blocks, context_lens, CUBE_POS_Y as usize, width * page_len, query.shape(0), queries);

    let mut of_queries = Shared::<[Vector<f32, N>]>::new_slice(comptime!(queries * lanes));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(queries * page_len));
    let mut maxima = Shared::<[f32]>::new_slice(comptime!(queries * CHUNKS));
    let mut of_lanes = Shared::<[f32]>::new_slice(comptime!(queries * LANES));
    let mut totals = Shared::<[f32]>::new_slice(queries);

    let mut element = thread;
    let mut of_block = 0_usize;
    if block.count > 0 {
        of_block = comptime!(queries * lanes).runtime();
    }
    while element < of_block {
        // Queries behind the last are the last.
        let q = block.first + usize::min(element / lanes, block.count - 1);
        let at = (q * query.stride(0) + head * query.stride(1)) / vector + element % lanes;
        of_queries[element] = query[at] * Vector::new(scale);
        element += THREADS;
    }
    sync_cube();

    let mut level = CUBE_POS_X as usize / heads;
    let mut end = 0_usize;
    if block.count > 0 {
        end = page::pages_seen(block.seen + block.count - 1, width, page_len);
    }
    if comptime!(!is_walk) {
        end = usize::min(end, level + 1);
    }

    // Of each query the largest score, and the weighted sums of this thread's columns.
    let mut max_scores = Array::<f32>::new(queries);
    let mut sums = Array::<f32>::new(comptime!(queries * columns));
    // What a page gives.
    let mut of_page = Array::<f32>::new(queries);
    let mut sums_of_page = Array::<f32>::new(comptime!(queries * columns));
    // Of the query that this thread has, if it has one.
    let mut own_max = 0.0_f32;
    let mut own_total = 0.0_f32;
    #[unroll]
    for q in 0..queries {
        max_scores[q] = 0.0;
    }
    #[unroll]
    for i in 0..comptime!(queries * columns) {
        sums[i] = 0.0;
        sums_of_page[i] = 0.0;
    }

    while level < end {
        let before = level * page_len;
        let entry = table[block.row * table.stride(0) + level * table.stride(1)] as usize;
        let page = usize::min(entry, keys.shape(0) - 1);
        let of_keys = (page * keys.stride(0) + head * keys.stride(1)) / vector;
        let of_values = page * values.stride(0) + head * values.stride(1);
        let max_visible = page::visible(&block, block.count - 1, before, page_len);

        page::scores(&of_queries, keys, of_keys, max_visible, &mut weights, sizes);
        sync_cube();
        page::maxima(&weights, &block, before, &mut maxima, sizes);
        sync_cube();
        #[unroll]
        for q in 0..queries {
            of_page[q] = page::max_score(&maxima, q);
        }
        page::weights(&mut weights, &of_page, &block, before, sizes);
        sync_cube();
        page::lanes(&weights, &mut of_lanes, sizes);
        page::sums(&weights, values, of_values, &block, before, &mut sums_of_page, sizes);
        // And nobody still reads the weights when the next page's scores are written.
        sync_cube();

        if page::visible(&block, thread, before, page_len) > 0 {
            let (max_score, total) = (page::max_score(&maxima, thread), page::total(&of_lanes, thread));
            if comptime!(!is_walk) {
                let at = ((block.first + thread) * heads + head) * width + level;
                output[at * comptime!(head_dim + 2) + head_dim] = max_score;
                output[at * comptime!(head_dim + 2) + comptime!(head_dim + 1)] = total;
            } else if level == 0 {
                own_max = max_score;
                own_total = total;
            } else {
                let larger = f32::max(own_max, max_score);
                let (a, b) = (f32::exp(own_max - larger), f32::exp(max_score - larger));
                own_total = folded(own_total, a, total, b);
                own_max = larger;
            }
        }
        #[unroll]
        for q in 0..queries {
            if page::visible(&block, q, before, page_len) > 0 {
                if comptime!(!is_walk) {
                    let at = ((block.first + q) * heads + head) * width + level;
                    #[unroll]
                    for c in 0..columns {
                        let column = thread + c * THREADS;
                        if column < head_dim {
                            output[at * comptime!(head_dim + 2) + column] = sums_of_page[q * columns + c];
                        }
                    }
                } else if level == 0 {
                    max_scores[q] = of_page[q];
                    #[unroll]
                    for c in 0..columns {
                        sums[q * columns + c] = sums_of_page[q * columns + c];
                    }
                } else {
                    let larger = f32::max(max_scores[q], of_page[q]);
                    let (a, b) = (f32::exp(max_scores[q] - larger), f32::exp(of_page[q] - larger));
                    #[unroll]
                    for c in 0..columns {
                        sums[q * columns + c] = folded(sums[q * columns + c], a, sums_of_page[q * columns + c], b);
                    }
                    max_scores[q] = larger;
                }
            }
        }
        level += 1;
    }

    if comptime!(is_walk) {
        if thread < queries {
            totals[thread] = own_total;
        }
        sync_cube();
        #[unroll]
        for q in 0..queries {
            if q < block.count {
                #[unroll]
                for c in 0..columns {
                    let column = thread + c * THREADS;
                    if column < head_dim {
                        output[((block.first + q) * heads + head) * head_dim + column] =
                            sums[q * columns + c] / totals[q];
                    }
                }
            }
        }
    }
}
