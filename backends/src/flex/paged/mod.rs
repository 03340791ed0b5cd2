//! Keys and values in pages: new ones are written, and `softmax(q k^T / sqrt D) v` is computed over all that each query sees.
//!
//! A page holds up to `page_len` consecutive positions of a sequence. Of each page and head a slab has `page_len x D` elements:
//! keys as `[page_len / 16][D][16]`, sixteen keys in the lanes of a register, and values as `[page_len][D]`. Behind integers stands a
//! scale for each position, by which a score, or a weight, is multiplied: see [`PageElement`].
//!
//! The order of sums depends on a query's tokens alone. Of one page: a score is one chain of fused multiply-adds over D; `m` is
//! the largest score, `w = exp(score - m)`, `l` the sum of the weights, sixteen lanes after sixteen lanes and then by halves, and `o` one
//! chain over the positions from 0 on, `+ 0.0`. Pages are folded from the left, beginning with (-inf, 0, 0): `M = max(m1, m2)`,
//! `a = exp(m1 - M)`, `b = exp(m2 - M)`, `l = fma(l1, a, l2 b)`, `o = fma(o1, a, o2 b)` (Milakov and Gimelshein, *Online normalizer
//! calculation for softmax*, 2018, section 3.1). A query is divided by sqrt D first; in the end its sums are multiplied by `1 / l`. So it is the same whether a page is computed for one query or for many, of one row or of several
//! that share it, and by which thread.
//!
//! What a query does not see may be anything: what is made of it is thrown away before it is added to anything, and not multiplied by 0.

mod append;
mod block;
mod element;
mod page;
mod slab;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use pulp::Arch;
use rayon::prelude::*;

use super::attend::View;
use super::lanes::LANES;
use super::output::Output;
use crate::PagedRow;
use append::append_row;
use block::{Block, Partials, Scratch};
pub use element::PageElement;
use slab::Slab;

/// What is attended with, and what is new.
#[derive(Clone, Copy)]
pub struct Paged<'a> {
    /// `[1, H, M, D]`: the queries of each row after those of the row before.
    pub query: View<'a, f32>,
    /// `[1, H, N, D]`, of the new tokens of each row after those of the row before.
    pub new_keys: View<'a, f32>,
    /// `[1, H, N, D]`.
    pub new_values: View<'a, f32>,
    /// Whose the tokens are.
    pub rows: &'a [PagedRow],
    /// Positions of a page, a multiple of 16.
    pub page_len: usize,
    /// `[H, D]`.
    pub shape: [usize; 2],
}

/// A query.
#[derive(Clone, Copy)]
struct Query {
    /// Whose it is.
    row: usize,
    /// Where in its sequence it is: it sees as many positions, and its own.
    position: usize,
    /// Which of all queries it is.
    index: usize,
}

impl Query {
    /// Positions that it sees of its row's page `level`.
    fn visible(self, level: usize, page_len: usize) -> usize {
        (self.position + 1).saturating_sub(level * page_len).min(page_len)
    }
}

/// Rows whose first pages are the same, which are read once for all of them.
struct Group {
    rows: Vec<usize>,
    queries: Vec<Query>,
}

impl Group {
    /// Rows that have a page in common are in one group, next to each other if they have more in common.
    fn all(rows: &[PagedRow], page_len: usize) -> Vec<Self> {
        let firsts = firsts(rows, |row| row.query_len);
        let mut order: Vec<usize> = (0..rows.len()).filter(|&row| rows[row].new_len > 0).collect();
        order.sort_by(|&one, &other| rows[one].pages.cmp(&rows[other].pages));
        let mut groups: Vec<Self> = Vec::new();
        for index in order {
            let row = &rows[index];
            let queries = (0..row.query_len).map(|t| Query {
                row: index,
                position: row.seq_len() - row.query_len + t,
                index: firsts[index] + t,
            });
            let shares =
                |group: &&mut Self| row.context_len >= page_len && rows[group.rows[0]].pages[0] == row.pages[0];
            match groups.last_mut().filter(shares) {
                Some(group) => {
                    group.rows.push(index);
                    group.queries.extend(queries);
                }
                None => groups.push(Self { rows: vec![index], queries: queries.collect() }),
            }
        }
        groups
    }
}

/// Multiplications below which threads cost more than they bring.
const WORTH_THREADS: usize = 1 << 16;

/// Tasks a thread from which on it is left to chance which of them ends last.
const TASKS_PER_THREAD: usize = 2;

/// The keys at the first `len` positions of a row with these pages of a slab, `[P, H, page_len, D]`: `[len, H, D]`.
///
/// # Panics
///
/// If there are not so many pages.
pub fn read_keys<E: PageElement>(slab: &[E], pages: &[u32], len: usize, shape: [usize; 3]) -> Vec<E::Number> {
    let [_, _, head_dim] = shape;
    read(slab, pages, len, shape, |part, slot, out| {
        let group = &part[slot / LANES * LANES * head_dim..][..LANES * head_dim];
        out.extend(group.iter().skip(slot % LANES).step_by(LANES));
    })
}

/// The values there.
///
/// # Panics
///
/// As [`read_keys`].
pub fn read_values<E: PageElement>(slab: &[E], pages: &[u32], len: usize, shape: [usize; 3]) -> Vec<E::Number> {
    let [_, _, head_dim] = shape;
    read(slab, pages, len, shape, |part, slot, out| out.extend(&part[slot * head_dim..][..head_dim]))
}

/// What `elements` takes out of a head's part of a page for each position and head, as numbers.
fn read<E: PageElement>(
    slab: &[E],
    pages: &[u32],
    len: usize,
    [heads, page_len, head_dim]: [usize; 3],
    elements: impl Fn(&[E], usize, &mut Vec<E>),
) -> Vec<E::Number> {
    let part_len = E::part_len(page_len, head_dim);
    let (mut out, mut taken) = (Vec::with_capacity(len * heads * head_dim), Vec::with_capacity(head_dim));
    for position in 0..len {
        let (page, slot) = (pages[position / page_len] as usize, position % page_len);
        for head in 0..heads {
            let part = &slab[(page * heads + head) * part_len..][..part_len];
            taken.clear();
            elements(part, slot, &mut taken);
            let scale = E::scales(part, page_len).get(slot).copied().unwrap_or(1.0);
            out.extend(taken.iter().map(|x| x.number(scale)));
        }
    }
    out
}

/// Writes what is new to the slabs, `[P, H, page_len, D]` both, and attends; the result is `[M, H D]`.
///
/// # Panics
///
/// If a view or a slab does not hold what the rows and the shape say, or [`PagedRow::check`] does.
pub fn attend<E: PageElement>(arch: Arch, paged: Paged<'_>, keys: &mut [E], values: &mut [E], out: &mut [f32]) {
    let ([heads, head_dim], page_len) = (paged.shape, paged.page_len);
    assert!(page_len > 0 && page_len.is_multiple_of(LANES), "{page_len} positions are not whole registers");
    let of_head = E::part_len(page_len, head_dim);
    let of_page = heads * of_head;
    assert_eq!(keys.len(), values.len(), "elements of the keys and of the values");
    assert!(heads * head_dim > 0, "{heads} heads of {head_dim} numbers");
    if paged.rows.is_empty() {
        return;
    }
    let new: usize = paged.rows.iter().map(|row| row.new_len).sum();
    PagedRow::check(paged.rows, [new, out.len() / (heads * head_dim)], keys.len() / of_page, page_len);
    let (keys, values) = (Slab::new(keys, [heads, of_head]), Slab::new(values, [heads, of_head]));
    let out = Output::new(out, heads * head_dim);
    let groups = Group::all(paged.rows, page_len);
    let seen: usize = groups.iter().flat_map(|group| &group.queries).map(|query| query.position + 1).sum();
    let threads = if (seen + new) * heads * head_dim < WORTH_THREADS { 1 } else { rayon::current_num_threads() };
    let work = Work { arch, paged, keys, values, out, groups: &groups, firsts: firsts(paged.rows, |row| row.new_len) };
    match threads {
        1 => {
            let mut scratch = Scratch::default();
            (0..groups.len() * heads).for_each(|task| work.write_and_attend(&mut scratch, task));
        }
        threads if groups.len() * heads >= TASKS_PER_THREAD * threads => {
            (0..groups.len() * heads)
                .into_par_iter()
                .for_each_init(Scratch::default, |scratch, task| work.write_and_attend(scratch, task));
        }
        threads => work.split(threads),
    }
}

/// Which of all tokens, of which each row has so many, is each row's first.
fn firsts(rows: &[PagedRow], len: fn(&PagedRow) -> usize) -> Vec<usize> {
    let first = |next: &mut usize, row: &PagedRow| {
        *next += len(row);
        Some(*next - len(row))
    };
    rows.iter().scan(0, first).collect()
}

/// All that is to be done.
struct Work<'a, E> {
    arch: Arch,
    paged: Paged<'a>,
    keys: Slab<'a, E>,
    values: Slab<'a, E>,
    out: Output<'a>,
    groups: &'a [Group],
    firsts: Vec<usize>,
}

impl<E: PageElement> Work<'_, E> {
    /// A head of a group, by one thread: what is new is written, and then all of its queries attend.
    fn write_and_attend(&self, scratch: &mut Scratch, task: usize) {
        let [heads, _] = self.paged.shape;
        let (group, head) = (&self.groups[task / heads], task % heads);
        group.rows.iter().for_each(|&row| self.append(row, head));
        for queries in group.queries.chunks(block::QUERIES) {
            let levels = levels(queries, self.paged.page_len);
            self.arch.dispatch(self.block(queries, head, 0..levels, None, scratch));
        }
    }

    /// As tasks that are fewer than threads have to be split further: all is written first, and a block's pages are dealt to
    /// several threads, the last of which folds them.
    fn split(&self, threads: usize) {
        let [heads, head_dim] = self.paged.shape;
        let rows: Vec<usize> = self.groups.iter().flat_map(|group| group.rows.iter().copied()).collect();
        (0..rows.len() * heads).into_par_iter().for_each(|task| self.append(rows[task / heads], task % heads));

        let blocks: Vec<&[Query]> = self.groups.iter().flat_map(|group| group.queries.chunks(block::QUERIES)).collect();
        let wanted = (TASKS_PER_THREAD * threads).div_ceil((blocks.len() * heads).max(1));
        let parts = |queries: &[Query]| wanted.min(levels(queries, self.paged.page_len));
        // Of the blocks that are split, room for what each of their pages gives.
        let shared: Vec<Option<(Partials, AtomicUsize)>> = (0..blocks.len() * heads)
            .map(|task| {
                let queries = blocks[task / heads];
                let levels = levels(queries, self.paged.page_len);
                (parts(queries) > 1).then(|| (Partials::new(queries.len() * levels, head_dim), AtomicUsize::new(0)))
            })
            .collect();
        let tasks: Vec<(usize, Range<usize>)> = (0..blocks.len() * heads)
            .flat_map(|task| {
                let queries = blocks[task / heads];
                let (parts, levels) = (parts(queries).max(1), levels(queries, self.paged.page_len));
                (0..parts).map(move |part| (task, levels * part / parts..levels * (part + 1) / parts))
            })
            .collect();
        tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (task, range)| {
            let (queries, head) = (blocks[task / heads], task % heads);
            let levels = levels(queries, self.paged.page_len);
            let Some((partials, done)) = &shared[task] else {
                return self.arch.dispatch(self.block(queries, head, range, None, scratch));
            };
            let len = range.len();
            self.arch.dispatch(self.block(queries, head, range, Some(partials), scratch));
            // What other threads have written is seen by the one that counts last.
            if done.fetch_add(len, Ordering::AcqRel) + len == levels {
                self.arch.dispatch(block::Fold { queries, partials, head, paged: &self.paged, scratch, out: self.out });
            }
        });
    }

    fn block<'b>(
        &'b self,
        queries: &'b [Query],
        head: usize,
        levels: Range<usize>,
        partials: Option<&'b Partials>,
        scratch: &'b mut Scratch,
    ) -> Block<'b, E> {
        let (keys, values, out) = (self.keys, self.values, self.out);
        Block { paged: &self.paged, keys, values, queries, head, levels, partials, scratch, out }
    }

    #[allow(unsafe_code)] // pages of a slab that other threads have, too
    fn append(&self, row: usize, head: usize) {
        // SAFETY: the slabs are of two slices. No other row has a page that this one writes, as `PagedRow::check` has seen; each head
        // of each row is written by one task, and read by that task behind it, or when all of `split` are written.
        let append = || unsafe { append_row(&self.paged, [self.keys, self.values], row, head, self.firsts[row]) };
        self.arch.dispatch(append);
    }
}

/// Pages of which some query sees something.
fn levels(queries: &[Query], page_len: usize) -> usize {
    queries.iter().map(|query| query.position / page_len + 1).max().unwrap_or(0)
}
