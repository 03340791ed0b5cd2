//! The operations of [`Gpt2Ops`](super::Gpt2Ops) on quantized matrices as compositions of burn's.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, Shape, Slice};

use super::default::{bool_store, cast, finish};
use super::{GROUP, Gelu, LEAST_SCALE, MAX_STEPS, TILE};

/// Below, the numbers of a group count as 0.
const TINY: f64 = 1e-30;

/// See [`Gpt2Ops::quantize`](super::Gpt2Ops::quantize); the scales are rounded to a type that the device has.
pub fn quantize<B: Backend>(matrix: FloatTensor<B>, of_scales: DType) -> (IntTensor<B>, FloatTensor<B>) {
    let [inputs, outputs] = matrix.shape().dims();
    let (groups, tiles) = (inputs.div_ceil(GROUP), outputs.div_ceil(TILE));
    let matrix = lengthen::<B>(lengthen::<B>(cast::<B>(matrix, DType::F32), 0, groups * GROUP), 1, tiles * TILE);
    let grouped = B::float_reshape(matrix, Shape::new([groups, GROUP, tiles, TILE]));
    let scales = rounded_scales::<B>(largest::<B>(grouped.clone(), 1), of_scales); // [groups, 1, tiles, 32]
    let wide = B::float_expand(cast::<B>(scales.clone(), DType::F32), grouped.shape());
    let is_zero = B::float_lower_equal_elem(wide.clone(), 0.0.into(), bool_store::<B>(&wide.device()));
    let whole = B::float_mask_fill(B::float_div(grouped, wide), is_zero, 0.0.into());
    let whole = B::float_clamp(B::float_round(whole), (-127.0).into(), 127.0.into());

    let whole = B::float_into_int(whole, DType::I32.into());
    let quads = inputs.div_ceil(4);
    let whole = B::int_reshape(whole, Shape::new([groups * GROUP / 4, 4, tiles * TILE]));
    let byte = |index: usize| {
        let slices = [Slice::from(0..quads), Slice::from(index..index + 1), Slice::from(0..tiles * TILE)];
        let byte = B::int_add_scalar(B::int_slice(whole.clone(), &slices), 128.into());
        match index {
            // The highest byte decides the sign of the word.
            3 => {
                let is_high = B::int_greater_equal_elem(byte.clone(), 128.into(), bool_store::<B>(&byte.device()));
                B::int_sub(byte, B::int_mul_scalar(B::bool_into_int(is_high, DType::I32.into()), 256.into()))
            }
            _ => byte,
        }
    };
    let shifted = |index: usize| B::int_mul_scalar(byte(index), (1_i32 << (8 * index)).into());
    let words = (1..4).fold(shifted(0), |word, index| B::int_add(word, shifted(index)));
    let words = B::int_reshape(words, Shape::new([quads, tiles, TILE]));
    let scales = B::float_reshape(scales, Shape::new([groups, tiles, TILE]));
    (B::int_permute(words, &[1, 0, 2]), B::float_permute(scales, &[1, 0, 2]))
}

/// The largest magnitudes of groups divided by 127, in a type that the device has. Among the least numbers of f16 the steps are
/// so coarse that the nearest one may be far too small for its group, or 0: then it is the next one.
fn rounded_scales<B: Backend>(max: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    let scales = cast::<B>(B::float_div_scalar(max.clone(), 127.0.into()), dtype);
    if dtype != DType::F16 {
        return scales;
    }
    let scales = cast::<B>(scales, DType::F32);
    let store = bool_store::<B>(&scales.device());
    let is_too_small = B::float_lower(B::float_mul_scalar(scales.clone(), MAX_STEPS.into()), max, store);
    let next = B::float_add_scalar(scales.clone(), f64::from(LEAST_SCALE).into());
    cast::<B>(B::float_mask_where(scales, is_too_small, next), dtype)
}

/// See [`Gpt2Ops::quantized_linear`](super::Gpt2Ops::quantized_linear).
pub fn linear<B: Backend>(
    x: FloatTensor<B>,
    weights: IntTensor<B>,
    scales: FloatTensor<B>,
    bias: FloatTensor<B>,
    outputs: usize,
    gelu: Option<Gelu>,
) -> FloatTensor<B> {
    let ([_, inputs], dtype) = (x.shape().dims(), x.dtype());
    let matrix = B::float_permute(dequantize::<B>(weights, scales, inputs), &[1, 0, 2]); // [inputs, tiles, 32]
    let [_, tiles, _] = matrix.shape().dims();
    let matrix = B::float_reshape(matrix, Shape::new([inputs, tiles * TILE]));
    let matrix = B::float_slice(matrix, &[Slice::from(0..inputs), Slice::from(0..outputs)]);
    let product = B::float_matmul(round::<B>(cast::<B>(x, DType::F32)), matrix);
    finish::<B>(cast::<B>(product, dtype), bias, gelu)
}

/// See [`Gpt2Ops::quantized_linear_add`](super::Gpt2Ops::quantized_linear_add).
pub fn linear_add<B: Backend>(
    x: FloatTensor<B>,
    weights: IntTensor<B>,
    scales: FloatTensor<B>,
    bias: FloatTensor<B>,
    residual: FloatTensor<B>,
) -> FloatTensor<B> {
    let [_, outputs] = residual.shape().dims();
    B::float_add(linear::<B>(x, weights, scales, bias, outputs, None), residual)
}

/// See [`Gpt2Ops::quantized_columns`](super::Gpt2Ops::quantized_columns).
pub fn columns<B: Backend>(
    weights: IntTensor<B>,
    scales: FloatTensor<B>,
    ids: IntTensor<B>,
    inputs: usize,
) -> FloatTensor<B> {
    let columns = B::float_swap_dims(dequantize::<B>(weights, scales, inputs), 1, 2); // [tiles, 32, inputs]
    let [tiles, _, _] = columns.shape().dims();
    B::float_select(B::float_reshape(columns, Shape::new([tiles * TILE, inputs])), 0, ids)
}

/// What a quantized matrix stands for: `[tiles, inputs, 32]` in f32.
fn dequantize<B: Backend>(weights: IntTensor<B>, scales: FloatTensor<B>, inputs: usize) -> FloatTensor<B> {
    let [tiles, quads, _] = weights.shape().dims();
    let [_, groups, _] = scales.shape().dims();
    let byte = |index: i32| {
        let byte = B::bitwise_right_shift_scalar(weights.clone(), (8 * index).into());
        let byte = B::int_sub_scalar(B::bitwise_and_scalar(byte, 255.into()), 128.into());
        B::float_reshape(B::int_into_float(byte, DType::F32.into()), Shape::new([tiles, quads, 1, TILE]))
    };
    let whole = B::float_cat((0..4).map(byte).collect(), 2); // [tiles, quads, 4, 32]
    let whole = lengthen::<B>(B::float_reshape(whole, Shape::new([tiles, 4 * quads, TILE])), 1, groups * GROUP);
    let whole = B::float_reshape(whole, Shape::new([tiles, groups, GROUP, TILE]));
    let scales = B::float_reshape(cast::<B>(scales, DType::F32), Shape::new([tiles, groups, 1, TILE]));
    let matrix = B::float_reshape(B::float_mul(whole, scales), Shape::new([tiles, groups * GROUP, TILE]));
    B::float_slice(matrix, &[Slice::from(0..tiles), Slice::from(0..inputs), Slice::from(0..TILE)])
}

/// `[N, inputs]`, every 64 numbers of a row rounded to steps of the largest of them divided by 127.
fn round<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let [rows, inputs] = x.shape().dims();
    let groups = inputs.div_ceil(GROUP);
    let grouped = B::float_reshape(lengthen::<B>(x, 1, groups * GROUP), Shape::new([rows, groups, GROUP]));
    let max = largest::<B>(grouped.clone(), 2); // [N, groups, 1]
    let is_tiny = B::float_lower_equal_elem(max.clone(), TINY.into(), bool_store::<B>(&max.device()));
    let steps = B::float_full(max.shape(), 127.0.into(), &max.device(), max.dtype().into());
    let per_step = B::float_mask_fill(B::float_div(steps, max.clone()), is_tiny, 0.0.into());
    let whole = B::float_round(B::float_mul(grouped, per_step));
    let rounded = B::float_mul(whole, B::float_div_scalar(max, 127.0.into()));
    let rounded = B::float_reshape(rounded, Shape::new([rows, groups * GROUP]));
    B::float_slice(rounded, &[Slice::from(0..rows), Slice::from(0..inputs)])
}

/// The largest magnitude along a dimension.
fn largest<B: Backend>(x: FloatTensor<B>, dim: usize) -> FloatTensor<B> {
    B::float_max_dim(B::float_abs(x), dim)
}

/// The same with zeros behind it, up to a length.
fn lengthen<B: Backend>(x: FloatTensor<B>, dim: usize, len: usize) -> FloatTensor<B> {
    let mut spare = x.shape();
    match len - spare[dim] {
        0 => x,
        missing => {
            spare[dim] = missing;
            let zeros = B::float_zeros(spare, &x.device(), x.dtype().into());
            B::float_cat(vec![x, zeros], dim)
        }
    }
}
