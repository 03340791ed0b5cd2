//! What pages hold, in the order of positions.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::layout::upload;
use crate::cube::{address_type, element_type, empty_beside, one_thread_each};

/// What is at the first `len` positions of a row with these pages of `[P, H, L, D]`: `[len, H, D]`, of at least one position.
pub fn read(pages: CubeTensor, of_row: &[u32], len: usize) -> CubeTensor {
    let [_, heads, page_len, head_dim]: [usize; 4] = pages.meta.shape().dims();
    let count = len.div_ceil(page_len);
    let output = empty_beside(&pages, [len, heads, head_dim], pages.dtype);
    let table = upload(of_row[..count].to_vec(), [count], &pages.device);
    let (cubes, dim) = one_thread_each(&pages.client, len * heads * head_dim);
    let (address, dtype) = (address_type(&[&pages, &output]), element_type(pages.dtype));
    // SAFETY: `checks::reading` made sure that the row has so many pages, and that they are there; what is behind the last position is
    // not written.
    unsafe {
        read_kernel::launch_unchecked(
            &output.client,
            cubes,
            dim,
            address,
            pages.into_tensor_arg(),
            table.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            dtype,
        );
    }
    output
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn read_kernel<C: Numeric>(
    pages: &Tensor<C>,
    table: &Tensor<u32>,
    output: &mut Tensor<C>,
    #[define(C)] _dtype: ElemType,
) {
    let (positions, heads, head_dim) = (output.shape(0), output.shape(1), output.shape(2));
    let (column, head) = (ABSOLUTE_POS % head_dim, ABSOLUTE_POS / head_dim % heads);
    let position = ABSOLUTE_POS / head_dim / heads;
    if position < positions {
        let page_len = pages.shape(2);
        let page = table[position / page_len * table.stride(0)] as usize;
        let from = page * pages.stride(0) + head * pages.stride(1) + position % page_len * pages.stride(2);
        let to = position * output.stride(0) + head * output.stride(1) + column * output.stride(2);
        output[to] = pages[from + column * pages.stride(3)];
    }
}
