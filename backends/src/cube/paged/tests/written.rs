//! What is written to pages, and where.

use burn::tensor::{Device, Tensor};

use crate::captured::of_floats;
use crate::cube::tests::{cpu, gpu, on, random};
use crate::{PagedRow, append_pages, attend_pages, copy_pages, read_pages};

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
    let _ = read_pages(pages.clone(), vec![0, 1].into(), 20, 8);
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
