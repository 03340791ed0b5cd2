//! Products of few rows with a quantized matrix. The other factor stays in f32: what limits these products is how many bytes of
//! weights are read, not the arithmetic.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::gelu::Activation;
use super::linear::rows_at_once;
use super::product::{Epilogue, Operands, write_sums};
use super::weight::{COLUMNS, whole};
use super::{THREADS, address_type, element_type, readable};
use crate::ops::{GROUP, QUAD};

/// Threads that share the inputs of a column.
const PARTS: usize = THREADS / COLUMNS;

/// As [`few_rows`](super::linear::few_rows), with the words and scales of a quantized matrix. Each thread makes one column.
pub fn few_rows_int8(
    x: CubeTensor,
    weights: CubeTensor,
    scales: CubeTensor,
    outputs: usize,
    epilogue: Epilogue,
) -> CubeTensor {
    let tiles = weights.meta.shape()[0];
    let (weights, scales) = (readable(weights, 1), readable(scales, 1));
    let operands = Operands::new(x, outputs, epilogue);
    let at_once = rows_at_once(&operands, 1);
    let Operands { x, bias, residual, output, activation, adds } = operands;
    let address = address_type(&[&x, &weights, &output]);
    let cubes = CubeCount::Static(x.meta.shape()[0].div_ceil(at_once) as u32, tiles as u32, 1);
    let dtype = element_type(scales.dtype);
    // SAFETY: as for few_rows, and `checks::product` made sure that there are words and scales for all inputs; those behind the
    // last, in the last word of a column, are not read from x.
    unsafe {
        few_rows_int8_kernel::launch_unchecked(
            &output.client,
            cubes,
            CubeDim::new_1d(THREADS as u32),
            address,
            x.into_tensor_arg(),
            weights.into_tensor_arg(),
            scales.into_tensor_arg(),
            bias.into_tensor_arg(),
            residual.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            at_once,
            activation,
            adds,
            dtype,
        );
    }
    output
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn few_rows_int8_kernel<S: Numeric>(
    x: &Tensor<f32>,
    weights: &Tensor<i32>,
    scales: &Tensor<S>,
    bias: &Tensor<f32>,
    residual: &Tensor<f32>,
    output: &mut Tensor<f32>,
    #[comptime] at_once: usize,
    #[comptime] activation: Activation,
    #[comptime] adds: bool,
    #[define(S)] _dtype: ElemType,
) {
    let (inputs, rows) = (x.shape(1), output.shape(0));
    let quads = weights.shape(1);
    let first = CUBE_POS_X as usize * at_once;
    let tile = CUBE_POS_Y as usize;
    let column = UNIT_POS as usize % COLUMNS;
    let part = UNIT_POS as usize / COLUMNS;
    let words = tile * weights.stride(0) + column;
    let steps = tile * scales.stride(0) + column;

    let mut sums = Array::<f32>::new(at_once);
    #[unroll]
    for r in 0..at_once {
        sums[r] = 0.0;
    }
    let mut quad = part;
    while quad < quads {
        let word = weights[words + quad * weights.stride(1)];
        let scale = f32::cast_from(scales[steps + quad * QUAD / GROUP * scales.stride(1)]);
        #[unroll]
        for index in 0..QUAD {
            let input = quad * QUAD + index;
            if input < inputs {
                let weight = whole(word, index) * scale;
                #[unroll]
                for r in 0..at_once {
                    let row = usize::min(first + r, rows - 1);
                    sums[r] += weight * x[row * inputs + input];
                }
            }
        }
        quad += PARTS;
    }

    let mut shared = Shared::<[f32]>::new_slice(comptime!(at_once * THREADS));
    #[unroll]
    for r in 0..at_once {
        shared[r * THREADS + part * COLUMNS + column] = sums[r];
    }
    write_sums(&shared, first, tile, bias, residual, output, at_once, PARTS, activation, adds);
}
