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

/// Fills the pages of all rows, which hold no numbers, up to their contexts, and then attends with what is new, on a device: what is
/// random is the same on all of them.
pub(crate) fn attended_in_two_steps(
    (rows, pages): &(Vec<PagedRow>, usize),
    [heads, head_dim]: [usize; 2],
    dtype: DType,
    device: &Device,
    random: impl Fn([usize; 3], u64) -> Tensor<3>,
    attend: impl Fn(Tensor<3>, [Tensor<3>; 2], [Tensor<4>; 2], Vec<PagedRow>) -> (Tensor<2>, [Tensor<4>; 2]),
) -> Tensor<2> {
    let mut states = [0, 1].map(|_| Tensor::<4>::full([*pages, heads, 16, head_dim], f32::NAN, (device, dtype)));
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
    let row = PagedRow { pages: vec![3, 1, 2], context_len: 40, new_len: 1, query_len: 0 };
    pages = append_pages([random([1, 2, 8]), random([1, 2, 8])], pages, vec![row].into());
    pages = copy_pages(pages, vec![[3, 0], [1, 3]].into());
    assert_eq!(pages.each_ref().map(start), starts, "after an append and copies");
}

#[test]
fn pages_of_which_there_is_a_second_handle_are_not_written_in_place() {
    let pages = [0, 1].map(|_| Tensor::<4>::zeros([2, 1, 16, 8], &Device::flex()));
    let row = PagedRow { pages: vec![0], context_len: 0, new_len: 1, query_len: 1 };
    let new = || [random([1, 1, 8]), random([1, 1, 8])];
    let written = append_pages(new(), pages.clone(), vec![PagedRow { query_len: 0, ..row.clone() }].into());
    let attended = attend_pages(random([1, 1, 8]), new(), pages.clone(), vec![row].into()).1;
    let copied = copy_pages(written.clone(), vec![[0, 1]].into());
    let sum = |pages: &[Tensor<4>; 2]| pages.clone().map(|pages| pages.abs().sum().into_scalar::<f32>());
    assert_eq!(sum(&pages), [0.0; 2]);
    assert!(sum(&attended).iter().all(|sum| *sum > 0.0));
    for (copied, written) in sum(&copied).into_iter().zip(sum(&written)) {
        assert!((copied - 2.0 * written).abs() < 1e-5, "{copied} is not twice {written}");
    }
}

#[test]
fn rows_without_new_tokens_change_nothing_and_name_no_page() {
    let idle = |pages: Vec<u32>| PagedRow { pages, context_len: 7, new_len: 0, query_len: 0 };
    let row = PagedRow { pages: vec![1], context_len: 0, new_len: 3, query_len: 2 };
    let (query, new) = (random([2, 2, 8]), [random([3, 2, 8]), random([3, 2, 8])]);
    let of = |rows: Vec<PagedRow>| {
        let pages = [0, 1].map(|_| Tensor::<4>::zeros([3, 2, 16, 8], &Device::flex()));
        let (out, [keys, values]) = attend_pages(query.clone(), new.clone(), pages, rows.into());
        [out.into_data(), keys.into_data(), values.into_data()]
    };
    let expected = of(vec![row.clone()]);
    assert_eq!(of(vec![idle(vec![99]), row.clone(), idle(vec![]), idle(vec![1])]), expected);
    // Written, but not asked for.
    let unasked = PagedRow { query_len: 0, ..row.clone() };
    let pages = [0, 1].map(|_| Tensor::<4>::zeros([3, 2, 16, 8], &Device::flex()));
    let both = [0, 1].map(|part: usize| Tensor::cat(vec![new[part].clone(); 2], 0));
    let other = PagedRow { pages: vec![2], ..row };
    let (out, _) = attend_pages(query.clone(), both, pages, vec![unasked, other].into());
    assert_eq!(out.into_data(), expected[0]);
}

/// What a query does not see may be anything; what it sees is told.
#[track_caller]
pub(crate) fn check_unseen_on(
    device: &Device,
    attend: impl Fn(Tensor<3>, [Tensor<3>; 2], [Tensor<4>; 2], PagedRow) -> Tensor<2>,
) {
    let row = PagedRow { pages: vec![3, 1], context_len: 0, new_len: 20, query_len: 20 };
    let random = || Tensor::<3>::from_data(random([20, 2, 8]).into_data(), device);
    let (query, new) = (random(), [random(), random()]);
    let of = |new: [Tensor<3>; 2]| -> Vec<f32> {
        let pages = [0, 1].map(|_| Tensor::<4>::full([4, 2, 16, 8], f32::NAN, device));
        attend(query.clone(), new, pages, row.clone()).into_data().try_into_vec().unwrap()
    };
    let expected = of(new.clone());
    assert!(expected.iter().all(|x| x.is_finite()));
    for bad in [f32::NAN, f32::INFINITY] {
        let invalid =
            new.clone().map(|new| Tensor::cat(vec![new.narrow(0, 0, 11), Tensor::full([9, 2, 8], bad, device)], 0));
        let found = of(invalid);
        assert_eq!(found[..11 * 16], expected[..11 * 16], "{bad}");
        assert!(found[11 * 16..].iter().all(|x| x.is_nan()), "{bad}");
    }
}

#[test]
fn what_a_query_does_not_see_may_be_anything() {
    check_unseen_on(&Device::flex(), |query, new, pages, row| attend_pages(query, new, pages, vec![row].into()).0);
    check_unseen_on(&Device::flex(), |query, new, pages, row| {
        let (new, pages) = (new.each_ref().map(flex), pages.each_ref().map(flex));
        Tensor::from_primitive::<Flex>(default_paged::attend::<Flex>(flex(&query), new, pages, &[row]).0)
    });
    #[cfg(feature = "ndarray")]
    check_unseen_on(&crate::device("ndarray").unwrap(), |query, new, pages, row| {
        attend_pages(query, new, pages, vec![row].into()).0
    });
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
        // Zeros of both signs.
        let random = || {
            let numbers = random([75, 3, 20]);
            let is_small = numbers.clone().abs().lower_elem(0.3);
            numbers.clone().mask_where(is_small, numbers * 0.0)
        };
        let new = [0, 1].map(|_| Tensor::from_data(random().into_data(), (device, DType::F32)));
        let row = PagedRow { pages: vec![4, 1, 5], context_len: 0, new_len: 60, query_len: 0 };
        let part = |range: std::ops::Range<usize>| new.clone().map(|new| new.narrow(0, range.start, range.len()));
        let pages = append_pages(part(0..60), pages, vec![row.clone()].into());
        let pages = append_pages(part(60..75), pages, vec![PagedRow { context_len: 60, new_len: 15, ..row }].into());
        let pages = copy_pages(pages, vec![[5, 2], [1, 3], [3, 0]].into());
        for of_row in [[4, 1, 5], [4, 3, 2], [4, 0, 5]] {
            let read = read_pages(pages.clone(), of_row.to_vec().into(), 75, 20);
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
