//! The operations of [`Gpt2Ops`](super::Gpt2Ops) as compositions of burn's.

use std::ops::Range;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{BoolStore, DType, IntDType, Shape, Slice};

use super::{Gelu, TILE};
use crate::{PackedRow, RowGroup};

/// See [`Gpt2Ops::pack`](super::Gpt2Ops::pack).
pub fn pack<B: Backend>(matrix: FloatTensor<B>) -> FloatTensor<B> {
    let [inputs, outputs] = matrix.shape().dims();
    let tiles = outputs.div_ceil(TILE);
    let (dtype, device) = (matrix.dtype(), matrix.device());
    let filled = match tiles * TILE - outputs {
        0 => matrix,
        spare => {
            let zeros = B::float_zeros(Shape::new([inputs, spare]), &device, dtype.into());
            B::float_cat(vec![matrix, zeros], 1)
        }
    };
    let tiled = B::float_reshape(filled, Shape::new([inputs, tiles, TILE]));
    let order = [1, 0, 2];
    let tiled = B::float_permute(tiled, &order);
    // A tensor of its own: a permuted view of the matrix would not be what streams.
    let zeros = B::float_zeros(Shape::new([tiles, inputs, TILE]), &device, dtype.into());
    B::float_add(zeros, tiled)
}

/// See [`Gpt2Ops::packed_linear`](super::Gpt2Ops::packed_linear).
pub fn packed_linear<B: Backend>(
    x: FloatTensor<B>,
    tiles: FloatTensor<B>,
    bias: FloatTensor<B>,
    outputs: usize,
    gelu: Option<Gelu>,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    finish::<B>(B::float_matmul(x, unpack::<B>(tiles, outputs, dtype)), bias, gelu)
}

/// `gelu?(product + bias)`: `[N, outputs]` and `[outputs]`.
pub(crate) fn finish<B: Backend>(product: FloatTensor<B>, bias: FloatTensor<B>, gelu: Option<Gelu>) -> FloatTensor<B> {
    let dtype = product.dtype();
    let [outputs] = bias.shape().dims();
    let bias = cast::<B>(B::float_reshape(bias, Shape::new([1, outputs])), dtype);
    let sum = B::float_add(product, bias);
    match gelu {
        None => sum,
        Some(Gelu::Tanh) => gelu_tanh::<B>(sum),
        Some(Gelu::Erf) => gelu_erf::<B>(sum),
    }
}

/// See [`Gpt2Ops::packed_linear_add`](super::Gpt2Ops::packed_linear_add).
pub fn packed_linear_add<B: Backend>(
    x: FloatTensor<B>,
    tiles: FloatTensor<B>,
    bias: FloatTensor<B>,
    residual: FloatTensor<B>,
) -> FloatTensor<B> {
    let [_, outputs] = residual.shape().dims();
    B::float_add(packed_linear::<B>(x, tiles, bias, outputs, None), residual)
}

/// See [`Gpt2Ops::packed_columns`](super::Gpt2Ops::packed_columns).
pub fn packed_columns<B: Backend>(tiles: FloatTensor<B>, ids: IntTensor<B>) -> FloatTensor<B> {
    let [count, _, _] = tiles.shape().dims();
    let matrix = unpack::<B>(tiles, count * TILE, DType::F32);
    B::float_transpose(B::float_select(matrix, 1, as_i32::<B>(ids)))
}

/// Ids or lengths in i32, where arithmetic on them does not overflow; those that it cannot hold are as large as can be.
pub(crate) fn as_i32<B: Backend>(integers: IntTensor<B>) -> IntTensor<B> {
    let max = i64::from(i32::MAX);
    let bounded = match integers.dtype() {
        DType::I32 => return integers,
        DType::I64 => B::int_clamp(integers, i64::from(i32::MIN).into(), max.into()),
        DType::U32 | DType::U64 => B::int_clamp_max(integers, max.into()),
        _ => integers,
    };
    B::int_cast(bounded, IntDType::I32)
}

/// Lengths, none of them negative.
fn lengths<B: Backend>(lens: IntTensor<B>) -> IntTensor<B> {
    B::int_clamp_min(as_i32::<B>(lens), 0.into())
}

/// A group's part of what is packed, `[N, H, D]`, as `[B, H, T, D]`.
fn unpack_group<B: Backend>(packed: &FloatTensor<B>, group: &RowGroup) -> FloatTensor<B> {
    let [_, heads, head_dim] = packed.shape().dims();
    let part = [group.tokens.clone(), 0..heads, 0..head_dim].map(Slice::from);
    let part = B::float_slice(packed.clone(), &part);
    let part = B::float_reshape(part, Shape::new([group.rows.len(), group.query_len, heads, head_dim]));
    B::float_swap_dims(part, 1, 2)
}

/// The keys or the values of [`Gpt2Ops::append`](super::Gpt2Ops::append).
pub fn append<B: Backend>(buffer: FloatTensor<B>, new: FloatTensor<B>, rows: &[PackedRow]) -> FloatTensor<B> {
    let new = rounded::<B>(new, buffer.dtype());
    let [_, heads, head_dim] = new.shape().dims();
    let at = |slots: Range<usize>, positions: Range<usize>| [slots, 0..heads, positions, 0..head_dim].map(Slice::from);
    RowGroup::all(rows).iter().fold(buffer, |buffer, group| {
        let new = unpack_group::<B>(&new, group);
        let of_group = &rows[group.rows.clone()];
        let start = of_group[0].context_len;
        if of_group.iter().all(|row| row.context_len == start) {
            return B::float_slice_assign(buffer, &at(group.slots.clone(), start..start + group.query_len), new);
        }
        of_group.iter().enumerate().fold(buffer, |buffer, (index, row)| {
            let part = B::float_slice(new.clone(), &at(index..index + 1, 0..row.query_len));
            B::float_slice_assign(buffer, &at(row.slot..row.slot + 1, row.context_len..row.seq_len()), part)
        })
    })
}

/// See [`Gpt2Ops::attend`](super::Gpt2Ops::attend).
pub fn attend<B: Backend>(
    query: FloatTensor<B>,
    keys: FloatTensor<B>,
    values: FloatTensor<B>,
    context_lens: IntTensor<B>,
    rows: &[PackedRow],
) -> FloatTensor<B> {
    let (dtype, device) = (query.dtype(), query.device());
    let [tokens, heads, head_dim] = query.shape().dims();
    let [_, _, capacity, _] = keys.shape().dims::<4>();
    let of_group = |group: &RowGroup| {
        let states = |states: &FloatTensor<B>| {
            let part = [group.slots.clone(), 0..heads, 0..capacity, 0..head_dim].map(Slice::from);
            cast::<B>(B::float_slice(states.clone(), &part), dtype)
        };
        let context_lens = B::int_slice(context_lens.clone(), &[Slice::from(group.rows.clone())]);
        let scores = masked_scores::<B>(unpack_group::<B>(&query, group), states(&keys), context_lens);
        let merged = merge_heads::<B>(B::float_matmul(softmax::<B>(scores), states(&values)));
        B::float_reshape(merged, Shape::new([group.tokens.len(), heads * head_dim]))
    };
    let mut parts: Vec<FloatTensor<B>> = RowGroup::all(rows).iter().map(of_group).collect();
    match parts.len() {
        0 => B::float_zeros(Shape::new([tokens, heads * head_dim]), &device, dtype.into()),
        1 => parts.remove(0),
        _ => B::float_cat(parts, 0),
    }
}

/// `[inputs, outputs]` of a packed matrix.
pub(crate) fn unpack<B: Backend>(tiles: FloatTensor<B>, outputs: usize, dtype: DType) -> FloatTensor<B> {
    let [count, inputs, _] = tiles.shape().dims();
    let order = [1, 0, 2];
    let wide = B::float_reshape(B::float_permute(tiles, &order), Shape::new([inputs, count * TILE]));
    let matrix = B::float_slice(wide, &[Slice::from(0..inputs), Slice::from(0..outputs)]);
    cast::<B>(matrix, dtype)
}

/// Keys or values in the element type of a cache. What is more than the largest half becomes NaN there: were it infinite, a key
/// could get a score of minus infinity and be left out of everything without a word; NaN is seen in the logits.
pub(crate) fn rounded<B: Backend>(new: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    let new = cast::<B>(new, dtype);
    if dtype != DType::F16 {
        return new;
    }
    let infinite = B::float_is_inf(new.clone(), bool_store::<B>(&new.device()));
    B::float_mask_fill(new, infinite, f64::NAN.into())
}

pub(crate) fn cast<B: Backend>(tensor: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if tensor.dtype() == dtype { tensor } else { B::float_cast(tensor, dtype.into()) }
}

fn gelu_erf<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let erf = B::float_erf(B::float_mul_scalar(x.clone(), std::f64::consts::FRAC_1_SQRT_2.into()));
    let share = B::float_mul_scalar(B::float_add_scalar(erf, 1.0.into()), 0.5.into());
    B::float_mul(x, share)
}

fn gelu_tanh<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let slope = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
    let square = B::float_mul(x.clone(), x.clone());
    let inner = B::float_add_scalar(B::float_mul_scalar(square, (0.044_715 * slope).into()), slope.into());
    let twice_u = B::float_mul(inner, x.clone());
    let denominator = B::float_add_scalar(B::float_exp(B::float_neg(twice_u)), 1.0.into());
    B::float_div(x, denominator)
}

/// `q k^T / sqrt D`, minus infinity where a key is behind the query.
fn masked_scores<B: Backend>(
    query: FloatTensor<B>,
    keys: FloatTensor<B>,
    context_lens: IntTensor<B>,
) -> FloatTensor<B> {
    let [batch, heads, time, head_dim] = query.shape().dims();
    let [_, _, count, _] = keys.shape().dims();
    let query = B::float_div_scalar(query, (head_dim as f64).sqrt().into());
    let scores = B::float_matmul(query, B::float_swap_dims(keys, 2, 3)); // [B, H, T, L]

    let lens = lengths::<B>(context_lens);
    let (device, dtype) = (lens.device(), lens.dtype());
    let shape = Shape::new([batch, heads, time, count]);
    let ramp = |len: usize| B::int_arange(0..len as i64, &device, dtype.into());
    let wide =
        |ints: IntTensor<B>, dims: [usize; 4]| B::int_expand(B::int_reshape(ints, Shape::new(dims)), shape.clone());
    let limit = B::int_add(wide(lens, [batch, 1, 1, 1]), wide(ramp(time), [1, 1, time, 1]));
    let mask = B::int_greater(wide(ramp(count), [1, 1, 1, count]), limit, bool_store::<B>(&device));
    B::float_mask_fill(scores, mask, f64::NEG_INFINITY.into())
}

/// Over the last of four dimensions.
fn softmax<B: Backend>(scores: FloatTensor<B>) -> FloatTensor<B> {
    let max = B::float_max_dim(scores.clone(), 3);
    let weights = B::float_exp(B::float_sub(scores, max));
    let total = B::float_sum_dim(weights.clone(), 3);
    B::float_div(weights, total)
}

/// `[B, H, T, D]` to `[B, T, H D]`.
fn merge_heads<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let [batch, heads, time, head_dim] = x.shape().dims();
    B::float_reshape(B::float_swap_dims(x, 1, 2), Shape::new([batch, time, heads * head_dim]))
}

/// See [`Gpt2Ops::layer_norm`](super::Gpt2Ops::layer_norm).
pub fn layer_norm<B: Backend>(
    x: FloatTensor<B>,
    gamma: FloatTensor<B>,
    beta: FloatTensor<B>,
    epsilon: f64,
) -> FloatTensor<B> {
    let [width] = gamma.shape().dims();
    let centred = B::float_sub(x.clone(), B::float_mean_dim(x, 1));
    let variance = B::float_mean_dim(B::float_mul(centred.clone(), centred.clone()), 1);
    let deviation = B::float_sqrt(B::float_add_scalar(variance, epsilon.into()));
    let row = |tensor: FloatTensor<B>| B::float_reshape(tensor, Shape::new([1, width]));
    B::float_add(B::float_mul(B::float_div(centred, deviation), row(gamma)), row(beta))
}

/// The id of a row of logits that are not numbers, or none of which is finite.
pub(crate) const NOT_A_NUMBER: i32 = -1;

/// See [`Gpt2Ops::argmax`](super::Gpt2Ops::argmax).
pub fn argmax<B: Backend>(logits: FloatTensor<B>) -> IntTensor<B> {
    let ([rows, columns], device) = (logits.shape().dims(), logits.device());
    if columns == 0 {
        return B::int_full(Shape::new([rows]), NOT_A_NUMBER.into(), &device, IntDType::I32);
    }
    let store = bool_store::<B>(&device);
    // Of what is not a number, every comparison is false. What it is replaced by loses against all that is finite, so that a
    // backend's own opinion of its order does not matter.
    let is_bad = B::bool_not(B::float_lower_elem(logits.clone(), f64::INFINITY.into(), store));
    let logits = B::float_mask_fill(logits, is_bad.clone(), f64::NEG_INFINITY.into());
    let max = B::float_max_dim(logits.clone(), 1);
    let has_none = B::float_lower_equal_elem(max, f64::NEG_INFINITY.into(), store);
    let is_flagged = B::bool_or(B::bool_any_dim(is_bad, 1), has_none);
    let ids = B::int_cast(B::float_argmax(logits, 1, IntDType::I32), IntDType::I32);
    B::int_reshape(B::int_mask_fill(ids, is_flagged, NOT_A_NUMBER.into()), Shape::new([rows]))
}

/// See [`Gpt2Ops::advance`](super::Gpt2Ops::advance).
pub fn advance<B: Backend>(
    logits: FloatTensor<B>,
    context_lens: IntTensor<B>,
    chosen: IntTensor<B>,
) -> (IntTensor<B>, IntTensor<B>, IntTensor<B>) {
    let ids = argmax::<B>(logits);
    let [batch, columns] = chosen.shape().dims();
    let wide = |ints: IntTensor<B>, dims: [usize; 2]| {
        B::int_expand(B::int_reshape(ints, Shape::new(dims)), Shape::new([batch, columns]))
    };
    let column = B::int_remainder_scalar(lengths::<B>(context_lens.clone()), (columns as i64).into());
    let device = context_lens.device();
    let ramp = B::int_arange(0..columns as i64, &device, IntDType::I32);
    let is_here = B::int_equal(wide(ramp, [1, columns]), wide(column, [batch, 1]), bool_store::<B>(&device));
    let of_row = B::int_cast(ids.clone(), chosen.dtype().into());
    let chosen = B::int_mask_where(chosen, is_here, wide(of_row, [batch, 1]));
    // Whatever is looked up next is in the vocabulary.
    (B::int_clamp_min(ids, 0.into()), B::int_add_scalar(context_lens, 1.into()), chosen)
}

/// How a device stores truth values: not all have a type for them.
pub(crate) fn bool_store<B: Backend>(device: &B::Device) -> BoolStore {
    let stores = [BoolStore::Native, BoolStore::U8, BoolStore::U32];
    stores.into_iter().find(|store| B::supports_dtype(device, DType::Bool(*store))).unwrap_or(BoolStore::Native)
}
