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
const PARTS_OF_MAX: usize = 16;
/// Workgroups along an axis that every device launches.
const MOST_WORKGROUPS: usize = 65_535;
/// Below every score, and far enough from the end of f32's range to be subtracted from.
const LOWEST: f32 = -1e30;

/// Keys or values, and such that all rows share before their own.
pub struct Segments {
    /// `[B, H, L, D]`.
    pub own: CubeTensor,
    /// `[1, H, S, D]`.
    pub shared: Option<CubeTensor>,
}

/// Whether queries of this shape, `[B, H, T, D]`, have a kernel: a head fits a workgroup, and there are no more of those than any
/// device launches at once.
pub fn has_kernel([batch, heads, time, head_dim]: [usize; 4]) -> bool {
    let fits = head_dim > 0 && head_dim <= BLOCK * vector_size(head_dim) && head_dim <= 4 * BLOCK;
    fits && [batch, heads, time].iter().all(|count| *count <= MOST_WORKGROUPS)
}

/// Elements of a key that are read at once.
fn vector_size(head_dim: usize) -> usize {
    if head_dim.is_multiple_of(4) { 4 } else { 1 }
}

/// See [`Gpt2Ops::attend`](crate::Gpt2Ops::attend) and [`Gpt2Ops::attend_shared`](crate::Gpt2Ops::attend_shared); `query` is in
/// f32, `past` in i32, and it says how far each row's own keys are filled, so that their buffers may be longer.
pub fn attend(query: CubeTensor, keys: Segments, values: Segments, past: CubeTensor) -> CubeTensor {
    let query = readable(query, 1);
    let [batch, heads, time, head_dim]: [usize; 4] = query.meta.shape().dims();
    let output = empty_beside(&query, [batch, time, heads * head_dim], DType::F32);
    let width = vector_size(head_dim);
    // Queries that share what is read of keys and values, bounded by the shared memory that the smallest devices have.
    let queries = if head_dim <= BLOCK { time.next_power_of_two().min(4) } else { 1 };
    let [keys, values] = [keys, values].map(|segments| {
        let shared = segments.shared.map(|shared| readable(shared, width));
        (readable(segments.own, width), shared)
    });
    let has_shared = keys.1.is_some();
    let shared_keys = keys.1.unwrap_or_else(|| keys.0.clone());
    let shared_values = values.1.unwrap_or_else(|| values.0.clone());
    let (keys, values) = (keys.0, values.0);
    let past = into_contiguous(past);
    let address = address_type(&[&query, &keys, &values, &shared_keys, &shared_values, &output]);
    let cubes = CubeCount::Static(heads as u32, batch as u32, time.div_ceil(queries) as u32);
    let dtype = element_type(keys.dtype);
    // SAFETY: `checks::attention` and `checks::shared` made sure that keys and values have the rows, heads and width of the
    // queries, and the caller that all four are of one type. Positions behind the shared and the own ones are not read,
    // whatever `past` says; queries behind the last read the last and are not written.
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
            shared_keys.into_tensor_arg(),
            shared_values.into_tensor_arg(),
            past.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            1.0 / (head_dim as f32).sqrt(),
            queries,
            head_dim,
            has_shared,
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
    shared_keys: &Tensor<Vector<C, N>>,
    shared_values: &Tensor<Vector<C, N>>,
    past: &Tensor<i32>,
    output: &mut Tensor<f32>,
    scale: f32,
    #[comptime] queries: usize,
    #[comptime] head_dim: usize,
    #[comptime] has_shared: bool,
    #[define(C)] _dtype: ElemType,
) {
    let width = keys.vector_size();
    let lanes = comptime!(head_dim / width);
    let parts = comptime!(BLOCK / lanes);
    let (head, row) = (CUBE_POS_X as usize, CUBE_POS_Y as usize);
    let first = CUBE_POS_Z as usize * queries;
    let (heads, time) = (query.shape(1), query.shape(2));
    let thread = UNIT_POS as usize;
    let (lane, part) = (thread % lanes, thread / lanes);

    let mut of_queries = Shared::<[f32]>::new_slice(comptime!(queries * head_dim));
    let mut scores = Shared::<[f32]>::new_slice(comptime!(queries * BLOCK));
    let mut largest = Shared::<[f32]>::new_slice(comptime!(queries * PARTS_OF_MAX));
    let mut sums_of_parts = Shared::<[f32]>::new_slice(comptime!(queries * parts * head_dim));
    let mut totals_of_parts = Shared::<[f32]>::new_slice(comptime!(queries * parts));

    let mut element = thread;
    while element < comptime!(queries * head_dim) {
        let t = usize::min(first + element / head_dim, time - 1);
        let at = row * query.stride(0) + head * query.stride(1) + t * query.stride(2) + element % head_dim;
        of_queries[element] = query[at] * scale;
        element += BLOCK;
    }
    sync_cube();

    let mut known = 0_usize;
    if comptime!(has_shared) {
        known = shared_keys.shape(2);
    }
    // A length that is negative, or beyond the buffer, is as near to what it says as can be.
    let before = known + usize::min(i32::max(past[row], 0) as usize, keys.shape(2));
    let end = usize::min(before + usize::min(first + queries, time), known + keys.shape(2));
    let of_row = (row * keys.stride(0) + head * keys.stride(1)) / width;
    let of_row_values = (row * values.stride(0) + head * values.stride(1)) / width;
    let of_head = head * shared_keys.stride(1) / width;
    let of_head_values = head * shared_values.stride(1) / width;

    let mut sums = Array::<Vector<f32, N>>::new(queries);
    let mut totals = Array::<f32>::new(queries);
    let mut most = Array::<f32>::new(queries);
    let mut dots = Array::<f32>::new(queries);
    #[unroll]
    for q in 0..queries {
        sums[q] = Vector::new(0.0);
        totals[q] = 0.0;
        most[q] = LOWEST;
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
                let mut key = Vector::<f32, N>::new(0.0);
                if comptime!(has_shared) {
                    if position < known {
                        key = Vector::cast_from(shared_keys[of_head + position * shared_keys.stride(2) / width + i]);
                    } else {
                        key = Vector::cast_from(keys[of_row + (position - known) * keys.stride(2) / width + i]);
                    }
                } else {
                    key = Vector::cast_from(keys[of_row + position * keys.stride(2) / width + i]);
                }
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
        if thread < comptime!(queries * PARTS_OF_MAX) {
            let each = comptime!(BLOCK / PARTS_OF_MAX);
            let mut max = scores[thread * each];
            for i in 1..each {
                max = f32::max(max, scores[thread * each + i]);
            }
            largest[thread] = max;
        }
        sync_cube();
        #[unroll]
        for q in 0..queries {
            let mut max = most[q];
            for i in 0..PARTS_OF_MAX {
                max = f32::max(max, largest[q * PARTS_OF_MAX + i]);
            }
            let correction = f32::exp(most[q] - max);
            most[q] = max;
            totals[q] *= correction;
            sums[q] *= Vector::new(correction);
            scores[q * BLOCK + thread] = f32::exp(dots[q] - max);
        }
        sync_cube();
        if part < parts {
            let mut of_block = part;
            while of_block < BLOCK && block + of_block < end {
                let position = block + of_block;
                let mut value = Vector::<f32, N>::new(0.0);
                if comptime!(has_shared) {
                    if position < known {
                        let at = of_head_values + position * shared_values.stride(2) / width + lane;
                        value = Vector::cast_from(shared_values[at]);
                    } else {
                        let at = of_row_values + (position - known) * values.stride(2) / width + lane;
                        value = Vector::cast_from(values[at]);
                    }
                } else {
                    value = Vector::cast_from(values[of_row_values + position * values.stride(2) / width + lane]);
                }
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
            output[((row * time + first + q) * heads + head) * head_dim + column] = sum / total;
        }
        element += BLOCK;
    }
}
