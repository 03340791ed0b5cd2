//! Attention over pages by kernels and by burn's operations.

use std::cell::RefCell;
use std::collections::HashMap;

use burn::backend::Flex;
use burn::tensor::{DType, Device, Tensor};
use proptest::prelude::*;

use crate::ops::default_paged;
use crate::tests::{assert_close, flex, panic_of, random};
use crate::{PagedRow, append_pages, attend_pages, copy_pages, read_pages};

/// Rows of so many context tokens, new tokens and queries over pages of sixteen, of which the first is common to those whose
/// contexts are long enough; and how many pages there are.
pub(crate) fn paged_rows(lens: &[[usize; 3]]) -> (Vec<PagedRow>, usize) {
    let mut next = 2;
    let row = |[context_len, new_len, queries]: &[usize; 3]| {
        let count = (context_len + new_len).div_ceil(16);
        let shared = usize::from(*context_len >= 16);
        let own = (next..next + (count - shared) as u32).rev();
        let pages = std::iter::repeat_n(1, shared).chain(own).collect();
        next += (count - shared) as u32;
        PagedRow { pages, context_len: *context_len, new_len: *new_len, query_len: *queries.min(new_len) }
    };
    (lens.iter().map(row).collect(), next as usize)
}

/// Fills the pages of all rows up to their contexts, and then attends with what is new, on a device: what is random is the same on all
/// of them.
pub(crate) fn attended_in_two_steps(
    (rows, pages): &(Vec<PagedRow>, usize),
    [heads, head_dim]: [usize; 2],
    dtype: DType,
    device: &Device,
    random: impl Fn([usize; 3], u64) -> Tensor<3>,
    attend: impl Fn(Tensor<3>, [Tensor<3>; 2], [Tensor<4>; 2], Vec<PagedRow>) -> (Tensor<2>, [Tensor<4>; 2]),
) -> Tensor<2> {
    let mut states = [0, 1].map(|_| Tensor::<4>::zeros([*pages, heads, 16, head_dim], (device, dtype)));
    for (index, row) in rows.iter().enumerate().filter(|(_, row)| row.context_len > 0) {
        let filled = PagedRow { context_len: 0, new_len: row.context_len, query_len: 1, ..row.clone() };
        // What is common is the same for all.
        let of = |part: u64| {
            let common = random([row.context_len.min(16), heads, head_dim], part);
            let own = random([row.context_len, heads, head_dim], 10 + 2 * index as u64 + part);
            match row.context_len.saturating_sub(16) {
                0 => common,
                more => Tensor::cat(vec![common, own.narrow(0, 0, more)], 0),
            }
        };
        (_, states) = attend(random([1, heads, head_dim], 9), [of(0), of(1)], states, vec![filled]);
    }
    let new: usize = rows.iter().map(|row| row.new_len).sum();
    let queries: usize = rows.iter().map(|row| row.query_len).sum();
    // Heads out of the midst of others, as a projection gives them.
    let part = |count: usize, seed: u64| random([count, 3 * heads, head_dim], seed).narrow(1, heads, heads);
    attend(part(queries, 5), [part(new, 6), part(new, 7)], states, rows.clone()).0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn attention_over_pages_is_that_of_the_default_body(
        (heads, head_dim) in (1_usize..4, 1_usize..40),
        lens in prop::collection::vec(prop_oneof![
            [0..70_usize, 1..2_usize, 1..2_usize],
            [0..40_usize, 1..40_usize, 1..40_usize],
        ], 1..5),
        is_half in any::<bool>(),
    ) {
        let (rows, dtype) = (paged_rows(&lens), if is_half { DType::F16 } else { DType::F32 });
        let numbers = RefCell::new(HashMap::new());
        let random = |shape: [usize; 3], seed: u64| {
            numbers.borrow_mut().entry((shape, seed)).or_insert_with(|| random(shape)).clone()
        };
        let by_burn = |query: Tensor<3>, new: [Tensor<3>; 2], pages: [Tensor<4>; 2], rows: Vec<PagedRow>| {
            let (new, pages) = (new.each_ref().map(flex), pages.each_ref().map(flex));
            let (out, keys, values) = default_paged::attend::<Flex>(flex(&query), new, pages, &rows);
            (Tensor::from_primitive::<Flex>(out), [keys, values].map(Tensor::from_primitive::<Flex>))
        };
        let by_kernel = |query, new, pages, rows: Vec<PagedRow>| attend_pages(query, new, pages, rows.into());
        let of = [heads, head_dim];
        let expected = attended_in_two_steps(&rows, of, dtype, &Device::flex(), random, by_burn);
        assert_close(attended_in_two_steps(&rows, of, dtype, &Device::flex(), random, by_kernel), expected);
    }
}

#[test]
fn pages_are_written_in_place() {
    let start = |tensor: &Tensor<4>| flex(tensor).storage::<f32>().as_ptr();
    let mut pages = [0, 1].map(|_| Tensor::<4>::zeros([4, 2, 16, 8], &Device::flex()));
    let starts = pages.each_ref().map(start);
    for context_len in 0..40 {
        let row = PagedRow { pages: vec![3, 1, 2], context_len, new_len: 1, query_len: 1 };
        let new = || random([1, 2, 8]);
        let (out, held) = attend_pages(new(), [new(), new()], pages, vec![row].into());
        assert_eq!(out.dims(), [1, 16]);
        pages = held;
        assert_eq!(pages.each_ref().map(start), starts, "after {context_len} tokens");
    }
}

#[test]
fn rows_over_pages_that_do_not_fit_are_refused() {
    let of = |rows: Vec<PagedRow>| {
        panic_of(|| {
            let pages = [0, 1].map(|_| Tensor::<4>::zeros([3, 1, 16, 8], &Device::flex()));
            let new: usize = rows.iter().map(|row| row.new_len).sum();
            let new = || random([new, 1, 8]);
            attend_pages(new(), [new(), new()], pages, rows.into())
        })
    };
    let row = |pages: &[u32], context_len: usize, new_len: usize| PagedRow {
        pages: pages.to_vec(),
        context_len,
        new_len,
        query_len: new_len,
    };
    assert!(of(vec![row(&[1], 16, 1)]).contains("too few pages"));
    assert!(of(vec![row(&[3], 0, 1)]).contains("in a slab of 3 pages"));
    assert!(of(vec![row(&[1], 3, 1), row(&[1], 3, 1)]).contains("named twice"));
    assert!(of(vec![row(&[1, 1], 16, 1)]).contains("named twice"));
    assert!(of(vec![row(&[1, 2], usize::MAX, 1)]).contains("too few pages"));
    for query_len in [2, usize::MAX] {
        assert!(of(vec![PagedRow { query_len, ..row(&[1], 0, 1) }]).contains("more queries than new tokens"));
    }
}

/// What is written to pages is read back from them, and from copies.
#[track_caller]
pub(crate) fn check_pages_on(device: &Device) {
    for dtype in [DType::F32, DType::F16].into_iter().filter(|dtype| device.supports_dtype(*dtype)) {
        let pages = [0, 1].map(|_| Tensor::<4>::zeros([6, 3, 32, 20], (device, dtype)));
        let new = [0, 1].map(|_| Tensor::from_data(random([75, 3, 20]).into_data(), (device, DType::F32)));
        let row = PagedRow { pages: vec![4, 1, 5], context_len: 0, new_len: 60, query_len: 0 };
        let part = |range: std::ops::Range<usize>| new.clone().map(|new| new.narrow(0, range.start, range.len()));
        let pages = append_pages(part(0..60), pages, vec![row.clone()].into());
        let pages = append_pages(part(60..75), pages, vec![PagedRow { context_len: 60, new_len: 15, ..row }].into());
        let pages = copy_pages(pages, vec![[5, 2], [1, 3], [3, 0]].into());
        for of_row in [[4, 1, 5], [4, 3, 2], [4, 0, 5]] {
            let read = read_pages(pages.clone(), of_row.to_vec().into(), 75);
            for (read, new) in read.into_iter().zip(&new) {
                assert_eq!(read.dims(), [75, 3, 20]);
                assert_eq!(read.into_data(), new.clone().cast(dtype).into_data(), "{dtype:?}, {of_row:?}");
            }
        }
    }
}

#[test]
fn what_is_written_to_pages_is_read_back() {
    check_pages_on(&Device::flex());
    #[cfg(feature = "ndarray")]
    check_pages_on(&crate::device("ndarray").unwrap());
}
