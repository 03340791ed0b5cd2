//! Products of few rows, which decoding and verification are made of: every weight is read once, and what it is multiplied
//! with stays in registers.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::gelu::Activation;
use super::product::{Epilogue, Operands, write_sums};
use super::weight::COLUMNS;
use super::{THREADS, address_type, element_type, readable};

/// Most rows that go through the kernel of this file; of more, every block of them would read the weights again.
pub const FEW: usize = 16;

/// `activation(x W + b) + residual`: `x` is `[N, inputs]` in f32, `tiles` a packed matrix, the result `[N, outputs]`.
///
/// A workgroup makes one tile of 32 columns for one block of rows. Its threads stand side by side over the columns, four or
/// eight of them each, and share the inputs out among themselves; each adds up its part, and at the end the parts are added in
/// the order of the threads. So among few rows, an element does not depend on how many there are.
pub fn few_rows(x: CubeTensor, tiles: CubeTensor, outputs: usize, epilogue: Epilogue) -> CubeTensor {
    let count = tiles.meta.shape()[0];
    let operands = Operands::new(x, outputs, epilogue);
    let width = vector_size(&tiles);
    let tiles = readable(tiles, width);
    let at_once = rows_at_once(&operands, width);
    let parts = THREADS / (COLUMNS / width);
    let Operands { x, bias, residual, output, activation, adds } = operands;
    let address = address_type(&[&x, &tiles, &output]);
    let cubes = CubeCount::Static(x.meta.shape()[0].div_ceil(at_once) as u32, count as u32, 1);
    let dtype = element_type(tiles.dtype);
    // SAFETY: rows behind the last are read from the last, columns behind the last of a tile are zeros that are there, and
    // neither is written; `checks::product` made sure that the tiles are those of `outputs` columns and have as many inputs as x,
    // and that bias and residual have the shape of the result.
    unsafe {
        few_rows_kernel::launch_unchecked(
            &output.client,
            cubes,
            CubeDim::new_1d(THREADS as u32),
            address,
            width,
            x.into_tensor_arg(),
            tiles.into_tensor_arg(),
            bias.into_tensor_arg(),
            residual.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            at_once,
            parts,
            activation,
            adds,
            dtype,
        );
    }
    output
}

/// Rows that a workgroup makes whose threads have `width` columns each: as many as there are, up to what half of its shared
/// memory holds the parts of, so that two of them are at work at a time.
pub fn rows_at_once(operands: &Operands, width: usize) -> usize {
    let shared = operands.x.client.properties().hardware.max_shared_memory_size;
    let fit = shared / 2 / (THREADS * width * size_of::<f32>());
    // Of the smallest devices, one takes all of it.
    let max = [8, 4].into_iter().find(|max| *max <= fit).unwrap_or(2);
    operands.rows().next_power_of_two().min(max)
}

/// Weights that a thread reads at once: 16 bytes of them, where the device can.
fn vector_size(tiles: &CubeTensor) -> usize {
    (16 / tiles.dtype.size()).min(tiles.client.properties().hardware.max_vector_size)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn few_rows_kernel<W: Numeric, N: Size>(
    x: &Tensor<f32>,
    tiles: &Tensor<Vector<W, N>>,
    bias: &Tensor<f32>,
    residual: &Tensor<f32>,
    output: &mut Tensor<f32>,
    #[comptime] at_once: usize,
    #[comptime] parts: usize,
    #[comptime] activation: Activation,
    #[comptime] adds: bool,
    #[define(W)] _dtype: ElemType,
) {
    let width = tiles.vector_size();
    let lanes = comptime!(COLUMNS / width);
    let (inputs, rows) = (x.shape(1), output.shape(0));
    let first = CUBE_POS_X as usize * at_once;
    let tile = CUBE_POS_Y as usize;
    let lane = UNIT_POS as usize % lanes;
    let part = UNIT_POS as usize / lanes;
    let column_of_tile = tile * tiles.stride(0) / width + lane;
    let row_of_tile = tiles.stride(1) / width;

    let mut sums = Array::<Vector<f32, N>>::new(at_once);
    #[unroll]
    for r in 0..at_once {
        sums[r] = Vector::new(0.0);
    }
    let mut input = part;
    while input < inputs {
        let weights = Vector::<f32, N>::cast_from(tiles[column_of_tile + input * row_of_tile]);
        #[unroll]
        for r in 0..at_once {
            let row = usize::min(first + r, rows - 1);
            sums[r] += weights * Vector::new(x[row * inputs + input]);
        }
        input += parts;
    }

    let mut shared = Shared::<[f32]>::new_slice(comptime!(at_once * parts * COLUMNS));
    #[unroll]
    for r in 0..at_once {
        #[unroll]
        for n in 0..width {
            shared[(r * parts + part) * COLUMNS + lane * width + n] = sums[r].extract(n);
        }
    }
    write_sums(&shared, first, tile, bias, residual, output, at_once, parts, activation, adds);
}
