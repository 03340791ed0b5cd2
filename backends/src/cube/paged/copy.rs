//! Pages that become copies of others, in place.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::layout::upload;
use super::vector_size;
use crate::cube::{address_type, element_type, one_thread_each, writable};

/// See [`Gpt2Ops::copy_pages`](crate::Gpt2Ops::copy_pages); there is something to copy.
pub fn copy(pages: CubeTensor, copies: &[[u32; 2]]) -> CubeTensor {
    let pages = writable(pages);
    let [_, heads, page_len, head_dim]: [usize; 4] = pages.meta.shape().dims();
    let pairs = upload(copies.as_flattened().to_vec(), [copies.len(), 2], &pages.device);
    let width = vector_size(&pages);
    let (cubes, dim) = one_thread_each(&pages.client, heads * page_len * head_dim / width);
    let (address, dtype) = (address_type(&[&pages]), element_type(pages.dtype));
    // SAFETY: `checks::copies` made sure that the pages are there; what is behind the last element of a page is not touched. Nothing
    // else refers to the pages.
    unsafe {
        copy_kernel::launch_unchecked(
            &pages.client,
            cubes,
            dim,
            address,
            width,
            pairs.into_tensor_arg(),
            pages.clone().into_tensor_arg(),
            dtype,
        );
    }
    pages
}

/// Each thread takes the same element of all pages, and goes through the copies in their order: so one that reads what another wrote
/// waits for nobody.
#[cube(launch_unchecked, address_type = "dynamic")]
fn copy_kernel<C: Numeric, N: Size>(
    pairs: &Tensor<u32>,
    pages: &mut Tensor<Vector<C, N>>,
    #[define(C)] _dtype: ElemType,
) {
    let width = pages.vector_size();
    let (heads, page_len, lanes) = (pages.shape(1), pages.shape(2), pages.shape(3) / width);
    let (lane, slot) = (ABSOLUTE_POS % lanes, ABSOLUTE_POS / lanes % page_len);
    let head = ABSOLUTE_POS / lanes / page_len;
    if head < heads {
        let of_page = head * pages.stride(1) + slot * pages.stride(2) + lane * width * pages.stride(3);
        for copy in 0..pairs.shape(0) {
            let from = pairs[copy * pairs.stride(0)] as usize * pages.stride(0) + of_page;
            let to = pairs[copy * pairs.stride(0) + pairs.stride(1)] as usize * pages.stride(0) + of_page;
            pages[to / width] = pages[from / width];
        }
    }
}
