//! Products of many rows, which prefill is made of: blocks of both factors go through shared memory.
//!
//! In plain f32 arithmetic, whatever matrix units the device has: f32 stays exact.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::gelu::Activation;
use super::product::{Epilogue, Operands, write};
use super::weight::{COLUMNS, weight_at};
use super::{THREADS, address_type, element_type, readable};

/// Columns that a thread makes.
const WIDTH: usize = 4;
/// Threads side by side over the columns of a tile.
const LANES: usize = COLUMNS / WIDTH;
/// Threads below each other.
const GROUPS: usize = THREADS / LANES;
/// Inputs that are in shared memory at a time.
const DEPTH: usize = 16;

/// `activation(x W + b) + residual`: `x` is `[N, inputs]` in f32, the result `[N, outputs]`. `weights` are the tiles of a packed
/// matrix, or the words of a quantized one with its scales.
pub fn many_rows(
    x: CubeTensor,
    weights: CubeTensor,
    scales: Option<CubeTensor>,
    outputs: usize,
    epilogue: Epilogue,
) -> CubeTensor {
    let tiles = weights.meta.shape()[0];
    let operands = Operands::new(x, outputs, epilogue);
    let rows = operands.rows();
    let Operands { x, bias, residual, output, activation, adds } = operands;
    let is_int8 = scales.is_some();
    let weights = readable(weights, 1);
    let scales = scales.map_or_else(|| bias.clone(), |scales| readable(scales, 1));
    // Rows that a thread makes: more read less of the weights, as long as there are enough workgroups.
    let each = rows.div_ceil(GROUPS).next_power_of_two().min(4);
    let address = address_type(&[&x, &weights, &output]);
    let cubes = CubeCount::Static(rows.div_ceil(GROUPS * each) as u32, tiles as u32, 1);
    let dtypes = [element_type(weights.dtype), element_type(scales.dtype)];
    // SAFETY: positions past the last row, input or output are neither read nor written; `checks::product` made sure that the
    // weights are those of `outputs` columns and have as many inputs as x, and that bias and residual have the shape of the
    // result.
    unsafe {
        many_rows_kernel::launch_unchecked(
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
            each,
            activation,
            adds,
            is_int8,
            dtypes,
        );
    }
    output
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn many_rows_kernel<W: Numeric, S: Numeric>(
    x: &Tensor<f32>,
    weights: &Tensor<W>,
    scales: &Tensor<S>,
    bias: &Tensor<f32>,
    residual: &Tensor<f32>,
    output: &mut Tensor<f32>,
    #[comptime] each: usize,
    #[comptime] activation: Activation,
    #[comptime] adds: bool,
    #[comptime] is_int8: bool,
    #[define(W, S)] _dtypes: [ElemType; 2],
) {
    let (inputs, outputs, rows) = (x.shape(1), output.shape(1), output.shape(0));
    let height = comptime!(GROUPS * each);
    // So that threads that write one input of neighbouring rows do not wait for each other.
    let pitch = comptime!(height + 1);
    let first = CUBE_POS_X as usize * height;
    let tile = CUBE_POS_Y as usize;
    let thread = UNIT_POS as usize;
    let (lane, group) = (thread % LANES, thread / LANES);

    let mut of_x = Shared::<[f32]>::new_slice(comptime!(DEPTH * pitch));
    let mut of_weights = Shared::<[f32]>::new_slice(comptime!(DEPTH * COLUMNS));
    let mut sums = Array::<f32>::new(comptime!(each * WIDTH));
    #[unroll]
    for s in 0..comptime!(each * WIDTH) {
        sums[s] = 0.0;
    }

    let mut start = 0_usize;
    while start < inputs {
        #[unroll]
        for part in 0..comptime!(height * DEPTH / THREADS) {
            let element = part * THREADS + thread;
            let (row, input) = (element / DEPTH, element % DEPTH);
            let is_there = first + row < rows && start + input < inputs;
            let mut value = 0.0_f32;
            if is_there {
                value = x[(first + row) * inputs + start + input];
            }
            of_x[input * pitch + row] = value;
        }
        #[unroll]
        for part in 0..comptime!(COLUMNS * DEPTH / THREADS) {
            let element = part * THREADS + thread;
            let (input, column) = (element / COLUMNS, element % COLUMNS);
            let mut value = 0.0_f32;
            if start + input < inputs {
                value = weight_at::<W, S>(weights, scales, tile, start + input, column, is_int8);
            }
            of_weights[element] = value;
        }
        sync_cube();
        for input in 0..DEPTH {
            #[unroll]
            for r in 0..each {
                let factor = of_x[input * pitch + group * each + r];
                #[unroll]
                for n in 0..WIDTH {
                    sums[r * WIDTH + n] += factor * of_weights[input * COLUMNS + lane * WIDTH + n];
                }
            }
        }
        sync_cube();
        start += DEPTH;
    }

    #[unroll]
    for r in 0..each {
        let row = first + group * each + r;
        #[unroll]
        for n in 0..WIDTH {
            let column = tile * COLUMNS + lane * WIDTH + n;
            if row < rows && column < outputs {
                write(sums[r * WIDTH + n], row, column, bias, residual, output, activation, adds);
            }
        }
    }
}
