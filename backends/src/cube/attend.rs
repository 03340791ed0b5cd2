//! Attention over a cache in one kernel: each workgroup takes a head of some queries of a row past all keys that they see, a
//! block of keys at a time, with the softmax corrected as larger scores turn up (Milakov and Gimelshein, *Online normalizer
//! calculation for softmax*, 2018, algorithm 3; FlashAttention puts it to this use).

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{address_type, element_type, empty_beside, readable};

/// Threads of a workgroup, and keys of a block: each thread makes the scores of one of them.
const BLOCK: usize = 128;
/// Parts in which the largest score of a block is looked for.
const MAX_SCORE_CHUNKS: usize = 16;
/// Workgroups along an axis that every device launches.
const MAX_WORKGROUPS: usize = 65_535;
/// Below every score, and far enough from the end of f32's range to be subtracted from.
const LOWEST: f32 = -1e30;

/// Whether queries of so many rows and heads, of up to T tokens of a row and of this width, `[B, H, T, D]`, have a kernel: a
/// head fits a workgroup, and there are no more of those than any device launches at once.
pub fn has_kernel([batch, heads, time, head_dim]: [usize; 4]) -> bool {
    let fits = head_dim > 0 && head_dim <= BLOCK * vector_size(head_dim) && head_dim <= 4 * BLOCK;
    fits && [batch, heads, time].iter().all(|count| *count <= MAX_WORKGROUPS)
}

/// Elements of a key that are read at once.
fn vector_size(head_dim: usize) -> usize {
    if head_dim.is_multiple_of(4) { 4 } else { 1 }
}

/// See [`Gpt2Ops::attend`](crate::Gpt2Ops::attend); `query` is in f32, with at least one token and at most `max_query_len` of a row;
/// context lengths and layout are in i32.
pub fn attend(
    query: CubeTensor,
    [keys, values]: [CubeTensor; 2],
    [context_lens, layout]: [CubeTensor; 2],
    max_query_len: usize,
) -> CubeTensor {
    let query = readable(query, 1);
    let [tokens, heads, head_dim]: [usize; 3] = query.meta.shape().dims();
    let [rows, _]: [usize; 2] = layout.meta.shape().dims();
    let output = empty_beside(&query, [tokens, heads * head_dim], DType::F32);
    let width = vector_size(head_dim);
    // Queries that share what is read of keys and values, bounded by the shared memory that the smallest devices have.
    let queries = if head_dim <= BLOCK { max_query_len.next_power_of_two().min(4) } else { 1 };
    let [keys, values] = [keys, values].map(|states| readable(states, width));
    // The layout is read by its strides: a device may leave room behind its rows, and a copy is one launch more.
    let context_lens = into_contiguous(context_lens);
    let address = address_type(&[&query, &keys, &values, &output]);
    let cubes = CubeCount::Static(heads as u32, rows as u32, max_query_len.div_ceil(queries) as u32);
    let dtype = element_type(keys.dtype);
    // SAFETY: `checks::packed` made sure that keys and values have the same shape, with the heads and the width of the queries,
    // and that there are three numbers of each row; and the caller that both are of one type. A slot that is not there is taken for
    // the last, positions behind the last are not read and tokens that are not there neither read nor written, whatever the
    // lengths and the layout say. Queries behind a row's last read the last and are not written.
    unsafe {
        attend_kernel::launch_unchecked(
            &output.client,
            cubes,
            CubeDim::new_1d(BLOCK as u32),
            address,
            width,
            query.into_tensor_arg(),
            keys.into_tensor_arg(),
            values.into_tensor_arg(),
            context_lens.into_tensor_arg(),
            layout.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            1.0 / (head_dim as f32).sqrt(),
            queries,
            head_dim,
            dtype,
        );
    }
    output
}

#[cube(launch_unchecked, address_type = "dynamic")]
#[allow(unused_assignments)] // kernels have no variable without a value
fn attend_kernel<C: Numeric, N: Size>(
    query: &Tensor<f32>,
    keys: &Tensor<Vector<C, N>>,
    values: &Tensor<Vector<C, N>>,
    context_lens: &Tensor<i32>,
    layout: &Tensor<i32>,
    output: &mut Tensor<f32>,
    scale: f32,
    #[comptime] queries: usize,
    #[comptime] head_dim: usize,
    #[define(C)] _dtype: ElemType,
) {
    let width = keys.vector_size();
    let lanes = comptime!(head_dim / width);
    let parts = comptime!(BLOCK / lanes);
    let (head, row) = (CUBE_POS_X as usize, CUBE_POS_Y as usize);
    let first = CUBE_POS_Z as usize * queries;
    let (tokens, heads) = (query.shape(0), query.shape(1));
    let (of_layout, of_number) = (row * layout.stride(0), layout.stride(1));
    let slot = usize::min(i32::max(layout[of_layout], 0) as usize, keys.shape(0) - 1);
    let token = usize::min(i32::max(layout[of_layout + of_number], 0) as usize, tokens - 1);
    let time = usize::min(i32::max(layout[of_layout + of_number + of_number], 0) as usize, tokens - token);
    let thread = UNIT_POS as usize;
    let (lane, part) = (thread % lanes, thread / lanes);

    let mut of_queries = Shared::<[f32]>::new_slice(comptime!(queries * head_dim));
    let mut scores = Shared::<[f32]>::new_slice(comptime!(queries * BLOCK));
    let mut largest = Shared::<[f32]>::new_slice(comptime!(queries * MAX_SCORE_CHUNKS));
    let mut sums_of_parts = Shared::<[f32]>::new_slice(comptime!(queries * parts * head_dim));
    let mut totals_of_parts = Shared::<[f32]>::new_slice(comptime!(queries * parts));

    let mut element = thread;
    while element < comptime!(queries * head_dim) {
        let t = token + usize::min(first + element / head_dim, usize::max(time, 1_usize) - 1);
        let at = t * query.stride(0) + head * query.stride(1) + element % head_dim;
        of_queries[element] = query[at] * scale;
        element += BLOCK;
    }
    sync_cube();

    // A length that is negative, or beyond the buffer, is as near to what it says as can be.
    let before = usize::min(i32::max(context_lens[row], 0) as usize, keys.shape(2));
    let mut end = usize::min(before + usize::min(first + queries, time), keys.shape(2));
    // Rows have unequally many tokens: this one may have none here.
    if first >= time {
        end = 0_usize;
    }
    let of_row = (slot * keys.stride(0) + head * keys.stride(1)) / width;
    let of_row_values = (slot * values.stride(0) + head * values.stride(1)) / width;

    let mut sums = Array::<Vector<f32, N>>::new(queries);
    let mut totals = Array::<f32>::new(queries);
    let mut max_scores = Array::<f32>::new(queries);
    let mut dots = Array::<f32>::new(queries);
    #[unroll]
    for q in 0..queries {
        sums[q] = Vector::new(0.0);
        totals[q] = 0.0;
        max_scores[q] = LOWEST;
    }

    let mut block = 0_usize;
    while block < end {
        let position = block + thread;
        #[unroll]
        for q in 0..queries {
            dots[q] = 0.0;
        }
        if position < end {
            for i in 0..lanes {
                let key = Vector::<f32, N>::cast_from(keys[of_row + position * keys.stride(2) / width + i]);
                #[unroll]
                for q in 0..queries {
                    #[unroll]
                    for n in 0..width {
                        dots[q] += of_queries[q * head_dim + i * width + n] * key.extract(n);
                    }
                }
            }
        }
        #[unroll]
        for q in 0..queries {
            // A query sees itself and what is before it.
            if position > before + first + q {
                dots[q] = LOWEST;
            }
            scores[q * BLOCK + thread] = dots[q];
        }
        sync_cube();
        if thread < comptime!(queries * MAX_SCORE_CHUNKS) {
            let each = comptime!(BLOCK / MAX_SCORE_CHUNKS);
            let mut max_score = scores[thread * each];
            for i in 1..each {
                max_score = f32::max(max_score, scores[thread * each + i]);
            }
            largest[thread] = max_score;
        }
        sync_cube();
        #[unroll]
        for q in 0..queries {
            let mut max_score = max_scores[q];
            for i in 0..MAX_SCORE_CHUNKS {
                max_score = f32::max(max_score, largest[q * MAX_SCORE_CHUNKS + i]);
            }
            let correction = f32::exp(max_scores[q] - max_score);
            max_scores[q] = max_score;
            totals[q] *= correction;
            sums[q] *= Vector::new(correction);
            scores[q * BLOCK + thread] = f32::exp(dots[q] - max_score);
        }
        sync_cube();
        if part < parts {
            let mut of_block = part;
            while of_block < BLOCK && block + of_block < end {
                let position = block + of_block;
                let at = of_row_values + position * values.stride(2) / width + lane;
                let value = Vector::<f32, N>::cast_from(values[at]);
                #[unroll]
                for q in 0..queries {
                    let weight = scores[q * BLOCK + of_block];
                    sums[q] += value * Vector::new(weight);
                    totals[q] += weight;
                }
                of_block += parts;
            }
        }
        // Nobody still reads the weights when the next block's scores are written.
        sync_cube();
        block += BLOCK;
    }

    if part < parts {
        #[unroll]
        for q in 0..queries {
            #[unroll]
            for n in 0..width {
                sums_of_parts[(q * parts + part) * head_dim + lane * width + n] = sums[q].extract(n);
            }
            if lane == 0 {
                totals_of_parts[q * parts + part] = totals[q];
            }
        }
    }
    sync_cube();
    element = thread;
    while element < comptime!(queries * head_dim) {
        let (q, column) = (element / head_dim, element % head_dim);
        if first + q < time {
            let mut sum = 0.0_f32;
            let mut total = 0.0_f32;
            for part in 0..parts {
                sum += sums_of_parts[(q * parts + part) * head_dim + column];
                total += totals_of_parts[q * parts + part];
            }
            output[((token + first + q) * heads + head) * head_dim + column] = sum / total;
        }
        element += BLOCK;
    }
}
