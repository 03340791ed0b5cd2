//! Attention over pages against the CPU, and its bits against themselves.

use burn::tensor::DType;
use proptest::prelude::*;

use super::{Batch, Page, Sequence, dtypes, prompt};
use crate::attend_pages;
use crate::cube::tests::{assert_close, cpu, gpu};
use crate::paged_tests::check_unseen_on;

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
fn what_a_query_does_not_see_may_be_anything() {
    let Some(gpu) = gpu() else { return };
    check_unseen_on(&gpu, |query, new, pages, row| attend_pages(query, new, pages, vec![row].into()).0);
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
