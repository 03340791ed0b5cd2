//! Attention over pages against sums in double precision, and its bits against themselves.

use burn::tensor::{bf16, f16};
use proptest::prelude::*;
use pulp::Arch;

use super::{PageElement, Paged, attend};
use crate::PagedRow;
use crate::flex::attend::View;
use crate::flex::tests::{all, numbers};

/// Positions of a page, as caches have them: all numbers of groups of lanes occur.
const PAGE: usize = 64;

/// Pages of a slab, of which what nobody sees is not a number.
#[derive(Clone)]
struct Slabs<E> {
    keys: Vec<E>,
    values: Vec<E>,
    shape: [usize; 2],
}

impl<E: PageElement> Slabs<E> {
    fn new(pages: usize, [heads, head_dim]: [usize; 2]) -> Self {
        // All bits are set: numbers, and scales, are none.
        let empty = vec![
            bytemuck::pod_read_unaligned(&[0xff; 4][..size_of::<E>()]);
            pages * heads * E::part_len(PAGE, head_dim)
        ];
        Self { keys: empty.clone(), values: empty, shape: [heads, head_dim] }
    }

    /// Appends and attends: `[M, H D]`.
    fn attend(&mut self, arch: Arch, rows: &[PagedRow], query: &[f32], new: [&[f32]; 2]) -> Vec<f32> {
        let [heads, head_dim] = self.shape;
        let strides = [0, head_dim, heads * head_dim];
        let [new_keys, new_values] = new.map(|new| View { elements: new, start: 0, strides });
        let query = View { elements: query, start: 0, strides };
        let queries: usize = rows.iter().map(|row| row.query_len).sum();
        let mut out = vec![f32::NAN; queries * heads * head_dim];
        let paged = Paged { query, new_keys, new_values, rows, page_len: PAGE, shape: self.shape };
        attend(arch, paged, &mut self.keys, &mut self.values, &mut out);
        out
    }
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

/// A sequence of a test: its tokens have keys and values that depend on a number, the position, head and column alone.
#[derive(Clone, Copy, Debug)]
struct Sequence {
    number: u64,
    /// Positions that it has in common with sequence 0, in whole pages.
    common: usize,
    context_len: usize,
    new_len: usize,
    query_len: usize,
}

impl Sequence {
    fn states(self, position: usize, shape: [usize; 2], what: u64) -> Vec<f32> {
        let number = if position < self.common { 0 } else { self.number };
        let seed = number * 10_007 + position as u64 * 3 + what;
        numbers(shape.iter().product(), seed)
    }

    fn query(self, position: usize, shape: [usize; 2]) -> Vec<f32> {
        numbers(shape.iter().product(), self.number * 10_007 + position as u64 * 3 + 2)
            .iter()
            .map(|x| 3.0 * x)
            .collect()
    }

    fn seq_len(self) -> usize {
        self.context_len + self.new_len
    }

    /// Its queries' results in double precision.
    fn expected<E: PageElement<Number: Into<f64>>>(self, [heads, head_dim]: [usize; 2]) -> Vec<f64> {
        // As pages hold them.
        let held = |states: &[f32]| -> Vec<f64> {
            let mut elements = vec![E::zeroed(); states.len()];
            let scale = E::write(states, &mut elements);
            elements.into_iter().map(|x| x.number(scale).into()).collect()
        };
        let wide = |states: Vec<f32>| -> Vec<f64> { states.chunks(head_dim).flat_map(held).collect() };
        let all =
            |what| (0..self.seq_len()).map(|at| wide(self.states(at, [heads, head_dim], what))).collect::<Vec<_>>();
        let (keys, values) = (all(0), all(1));
        let mut out = Vec::new();
        for position in self.seq_len() - self.query_len..self.seq_len() {
            let query = self.query(position, [heads, head_dim]);
            for head in 0..heads {
                let part = head * head_dim..(head + 1) * head_dim;
                let score = |key: &Vec<f64>| -> f64 {
                    let products = query[part.clone()].iter().zip(&key[part.clone()]).map(|(q, k)| f64::from(*q) * k);
                    products.sum::<f64>() / (head_dim as f64).sqrt()
                };
                let weights: Vec<f64> = keys[..=position].iter().map(|key| score(key).exp()).collect();
                let total: f64 = weights.iter().sum();
                for column in part.clone() {
                    let sum: f64 = weights.iter().zip(&values).map(|(weight, value)| weight * value[column]).sum();
                    out.push(sum / total);
                }
            }
        }
        out
    }
}

/// Pages for these sequences, filled up to their contexts, token by token by the kernel itself; and rows over them. What they have
/// in common is in the same pages, or in pages of their own.
fn set_up<E: PageElement>(sequences: &[Sequence], shape: [usize; 2], is_shared: bool) -> (Slabs<E>, Vec<PagedRow>) {
    let mut next = 1;
    let mut rows: Vec<PagedRow> = Vec::new();
    for sequence in sequences {
        let common = if is_shared && !rows.is_empty() { sequence.common / PAGE } else { 0 };
        let count = sequence.seq_len().div_ceil(PAGE);
        let mut pages: Vec<u32> = rows.first().map_or(Vec::new(), |row| row.pages[..common].to_vec());
        // From behind, so that pages of a row are in no order.
        pages.extend((next..next + (count - common) as u32).rev());
        next += (count - common) as u32;
        rows.push(PagedRow {
            pages,
            context_len: sequence.context_len,
            new_len: sequence.new_len,
            query_len: sequence.query_len,
        });
    }
    let mut slabs = Slabs::new(next as usize, shape);
    for (sequence, row) in sequences.iter().zip(&rows) {
        let [keys, values] = [0, 1].map(|what| {
            (0..sequence.context_len).flat_map(|at| sequence.states(at, shape, what)).collect::<Vec<f32>>()
        });
        let filled = PagedRow { context_len: 0, new_len: sequence.context_len, query_len: 0, ..row.clone() };
        slabs.attend(Arch::new(), &[filled], &[], [&keys, &values]);
    }
    (slabs, rows)
}

fn inputs(sequences: &[Sequence], shape: [usize; 2]) -> (Vec<f32>, [Vec<f32>; 2]) {
    let queries = |sequence: &Sequence| {
        let sequence = *sequence;
        (sequence.seq_len() - sequence.query_len..sequence.seq_len()).flat_map(move |at| sequence.query(at, shape))
    };
    let new = |what| {
        let of = |sequence: &Sequence| {
            let sequence = *sequence;
            (sequence.context_len..sequence.seq_len()).flat_map(move |at| sequence.states(at, shape, what))
        };
        sequences.iter().flat_map(of).collect()
    };
    (sequences.iter().flat_map(queries).collect(), [new(0), new(1)])
}

fn check<E: PageElement<Number: Into<f64>>>(sequences: &[Sequence], shape: [usize; 2]) {
    let (query, [keys, values]) = inputs(sequences, shape);
    let (slabs, rows) = set_up::<E>(sequences, shape, true);
    let found = slabs.clone().attend(Arch::new(), &rows, &query, [&keys, &values]);
    let expected: Vec<f64> = sequences.iter().flat_map(|sequence| sequence.expected::<E>(shape)).collect();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        assert!((f64::from(*found) - expected).abs() < 2e-6, "{found} and {expected}: {sequences:?}, {shape:?}");
    }
    for arch in all() {
        let other = slabs.clone().attend(arch, &rows, &query, [&keys, &values]);
        assert_eq!(bits(&other), bits(&found), "{arch:?}");
    }
    for threads in [1, 2, 3, 8, 40] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let other = pool.install(|| slabs.clone().attend(Arch::new(), &rows, &query, [&keys, &values]));
        assert_eq!(bits(&other), bits(&found), "{threads} threads");
    }
    let (mut own, rows) = set_up::<E>(sequences, shape, false);
    let other = own.attend(Arch::new(), &rows, &query, [&keys, &values]);
    assert_eq!(bits(&other), bits(&found), "pages of their own");
    // Each by itself, and each query by itself.
    let width = shape[0] * shape[1];
    let mut done = 0;
    for sequence in sequences {
        let (mut slabs, rows) = set_up::<E>(&[*sequence], shape, false);
        let mut row = PagedRow { new_len: 0, query_len: 0, ..rows[0].clone() };
        for at in sequence.context_len..sequence.seq_len() {
            let is_query = at >= sequence.seq_len() - sequence.query_len;
            (row.context_len, row.new_len, row.query_len) = (at, 1, usize::from(is_query));
            let query = if is_query { sequence.query(at, shape) } else { Vec::new() };
            let [key, value] = [0, 1].map(|what| sequence.states(at, shape, what));
            let alone = slabs.attend(Arch::new(), std::slice::from_ref(&row), &query, [&key, &value]);
            assert_eq!(bits(&alone), bits(&found[done..done + alone.len()]), "position {at} of {sequence:?}");
            done += alone.len();
        }
    }
    assert_eq!(done, found.len());
    assert!(found.len().is_multiple_of(width));
}

fn sequences() -> impl Strategy<Value = Vec<Sequence>> {
    let one = (0_usize..4, 0_usize..70, 1_usize..80, 0_usize..4, 0_usize..80);
    proptest::collection::vec(one, 1..5).prop_map(|parts| {
        let pages = parts[0].0;
        let of = |(index, (common, context, new, kind, count)): (usize, (usize, usize, usize, usize, usize))| {
            let common = if index == 0 { pages } else { common.min(pages) } * PAGE;
            // A token, some, or a chunk of a prompt.
            let new_len = [1, 1, 1 + new % 9, new][kind];
            let query_len = if kind == 3 { count % (new_len + 1) } else { new_len };
            Sequence { number: index as u64, common, context_len: common + context, new_len, query_len }
        };
        parts.into_iter().enumerate().map(of).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 300, ..ProptestConfig::with_cases(24) })]

    #[test]
    fn attention_over_pages_is_the_weighted_mean_and_has_one_order_of_sums(
        sequences in sequences(),
        (heads, head_dim) in (1_usize..4, 1_usize..80),
    ) {
        check::<f32>(&sequences, [heads, head_dim]);
        check::<f16>(&sequences, [heads, head_dim]);
        check::<bf16>(&sequences, [heads, head_dim]);
        check::<i8>(&sequences, [heads, head_dim]);
    }
}

fn sequence(number: u64, common: usize, context_len: usize, new_len: usize) -> Sequence {
    Sequence { number, common, context_len, new_len, query_len: new_len }
}

#[test]
fn attention_that_is_worth_threads_has_the_same_bits() {
    check::<f32>(&[sequence(0, 0, 300, 1)], [4, 64]);
    check::<f32>(&[sequence(0, 0, 10, 150)], [3, 64]);
    // Of halves, a page is widened for more queries than are computed at once.
    for queries in [6, 7, 150] {
        check::<f16>(&[sequence(0, 0, 10, queries)], [3, 64]);
        check::<bf16>(&[sequence(0, 0, 10, queries)], [3, 64]);
        check::<i8>(&[sequence(0, 0, 10, queries)], [3, 64]);
    }
    let rows: Vec<Sequence> = (0..9).map(|row| sequence(row, 4 * PAGE, 4 * PAGE + 3 * row as usize, 1)).collect();
    check::<f32>(&rows, [4, 64]);
}

#[test]
fn what_a_query_does_not_see_may_be_anything() {
    check_unseen::<f32>();
    check_unseen::<f16>();
    check_unseen::<bf16>();
    check_unseen::<i8>();
}

fn check_unseen<E: PageElement>() {
    for bad in [f32::NAN, f32::INFINITY] {
        let one = sequence(0, 0, 5, 40);
        let (query, [mut keys, mut values]) = inputs(&[one], [1, 20]);
        let (slabs, rows) = set_up::<E>(&[one], [1, 20], false);
        let expected = slabs.clone().attend(Arch::new(), &rows, &query, [&keys, &values]);
        for token in 21..40 {
            keys[token * 20..][..20].fill(bad);
            values[token * 20..][..20].fill(bad);
        }
        for arch in all() {
            let found = slabs.clone().attend(arch, &rows, &query, [&keys, &values]);
            assert_eq!(bits(&found[..21 * 20]), bits(&expected[..21 * 20]));
            assert!(found[21 * 20..].iter().all(|x| x.is_nan()), "what is seen is told");
        }
    }
}
