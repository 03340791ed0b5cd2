//! New keys and values into the buffers of a cache, in place, and rounded to its element type on the way.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{address_type, element_type, one_thread_each, writable};

/// See [`Gpt2Ops::append`](crate::Gpt2Ops::append). Context lengths and layout are in i32, and no row has more than `max_query_len` new
/// tokens.
pub fn append(
    [keys, values]: [CubeTensor; 2],
    [new_keys, new_values]: [CubeTensor; 2],
    [context_lens, layout]: [CubeTensor; 2],
    max_query_len: usize,
) -> [CubeTensor; 2] {
    let [keys, values] = [keys, values].map(writable);
    let [_, heads, head_dim]: [usize; 3] = new_keys.meta.shape().dims();
    let [rows, _]: [usize; 2] = layout.meta.shape().dims();
    // The layout is read by its strides: a device may leave room behind its rows, and a copy is one launch more.
    let context_lens = into_contiguous(context_lens);
    let address = address_type(&[&keys, &values, &new_keys, &new_values]);
    let (cubes, dim) = one_thread_each(&keys.client, rows * heads * max_query_len * head_dim);
    let dtypes = [element_type(keys.dtype), element_type(new_keys.dtype)];
    let is_half = keys.dtype == DType::F16;
    // SAFETY: `checks::append` made sure that the four have heads and width in common, the two buffers slots and capacity, what
    // is new its tokens, and that there are three numbers of each row; and the caller that the types of keys are those of values.
    // A slot or a position that is not in the buffers is not written, and a token that is not there not read, whatever the lengths
    // and the layout say. Nothing else refers to the buffers.
    unsafe {
        append_kernel::launch_unchecked(
            &keys.client,
            cubes,
            dim,
            address,
            new_keys.into_tensor_arg(),
            new_values.into_tensor_arg(),
            context_lens.into_tensor_arg(),
            layout.into_tensor_arg(),
            keys.clone().into_tensor_arg(),
            values.clone().into_tensor_arg(),
            max_query_len,
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
    context_lens: &Tensor<i32>,
    layout: &Tensor<i32>,
    keys: &mut Tensor<C>,
    values: &mut Tensor<C>,
    max_query_len: usize,
    #[comptime] is_half: bool,
    #[define(C, E)] _dtypes: [ElemType; 2],
) {
    let (tokens, heads, head_dim) = (new_keys.shape(0), new_keys.shape(1), new_keys.shape(2));
    let column = ABSOLUTE_POS % head_dim;
    // Heads stand next to each other in what a projection gives: so do the threads.
    let head = ABSOLUTE_POS / head_dim % heads;
    let t = ABSOLUTE_POS / head_dim / heads % max_query_len;
    let row = ABSOLUTE_POS / head_dim / heads / max_query_len;
    if row < layout.shape(0) {
        let (of_row, of_number) = (row * layout.stride(0), layout.stride(1));
        let slot = i32::max(layout[of_row], 0) as usize;
        let token = i32::max(layout[of_row + of_number], 0) as usize + t;
        let count = i32::max(layout[of_row + of_number + of_number], 0) as usize;
        let start = context_lens[row];
        let position = usize::min(i32::max(start, 0) as usize, keys.shape(2)) + t;
        let is_there = t < count && token < tokens && slot < keys.shape(0);
        if is_there && start >= 0 && position < keys.shape(2) {
            let from = token * new_keys.stride(0) + head * new_keys.stride(1);
            let to =
                slot * keys.stride(0) + head * keys.stride(1) + position * keys.stride(2) + column * keys.stride(3);
            keys[to] = rounded::<E, C>(new_keys[from + column * new_keys.stride(2)], is_half);
            let from = token * new_values.stride(0) + head * new_values.stride(1);
            let to = slot * values.stride(0) + head * values.stride(1) + position * values.stride(2);
            let to = to + column * values.stride(3);
            values[to] = rounded::<E, C>(new_values[from + column * new_values.stride(2)], is_half);
        }
    }
}

/// A number as a cache holds it. What is more than the largest half is NaN, and not infinite: see `ops::default::rounded`.
#[cube]
pub fn rounded<E: Numeric, C: Numeric>(number: E, #[comptime] is_half: bool) -> C {
    let mut rounded = C::cast_from(number);
    if comptime!(is_half) {
        let wide = f32::cast_from(number);
        // Halfway to what would come behind the largest half, and from there on.
        let bits = select(f32::abs(wide) >= 65_520.0_f32, 0x7fc0_0000_u32, u32::reinterpret(wide));
        rounded = C::cast_from(f32::reinterpret(bits));
    }
    rounded
}
