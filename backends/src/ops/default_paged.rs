//! Attention over pages as a composition of burn's operations.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{IntDType, Shape, Slice, TensorData};

use super::default::{bool_store, cast, rounded};
use crate::PagedRow;

/// See [`Gpt2Ops::attend_pages`](super::Gpt2Ops::attend_pages). Pages are `[P, H, L, D]` as they lie in memory.
pub fn attend<B: Backend>(
    query: FloatTensor<B>,
    new: [FloatTensor<B>; 2],
    pages: [FloatTensor<B>; 2],
    rows: &[PagedRow],
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let [_, heads, head_dim] = query.shape().dims();
    let [new_keys, new_values] = new;
    let [keys, values] = pages;
    let (keys, values) = (append::<B>(keys, new_keys, rows), append::<B>(values, new_values, rows));
    let mut first = 0;
    let mut parts = Vec::new();
    for row in rows.iter().filter(|row| row.query_len > 0) {
        let range = [first..first + row.query_len, 0..heads, 0..head_dim].map(Slice::from);
        first += row.query_len;
        parts.push(attend_row::<B>(B::float_slice(query.clone(), &range), &keys, &values, row));
    }
    let out = match parts.len() {
        0 => B::float_zeros(Shape::new([0, heads * head_dim]), &query.device(), query.dtype().into()),
        1 => parts.remove(0),
        _ => B::float_cat(parts, 0),
    };
    (out, keys, values)
}

/// See [`Gpt2Ops::copy_pages`](super::Gpt2Ops::copy_pages).
pub fn copy<B: Backend>(pages: FloatTensor<B>, copies: &[[u32; 2]]) -> FloatTensor<B> {
    let [_, heads, page_len, head_dim] = pages.shape().dims::<4>();
    let page = |page: u32| [page as usize..page as usize + 1, 0..heads, 0..page_len, 0..head_dim].map(Slice::from);
    copies.iter().fold(pages, |pages, [from, to]| {
        // In memory of its own: a view would be a second reference, for which the assignment copied all pages.
        let own = B::float_empty(Shape::new([1, heads, page_len, head_dim]), &pages.device(), pages.dtype().into());
        let part = B::float_slice_assign(own, &page(0), B::float_slice(pages.clone(), &page(*from)));
        B::float_slice_assign(pages, &page(*to), part)
    })
}

/// See [`Gpt2Ops::read_pages`](super::Gpt2Ops::read_pages).
pub fn read<B: Backend>(pages: FloatTensor<B>, of_row: &[u32], len: usize) -> FloatTensor<B> {
    let [_, heads, page_len, head_dim] = pages.shape().dims::<4>();
    let count = len.div_ceil(page_len);
    let ids: Vec<i32> = of_row[..count].iter().map(|page| *page as i32).collect();
    let ids = B::int_from_data(TensorData::new(ids, [count]), &pages.device());
    let states = B::float_swap_dims(B::float_select(pages, 0, ids), 1, 2); // [n, L, H, D]
    let states = B::float_reshape(states, Shape::new([count * page_len, heads, head_dim]));
    B::float_slice(states, &[0..len, 0..heads, 0..head_dim].map(Slice::from))
}

/// Writes the new keys or values of each row to its pages.
pub fn append<B: Backend>(pages: FloatTensor<B>, new: FloatTensor<B>, rows: &[PagedRow]) -> FloatTensor<B> {
    let [_, heads, page_len, head_dim] = pages.shape().dims::<4>();
    let new = rounded::<B>(new, pages.dtype());
    let mut first = 0;
    rows.iter().fold(pages, |mut pages, row| {
        let mut position = row.context_len;
        while position < row.seq_len() {
            let (page, slot) = (row.pages[position / page_len] as usize, position % page_len);
            let count = (page_len - slot).min(row.seq_len() - position);
            let part = B::float_slice(new.clone(), &[first..first + count, 0..heads, 0..head_dim].map(Slice::from));
            let part = B::float_reshape(B::float_swap_dims(part, 0, 1), Shape::new([1, heads, count, head_dim]));
            let to = [page..page + 1, 0..heads, slot..slot + count, 0..head_dim].map(Slice::from);
            pages = B::float_slice_assign(pages, &to, part);
            (first, position) = (first + count, position + count);
        }
        pages
    })
}

/// A row's queries, `[T, H, D]`, over its pages: `[T, H D]`.
fn attend_row<B: Backend>(
    query: FloatTensor<B>,
    keys: &FloatTensor<B>,
    values: &FloatTensor<B>,
    row: &PagedRow,
) -> FloatTensor<B> {
    let ([time, heads, head_dim], dtype, device) = (query.shape().dims(), query.dtype(), query.device());
    let [_, _, page_len, _] = keys.shape().dims::<4>();
    let count = row.seq_len().div_ceil(page_len);
    let store = bool_store::<B>(&device);
    let ids: Vec<i32> = row.pages[..count].iter().map(|page| *page as i32).collect();
    let ids = B::int_from_data(TensorData::new(ids, [count]), &device);
    let of_row = |pages: &FloatTensor<B>| cast::<B>(B::float_select(pages.clone(), 0, ids.clone()), dtype); // [n, H, L, D]

    let query = B::float_div_scalar(query, (head_dim as f64).sqrt().into());
    let query = B::float_reshape(B::float_swap_dims(query, 0, 1), Shape::new([1, heads, time, head_dim]));
    let query = B::float_expand(query, Shape::new([count, heads, time, head_dim]));
    let scores = B::float_matmul(query, B::float_swap_dims(of_row(keys), 2, 3)); // [n, H, T, L]

    // [n, 1, 1, L] and [1, 1, T, 1]: where a slot is, and up to where a query sees.
    let shape = Shape::new([count, heads, time, page_len]);
    let ints = |from: usize, len: usize, dims: [usize; 4]| {
        let ramp = B::int_arange(from as i64..(from + len) as i64, &device, IntDType::I32);
        B::int_reshape(ramp, Shape::new(dims))
    };
    let position = ints(0, count * page_len, [count, 1, 1, page_len]);
    let last = ints(row.seq_len() - time, time, [1, 1, time, 1]);
    let unseen = B::int_greater(B::int_expand(position, shape.clone()), B::int_expand(last, shape.clone()), store);
    let scores = B::float_mask_fill(scores, unseen.clone(), f64::NEG_INFINITY.into());
    let max = B::float_max_dim(scores.clone(), 3); // [n, H, T, 1]
    let weights = B::float_exp(B::float_sub(scores, max.clone()));
    let weights = B::float_mask_fill(weights, unseen.clone(), 0.0.into());
    let sum = B::float_sum_dim(weights.clone(), 3); // [n, H, T, 1]
    // What a query does not see may be no number, and times a weight of zero would be none: such values are left out of the sums,
    // and what sees one is told.
    let values = of_row(values); // [n, H, L, D]
    let is_bad = B::bool_or(B::float_is_nan(values.clone(), store), B::float_is_inf(values.clone(), store));
    let bad = B::float_zeros(values.shape(), &device, dtype.into());
    let bad = B::float_mask_fill(bad, is_bad.clone(), 1.0.into());
    let seen = B::float_mask_fill(B::float_ones(shape, &device, dtype.into()), unseen, 0.0.into());
    let sees_bad = B::float_greater_elem(B::float_matmul(seen, bad), 0.0.into(), store);
    let of_pages = B::float_matmul(weights, B::float_mask_fill(values, is_bad, 0.0.into())); // [n, H, T, D]
    let of_pages = B::float_mask_fill(of_pages, sees_bad, f64::NAN.into());

    let page = |tensor: &FloatTensor<B>, index: usize| {
        let [_, _, _, width] = tensor.shape().dims::<4>();
        B::float_slice(tensor.clone(), &[index..index + 1, 0..heads, 0..time, 0..width].map(Slice::from))
    };
    let (mut m, mut l, mut o) = (page(&max, 0), page(&sum, 0), page(&of_pages, 0));
    for index in 1..count {
        let (m2, l2, o2) = (page(&max, index), page(&sum, index), page(&of_pages, index));
        let largest = larger::<B>(m.clone(), m2.clone());
        let (a, b) = (B::float_sub(m, largest.clone()), B::float_sub(m2, largest.clone()));
        let (a, b) = (B::float_exp(a), B::float_exp(b));
        l = B::float_add(B::float_mul(l, a.clone()), B::float_mul(l2, b.clone()));
        o = B::float_add(B::float_mul(o, a), B::float_mul(o2, b));
        m = largest;
    }
    let out = B::float_reshape(B::float_div(o, l), Shape::new([heads, time, head_dim]));
    B::float_reshape(B::float_swap_dims(out, 0, 1), Shape::new([time, heads * head_dim]))
}

fn larger<B: Backend>(one: FloatTensor<B>, other: FloatTensor<B>) -> FloatTensor<B> {
    let is_smaller = B::float_lower(one.clone(), other.clone(), bool_store::<B>(&one.device()));
    B::float_mask_where(one, is_smaller, other)
}
