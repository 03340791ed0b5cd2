//! One query of one head: sixteen columns at a time.
#![allow(clippy::needless_range_loop)] // an index runs over several arrays at once

use pulp::{Simd, WithSimd};

use super::{Attention, View};
use crate::flex::element::{Element, lanes_at};
use crate::flex::lanes::{LANES, add, exp, largest, load, max, mul, mul_add, splat, store, sub, sum, with_width};
use crate::flex::output::Output;

/// What a thread keeps from query to query.
#[derive(Default)]
pub struct One {
    /// The query, scaled, and filled up to whole lanes.
    query: Vec<f32>,
    /// A score, then a weight, for each key, filled up to whole lanes.
    scores: Vec<f32>,
}

/// One query of one head.
pub struct Query<'a, 's, E> {
    pub attention: &'a Attention<'a, E>,
    /// The row of the buffers that its keys are in.
    pub slot: usize,
    pub head: usize,
    /// Which of all new tokens it is.
    pub token: usize,
    /// How many keys it sees.
    pub visible: usize,
    pub scratch: &'s mut One,
    pub out: Output<'a>,
}

impl<E: Element> WithSimd for Query<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        with_width!(simd: S, E => one_query(self))
    }
}

#[allow(unsafe_code)]
#[inline(always)]
fn one_query<S: Simd, const V: usize, E: Element>(simd: S, task: Query<'_, '_, E>) {
    let Query { attention, slot, head, token, visible: count, scratch, out } = task;
    let [_, head_dim] = attention.shape;
    scale(attention.query.position(0, head, token, head_dim), &mut scratch.query);
    scratch.scores.clear();
    scratch.scores.resize(count.next_multiple_of(LANES), f32::NEG_INFINITY);

    let (query, _) = scratch.query.as_chunks::<LANES>();
    score::<S, V, E>(simd, query, &attention.keys, [slot, head, head_dim], &mut scratch.scores[..count]);
    let scale = 1.0 / softmax::<S, V>(simd, &mut scratch.scores, count);

    // SAFETY: no other task has this token and head.
    let out = unsafe { out.row_part(token, head * head_dim, head_dim) };
    let (values, weights) = (&attention.values, &scratch.scores[..count]);
    let mut column = 0;
    while head_dim - column >= 4 * LANES {
        let end = column + 4 * LANES;
        weigh::<S, V, E, 4>(simd, values, weights, [slot, head, column, head_dim], scale, &mut out[column..end]);
        column = end;
    }
    while column < head_dim {
        let end = (column + LANES).min(head_dim);
        weigh::<S, V, E, 1>(simd, values, weights, [slot, head, column, head_dim], scale, &mut out[column..end]);
        column = end;
    }
}

/// The query divided by the root of its width, and zeros up to whole lanes.
#[inline(always)]
fn scale(query: &[f32], out: &mut Vec<f32>) {
    let divisor = (query.len() as f32).sqrt();
    out.clear();
    out.resize(query.len().next_multiple_of(LANES), 0.0);
    for i in 0..query.len() {
        out[i] = query[i] / divisor;
    }
}

/// Scores of as many keys as there is room for.
#[inline(always)]
fn score<S: Simd, const V: usize, E: Element>(
    simd: S,
    query: &[[f32; LANES]],
    keys: &View<'_, E>,
    [slot, head, head_dim]: [usize; 3],
    scores: &mut [f32],
) {
    for position in 0..scores.len() {
        let key = keys.position(slot, head, position, head_dim);
        let mut total = splat::<S, V>(simd, 0.0);
        for chunk in 0..query.len() {
            let key = lanes_at(simd, key, chunk * LANES);
            total = mul_add(simd, load(simd, &query[chunk]), load(simd, &key), total);
        }
        scores[position] = sum(simd, total);
    }
}

/// Makes `count` scores, and the minus infinities behind them, weights that are yet to be divided by their sum, which it
/// returns.
#[inline(always)]
fn softmax<S: Simd, const V: usize>(simd: S, scores: &mut [f32], count: usize) -> f32 {
    let (chunks, _) = scores.as_chunks_mut::<LANES>();
    let mut max_score = splat::<S, V>(simd, f32::NEG_INFINITY);
    for chunk in chunks.iter() {
        max_score = max(simd, load(simd, chunk), max_score);
    }
    let max_score = splat::<S, V>(simd, largest(simd, max_score));
    let mut total = splat::<S, V>(simd, 0.0);
    for chunk in chunks.iter_mut() {
        let weights = exp(simd, sub(simd, load(simd, chunk), max_score));
        total = add(simd, total, weights);
        store(simd, weights, chunk);
    }
    debug_assert!(scores[count..].iter().all(|weight| *weight == 0.0 || weight.is_nan()));
    sum(simd, total)
}

/// `C` times 16 columns of the weighted sum of values, from `column` on; `out` may end before them.
#[inline(always)]
fn weigh<S: Simd, const V: usize, E: Element, const C: usize>(
    simd: S,
    values: &View<'_, E>,
    weights: &[f32],
    [slot, head, column, head_dim]: [usize; 4],
    scale: f32,
    out: &mut [f32],
) {
    let mut totals = [splat::<S, V>(simd, 0.0); C];
    for position in 0..weights.len() {
        let weight = splat::<S, V>(simd, weights[position]);
        let value = values.position(slot, head, position, head_dim);
        for chunk in 0..C {
            let value = lanes_at(simd, value, column + chunk * LANES);
            totals[chunk] = mul_add(simd, load(simd, &value), weight, totals[chunk]);
        }
    }
    for chunk in 0..C {
        let mut lanes = [0.0; LANES];
        store(simd, mul(simd, totals[chunk], splat(simd, scale)), &mut lanes);
        let (from, to) = (chunk * LANES, out.len().min((chunk + 1) * LANES));
        out[from..to].copy_from_slice(&lanes[..to - from]);
    }
}
