//! What a page gives to some queries: of each, the largest score, the sum of the weights, and the weighted sum of the values.
//!
//! A score is one chain of fused multiply-adds over D, and so is a thread's affair; the weighted sum of a column is one over the positions, and
//! so is another's. What a query does not see is not read where no query of the block does, and what is made of it otherwise is
//! thrown away before it is added to anything.

use cubecl::prelude::*;

/// Threads of a workgroup: as many as a page has positions and a head has columns, in the models that there are.
pub const THREADS: usize = 64;
/// Queries of a workgroup, at most: each of them has sums in the registers of a thread.
pub const MAX_QUERIES: usize = 8;
/// Parts in which the largest score of a page is looked for.
pub const CHUNKS: usize = 8;
/// Weights that are added next to each other. Pages have a multiple of it.
pub const LANES: usize = 16;
/// Vectors of a key, and values, that a thread asks for before it waits for the first of them: what is computed with them has to wait for
/// what comes before.
const KEYS_AT_ONCE: usize = 4;
const VALUES_AT_ONCE: usize = 8;

/// What kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sizes {
    /// Queries of a workgroup, a power of two up to [`MAX_QUERIES`].
    pub queries: usize,
    pub page_len: usize,
    pub head_dim: usize,
}

impl Sizes {
    /// Columns of a thread.
    pub const fn columns(self) -> usize {
        self.head_dim.div_ceil(THREADS)
    }

    /// Bytes of shared memory that a workgroup needs.
    pub const fn shared_memory(self) -> usize {
        self.queries * (self.head_dim + self.page_len + CHUNKS + LANES + 1) * size_of::<f32>()
    }
}

/// The queries of a workgroup, all of one row.
#[derive(CubeType)]
pub struct Block {
    pub row: usize,
    /// Positions that the first of them sees; the next one sees one more.
    pub seen: usize,
    /// Which of all queries the first is.
    pub first: usize,
    pub count: usize,
}

/// A block of `blocks`, `[K, 4]`, as [`Queries`](super::Queries) describes it. Whatever stands there and in `context_lens`, its row is
/// one of those, and its queries are among as many as there are.
#[cube]
pub fn block(
    blocks: &Tensor<i32>,
    context_lens: &Tensor<i32>,
    index: usize,
    capacity: usize,
    queries: usize,
    #[comptime] of_block: usize,
) -> Block {
    let (at, next) = (index * blocks.stride(0), blocks.stride(1));
    let row = usize::min(i32::max(blocks[at], 0) as usize, context_lens.shape(0) - 1);
    // A length that is negative, or beyond the pages, is as near to what it says as can be.
    let context_len = usize::min(i32::max(context_lens[row * context_lens.stride(0)], 0) as usize, capacity);
    let offset = i32::max(blocks[at + next], 0) as usize;
    let first = usize::min(i32::max(blocks[at + next * 2], 0) as usize, queries);
    let count = usize::min(i32::max(blocks[at + next * 3], 0) as usize, queries - first);
    Block { row, seen: context_len + offset + 1, first, count: usize::min(count, of_block) }
}

/// How many positions of a page a query of a block sees, where `before` are in earlier pages. Queries behind the last see none.
#[cube]
pub fn visible(block: &Block, query: usize, before: usize, #[comptime] page_len: usize) -> usize {
    let seen = usize::max(block.seen + query, before) - before;
    select(query < block.count, usize::min(seen, page_len), 0)
}

/// Pages of which a query sees something that sees so many positions, among those that a row may have.
#[cube]
pub fn pages_seen(seen: usize, width: usize, #[comptime] page_len: usize) -> usize {
    usize::min((seen + comptime!(page_len - 1)) / page_len, width)
}

/// Writes the scores of a page's positions up to `max_visible`, `[queries, L]`, for `of_queries`, `[queries, D]`, which are scaled.
#[cube]
pub fn scores<C: Numeric, N: Size>(
    of_queries: &Shared<[Vector<f32, N>]>,
    keys: &Tensor<Vector<C, N>>,
    of_keys: usize,
    max_visible: usize,
    scores: &mut Shared<[f32]>,
    #[comptime] sizes: Sizes,
) {
    let width = keys.vector_size();
    let lanes = comptime!(sizes.head_dim / width);
    let queries = comptime!(sizes.queries);
    let at_once = comptime!(if lanes.is_multiple_of(KEYS_AT_ONCE) { KEYS_AT_ONCE } else { 1 });
    let mut of_batch = Array::<Vector<f32, N>>::new(at_once);
    let mut dots = Array::<f32>::new(queries);
    let mut position = UNIT_POS as usize;
    while position < max_visible {
        #[unroll]
        for q in 0..queries {
            dots[q] = 0.0;
        }
        let at = of_keys + position * keys.stride(2) / width;
        for batch in 0..comptime!(lanes / at_once) {
            let first = batch * at_once;
            #[unroll]
            for i in 0..at_once {
                of_batch[i] = Vector::cast_from(keys[at + first + i]);
            }
            #[unroll]
            for i in 0..at_once {
                let key = of_batch[i];
                #[unroll]
                for q in 0..queries {
                    let query = of_queries[q * lanes + first + i];
                    #[unroll]
                    for n in 0..width {
                        dots[q] = fma(query.extract(n), key.extract(n), dots[q]);
                    }
                }
            }
        }
        #[unroll]
        for q in 0..queries {
            scores[q * comptime!(sizes.page_len) + position] = dots[q];
        }
        position += THREADS;
    }
}

/// Writes the largest score of each of [`CHUNKS`] parts of what each query sees, `[queries, CHUNKS]`.
#[cube]
pub fn maxima(
    scores: &Shared<[f32]>,
    block: &Block,
    before: usize,
    maxima: &mut Shared<[f32]>,
    #[comptime] sizes: Sizes,
) {
    let thread = UNIT_POS as usize;
    if thread < comptime!(sizes.queries * CHUNKS) {
        let (q, chunk) = (thread / CHUNKS, thread % CHUNKS);
        let visible = visible(block, q, before, sizes.page_len);
        let each = comptime!(sizes.page_len / CHUNKS);
        let of_query = q * comptime!(sizes.page_len);
        // Every query that sees something of a page sees its first position.
        let mut max_score = scores[of_query];
        let end = usize::min((chunk + 1) * each, visible);
        let mut position = chunk * each;
        while position < end {
            max_score = f32::max(max_score, scores[of_query + position]);
            position += 1;
        }
        maxima[thread] = max_score;
    }
}

/// The largest score of a query.
#[cube]
pub fn max_score(maxima: &Shared<[f32]>, query: usize) -> f32 {
    let mut max_score = maxima[query * CHUNKS];
    #[unroll]
    for chunk in 1..CHUNKS {
        max_score = f32::max(max_score, maxima[query * CHUNKS + chunk]);
    }
    max_score
}

/// Makes weights of scores, and zeros of what a query does not see.
#[cube]
pub fn weights(
    weights: &mut Shared<[f32]>,
    max_scores: &Array<f32>,
    block: &Block,
    before: usize,
    #[comptime] sizes: Sizes,
) {
    let mut position = UNIT_POS as usize;
    while position < comptime!(sizes.page_len) {
        #[unroll]
        for q in 0..comptime!(sizes.queries) {
            let at = q * comptime!(sizes.page_len) + position;
            let mut weight = 0.0_f32;
            if position < visible(block, q, before, sizes.page_len) {
                weight = f32::exp(weights[at] - max_scores[q]);
            }
            weights[at] = weight;
        }
        position += THREADS;
    }
}

/// Adds the weights of each query, sixteen after sixteen: `[queries, LANES]`.
#[cube]
pub fn lanes(weights: &Shared<[f32]>, lanes: &mut Shared<[f32]>, #[comptime] sizes: Sizes) {
    let mut element = UNIT_POS as usize;
    while element < comptime!(sizes.queries * LANES) {
        let at = element / LANES * comptime!(sizes.page_len) + element % LANES;
        let mut sum = weights[at];
        for group in 1..comptime!(sizes.page_len / LANES) {
            sum += weights[at + group * LANES];
        }
        lanes[element] = sum;
        element += THREADS;
    }
}

/// The sum of a query's lanes, by halves.
#[cube]
pub fn total(lanes: &Shared<[f32]>, query: usize) -> f32 {
    let mut sums = Array::<f32>::new(LANES);
    #[unroll]
    for lane in 0..LANES {
        sums[lane] = lanes[query * LANES + lane];
    }
    #[unroll]
    for step in 0..4 {
        let half = comptime!(LANES >> (step + 1));
        #[unroll]
        for lane in 0..half {
            let other = sums[lane + half];
            sums[lane] += other;
        }
    }
    sums[0]
}

/// The weighted sums of the values in the columns of a thread, `[queries, columns]`; those of a query that sees nothing are no numbers
/// that anybody needs.
#[cube]
pub fn sums<C: Numeric>(
    weights: &Shared<[f32]>,
    values: &Tensor<C>,
    of_values: usize,
    block: &Block,
    before: usize,
    sums: &mut Array<f32>,
    #[comptime] sizes: Sizes,
) {
    let (queries, columns) = (comptime!(sizes.queries), comptime!(sizes.columns()));
    let min_visible = visible(block, 0, before, sizes.page_len);
    let max_visible = visible(block, block.count - 1, before, sizes.page_len);
    let stride = values.stride(2);
    let mut totals = Array::<f32>::new(queries);
    let mut of_batch = Array::<f32>::new(VALUES_AT_ONCE);
    #[unroll]
    for c in 0..columns {
        let column = UNIT_POS as usize + c * THREADS;
        if column < comptime!(sizes.head_dim) {
            let at = of_values + column * values.stride(3);
            #[unroll]
            for q in 0..queries {
                totals[q] = 0.0;
            }
            let mut position = 0_usize;
            while position + VALUES_AT_ONCE <= min_visible {
                #[unroll]
                for i in 0..VALUES_AT_ONCE {
                    of_batch[i] = f32::cast_from(values[at + (position + i) * stride]);
                }
                #[unroll]
                for i in 0..VALUES_AT_ONCE {
                    #[unroll]
                    for q in 0..queries {
                        let weight = weights[q * comptime!(sizes.page_len) + position + i];
                        totals[q] = fma(weight, of_batch[i], totals[q]);
                    }
                }
                position += VALUES_AT_ONCE;
            }
            // What is left of that, and what only some of the queries see.
            while position < max_visible {
                let value = f32::cast_from(values[at + position * stride]);
                #[unroll]
                for q in 0..queries {
                    if position < visible(block, q, before, sizes.page_len) {
                        totals[q] = fma(weights[q * comptime!(sizes.page_len) + position], value, totals[q]);
                    }
                }
                position += 1;
            }
            #[unroll]
            for q in 0..queries {
                sums[q * columns + c] = totals[q] + 0.0;
            }
        }
    }
}
