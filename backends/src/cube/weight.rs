//! One weight of a packed or quantized matrix, as f32.

use cubecl::prelude::*;

use crate::ops::{GROUP, QUAD, TILE};

/// The weight of `input` and column `column` of tile `tile`: of a packed matrix, `[tiles, inputs, 32]`, or, if it `is_int8`, of
/// a quantized one, `[tiles, quads, 32]` in i32 with scales `[tiles, groups, 32]`.
#[cube]
pub fn weight_at<W: Numeric, S: Numeric>(
    weights: &Tensor<W>,
    scales: &Tensor<S>,
    tile: usize,
    input: usize,
    column: usize,
    #[comptime] is_int8: bool,
) -> f32 {
    if comptime!(is_int8) {
        let word = weights[tile * weights.stride(0) + input / QUAD * weights.stride(1) + column];
        let scale = scales[tile * scales.stride(0) + input / GROUP * scales.stride(1) + column];
        whole(i32::cast_from(word), input % QUAD) * f32::cast_from(scale)
    } else {
        f32::cast_from(weights[tile * weights.stride(0) + input * weights.stride(1) + column])
    }
}

/// The whole number from -127 to 127 that byte `index` of a word stands for.
#[cube]
pub fn whole(word: i32, index: usize) -> f32 {
    let shift = 8 * index as i32;
    let byte = (word >> shift) & 255;
    f32::cast_from(byte - 128)
}

/// Columns of a tile, for kernels.
pub const COLUMNS: usize = TILE;
