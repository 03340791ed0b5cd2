//! What all products of this folder have in common: what follows them, and how the parts of a sum come together.

use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::gelu::{Activation, activate};
use super::weight::COLUMNS;
use super::{THREADS, empty_beside};

/// What follows a product.
pub struct Epilogue {
    /// `[outputs]`.
    pub bias: CubeTensor,
    pub activation: Activation,
    /// `[N, outputs]`.
    pub residual: Option<CubeTensor>,
}

/// Tensors of a product, as its kernel takes them.
pub struct Operands {
    /// `[N, inputs]`.
    pub x: CubeTensor,
    /// `[outputs]`.
    pub bias: CubeTensor,
    /// `[N, outputs]`; something that is not read, if nothing is added.
    pub residual: CubeTensor,
    /// `[N, outputs]`.
    pub output: CubeTensor,
    pub activation: Activation,
    /// Whether the residual is added.
    pub adds: bool,
}

impl Operands {
    /// Of a product of `x`, `[N, inputs]`, with a matrix of `outputs` columns.
    pub fn new(x: CubeTensor, outputs: usize, epilogue: Epilogue) -> Self {
        let x = into_contiguous(x);
        let rows = x.meta.shape()[0];
        let output = empty_beside(&x, [rows, outputs], DType::F32);
        let bias = into_contiguous(epilogue.bias);
        let adds = epilogue.residual.is_some();
        let residual = epilogue.residual.map_or_else(|| bias.clone(), into_contiguous);
        Self { x, bias, residual, output, activation: epilogue.activation, adds }
    }

    /// N.
    pub fn rows(&self) -> usize {
        self.x.meta.shape()[0]
    }
}

/// Writes element `[row, column]` of a result, of which the sum is known.
#[cube]
pub fn write(
    sum: f32,
    row: usize,
    column: usize,
    bias: &Tensor<f32>,
    residual: &Tensor<f32>,
    output: &mut Tensor<f32>,
    #[comptime] activation: Activation,
    #[comptime] adds: bool,
) {
    let at = row * output.shape(1) + column;
    let mut value = activate(sum + bias[column], activation);
    if comptime!(adds) {
        value += residual[at];
    }
    output[at] = value;
}

/// Adds up what the threads of a workgroup have of the columns of a tile, in the order of the threads, and writes it: `sums` is
/// `[at_once, parts, 32]`, of rows from `first` on.
#[cube]
pub fn write_sums(
    sums: &Shared<[f32]>,
    first: usize,
    tile: usize,
    bias: &Tensor<f32>,
    residual: &Tensor<f32>,
    output: &mut Tensor<f32>,
    #[comptime] at_once: usize,
    #[comptime] parts: usize,
    #[comptime] activation: Activation,
    #[comptime] adds: bool,
) {
    sync_cube();
    let mut element = UNIT_POS as usize;
    while element < comptime!(at_once * COLUMNS) {
        let (r, column) = (element / COLUMNS, element % COLUMNS);
        let (row, of_all) = (first + r, tile * COLUMNS + column);
        if row < output.shape(0) && of_all < output.shape(1) {
            let mut sum = 0.0_f32;
            for part in 0..parts {
                sum += sums[(r * parts + part) * COLUMNS + column];
            }
            write(sum, row, of_all, bias, residual, output, activation, adds);
        }
        element += THREADS;
    }
}
