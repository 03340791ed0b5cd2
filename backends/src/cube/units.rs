//! Products of many rows on the matrix units of a device, as burn computes them: for weights of 16 bits, which are rounded
//! anyway, and for f32 if it is [allowed](crate::allow_fast_f32) to round.

use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};
use burn_cubecl::tensor::CubeTensor;

use super::product::Epilogue;
use crate::ops::{Gelu, default};

/// With fewer rows, bringing the weights into the order that they want costs more than they save.
pub const LEAST_ROWS: usize = 256;

/// Whether a product with tiles of this type may go there.
pub fn are_for(tiles: &CubeTensor) -> bool {
    let matmul = &tiles.client.features().matmul;
    let has_units = !matmul.cmma.is_empty() || !matmul.mma.is_empty();
    has_units && (tiles.dtype != DType::F32 || crate::is_fast_f32_allowed())
}

/// As [`many_rows`](super::many::many_rows); `x` is rounded to the type of the weights, and sums are in f32. None if burn has no
/// such product for these shapes.
pub fn product(
    x: &CubeTensor,
    tiles: CubeTensor,
    outputs: usize,
    epilogue: &Epilogue,
    gelu: Option<Gelu>,
) -> Option<CubeTensor> {
    let dtype = tiles.dtype;
    let matrix = default::unpack::<CubeBackend>(tiles, outputs, dtype);
    let x = default::cast::<CubeBackend>(x.clone(), dtype);
    let product = matmul(x, matrix, None, MatmulStrategy::default(), DType::F32).ok()?;
    let sum = default::finish::<CubeBackend>(product, epilogue.bias.clone(), gelu);
    debug_assert_eq!(sum.dtype(), DType::F32);
    Some(match &epilogue.residual {
        Some(residual) => CubeBackend::float_add(sum, residual.clone()),
        None => sum,
    })
}
