//! New keys and values into the buffers of a cache, in place, and rounded to its element type on the way.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{address_type, element_type, one_thread_each, writable};

/// See [`Gpt2Ops::append`](crate::Gpt2Ops::append). `starts` says where each row's new positions go, and `counts`, if rows have
/// unequally many, how many of them count; of all rows, `count` do otherwise. Both are in i32.
pub fn append(
    [keys, values]: [CubeTensor; 2],
    [new_keys, new_values]: [CubeTensor; 2],
    starts: CubeTensor,
    counts: Option<CubeTensor>,
    count: usize,
) -> [CubeTensor; 2] {
    let [keys, values] = [keys, values].map(writable);
    let [batch, heads, _, head_dim]: [usize; 4] = new_keys.meta.shape().dims();
    let starts = into_contiguous(starts);
    let is_ragged = counts.is_some();
    let counts = counts.map_or_else(|| starts.clone(), into_contiguous);
    let address = address_type(&[&keys, &values, &new_keys, &new_values]);
    let (cubes, dim) = one_thread_each(&keys.client, batch * heads * count * head_dim);
    let dtypes = [element_type(keys.dtype), element_type(new_keys.dtype)];
    let is_half = keys.dtype == DType::F16;
    // SAFETY: `checks::append` made sure that the four have rows, heads and width in common, the two buffers a capacity, and
    // what is new `count` positions; and the caller that the types of keys are those of values. A position that is not in the
    // buffers is not written, whatever `starts` says. Nothing else refers to the buffers.
    unsafe {
        append_kernel::launch_unchecked(
            &keys.client,
            cubes,
            dim,
            address,
            new_keys.into_tensor_arg(),
            new_values.into_tensor_arg(),
            starts.into_tensor_arg(),
            counts.into_tensor_arg(),
            keys.clone().into_tensor_arg(),
            values.clone().into_tensor_arg(),
            count,
            is_ragged,
            is_half,
            dtypes,
        );
    }
    [keys, values]
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn append_kernel<C: Numeric, E: Numeric>(
    new_keys: &Tensor<E>,
    new_values: &Tensor<E>,
    starts: &Tensor<i32>,
    counts: &Tensor<i32>,
    keys: &mut Tensor<C>,
    values: &mut Tensor<C>,
    count: usize,
    #[comptime] is_ragged: bool,
    #[comptime] is_half: bool,
    #[define(C, E)] _dtypes: [ElemType; 2],
) {
    let (batch, heads, head_dim) = (new_keys.shape(0), new_keys.shape(1), new_keys.shape(3));
    let column = ABSOLUTE_POS % head_dim;
    // Heads stand next to each other in what a projection gives: so do the threads.
    let head = ABSOLUTE_POS / head_dim % heads;
    let t = ABSOLUTE_POS / head_dim / heads % count;
    let row = ABSOLUTE_POS / head_dim / heads / count;
    if row < batch {
        let mut counted = count;
        if comptime!(is_ragged) {
            counted = i32::max(counts[row], 0) as usize;
        }
        let start = starts[row];
        let position = usize::min(i32::max(start, 0) as usize, keys.shape(2)) + t;
        if start >= 0 && t < counted && position < keys.shape(2) {
            let from = row * new_keys.stride(0) + head * new_keys.stride(1) + t * new_keys.stride(2);
            let to = row * keys.stride(0) + head * keys.stride(1) + position * keys.stride(2) + column * keys.stride(3);
            keys[to] = rounded::<E, C>(new_keys[from + column * new_keys.stride(3)], is_half);
            let from = row * new_values.stride(0) + head * new_values.stride(1) + t * new_values.stride(2);
            let to = row * values.stride(0) + head * values.stride(1) + position * values.stride(2);
            let to = to + column * values.stride(3);
            values[to] = rounded::<E, C>(new_values[from + column * new_values.stride(3)], is_half);
        }
    }
}

/// A number as a cache holds it. What is more than the largest half is NaN, and not infinite: see `ops::default::rounded`.
#[cube]
fn rounded<E: Numeric, C: Numeric>(number: E, #[comptime] is_half: bool) -> C {
    let mut rounded = C::cast_from(number);
    if comptime!(is_half) {
        let wide = f32::cast_from(number);
        // Halfway to what would come behind the largest half, and from there on.
        let bits = select(f32::abs(wide) >= 65_520.0_f32, 0x7fc0_0000_u32, u32::reinterpret(wide));
        rounded = C::cast_from(f32::reinterpret(bits));
    }
    rounded
}
