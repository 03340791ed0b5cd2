//! The operations of [`Gpt2Ops`](super::Gpt2Ops) as compositions of burn's.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{BoolStore, DType, IntDType, Shape, Slice};

use super::{Gelu, TILE};

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
    let most = i64::from(i32::MAX);
    let bounded = match integers.dtype() {
        DType::I32 => return integers,
        DType::I64 => B::int_clamp(integers, i64::from(i32::MIN).into(), most.into()),
        DType::U32 | DType::U64 => B::int_clamp_max(integers, most.into()),
        _ => integers,
    };
    B::int_cast(bounded, IntDType::I32)
}

/// Lengths, none of them negative.
fn lengths<B: Backend>(past: IntTensor<B>) -> IntTensor<B> {
    B::int_clamp_min(as_i32::<B>(past), 0.into())
}

/// The keys or the values of [`Gpt2Ops::append`](super::Gpt2Ops::append).
pub fn append<B: Backend>(
    buffer: FloatTensor<B>,
    new: FloatTensor<B>,
    starts: &[usize],
    counts: &[usize],
) -> FloatTensor<B> {
    let new = rounded::<B>(new, buffer.dtype());
    let [batch, heads, _, head_dim] = new.shape().dims();
    let all = |rows: std::ops::Range<usize>, positions: std::ops::Range<usize>| {
        [rows, 0..heads, positions, 0..head_dim].map(Slice::from)
    };
    let is_uniform = |lens: &[usize]| lens.iter().all(|len| *len == lens[0]);
    if batch > 0 && is_uniform(starts) && is_uniform(counts) {
        let new = B::float_slice(new, &all(0..batch, 0..counts[0]));
        return B::float_slice_assign(buffer, &all(0..batch, starts[0]..starts[0] + counts[0]), new);
    }
    (0..batch).fold(buffer, |buffer, row| {
        let part = B::float_slice(new.clone(), &all(row..row + 1, 0..counts[row]));
        B::float_slice_assign(buffer, &all(row..row + 1, starts[row]..starts[row] + counts[row]), part)
    })
}

/// See [`Gpt2Ops::attend`](super::Gpt2Ops::attend).
pub fn attend<B: Backend>(
    query: FloatTensor<B>,
    keys: FloatTensor<B>,
    values: FloatTensor<B>,
    past: IntTensor<B>,
) -> FloatTensor<B> {
    let dtype = query.dtype();
    let scores = masked_scores::<B>(query, cast::<B>(keys, dtype), past);
    merge_heads::<B>(B::float_matmul(softmax::<B>(scores), cast::<B>(values, dtype)))
}

/// See [`Gpt2Ops::attend_shared`](super::Gpt2Ops::attend_shared).
pub fn attend_shared<B: Backend>(
    query: FloatTensor<B>,
    shared_keys: FloatTensor<B>,
    shared_values: FloatTensor<B>,
    keys: FloatTensor<B>,
    values: FloatTensor<B>,
    past: IntTensor<B>,
) -> FloatTensor<B> {
    let [batch, _, _, _] = query.shape().dims::<4>();
    let dtype = query.dtype();
    let (keys, values) = (cast::<B>(keys, dtype), cast::<B>(values, dtype));
    let of_all = |shared: FloatTensor<B>| {
        let [_, heads, count, head_dim] = shared.shape().dims();
        B::float_expand(cast::<B>(shared, dtype), Shape::new([batch, heads, count, head_dim]))
    };
    let [_, _, _, head_dim] = query.shape().dims();
    let scaled = B::float_div_scalar(query.clone(), (head_dim as f64).sqrt().into());
    let of_shared = B::float_matmul(scaled, B::float_swap_dims(of_all(shared_keys), 2, 3));
    let scores = B::float_cat(vec![of_shared, masked_scores::<B>(query, keys, past)], 3);
    let values = B::float_cat(vec![of_all(shared_values), values], 2);
    merge_heads::<B>(B::float_matmul(softmax::<B>(scores), values))
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
fn masked_scores<B: Backend>(query: FloatTensor<B>, keys: FloatTensor<B>, past: IntTensor<B>) -> FloatTensor<B> {
    let [batch, heads, time, head_dim] = query.shape().dims();
    let [_, _, count, _] = keys.shape().dims();
    let query = B::float_div_scalar(query, (head_dim as f64).sqrt().into());
    let scores = B::float_matmul(query, B::float_swap_dims(keys, 2, 3)); // [B, H, T, L]

    let past = lengths::<B>(past);
    let (device, dtype) = (past.device(), past.dtype());
    let shape = Shape::new([batch, heads, time, count]);
    let ramp = |len: usize| B::int_arange(0..len as i64, &device, dtype.into());
    let wide =
        |ints: IntTensor<B>, dims: [usize; 4]| B::int_expand(B::int_reshape(ints, Shape::new(dims)), shape.clone());
    let limit = B::int_add(wide(past, [batch, 1, 1, 1]), wide(ramp(time), [1, 1, time, 1]));
    let hidden = B::int_greater(wide(ramp(count), [1, 1, 1, count]), limit, bool_store::<B>(&device));
    B::float_mask_fill(scores, hidden, f64::NEG_INFINITY.into())
}

/// Over the last of four dimensions.
fn softmax<B: Backend>(scores: FloatTensor<B>) -> FloatTensor<B> {
    let most = B::float_max_dim(scores.clone(), 3);
    let weights = B::float_exp(B::float_sub(scores, most));
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
    let most = B::float_max_dim(logits.clone(), 1);
    let has_none = B::float_lower_equal_elem(most, f64::NEG_INFINITY.into(), store);
    let is_flagged = B::bool_or(B::bool_any_dim(is_bad, 1), has_none);
    let ids = B::int_cast(B::float_argmax(logits, 1, IntDType::I32), IntDType::I32);
    B::int_reshape(B::int_mask_fill(ids, is_flagged, NOT_A_NUMBER.into()), Shape::new([rows]))
}

/// See [`Gpt2Ops::advance`](super::Gpt2Ops::advance).
pub fn advance<B: Backend>(
    logits: FloatTensor<B>,
    past: IntTensor<B>,
    chosen: IntTensor<B>,
) -> (IntTensor<B>, IntTensor<B>, IntTensor<B>) {
    let ids = argmax::<B>(logits);
    let [batch, places] = chosen.shape().dims();
    let wide = |ints: IntTensor<B>, dims: [usize; 2]| {
        B::int_expand(B::int_reshape(ints, Shape::new(dims)), Shape::new([batch, places]))
    };
    let place = B::int_remainder_scalar(lengths::<B>(past.clone()), (places as i64).into());
    let device = past.device();
    let ramp = B::int_arange(0..places as i64, &device, IntDType::I32);
    let is_here = B::int_equal(wide(ramp, [1, places]), wide(place, [batch, 1]), bool_store::<B>(&device));
    let of_row = B::int_cast(ids.clone(), chosen.dtype().into());
    let chosen = B::int_mask_where(chosen, is_here, wide(of_row, [batch, 1]));
    // Whatever is looked up next is in the vocabulary.
    (B::int_clamp_min(ids, 0.into()), B::int_add_scalar(past, 1.into()), chosen)
}

/// How a device stores truth values: not all have a type for them.
pub(crate) fn bool_store<B: Backend>(device: &B::Device) -> BoolStore {
    let stores = [BoolStore::Native, BoolStore::U8, BoolStore::U32];
    stores.into_iter().find(|store| B::supports_dtype(device, DType::Bool(*store))).unwrap_or(BoolStore::Native)
}
