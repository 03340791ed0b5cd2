//! Attention over pages against the CPU, and its bits against themselves.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use proptest::prelude::*;

use crate::captured::of_floats;
use crate::cube::tests::{assert_close, cpu, gpu, on, random};
use crate::paged_tests::check_unseen_on;
use crate::{PagedRow, append_pages, attend_pages, copy_pages, read_pages};

/// Tokens of a sequence: what is at a position depends on the number, the position and the head alone.
#[derive(Clone, Copy, Debug)]
struct Sequence {
    number: u64,
    /// Its first pages are those of sequence 0.
    common: usize,
    context_len: usize,
    new_len: usize,
    query_len: usize,
}

/// `[H, L, D]`
#[derive(Clone, Copy, Debug)]
struct Page {
    heads: usize,
    len: usize,
    head_dim: usize,
}

impl Sequence {
    /// Keys, values or queries, `[n, H, D]`, of positions in a range.
    fn states(self, range: std::ops::Range<usize>, page: Page, what: u64) -> Vec<f32> {
        let state = |position: usize| {
            let number = if position < self.common * page.len { 0 } else { self.number };
            let seed = (number * 5000 + position as u64) * 3 + what;
            let of_position: Vec<f32> = random([page.heads, page.head_dim], seed).try_into_vec_as().unwrap();
            of_position
        };
        range.flat_map(state).collect()
    }
}

/// What sequences attend to in one call, all contexts having been written before: what is not is NaN. Pages are dealt so that
/// `placed` changes where they are.
struct Batch {
    rows: Vec<PagedRow>,
    pages: usize,
    page: Page,
    sequences: Vec<Sequence>,
}

impl Batch {
    fn new(sequences: &[Sequence], page: Page, placed: u32) -> Self {
        let held = |sequence: &Sequence| (sequence.context_len + sequence.new_len).div_ceil(page.len);
        // Sequence 0 lends its first pages.
        let common = sequences.iter().map(|sequence| sequence.common).max().unwrap_or(0);
        let all = common + sequences.iter().map(|sequence| held(sequence) - sequence.common).sum::<usize>();
        let mut next = common;
        let place = |page: usize| ((page as u32) + placed) % all as u32;
        let rows = sequences.iter().map(|sequence| {
            let own = held(sequence) - sequence.common;
            let pages = (0..sequence.common).chain(next..next + own).map(place).collect();
            next += own;
            let Sequence { context_len, new_len, query_len, .. } = *sequence;
            PagedRow { pages, context_len, new_len, query_len }
        });
        Self { rows: rows.collect(), pages: all, page, sequences: sequences.to_vec() }
    }

    fn tensor(&self, device: &Device, what: u64, range: impl Fn(&Sequence) -> std::ops::Range<usize>) -> Tensor<3> {
        let of = |sequence: &Sequence| sequence.states(range(sequence), self.page, what);
        let numbers: Vec<f32> = self.sequences.iter().flat_map(of).collect();
        let [heads, head_dim] = [self.page.heads, self.page.head_dim];
        let count = numbers.len() / (heads * head_dim);
        Tensor::from_data(burn::tensor::TensorData::new(numbers, [count, heads, head_dim]), device)
    }

    /// Pages with the contexts.
    fn slabs(&self, dtype: DType, device: &Device) -> [Tensor<4>; 2] {
        let Page { heads, len, head_dim } = self.page;
        let mut slabs = [0, 1].map(|_| Tensor::full([self.pages, heads, len, head_dim], f32::NAN, (device, dtype)));
        for (row, sequence) in self.rows.iter().zip(&self.sequences).filter(|(row, _)| row.context_len > 0) {
            let alone = Self { rows: vec![], pages: 0, page: self.page, sequences: vec![*sequence] };
            let new = [0, 1].map(|what| alone.tensor(device, what, |sequence| 0..sequence.context_len));
            let row = PagedRow { context_len: 0, new_len: row.context_len, query_len: 0, ..row.clone() };
            slabs = append_pages(new, slabs, vec![row].into());
        }
        slabs
    }

    fn new_states(&self, device: &Device) -> [Tensor<3>; 2] {
        [0, 1].map(|what| {
            self.tensor(device, what, |sequence| sequence.context_len..sequence.context_len + sequence.new_len)
        })
    }

    fn query(&self, device: &Device) -> Tensor<3> {
        self.tensor(device, 2, |sequence| {
            let end = sequence.context_len + sequence.new_len;
            end - sequence.query_len..end
        })
    }

    fn rows(&self) -> Arc<[PagedRow]> {
        self.rows.clone().into()
    }

    fn attend(&self, dtype: DType, device: &Device) -> Tensor<2> {
        let slabs = self.slabs(dtype, device);
        attend_pages(self.query(device), self.new_states(device), slabs, self.rows()).0
    }

    /// The bits of each row's results.
    fn bits(&self, dtype: DType, device: &Device) -> Vec<Vec<u32>> {
        self.of_rows(self.attend(dtype, device))
    }

    fn of_rows(&self, out: Tensor<2>) -> Vec<Vec<u32>> {
        let width = self.page.heads * self.page.head_dim;
        let numbers: Vec<f32> = out.try_into_vec_as().unwrap();
        assert!(numbers.iter().all(|number| number.is_finite()));
        let mut rest = &numbers[..];
        let mut next = |row: &PagedRow| {
            let (of_row, others) = rest.split_at(row.query_len * width);
            rest = others;
            of_row.iter().map(|number| number.to_bits()).collect()
        };
        self.rows.iter().map(&mut next).collect()
    }
}

/// Sequences, of which some begin with pages of sequence 0.
fn sequences(page_len: usize) -> impl Strategy<Value = Vec<Sequence>> {
    let lens = prop_oneof![
        (0..5 * page_len, Just(1), Just(1)),
        (0..3 * page_len, 0_usize..4, 0_usize..4),
        (0..2 * page_len, 0..2 * page_len, 0..2 * page_len),
    ];
    prop::collection::vec((lens, any::<bool>()), 1..6).prop_map(move |rows| {
        let of = |(index, ((context_len, new_len, query_len), is_shared)): (usize, &((usize, usize, usize), bool))| {
            let first = rows[0].0.0;
            let common = if *is_shared { (*context_len).min(first) / page_len } else { 0 };
            let common = if index == 0 { first / page_len } else { common };
            let query_len = *query_len.min(new_len);
            Sequence { number: index as u64, common, context_len: *context_len, new_len: *new_len, query_len }
        };
        rows.iter().enumerate().map(of).collect()
    })
}

fn pages() -> impl Strategy<Value = Page> {
    let head_dims = prop::sample::select(&[64, 8, 20, 33, 80][..]);
    (1_usize..4, prop::sample::select(&[16_usize, 64][..]), head_dims).prop_map(|(heads, len, head_dim)| Page {
        heads,
        len,
        head_dim,
    })
}

fn dtypes(device: &Device) -> Vec<DType> {
    [DType::F32, DType::F16, DType::BF16].into_iter().filter(|dtype| device.supports_dtype(*dtype)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn attention_is_that_of_the_cpu_and_its_bits_those_of_each_row_alone(
        (page, sequences) in pages().prop_flat_map(|page| (Just(page), sequences(page.len))),
        placed in 0_u32..20,
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        prop_assume!(sequences.iter().any(|sequence| sequence.query_len > 0));
        for dtype in dtypes(&gpu) {
            let batch = Batch::new(&sequences, page, placed);
            let found = batch.attend(dtype, &gpu);
            assert_close(found.clone(), batch.attend(dtype, &cpu()), 1e-4);
            for (sequence, of_row) in sequences.iter().zip(batch.of_rows(found)).filter(|(_, row)| !row.is_empty()) {
                // In other places, and with pages that nobody shares.
                let alone = Batch::new(&[*sequence], page, placed + 1);
                prop_assert_eq!(&alone.bits(dtype, &gpu)[0], &of_row, "{:?} in {:?}", sequence, dtype);
            }
        }
    }
}

fn prompt(number: u64, new_len: usize) -> Sequence {
    Sequence { number, common: 0, context_len: 0, new_len, query_len: new_len }
}

/// Blocks of queries of all sizes.
#[test]
fn a_prompt_has_the_bits_of_its_tokens_one_by_one() {
    let Some(gpu) = gpu() else { return };
    for (page, tokens) in
        [(Page { heads: 2, len: 16, head_dim: 64 }, 40), (Page { heads: 1, len: 64, head_dim: 20 }, 70)]
    {
        for dtype in dtypes(&gpu) {
            let whole = Batch::new(&[prompt(1, tokens)], page, 3).bits(dtype, &gpu);
            for step in [1, 2, 3, 7] {
                let part = |from: usize| {
                    let new_len = step.min(tokens - from);
                    let sequence = Sequence { context_len: from, new_len, query_len: new_len, ..prompt(1, 0) };
                    Batch::new(&[sequence], page, 0).bits(dtype, &gpu).remove(0)
                };
                let parts: Vec<u32> = (0..tokens).step_by(step).flat_map(part).collect();
                assert_eq!(parts, whole[0], "{step} at a time, {page:?} of {dtype:?}");
            }
        }
    }
}

/// So many rows that each workgroup takes all pages of a query, which it does not where a row is alone.
#[test]
fn rows_in_large_batches_have_the_bits_that_they_have_alone() {
    let Some(gpu) = gpu() else { return };
    let page = Page { heads: 4, len: 16, head_dim: 8 };
    let sequence = |number: u64| {
        let [context_len, query_len] = [33 + number as usize % 40, 1 + number as usize % 2];
        Sequence { number, common: 2, context_len, new_len: 2, query_len }
    };
    let sequences: Vec<Sequence> = (0..300).map(sequence).collect();
    let of_batch = Batch::new(&sequences, page, 5).bits(DType::F32, &gpu);
    for index in [0, 1, 7, 150, 299] {
        let alone = Batch::new(&sequences[index..=index], page, 0).bits(DType::F32, &gpu);
        assert_eq!(alone[0], of_batch[index], "row {index}");
    }
}

#[test]
#[cfg(not(feature = "fusion"))] // whose tensors are not those of the kernels
fn pages_one_by_one_give_the_bits_of_all_by_one_workgroup() {
    use super::{PageTable, Plan, Queries, Tokens};
    use burn_cubecl::CubeBackend;

    fn primitive<const D: usize>(tensor: Tensor<D>) -> burn_cubecl::tensor::CubeTensor {
        tensor.try_into_primitive::<CubeBackend>().unwrap()
    }

    let Some(gpu) = gpu() else { return };
    for (page, query_len) in [(16, 64, 1), (64, 64, 1), (64, 80, 5), (16, 130, 9)]
        .map(|(len, head_dim, query_len)| (Page { heads: 2, len, head_dim }, query_len))
    {
        let of = |number: u64, context_len: usize| {
            let common = if context_len >= page.len { 1 } else { 0 };
            Sequence { number, common, context_len, new_len: 10, query_len }
        };
        let batch = Batch::new(&[of(0, 2 * page.len), of(1, 7), of(2, 3 * page.len - 5), of(3, 0)], page, 2);
        for dtype in dtypes(&gpu) {
            let [keys, values] = batch.slabs(dtype, &gpu).map(primitive);
            let (client, device) = (keys.client.clone(), keys.device.clone());
            let table = PageTable::new(&batch.rows, page.len, &device);
            let shape = keys.meta.shape().dims();
            let plan = Plan::new(&client, shape, table.width(), &batch.rows).unwrap();
            let queries = Queries::new(&batch.rows, plan.queries(), &device);
            let new = batch.new_states(&gpu).map(primitive);
            let states = super::append([keys, values], new, &table, &Tokens::new(&batch.rows, &device));
            let [walked, folded] = [true, false].map(|is_walk| {
                let query = primitive(batch.query(&gpu));
                let out = super::attend(query, states.clone(), &table, &queries, plan.with_walk(is_walk));
                batch.of_rows(Tensor::from_primitive::<CubeBackend>(out))
            });
            assert_eq!(walked, folded, "{page:?} of {dtype:?}");
        }
    }
}

#[test]
fn pages_are_written_in_place() {
    let Some(gpu) = gpu() else { return };
    let start = |pages: &[Tensor<4>; 2]| pages.each_ref().map(of_floats);
    let new = |count: usize, seed: u64| on(&random([count, 2, 8], seed), &gpu);
    let mut pages = [0, 1].map(|_| Tensor::<4>::zeros([4, 2, 16, 8], &gpu));
    let starts = start(&pages);
    assert_eq!(starts[0].is_some(), cfg!(not(feature = "fusion")));
    for context_len in 0..40 {
        let row = PagedRow { pages: vec![3, 1, 2], context_len, new_len: 1, query_len: 1 };
        let out;
        (out, pages) = attend_pages(new(1, 1), [new(1, 2), new(1, 3)], pages, vec![row].into());
        assert_eq!(out.dims(), [1, 16]);
        assert_eq!(start(&pages), starts, "after {context_len} tokens");
    }
    let row = PagedRow { pages: vec![3, 1, 2], context_len: 40, new_len: 3, query_len: 0 };
    pages = append_pages([new(3, 4), new(3, 5)], pages, vec![row].into());
    pages = copy_pages(pages, vec![[3, 0], [1, 3]].into());
    assert_eq!(start(&pages), starts, "after an append and copies");
    let _ = read_pages(pages.clone(), vec![0, 1].into(), 20);
    assert_eq!(start(&pages), starts, "after reading");
}

#[test]
fn pages_of_which_there_is_a_second_handle_are_not_written() {
    let Some(gpu) = gpu() else { return };
    let numbers = || [0, 1].map(|part| random([3, 2, 16, 8], part));
    let pages = numbers().map(|pages| on(&pages, &gpu));
    let new = || [2, 3].map(|part| on(&random([5, 2, 8], part), &gpu));
    let row = PagedRow { pages: vec![2, 0], context_len: 13, new_len: 5, query_len: 0 };
    let written = append_pages(new(), pages.clone(), vec![row.clone()].into());
    let query = on(&random([1, 2, 8], 4), &gpu);
    let attended = attend_pages(query, new(), pages.clone(), vec![PagedRow { query_len: 1, ..row }].into()).1;
    let copied = copy_pages(pages.clone(), vec![[2, 0]].into());
    let data = |pages: [Tensor<4>; 2]| pages.map(Tensor::into_data);
    assert_eq!(data(pages), data(numbers()));
    assert_eq!(data(attended), data(written.clone()));
    assert!(data(written) != data(numbers()) && data(copied) != data(numbers()));
}

/// Those that stay where they are, those that are read after they were written, and those that go round.
#[test]
fn copies_are_made_in_their_order() {
    let Some(gpu) = gpu() else { return };
    for head_dim in [8, 5] {
        for copies in [vec![[0, 1], [1, 2], [2, 3]], vec![[1, 0], [2, 1], [0, 2]], vec![[3, 3], [3, 0], [1, 3], [0, 1]]]
        {
            let of = |device: &Device| {
                let pages = [0, 1].map(|part| on(&random([4, 3, 16, head_dim], part), device));
                copy_pages(pages, copies.clone().into()).map(Tensor::into_data)
            };
            // In a layout of its own, the CPU copies whole pages too.
            assert_eq!(of(&gpu), of(&cpu()), "{copies:?}");
        }
    }
}

#[test]
fn rows_without_new_tokens_change_nothing_and_name_no_page() {
    let Some(gpu) = gpu() else { return };
    let idle = |pages: Vec<u32>| PagedRow { pages, context_len: 7, new_len: 0, query_len: 0 };
    let row = PagedRow { pages: vec![1], context_len: 0, new_len: 3, query_len: 2 };
    let states = |count: usize, seed: u64| on(&random([count, 2, 8], seed), &gpu);
    let of = |rows: Vec<PagedRow>| {
        let pages = [0, 1].map(|_| Tensor::<4>::zeros([3, 2, 16, 8], &gpu));
        let [new, queries] = [rows.iter().map(|row| row.new_len).sum(), rows.iter().map(|row| row.query_len).sum()];
        let (out, [keys, values]) =
            attend_pages(states(queries, 1), [states(new, 2), states(new, 3)], pages, rows.into());
        [out.into_data(), keys.into_data(), values.into_data()]
    };
    let expected = of(vec![row.clone()]);
    assert_eq!(of(vec![idle(vec![99]), row.clone(), idle(vec![]), idle(vec![1])]), expected);
    let [out, keys, values] = of(vec![PagedRow { query_len: 0, ..row }]);
    assert_eq!((out.num_elements(), [keys, values]), (0, [1, 2].map(|part| expected[part].clone())));
}

#[test]
fn what_a_query_does_not_see_may_be_anything() {
    let Some(gpu) = gpu() else { return };
    check_unseen_on(&gpu, |query, new, pages, row| attend_pages(query, new, pages, vec![row].into()).0);
}

/// Safe code that calls the operations themselves, with what a kernel would read or write out of bounds: all of it is refused.
#[test]
#[cfg(not(feature = "fusion"))] // which has threads of its own for it
fn operations_refuse_what_does_not_fit_together() {
    use crate::Gpt2Ops;
    use crate::tests::panic_of;
    use burn::backend::Dispatch;

    let Some(gpu) = gpu() else { return };
    let states = |shape: [usize; 3]| Tensor::<3>::zeros(shape, &gpu).into_dispatch();
    let pages = |shape: [usize; 4]| Tensor::<4>::zeros(shape, &gpu).into_dispatch();
    let row = |pages: &[u32], context_len: usize, new_len: usize| PagedRow {
        pages: pages.to_vec(),
        context_len,
        new_len,
        query_len: 1,
    };
    let (slab, rows) = ([3, 2, 16, 8], [row(&[1, 2], 15, 2)]);
    let attend = |query: [usize; 3], new: [[usize; 3]; 2], held: [[usize; 4]; 2], rows: &[PagedRow]| {
        let ([new_keys, new_values], [keys, values]) = (new.map(states), held.map(pages));
        Dispatch::attend_pages(states(query), new_keys, new_values, keys, values, rows.into())
    };
    let (query, new) = ([1, 2, 8], [2, 2, 8]);
    drop(attend(query, [new; 2], [slab; 2], &rows));
    let refused = |what: &str, text: String| {
        let reasons = ["and not", "new tokens and queries", "too few pages", "in a slab of", "named twice"];
        assert!(reasons.iter().any(|reason| text.contains(reason)), "{what}: {text}");
    };
    refused("queries", panic_of(|| attend([2, 2, 8], [new; 2], [slab; 2], &rows)));
    refused("heads of queries", panic_of(|| attend([1, 20, 8], [new; 2], [slab; 2], &rows)));
    refused("width of queries", panic_of(|| attend([1, 2, 80], [new; 2], [slab; 2], &rows)));
    refused("new values", panic_of(|| attend(query, [new, [1, 2, 8]], [slab; 2], &rows)));
    refused("width of keys", panic_of(|| attend(query, [[2, 2, 7], new], [slab; 2], &rows)));
    refused("pages of values", panic_of(|| attend(query, [new; 2], [slab, [1, 2, 16, 8]], &rows)));
    refused("pages of nothing", panic_of(|| attend(query, [new; 2], [[3, 2, 0, 8]; 2], &rows)));
    let of = |row: PagedRow| panic_of(|| attend(query, [[row.new_len, 2, 8]; 2], [slab; 2], &[row.clone()]));
    refused("a page", of(row(&[1, 3], 15, 2)));
    refused("pages", of(row(&[1], 15, 2)));
    refused("a page twice", of(row(&[1, 1], 15, 2)));

    let append = |new: [[usize; 3]; 2], held: [[usize; 4]; 2], rows: &[PagedRow]| {
        let ([new_keys, new_values], [keys, values]) = (new.map(states), held.map(pages));
        Dispatch::append_pages(new_keys, new_values, keys, values, rows.into())
    };
    drop(append([new; 2], [slab; 2], &rows));
    refused("tokens", panic_of(|| append([[3, 2, 8]; 2], [slab; 2], &rows)));
    refused("heads", panic_of(|| append([[2, 3, 8]; 2], [slab; 2], &rows)));
    refused("a page to write to", panic_of(|| append([new; 2], [slab; 2], &[row(&[1, 9], 15, 2)])));

    drop(Dispatch::copy_pages(pages(slab), vec![[0, 2]].into()));
    refused("what is copied", panic_of(|| Dispatch::copy_pages(pages(slab), vec![[3, 2]].into())));
    refused("a copy", panic_of(|| Dispatch::copy_pages(pages(slab), vec![[0, 2], [0, 3]].into())));
    let read = |shape: [[usize; 4]; 2], of_row: &[u32], len: usize| {
        let [keys, values] = shape.map(pages);
        Dispatch::read_pages(keys, values, of_row.into(), len)
    };
    drop(read([slab; 2], &[2, 0], 32));
    refused("positions", panic_of(|| read([slab; 2], &[2, 0], 33)));
    refused("a page that is read", panic_of(|| read([slab; 2], &[2, 3], 20)));
    refused("values", panic_of(|| read([slab, [1, 2, 16, 8]], &[2], 16)));
}

/// The kernels have one type for both; so these go to the default bodies.
#[test]
fn pages_and_rows_without_kernels_go_to_the_default_bodies() {
    let Some(gpu) = gpu() else { return };
    // Wider than a workgroup's registers hold.
    let page = Page { heads: 1, len: 16, head_dim: 600 };
    let batch = Batch::new(&[Sequence { context_len: 20, ..prompt(1, 3) }], page, 1);
    assert_close(batch.attend(DType::F32, &gpu), batch.attend(DType::F32, &cpu()), 1e-4);
}
