//! Some queries over all pages that they see, a page after the other.
#![allow(unsafe_code)] // pages and results that other threads have, too

use std::cell::UnsafeCell;
use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::page::{self, MAX_QUERIES, Next, PageOfQueries};
use super::{PageElement, Paged, Query, Slab};
use crate::flex::element::Element;
use crate::flex::lanes::{LANES, exp, load, store, with_width};
use crate::flex::output::Output;

/// Queries whose results lie in the nearest cache while pages pass by.
pub const QUERIES: usize = 48;

/// What a thread keeps from task to task.
#[derive(Default)]
pub struct Scratch {
    /// `[queries, D]`, scaled.
    queries: Vec<f32>,
    /// What is folded of each query.
    max: Vec<f32>,
    sum: Vec<f32>,
    /// `[queries, D]`.
    out: Vec<f32>,
    /// `[MAX_QUERIES, page_len]`: scores, then weights.
    weights: Vec<f32>,
    /// `[MAX_QUERIES, D]`: what a page gives.
    of_page: Vec<f32>,
    /// A head's keys and values of a page in f32, where they are of another type and read several times.
    wide: Vec<f32>,
}

/// What pages give that are computed by several threads: a maximum, a sum, and D numbers for each query and page.
pub struct Partials {
    head_dim: usize,
    values: Box<[UnsafeCell<f32>]>,
}

// SAFETY: threads write other pages' parts, and one reads them all when the others are done: see `Work::split`.
unsafe impl Sync for Partials {}

impl Partials {
    pub fn new(count: usize, head_dim: usize) -> Self {
        let values = (0..count * (head_dim + 2)).map(|_| UnsafeCell::new(0.0)).collect();
        Self { head_dim, values }
    }

    /// # Safety
    ///
    /// While the slice is in use, nobody else may ask for the same part.
    #[allow(clippy::mut_from_ref)] // as the section on safety says
    unsafe fn part(&self, index: usize) -> &mut [f32] {
        let len = self.head_dim + 2;
        let part = &self.values[index * len..][..len];
        // SAFETY: an `UnsafeCell` is laid out as what it holds; nobody else uses the part, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(part.as_ptr().cast_mut().cast(), len) }
    }
}

/// Queries of one head, over some of the pages of their rows.
pub struct Block<'a, E> {
    pub paged: &'a Paged<'a>,
    pub keys: Slab<'a, E>,
    pub values: Slab<'a, E>,
    pub queries: &'a [Query],
    pub head: usize,
    /// Which of each row's pages.
    pub levels: Range<usize>,
    /// Where to leave what pages give; none: they are folded here, and the result is written.
    pub partials: Option<&'a Partials>,
    pub scratch: &'a mut Scratch,
    pub out: Output<'a>,
}

impl<E: PageElement> WithSimd for Block<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        with_width!(simd: S, E => block(self))
    }
}

#[inline(always)]
fn block<S: Simd, const V: usize, E: PageElement>(simd: S, task: Block<'_, E>) {
    let Block { paged, keys: keys_of, values: values_of, queries, head, levels, partials, scratch, out } = task;
    let ([_, head_dim], page_len) = (paged.shape, paged.page_len);
    scratch.begin(paged, queries, head);
    for level in levels.clone() {
        let mut first = 0;
        while first < queries.len() {
            if queries[first].visible(level, page_len) == 0 {
                first += 1;
                continue;
            }
            let id = paged.rows[queries[first].row].pages[level];
            let is_here =
                |query: &&Query| query.visible(level, page_len) > 0 && paged.rows[query.row].pages[level] == id;
            let count = queries[first..].iter().take_while(is_here).count();
            // SAFETY: all that is new of a page was written by this thread, or before threads were let at this: see `Work`.
            let (keys, values) = unsafe { (keys_of.part(id, head), values_of.part(id, head)) };
            let range = first..first + count;
            let (run, shape) = (Run { all: queries, range: range.clone(), level, partials }, [page_len, head_dim]);
            let scales = [E::scales(keys, page_len), E::scales(values, page_len)];
            if count > MAX_QUERIES && size_of::<E>() < size_of::<f32>() {
                // What is read several times is widened once.
                let visible = queries[range].iter().map(|query| query.visible(level, page_len)).max().unwrap_or(0);
                let len = visible.next_multiple_of(LANES) * head_dim;
                let mut wide = std::mem::take(&mut scratch.wide);
                wide.resize(2 * page_len * head_dim, 0.0);
                let (wide_keys, wide_values) = wide.split_at_mut(page_len * head_dim);
                widen(simd, &keys[..len], wide_keys);
                widen(simd, &values[..len], wide_values);
                let page = Page { keys: &*wide_keys, values: &*wide_values, scales, next: Next::NONE, shape };
                attend_run::<S, V, f32>(simd, page, run, scratch);
                scratch.wide = wide;
            } else {
                let next = next(paged, [keys_of, values_of], queries[first], level, levels.end, head);
                attend_run::<S, V, E>(simd, Page { keys, values, scales, next, shape }, run, scratch);
            }
            first += count;
        }
    }
    if partials.is_none() {
        scratch.finish(queries, head, head_dim, out);
    }
}

/// A head's part of a page.
#[derive(Clone, Copy)]
struct Page<'a, E> {
    /// `[page_len / 16, D, 16]`.
    keys: &'a [E],
    /// `[page_len, D]`.
    values: &'a [E],
    /// Of each position, by what scores and weights are multiplied; nothing, if by nothing.
    scales: [&'a [f32]; 2],
    /// What is needed next.
    next: Next<E>,
    /// `[page_len, D]`.
    shape: [usize; 2],
}

/// Queries of a block, one behind the other, that see something of the same page.
struct Run<'a> {
    /// All of the block's.
    all: &'a [Query],
    range: Range<usize>,
    /// Which of their rows' pages.
    level: usize,
    /// Where to leave what the page gives; none: it is folded.
    partials: Option<&'a Partials>,
}

/// A page for all queries of a run, as many at a time as there are registers for.
#[inline(always)]
fn attend_run<S: Simd, const V: usize, E: Element>(simd: S, page: Page<'_, E>, run: Run<'_>, scratch: &mut Scratch) {
    let Page { keys, values, scales, next, shape: [page_len, head_dim] } = page;
    let Run { all, range, level, partials } = run;
    let mut first = range.start;
    while first < range.end {
        macro_rules! of {
            ($count:literal) => {{
                let mut visible = [0; $count];
                for i in 0..$count {
                    visible[i] = all[first + i].visible(level, page_len);
                }
                let query = &scratch.queries[first * head_dim..][..$count * head_dim];
                let (weights, of_page) = (&mut scratch.weights[..], &mut scratch.of_page[..]);
                let page = PageOfQueries { query, keys, values, scales, next, visible, shape: [page_len, head_dim] };
                let (max, sum) = page::attend::<S, V, E, $count>(simd, page, weights, of_page);
                match partials {
                    None => fold::<S, V, $count>(simd, scratch, first, head_dim, max, sum),
                    Some(partials) => {
                        for i in 0..$count {
                            // SAFETY: no other task has this page of this query.
                            let part = unsafe { partials.part(level * all.len() + first + i) };
                            (part[0], part[1]) = (max[i], sum[i]);
                            part[2..].copy_from_slice(&scratch.of_page[i * head_dim..][..head_dim]);
                        }
                    }
                }
                $count
            }};
        }
        first += match range.end - first {
            6.. => of!(6),
            4.. => of!(4),
            2.. => of!(2),
            _ => of!(1),
        };
    }
}

/// Writes elements, whole registers of them, to the beginning of `wide`.
#[inline(always)]
fn widen<S: Simd, E: Element>(simd: S, elements: &[E], wide: &mut [f32]) {
    let (elements, wide) = (elements.as_chunks::<LANES>().0, wide.as_chunks_mut::<LANES>().0);
    for (wide, elements) in wide.iter_mut().zip(elements) {
        *wide = E::widen_with::<S, LANES>(simd, elements);
    }
}

/// What is needed after a page: the row's next page, or its first one for the next head, which is the next task as a rule.
#[inline(always)]
fn next<E: PageElement>(
    paged: &Paged<'_>,
    slabs: [Slab<'_, E>; 2],
    query: Query,
    level: usize,
    end: usize,
    head: usize,
) -> Next<E> {
    let ([heads, head_dim], page_len) = (paged.shape, paged.page_len);
    let (level, head) = if level + 1 < end { (level + 1, head) } else { (0, head + 1) };
    match query.visible(level, page_len) {
        0 => Next::NONE,
        _ if head == heads => Next::NONE,
        visible => {
            let page = paged.rows[query.row].pages[level];
            let [keys, values] = slabs.map(|slab| slab.at(page, head).cast_const());
            Next { keys, values, len: visible.next_multiple_of(LANES) * head_dim }
        }
    }
}

/// What several threads have left of a block, folded.
pub struct Fold<'a> {
    pub queries: &'a [Query],
    pub partials: &'a Partials,
    pub head: usize,
    pub paged: &'a Paged<'a>,
    pub scratch: &'a mut Scratch,
    pub out: Output<'a>,
}

impl WithSimd for Fold<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        with_width!(simd: S => fold_all(self))
    }
}

#[inline(always)]
fn fold_all<S: Simd, const V: usize>(simd: S, task: Fold<'_>) {
    let Fold { queries, partials, head, paged, scratch, out } = task;
    let ([_, head_dim], page_len) = (paged.shape, paged.page_len);
    scratch.begin(paged, queries, head);
    for (index, query) in queries.iter().enumerate() {
        for level in 0..query.position / page_len + 1 {
            // SAFETY: the other threads are done.
            let part = unsafe { partials.part(level * queries.len() + index) };
            scratch.of_page[..head_dim].copy_from_slice(&part[2..]);
            fold::<S, V, 1>(simd, scratch, index, head_dim, [part[0]], [part[1]]);
        }
    }
    scratch.finish(queries, head, head_dim, out);
}

impl Scratch {
    #[inline(always)]
    fn begin(&mut self, paged: &Paged<'_>, queries: &[Query], head: usize) {
        let [_, head_dim] = paged.shape;
        let divisor = (head_dim as f32).sqrt();
        let count = queries.len();
        self.queries.clear();
        for query in queries {
            let query = paged.query.position(0, head, query.index, head_dim);
            self.queries.extend(query.iter().map(|x| x / divisor));
        }
        self.max.clear();
        self.max.resize(count, f32::NEG_INFINITY);
        self.sum.clear();
        self.sum.resize(count, 0.0);
        self.out.clear();
        self.out.resize(count * head_dim, 0.0);
        self.weights.resize(MAX_QUERIES * paged.page_len, 0.0);
        self.of_page.resize(MAX_QUERIES * head_dim, 0.0);
    }

    #[inline(always)]
    fn finish(&self, queries: &[Query], head: usize, head_dim: usize, out: Output<'_>) {
        for (index, query) in queries.iter().enumerate() {
            // SAFETY: no other task has this query and head.
            let out = unsafe { out.row_part(query.index, head * head_dim, head_dim) };
            let scale = 1.0 / self.sum[index];
            for (to, x) in out.iter_mut().zip(&self.out[index * head_dim..]) {
                *to = x * scale;
            }
        }
    }
}

/// Adds what a page gave to what there is of `R` queries from `first` on.
#[inline(always)]
fn fold<S: Simd, const V: usize, const R: usize>(
    simd: S,
    scratch: &mut Scratch,
    first: usize,
    head_dim: usize,
    max: [f32; R],
    sum: [f32; R],
) {
    let mut scales = [0.0; LANES];
    for i in 0..R {
        let held = scratch.max[first + i];
        let new = if held > max[i] { held } else { max[i] };
        (scales[i], scales[LANES / 2 + i]) = (held - new, max[i] - new);
        scratch.max[first + i] = new;
    }
    let wide = exp::<S, V>(simd, load(simd, &scales));
    store(simd, wide, &mut scales);
    for i in 0..R {
        let (a, b) = (scales[i], scales[LANES / 2 + i]);
        scratch.sum[first + i] = scratch.sum[first + i].mul_add(a, sum[i] * b);
        let out = &mut scratch.out[(first + i) * head_dim..][..head_dim];
        page::fold_row::<S, V>(simd, out, &scratch.of_page[i * head_dim..][..head_dim], a, b);
    }
}
