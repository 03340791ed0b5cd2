//! Columns of a packed or quantized matrix as rows: the token embedding of a model that ties its head to it.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::weight::{COLUMNS, weight_at};
use super::{address_type, element_type, empty_beside, one_thread_each, readable};

/// Columns `ids`, `[N]` in i32, as rows `[N, inputs]` in f32, of tiles, or of words and scales.
pub fn columns(weights: CubeTensor, scales: Option<CubeTensor>, ids: CubeTensor, inputs: usize) -> CubeTensor {
    let (ids, weights) = (into_contiguous(ids), readable(weights, 1));
    let count = ids.meta.shape()[0];
    let output = empty_beside(&weights, [count, inputs], DType::F32);
    let is_int8 = scales.is_some();
    let scales = scales.map_or_else(|| weights.clone(), |scales| readable(scales, 1));
    let address = address_type(&[&weights, &output]);
    let (cubes, dim) = one_thread_each(&output.client, count * inputs);
    let dtypes = [element_type(weights.dtype), element_type(scales.dtype)];
    // SAFETY: threads behind the last element do nothing; `checks::columns` made sure that there is a tile, that all have these
    // inputs, and scales for them; an id that is negative reads the first column, and one behind the last tile the last.
    unsafe {
        columns_kernel::launch_unchecked(
            &output.client,
            cubes,
            dim,
            address,
            weights.into_tensor_arg(),
            scales.into_tensor_arg(),
            ids.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            is_int8,
            dtypes,
        );
    }
    output
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn columns_kernel<W: Numeric, S: Numeric>(
    weights: &Tensor<W>,
    scales: &Tensor<S>,
    ids: &Tensor<i32>,
    output: &mut Tensor<f32>,
    #[comptime] is_int8: bool,
    #[define(W, S)] _dtypes: [ElemType; 2],
) {
    let at = ABSOLUTE_POS;
    let (rows, inputs) = (output.shape(0), output.shape(1));
    if at < rows * inputs {
        let id = i32::max(ids[at / inputs], 0) as usize;
        let id = usize::min(id, weights.shape(0) * COLUMNS - 1);
        output[at] = weight_at::<W, S>(weights, scales, id / COLUMNS, at % inputs, id % COLUMNS, is_int8);
    }
}
