//! `softmax(q k^T / sqrt D) v` over the keys that each query sees, in place in the cache.
//!
//! A query's result is made of its own keys and no others: what is computed with keys that it does not see is thrown away
//! before it is added to anything. Sums have an order that depends on the number of
//! keys alone: 16 partial sums over the width of a head for a score, 16 over the keys for the softmax's denominator, and
//! one chain over the keys for each element of the result.

mod many;
mod one;

use std::cmp::Reverse;

use pulp::Arch;
use rayon::prelude::*;

use super::element::Element;
use super::lanes::LANES;
use super::output::Output;
use crate::PackedRow;
use crate::metadata::firsts;
use many::{Many, Queries};
use one::{One, Query};

/// A `[B, H, N, D]` tensor whose last dimension is contiguous.
#[derive(Clone, Copy)]
pub struct View<'a, E> {
    /// The whole buffer.
    pub elements: &'a [E],
    /// Where element `[0, 0, 0, 0]` is.
    pub start: usize,
    /// Elements from one row, head and position to the next.
    pub strides: [usize; 3],
}

impl<'a, E> View<'a, E> {
    /// One position of one head.
    pub fn position(&self, row: usize, head: usize, position: usize, head_dim: usize) -> &'a [E] {
        let [of_row, of_head, of_position] = self.strides;
        &self.elements[self.start + row * of_row + head * of_head + position * of_position..][..head_dim]
    }
}

/// What is attended with, and over.
#[derive(Clone, Copy)]
pub struct Attention<'a, E> {
    /// `[1, H, N, D]`: the new tokens of each row after those of the row before.
    pub query: View<'a, f32>,
    /// `[S, H, C, D]`.
    pub keys: View<'a, E>,
    /// `[S, H, C, D]`.
    pub values: View<'a, E>,
    /// Whose the tokens are; query t of a row sees the first `context_len + t + 1` positions of its slot.
    pub rows: &'a [PackedRow],
    /// `[H, D]`.
    pub shape: [usize; 2],
}

/// Consecutive queries of one row.
struct Block {
    slot: usize,
    /// The first of them among all new tokens.
    token: usize,
    count: usize,
    /// Keys that the first of them sees; each further one sees one more.
    visible: usize,
}

impl Block {
    /// Those of all rows, the ones that see most keys first: threads end together if what is left last is short.
    fn all(rows: &[PackedRow]) -> Vec<Self> {
        let of_row = |(row, first): (&PackedRow, usize)| {
            let PackedRow { slot, context_len, query_len } = *row;
            (0..query_len).step_by(QUERY_BLOCK).map(move |t| Self {
                slot,
                token: first + t,
                count: QUERY_BLOCK.min(query_len - t),
                visible: context_len + t + 1,
            })
        };
        let mut blocks: Vec<Self> = rows.iter().zip(firsts(rows)).flat_map(of_row).collect();
        blocks.sort_by_key(|block| Reverse(block.visible));
        blocks
    }
}

/// Multiplications below which threads cost more than they bring.
const WORTH_THREADS: usize = 1 << 16;

/// Queries of a head that are one thread's work.
const QUERY_BLOCK: usize = LANES;

/// Queries of a head from which on they are computed together.
const WORTH_TOGETHER: usize = 4;

/// Attends; the result is `[N, H D]`.
///
/// # Panics
///
/// If a view does not hold what the rows and the shape say.
pub fn attend<E: Element>(arch: Arch, attention: Attention<'_, E>, out: &mut [f32]) {
    let [heads, head_dim] = attention.shape;
    let width = heads * head_dim;
    let tokens: usize = attention.rows.iter().map(|row| row.query_len).sum();
    assert_eq!(out.len(), tokens * width, "elements of the result");
    if out.is_empty() {
        return;
    }
    let blocks = Block::all(attention.rows);
    let out = Output::new(out, width);
    let work = |scratch: &mut Scratch, task: usize| {
        let (Block { slot, token, count, visible }, head) = (&blocks[task / heads], task % heads);
        if *count >= WORTH_TOGETHER {
            return arch.dispatch(Queries {
                attention: &attention,
                slot: *slot,
                head,
                token: *token,
                count: *count,
                visible: *visible,
                scratch: &mut scratch.many,
                out,
            });
        }
        for t in 0..*count {
            arch.dispatch(Query {
                attention: &attention,
                slot: *slot,
                head,
                token: token + t,
                visible: visible + t,
                scratch: &mut scratch.one,
                out,
            });
        }
    };
    let tasks = blocks.len() * heads;
    if blocks.iter().map(|block| block.count * block.visible).sum::<usize>() * width < WORTH_THREADS {
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
