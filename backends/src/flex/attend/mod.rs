//! `softmax(q k^T / sqrt D) v` over the keys that each query sees, in place in the cache.
//!
//! A query's result is made of its own keys and no others: what is computed with keys that it does not see is thrown away
//! before it is added to anything. Sums have an order that depends on the number of
//! keys alone: 16 partial sums over the width of a head for a score, 16 over the keys for the softmax's denominator, and
//! one chain over the keys for each element of the result.

mod many;
mod one;

use pulp::Arch;
use rayon::prelude::*;

use super::element::Element;
use super::lanes::LANES;
use super::output::Output;
use many::{Many, Queries};
use one::{One, Query};

/// A `[B, H, N, D]` tensor whose last dimension is contiguous.
#[derive(Clone, Copy)]
pub struct View<'a, E> {
    /// The whole buffer.
    pub elements: &'a [E],
    /// Where element `[0, 0, 0, 0]` is.
    pub start: usize,
    /// Elements from one row, head and position to the next; a row's is 0 where one row stands for all.
    pub strides: [usize; 3],
}

impl<'a, E> View<'a, E> {
    /// One position of one head.
    pub fn position(&self, row: usize, head: usize, position: usize, head_dim: usize) -> &'a [E] {
        let [of_row, of_head, of_position] = self.strides;
        &self.elements[self.start + row * of_row + head * of_head + position * of_position..][..head_dim]
    }
}

/// Consecutive keys and values.
#[derive(Clone, Copy)]
pub struct Segment<'a, E> {
    /// `[B, H, N, D]`.
    pub keys: View<'a, E>,
    /// `[B, H, N, D]`.
    pub values: View<'a, E>,
}

/// What is attended with, and over.
#[derive(Clone, Copy)]
pub struct Attention<'a, E> {
    /// `[B, H, T, D]`.
    pub query: View<'a, f32>,
    /// Keys that every query sees, and how many there are.
    pub shared: Option<(Segment<'a, E>, usize)>,
    /// Keys of which query t of row b sees the first `past[b] + t + 1`.
    pub own: Segment<'a, E>,
    /// Own keys of each row before those of the queries.
    pub past: &'a [usize],
    /// Own keys that there are; a query behind the end of a shorter row sees no more than that.
    pub keys: usize,
    /// `[B, H, T, D]`.
    pub shape: [usize; 4],
}

/// Multiplications below which threads cost more than they bring.
const WORTH_THREADS: usize = 1 << 16;

/// Queries of a head that are one thread's work.
const QUERY_BLOCK: usize = LANES;

/// Queries of a head from which on they are computed together.
const WORTH_TOGETHER: usize = 4;

/// Attends; the result is `[B, T, H D]`.
///
/// # Panics
///
/// If a view does not hold what the shape says.
pub fn attend<E: Element>(arch: Arch, attention: Attention<'_, E>, out: &mut [f32]) {
    let [batch, heads, time, head_dim] = attention.shape;
    assert_eq!(out.len(), batch * heads * time * head_dim, "elements of the result");
    if out.is_empty() {
        return;
    }
    let blocks = time.div_ceil(QUERY_BLOCK);
    let width = heads * head_dim;
    let out = Output::new(out, width);
    let work = |scratch: &mut Scratch, task: usize| {
        // Long queries first: in a prefill the last ones see the most keys.
        let (block, row, head) = (blocks - 1 - task / (batch * heads), task / heads % batch, task % heads);
        let (first, count) = (block * QUERY_BLOCK, QUERY_BLOCK.min(time - block * QUERY_BLOCK));
        if count >= WORTH_TOGETHER {
            return arch.dispatch(Queries {
                attention: &attention,
                row,
                head,
                first,
                count,
                scratch: &mut scratch.many,
                out,
            });
        }
        for t in first..first + count {
            arch.dispatch(Query { attention: &attention, row, head, t, scratch: &mut scratch.one, out });
        }
    };
    let tasks = blocks * batch * heads;
    let shared = attention.shared.map_or(0, |(_, count)| count);
    if tasks * QUERY_BLOCK.min(time) * (attention.keys + shared) * head_dim < WORTH_THREADS {
        let mut scratch = Scratch::default();
        return (0..tasks).for_each(|task| work(&mut scratch, task));
    }
    (0..tasks).into_par_iter().for_each_init(Scratch::default, work);
}

/// What a thread keeps from task to task.
#[derive(Default)]
struct Scratch {
    one: One,
    many: Many,
}

impl<E> Attention<'_, E> {
    /// Own keys that query `t` of a row sees.
    fn visible(&self, row: usize, t: usize) -> usize {
        self.past[row].saturating_add(t + 1).min(self.keys)
    }
}
