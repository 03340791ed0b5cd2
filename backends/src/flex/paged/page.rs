//! A few queries over one page: the one kernel of attention.
#![allow(clippy::needless_range_loop)] // an index runs over several arrays at once

use pulp::Simd;

use crate::flex::element::{Element, lanes_at};
use crate::flex::lanes::{LANES, Wide, add, exp, load, max, mul, mul_add, select, splat, store, sub, sum};
use crate::flex::prefetch::prefetch_far;

/// Queries that a page is read for at a time: as many sums as there are registers for.
pub const MAX_QUERIES: usize = 6;

/// Where the keys and the values of the next page begin, and how many elements of each are needed.
#[derive(Clone, Copy)]
pub struct Next<E> {
    pub keys: *const E,
    pub values: *const E,
    pub len: usize,
}

impl<E> Next<E> {
    /// None is known.
    pub const NONE: Self = Self { keys: std::ptr::null(), values: std::ptr::null(), len: 0 };
}

/// `R` queries and a page of which each sees some of the first positions, at least one.
pub struct PageOfQueries<'a, E, const R: usize> {
    /// `[R, D]`, scaled.
    pub query: &'a [f32],
    /// `[page_len / 16, D, 16]`.
    pub keys: &'a [E],
    /// `[page_len, D]`.
    pub values: &'a [E],
    /// Of each position, by what scores and weights are multiplied; nothing, if by nothing.
    pub scales: [&'a [f32]; 2],
    /// Where the keys and the values are that are needed next, and how many elements of each.
    pub next: Next<E>,
    /// How many positions each sees.
    pub visible: [usize; R],
    /// `[page_len, D]`.
    pub shape: [usize; 2],
}

/// Largest score and sum of the weights of each query; the weighted sums of values go to `out`, `[R, D]`. `weights` has room for
/// `[R, page_len]`.
#[inline(always)]
pub fn attend<S: Simd, const V: usize, E: Element, const R: usize>(
    simd: S,
    page: PageOfQueries<'_, E, R>,
    weights: &mut [f32],
    out: &mut [f32],
) -> ([f32; R], [f32; R]) {
    let PageOfQueries { query, keys, values, scales: [key_scales, value_scales], next, visible, shape } = page;
    let [page_len, head_dim] = shape;
    let (mut min_visible, mut max_visible) = (visible[0], visible[0]);
    for i in 1..R {
        (min_visible, max_visible) = (min_visible.min(visible[i]), max_visible.max(visible[i]));
    }
    let groups = max_visible.div_ceil(LANES);
    let (weights, _) = weights.as_chunks_mut::<LANES>();
    let of_query = page_len / LANES;

    // Few sums at a time where there are few registers; that of a single query needs several, since one waits for itself.
    let is_wide = V == 1 || R == 1;
    let mut group = 0;
    while group < groups {
        let offset = group * LANES * head_dim;
        let (keys, weights) = (&keys[offset..], &mut weights[group..]);
        let ahead = (next.keys.wrapping_add(offset), next.len.saturating_sub(offset));
        macro_rules! score {
            ($groups:literal) => {{
                score::<S, V, E, R, $groups>(simd, query, keys, head_dim, ahead, weights, of_query);
                scale::<S, V, R>(simd, weights, of_query, $groups, key_scales.get(group * LANES..));
                group += $groups;
            }};
        }
        match groups - group {
            4.. if is_wide => score!(4),
            3 if is_wide => score!(3),
            2 if is_wide => score!(2),
            _ => score!(1),
        }
    }

    let next_values = (next.values, next.len);
    let (maxima, sums) = softmax::<S, V, R>(simd, weights, of_query, &visible, groups);

    scale::<S, V, R>(simd, weights, of_query, groups, Some(value_scales));

    let mut column = 0;
    while column < head_dim {
        let sizes = Sizes { column, head_dim, page_len, min_visible, max_visible };
        if is_wide && head_dim - column >= 4 * LANES {
            weigh::<S, V, E, R, 4, true>(simd, weights, values, next_values, &visible, sizes, out);
            column += 4 * LANES;
        } else if head_dim - column >= LANES {
            weigh::<S, V, E, R, 1, true>(simd, weights, values, next_values, &visible, sizes, out);
            column += LANES;
        } else {
            weigh::<S, V, E, R, 1, false>(simd, weights, values, next_values, &visible, sizes, out);
            column += LANES;
        }
    }
    (maxima, sums)
}

/// Asks for the line that begins with an element, if it is one of those that are there. Where there are as many queries as can be, a page is in a near
/// cache as a rule: those before them have read it.
#[inline(always)]
fn ask<E, const R: usize>((start, len): (*const E, usize), element: usize) {
    const LINE: usize = 64;
    if R < MAX_QUERIES && element < len && (element * size_of::<E>()).is_multiple_of(LINE) {
        prefetch_far(start.wrapping_add(element).cast());
    }
}

/// The scores of `C` groups of sixteen keys, `[C, D, 16]`.
#[inline(always)]
fn score<S: Simd, const V: usize, E: Element, const R: usize, const C: usize>(
    simd: S,
    query: &[f32],
    keys: &[E],
    head_dim: usize,
    ahead: (*const E, usize),
    scores: &mut [[f32; LANES]],
    of_query: usize,
) {
    let (keys, _) = keys[..C * head_dim * LANES].as_chunks::<LANES>();
    let mut of_group = [&keys[..head_dim]; C];
    for c in 1..C {
        of_group[c] = &keys[c * head_dim..][..head_dim];
    }
    let mut of_row = [&query[..head_dim]; R];
    for i in 1..R {
        of_row[i] = &query[i * head_dim..][..head_dim];
    }
    let mut totals = [[splat::<S, V>(simd, 0.0); C]; R];
    for d in 0..head_dim {
        let mut key = [splat::<S, V>(simd, 0.0); C];
        for c in 0..C {
            key[c] = load(simd, &E::widen_with::<S, LANES>(simd, &of_group[c][d]));
            ask::<E, R>(ahead, (c * head_dim + d) * LANES);
        }
        for i in 0..R {
            let query = splat::<S, V>(simd, of_row[i][d]);
            for c in 0..C {
                totals[i][c] = mul_add(simd, query, key[c], totals[i][c]);
            }
        }
    }
    for i in 0..R {
        for c in 0..C {
            store(simd, totals[i][c], &mut scores[i * of_query + c]);
        }
    }
}

/// Multiplies what `R` queries have of some groups by the scales of their positions, if there are some.
#[inline(always)]
fn scale<S: Simd, const V: usize, const R: usize>(
    simd: S,
    of_groups: &mut [[f32; LANES]],
    of_query: usize,
    groups: usize,
    scales: Option<&[f32]>,
) {
    let (scales, _) = scales.unwrap_or_default().as_chunks::<LANES>();
    for (group, scale) in scales.iter().take(groups).enumerate() {
        for i in 0..R {
            let x = &mut of_groups[i * of_query + group];
            store(simd, mul(simd, load::<S, V>(simd, x), load(simd, scale)), x);
        }
    }
}

/// Makes the scores of `groups` times 16 positions weights, of what a query does not see zeros; returns the largest score and the
/// sum of the weights of each query.
#[inline(always)]
fn softmax<S: Simd, const V: usize, const R: usize>(
    simd: S,
    scores: &mut [[f32; LANES]],
    of_query: usize,
    visible: &[usize; R],
    groups: usize,
) -> ([f32; R], [f32; R]) {
    let mut lanes = [0.0; LANES];
    for lane in 0..LANES {
        lanes[lane] = lane as f32;
    }
    let lanes = load::<S, V>(simd, &lanes);
    let mut min_visible = visible[0];
    for i in 1..R {
        min_visible = min_visible.min(visible[i]);
    }
    let seen_by_all = min_visible / LANES;

    let mut maxima = [splat::<S, V>(simd, f32::NEG_INFINITY); R];
    for group in 0..groups {
        for i in 0..R {
            let scores = &mut scores[i * of_query + group];
            let mut score = load(simd, scores);
            if group >= seen_by_all {
                score = first_lanes(simd, lanes, visible[i], group, score);
                store(simd, score, scores);
            }
            maxima[i] = max(simd, score, maxima[i]);
        }
    }
    let mut max_scores = [0.0; R];
    for i in 0..R {
        max_scores[i] = largest_of_halves(simd, maxima[i]);
    }
    let mut totals = [splat::<S, V>(simd, 0.0); R];
    for group in 0..groups {
        for i in 0..R {
            let scores = &mut scores[i * of_query + group];
            let weight = exp(simd, sub(simd, load(simd, scores), splat(simd, max_scores[i])));
            totals[i] = add(simd, totals[i], weight);
            store(simd, weight, scores);
        }
    }
    let mut sums = [0.0; R];
    for i in 0..R {
        sums[i] = sum(simd, totals[i]);
    }
    (max_scores, sums)
}

/// Of scores `x` of the positions of a group, those below `visible`; minus infinity instead of the rest.
#[inline(always)]
fn first_lanes<S: Simd, const V: usize>(
    simd: S,
    lanes: Wide<S, V>,
    visible: usize,
    group: usize,
    x: Wide<S, V>,
) -> Wide<S, V> {
    let end = splat::<S, V>(simd, visible.saturating_sub(group * LANES) as f32);
    select(simd, sub(simd, end, lanes), x, splat(simd, f32::NEG_INFINITY))
}

/// The largest of all lanes, NaN perhaps if there is one: halves are compared until one is left.
#[inline(always)]
fn largest_of_halves<S: Simd, const V: usize>(simd: S, x: Wide<S, V>) -> f32 {
    let mut a = [0.0; LANES];
    store(simd, x, &mut a);
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            a[lane] = if a[lane + half] > a[lane] { a[lane + half] } else { a[lane] };
        }
        half /= 2;
    }
    a[0]
}

/// Where [`weigh`] begins, and of how many.
#[derive(Clone, Copy)]
struct Sizes {
    /// The first of the columns.
    column: usize,
    head_dim: usize,
    page_len: usize,
    /// Positions that every query sees.
    min_visible: usize,
    /// Positions that some query sees.
    max_visible: usize,
}

/// Columns of the weighted sums of values, `C` times 16 from `column` on; or, of `C = 1`, those that are left of them.
#[inline(always)]
fn weigh<S: Simd, const V: usize, E: Element, const R: usize, const C: usize, const IS_WHOLE: bool>(
    simd: S,
    weights: &[[f32; LANES]],
    values: &[E],
    next_values: (*const E, usize),
    visible: &[usize; R],
    sizes: Sizes,
    out: &mut [f32],
) {
    let Sizes { column, head_dim, page_len, min_visible, max_visible } = sizes;
    let weights = weights.as_flattened();
    let mut totals = [[splat::<S, V>(simd, 0.0); C]; R];
    let mut of_row = [&weights[..min_visible]; R];
    for i in 1..R {
        of_row[i] = &weights[i * page_len..][..min_visible];
    }
    for (position, value) in values[..min_visible * head_dim].chunks_exact(head_dim).enumerate() {
        let value = columns::<S, V, E, C, IS_WHOLE>(simd, value, column);
        for c in 0..C {
            ask::<E, R>(next_values, position * head_dim + column + c * LANES);
        }
        for i in 0..R {
            let weight = splat::<S, V>(simd, of_row[i][position]);
            for c in 0..C {
                totals[i][c] = mul_add(simd, weight, value[c], totals[i][c]);
            }
        }
    }
    // What only some of the queries see: what it makes of the sums of the others is thrown away.
    for position in min_visible..max_visible {
        let value = columns::<S, V, E, C, IS_WHOLE>(simd, &values[position * head_dim..][..head_dim], column);
        for i in 0..R {
            let weight = splat::<S, V>(simd, weights[i * page_len + position]);
            let is_seen = splat::<S, V>(simd, if visible[i] > position { 1.0 } else { 0.0 });
            for c in 0..C {
                let total = mul_add(simd, weight, value[c], totals[i][c]);
                totals[i][c] = select(simd, is_seen, total, totals[i][c]);
            }
        }
    }
    let zero = splat::<S, V>(simd, 0.0);
    for i in 0..R {
        for c in 0..C {
            let from = column + c * LANES;
            let total = add(simd, totals[i][c], zero);
            match IS_WHOLE {
                true => write::<S, V>(simd, total, &mut out[i * head_dim + from..][..LANES]),
                false => write::<S, V>(simd, total, &mut out[i * head_dim..][from..head_dim]),
            }
        }
    }
}

/// `C` times 16 elements of a position from `column` on; zeros where there are no more, if not all are there.
#[inline(always)]
fn columns<S: Simd, const V: usize, E: Element, const C: usize, const IS_WHOLE: bool>(
    simd: S,
    value: &[E],
    column: usize,
) -> [Wide<S, V>; C] {
    let mut wide = [splat::<S, V>(simd, 0.0); C];
    if IS_WHOLE {
        let (value, _) = value[column..][..C * LANES].as_chunks::<LANES>();
        for c in 0..C {
            wide[c] = load(simd, &E::widen_with::<S, LANES>(simd, &value[c]));
        }
    } else {
        wide[0] = load(simd, &lanes_at(simd, value, column));
    }
    wide
}

#[inline(always)]
fn write<S: Simd, const V: usize>(simd: S, wide: Wide<S, V>, out: &mut [f32]) {
    match out.as_chunks_mut::<LANES>() {
        ([lanes], []) => store(simd, wide, lanes),
        _ => {
            let mut lanes = [0.0; LANES];
            store(simd, wide, &mut lanes);
            out.copy_from_slice(&lanes[..out.len()]);
        }
    }
}

/// `out = fma(out, a, new b)`.
#[inline(always)]
pub fn fold_row<S: Simd, const V: usize>(simd: S, out: &mut [f32], new: &[f32], a: f32, b: f32) {
    let ((out, out_rest), (new, new_rest)) = (out.as_chunks_mut::<LANES>(), new.as_chunks::<LANES>());
    let (wide_a, wide_b) = (splat::<S, V>(simd, a), splat::<S, V>(simd, b));
    for (out, new) in out.iter_mut().zip(new) {
        let scaled = mul(simd, load(simd, new), wide_b);
        store(simd, mul_add(simd, load(simd, out), wide_a, scaled), out);
    }
    for (out, new) in out_rest.iter_mut().zip(new_rest) {
        *out = out.mul_add(a, new * b);
    }
}
