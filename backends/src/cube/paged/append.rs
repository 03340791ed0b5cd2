//! New keys and values into pages, in place, and rounded to their element type on the way.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{PageTable, Tokens};
use crate::cube::append::rounded;
use crate::cube::{address_type, element_type, one_thread_each, writable};

/// See [`Gpt2Ops::append_pages`](crate::Gpt2Ops::append_pages); there is something new.
pub fn append(
    [keys, values]: [CubeTensor; 2],
    [new_keys, new_values]: [CubeTensor; 2],
    table: &PageTable,
    tokens: &Tokens,
) -> [CubeTensor; 2] {
    let [keys, values] = [keys, values].map(writable);
    let [count, heads, head_dim]: [usize; 3] = new_keys.meta.shape().dims();
    let address = address_type(&[&keys, &values, &new_keys, &new_values]);
    let (cubes, dim) = one_thread_each(&keys.client, count * heads * head_dim);
    let dtypes = [element_type(keys.dtype), element_type(new_keys.dtype)];
    let is_half = keys.dtype == DType::F16;
    // SAFETY: `checks::pages` made sure that the four have heads and width in common and that there is a page, and the caller that the
    // types of keys are those of values and that there is a place for each new token. A row or a page that is not there is not
    // written, nor a position for which the table has no page, whatever the table, the lengths and the places say. Nothing else refers
    // to the pages.
    unsafe {
        append_kernel::launch_unchecked(
            &keys.client,
            cubes,
            dim,
            address,
            new_keys.into_tensor_arg(),
            new_values.into_tensor_arg(),
            table.pages.clone().into_tensor_arg(),
            table.context_lens.clone().into_tensor_arg(),
            tokens.places.clone().into_tensor_arg(),
            keys.clone().into_tensor_arg(),
            values.clone().into_tensor_arg(),
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
    table: &Tensor<u32>,
    context_lens: &Tensor<i32>,
    places: &Tensor<i32>,
    keys: &mut Tensor<C>,
    values: &mut Tensor<C>,
    #[comptime] is_half: bool,
    #[define(C, E)] _dtypes: [ElemType; 2],
) {
    let (tokens, heads, head_dim) = (new_keys.shape(0), new_keys.shape(1), new_keys.shape(2));
    let column = ABSOLUTE_POS % head_dim;
    let head = ABSOLUTE_POS / head_dim % heads;
    let token = ABSOLUTE_POS / head_dim / heads;
    if token < tokens {
        let of_token = token * places.stride(0);
        let row = i32::max(places[of_token], 0) as usize;
        if row < table.shape(0) {
            let t = i32::max(places[of_token + places.stride(1)], 0) as usize;
            let page_len = keys.shape(2);
            let context_len = context_lens[row * context_lens.stride(0)];
            let position = usize::min(i32::max(context_len, 0) as usize, table.shape(1) * page_len) + t;
            if context_len >= 0 && position < table.shape(1) * page_len {
                let page = table[row * table.stride(0) + position / page_len * table.stride(1)] as usize;
                if page < keys.shape(0) {
                    let slot = position % page_len;
                    let from = token * new_keys.stride(0) + head * new_keys.stride(1) + column * new_keys.stride(2);
                    let to = page * keys.stride(0) + head * keys.stride(1) + slot * keys.stride(2);
                    let to = to + column * keys.stride(3);
                    keys[to] = rounded::<E, C>(new_keys[from], is_half);
                    let from =
                        token * new_values.stride(0) + head * new_values.stride(1) + column * new_values.stride(2);
                    let to = page * values.stride(0) + head * values.stride(1) + slot * values.stride(2);
                    let to = to + column * values.stride(3);
                    values[to] = rounded::<E, C>(new_values[from], is_half);
                }
            }
        }
    }
}
