//! Up to sixteen consecutive queries of one head at a time, a query a lane: keys and values are read once for all of them.
//!
//! Each sum has the order that it has in [`one`](super::one), so that a query has the same bits alone and in company.
#![allow(clippy::needless_range_loop)] // an index runs over several arrays at once

use pulp::{Simd, WithSimd};

use super::{Attention, View};
use crate::flex::element::{Element, lanes_at};
use crate::flex::lanes::{LANES, Wide, add, div, exp, load, max, mul, mul_add, splat, store, sub, with_width};
use crate::flex::output::Output;

/// Keys whose scores are computed at a time.
const KEYS: usize = 2;

/// Queries that values are added up for at a time.
const QUERIES: usize = 4;

/// What a thread keeps from task to task.
#[derive(Default)]
pub struct Many {
    /// `[columns / 16, 16, 16]`: a column of each query, scaled; zeros up to whole chunks of columns.
    queries: Vec<[[f32; LANES]; LANES]>,
    /// `[columns / 16, KEYS, 16]`: keys in f32, filled up likewise.
    keys: Vec<[[f32; LANES]; KEYS]>,
    /// `[keys, 16]`: of each query a score, then a weight, for each key.
    scores: Vec<[f32; LANES]>,
}

/// Consecutive queries of one row, of one head.
pub struct Queries<'a, 's, E> {
    pub attention: &'a Attention<'a, E>,
    /// The row of the buffers that their keys are in.
    pub slot: usize,
    pub head: usize,
    /// Which of all new tokens the first of them is.
    pub token: usize,
    pub count: usize,
    /// How many keys the first of them sees; each further one sees one more.
    pub visible: usize,
    pub scratch: &'s mut Many,
    pub out: Output<'a>,
}

impl<E: Element> WithSimd for Queries<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        with_width!(simd: S, E => many_queries(self))
    }
}

#[inline(always)]
fn many_queries<S: Simd, const V: usize, E: Element>(simd: S, task: Queries<'_, '_, E>) {
    let Queries { attention, slot, head, token, count, visible, scratch, out } = task;
    let [_, head_dim] = attention.shape;
    let Many { queries, keys, scores } = scratch;
    transpose(attention, [head, token, count], queries);

    scores.clear();
    let index = [slot, head, head_dim, visible + count - 1];
    score::<S, V, E>(simd, queries, keys, &attention.keys, index, scores);
    for lane in 0..count {
        for scores in &mut scores[visible + lane..] {
            scores[lane] = f32::NEG_INFINITY;
        }
    }
    let mut scales = [0.0; LANES];
    store(simd, softmax::<S, V>(simd, scores), &mut scales);

    let mut lane = 0;
    while lane < count {
        let at = At { slot, head, lane, token: token + lane, visible: visible + lane };
        let together = if count - lane >= QUERIES { QUERIES } else { 1 };
        let mut column = 0;
        while column < head_dim {
            // With AVX-512 there are registers for four times 16 columns of four queries.
            let wide = V == 1 && head_dim - column >= 4 * LANES;
            let end = if wide { column + 4 * LANES } else { (column + LANES).min(head_dim) };
            match (together == QUERIES, wide) {
                (true, true) => weigh::<S, V, E, QUERIES, 4>(simd, attention, scores, &scales, at, column..end, out),
                (true, false) => weigh::<S, V, E, QUERIES, 1>(simd, attention, scores, &scales, at, column..end, out),
                (false, true) => weigh::<S, V, E, 1, 4>(simd, attention, scores, &scales, at, column..end, out),
                (false, false) => weigh::<S, V, E, 1, 1>(simd, attention, scores, &scales, at, column..end, out),
            }
            column = end;
        }
        lane += together;
    }
}

/// The queries divided by the root of their width, a query a lane.
#[inline(always)]
fn transpose<E: Element>(
    attention: &Attention<'_, E>,
    [head, token, count]: [usize; 3],
    out: &mut Vec<[[f32; LANES]; LANES]>,
) {
    let [_, head_dim] = attention.shape;
    let divisor = (head_dim as f32).sqrt();
    out.clear();
    out.resize(head_dim.div_ceil(LANES), [[0.0; LANES]; LANES]);
    let out = out.as_flattened_mut();
    for lane in 0..count {
        let query = attention.query.position(0, head, token + lane, head_dim);
        for column in 0..head_dim {
            out[column][lane] = query[column] / divisor;
        }
    }
}

/// The scores of keys `0..count`.
#[inline(always)]
fn score<S: Simd, const V: usize, E: Element>(
    simd: S,
    queries: &[[[f32; LANES]; LANES]],
    wide: &mut Vec<[[f32; LANES]; KEYS]>,
    keys: &View<'_, E>,
    [slot, head, head_dim, count]: [usize; 4],
    scores: &mut Vec<[f32; LANES]>,
) {
    wide.clear();
    wide.resize(queries.len(), [[0.0; LANES]; KEYS]);
    for first in (0..count).step_by(KEYS) {
        let together = KEYS.min(count - first);
        for key in 0..together {
            let elements = keys.position(slot, head, first + key, head_dim);
            let (chunks, rest) = elements.as_chunks::<LANES>();
            for (wide, chunk) in wide.iter_mut().zip(chunks) {
                wide[key] = E::widen_with(simd, chunk);
            }
            if !rest.is_empty() {
                wide[chunks.len()][key] = lanes_at(simd, elements, chunks.len() * LANES);
            }
        }
        let found = products::<S, V>(simd, queries, wide);
        scores.extend_from_slice(&found[..together]);
    }
}

/// Products of each query with each key: as for one query, 16 partial sums, of which halves are added until one is left.
#[inline(always)]
fn products<S: Simd, const V: usize>(
    simd: S,
    queries: &[[[f32; LANES]; LANES]],
    keys: &[[[f32; LANES]; KEYS]],
) -> [[f32; LANES]; KEYS] {
    let mut sums = [[splat::<S, V>(simd, 0.0); LANES / 2]; KEYS];
    // With AVX-512 there are registers for the sums of eight lanes and two keys, else for those of two lanes.
    if V == 1 {
        halves::<S, V, 4>(simd, queries, keys, 0, &mut sums);
        halves::<S, V, 4>(simd, queries, keys, 4, &mut sums);
    } else {
        for lane in 0..LANES / 2 {
            halves::<S, V, 1>(simd, queries, keys, lane, &mut sums);
        }
    }
    let mut out = [[0.0; LANES]; KEYS];
    for key in 0..KEYS {
        let mut half = LANES / 4;
        while half > 0 {
            for lane in 0..half {
                sums[key][lane] = add(simd, sums[key][lane], sums[key][lane + half]);
            }
            half /= 2;
        }
        store(simd, sums[key][0], &mut out[key]);
    }
    out
}

/// Partial sums of `L` lanes from `first` on, each added to the one eight lanes further.
#[inline(always)]
fn halves<S: Simd, const V: usize, const L: usize>(
    simd: S,
    queries: &[[[f32; LANES]; LANES]],
    keys: &[[[f32; LANES]; KEYS]],
    first: usize,
    sums: &mut [[Wide<S, V>; LANES / 2]; KEYS],
) {
    let mut totals = [[[splat::<S, V>(simd, 0.0); 2]; L]; KEYS];
    for (queries, keys) in queries.iter().zip(keys) {
        for i in 0..L {
            for half in 0..2 {
                let lane = first + i + half * (LANES / 2);
                let query = load::<S, V>(simd, &queries[lane]);
                for key in 0..KEYS {
                    totals[key][i][half] = mul_add(simd, query, splat(simd, keys[key][lane]), totals[key][i][half]);
                }
            }
        }
    }
    for key in 0..KEYS {
        for i in 0..L {
            let [low, high] = totals[key][i];
            sums[key][first + i] = add(simd, low, high);
        }
    }
}

/// Makes scores weights that are yet to be multiplied by what it returns, one over their sum.
#[inline(always)]
fn softmax<S: Simd, const V: usize>(simd: S, scores: &mut [[f32; LANES]]) -> Wide<S, V> {
    let mut max_score = splat::<S, V>(simd, f32::NEG_INFINITY);
    for scores in scores.iter() {
        max_score = max(simd, load(simd, scores), max_score);
    }
    // As for one query: 16 partial sums over the keys.
    let mut partial = [[0.0; LANES]; LANES];
    for chunk in scores.chunks_mut(LANES) {
        for (scores, partial) in chunk.iter_mut().zip(&mut partial) {
            let weights = exp::<S, V>(simd, sub(simd, load(simd, scores), max_score));
            store(simd, weights, scores);
            store(simd, add(simd, load(simd, partial), weights), partial);
        }
    }
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            let sum = add::<S, V>(simd, load(simd, &partial[lane]), load(simd, &partial[lane + half]));
            store(simd, sum, &mut partial[lane]);
        }
        half /= 2;
    }
    div(simd, splat(simd, 1.0), load(simd, &partial[0]))
}

/// Which queries' values are added up, and where the results go.
#[derive(Clone, Copy)]
struct At {
    slot: usize,
    head: usize,
    /// Lane of the first of the queries.
    lane: usize,
    /// Row of the result that belongs to it.
    token: usize,
    /// Keys that it sees.
    visible: usize,
}

/// The weighted sums of `C` times 16 columns of the values for `Q` queries; `columns` may end before them.
#[allow(unsafe_code)]
#[inline(always)]
fn weigh<S: Simd, const V: usize, E: Element, const Q: usize, const C: usize>(
    simd: S,
    attention: &Attention<'_, E>,
    weights: &[[f32; LANES]],
    scales: &[f32; LANES],
    at: At,
    columns: std::ops::Range<usize>,
    out: Output<'_>,
) {
    let [_, head_dim] = attention.shape;
    let mut totals = [[splat::<S, V>(simd, 0.0); C]; Q];
    // Keys that all queries see, and then, query by query, those that only later ones do.
    let of_all = at.visible;
    let index = [at.slot, at.head, head_dim, columns.start];
    let values = &attention.values;
    totals = add_values::<S, V, E, Q, C>(simd, values, &weights[..of_all], at.lane, index, totals);
    for query in 1..Q {
        for position in of_all..of_all + query {
            let value = columns_at::<S, V, E, C>(simd, values, position, index);
            let weight = splat(simd, weights[position][at.lane + query]);
            for chunk in 0..C {
                totals[query][chunk] = mul_add(simd, value[chunk], weight, totals[query][chunk]);
            }
        }
    }
    for query in 0..Q {
        let lane = at.lane + query;
        let (column, width) = (at.head * head_dim + columns.start, columns.len());
        // SAFETY: no other task has this token and head.
        let out = unsafe { out.row_part(at.token + query, column, width) };
        for chunk in 0..C {
            let mut lanes = [0.0; LANES];
            store(simd, mul(simd, totals[query][chunk], splat(simd, scales[lane])), &mut lanes);
            let (from, to) = (chunk * LANES, width.min((chunk + 1) * LANES));
            out[from..to].copy_from_slice(&lanes[..to - from]);
        }
    }
}

/// Adds the weighted values of the first positions.
#[inline(always)]
fn add_values<S: Simd, const V: usize, E: Element, const Q: usize, const C: usize>(
    simd: S,
    values: &View<'_, E>,
    weights: &[[f32; LANES]],
    lane: usize,
    index: [usize; 4],
    mut totals: [[Wide<S, V>; C]; Q],
) -> [[Wide<S, V>; C]; Q] {
    for position in 0..weights.len() {
        let value = columns_at::<S, V, E, C>(simd, values, position, index);
        let weights = &weights[position][lane..lane + Q];
        for query in 0..Q {
            let weight = splat(simd, weights[query]);
            for chunk in 0..C {
                totals[query][chunk] = mul_add(simd, value[chunk], weight, totals[query][chunk]);
            }
        }
    }
    totals
}

/// `C` times 16 columns of a value.
#[inline(always)]
fn columns_at<S: Simd, const V: usize, E: Element, const C: usize>(
    simd: S,
    values: &View<'_, E>,
    position: usize,
    [slot, head, head_dim, start]: [usize; 4],
) -> [Wide<S, V>; C] {
    let value = values.position(slot, head, position, head_dim);
    let mut columns = [splat::<S, V>(simd, 0.0); C];
    if C == 1 {
        // There may be fewer than 16.
        columns[0] = load(simd, &lanes_at(simd, value, start));
        return columns;
    }
    let value = value[start..start + C * LANES].as_chunks::<LANES>().0;
    for chunk in 0..C {
        columns[chunk] = load(simd, &E::widen_with(simd, &value[chunk]));
    }
    columns
}
