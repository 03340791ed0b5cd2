//! Safe code that calls the operations themselves, with what a kernel would read or write out of bounds: all of it is refused.
#![cfg(not(feature = "fusion"))] // which has threads of its own for it

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use crate::cube::tests::gpu;
use crate::tests::panic_of;
use crate::{Gpt2Ops, PagedRow};

#[test]
fn operations_refuse_what_does_not_fit_together() {
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
        Dispatch::read_pages(keys, values, of_row.into(), len, 8)
    };
    drop(read([slab; 2], &[2, 0], 32));
    refused("positions", panic_of(|| read([slab; 2], &[2, 0], 33)));
    refused("a page that is read", panic_of(|| read([slab; 2], &[2, 3], 20)));
    refused("values", panic_of(|| read([slab, [1, 2, 16, 8]], &[2], 16)));
}
