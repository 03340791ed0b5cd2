//! Kernels with tables that stay on the device.

use burn::backend::ops::IntTensorOps;
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::{Batch, Page, Sequence, dtypes};
use crate::PagedRow;
use crate::cube::paged::{PageTable, Plan, Queries, Tokens, append, attend};
use crate::cube::tests::{gpu, on, random};

fn primitive<const D: usize>(tensor: Tensor<D>) -> CubeTensor {
    tensor.try_into_primitive::<CubeBackend>().unwrap()
}

fn ints<const D: usize>(numbers: Vec<i32>, shape: [usize; D], beside: &CubeTensor) -> CubeTensor {
    CubeBackend::int_from_data(TensorData::new(numbers, shape), &beside.device)
}

#[test]
fn pages_one_by_one_give_the_bits_of_all_by_one_workgroup() {
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
            let table = PageTable::new(&batch.rows, page.len, 1, &device);
            let shape = keys.meta.shape().dims();
            let plan = Plan::new(&client, shape, table.width(), &batch.rows).unwrap();
            let queries = Queries::new(&batch.rows, plan.queries(), &device);
            let new = batch.new_states(&gpu).map(primitive);
            let states = append([keys, values], new, &table, &Tokens::new(&batch.rows, &device));
            let [walked, folded] = [true, false].map(|is_walk| {
                let query = primitive(batch.query(&gpu));
                let out = attend(query, states.clone(), &table, &queries, plan.with_walk(is_walk));
                batch.of_rows(Tensor::from_primitive::<CubeBackend>(out))
            });
            assert_eq!(walked, folded, "{page:?} of {dtype:?}");
        }
    }
}

/// What a captured step does: the table has room for all pages that rows may get, tokens and queries stay as they are, and the lengths grow
/// where they are.
#[test]
fn tables_serve_step_after_step_while_lengths_grow_on_the_device() {
    let Some(gpu) = gpu() else { return };
    let (page, steps) = (Page { heads: 2, len: 16, head_dim: 8 }, 20);
    let of = |number: u64, context_len: usize, new_len: usize| Sequence {
        number,
        common: 0,
        context_len,
        new_len,
        query_len: new_len,
    };
    let lens = [(1, 9), (2, 30), (3, 1)];
    let at_once = Batch::new(&lens.map(|(number, len)| of(number, len, steps)), page, 0);
    let expected = at_once.bits(DType::F32, &gpu);

    // The same pages, step by step.
    let mut states = at_once.slabs(DType::F32, &gpu).map(primitive);
    let (client, device) = (states[0].client.clone(), states[0].device.clone());
    let of_step = |step: usize| lens.map(|(number, len)| of(number, len + step, 1));
    let rows = |step: usize| -> Vec<PagedRow> {
        let row = |(row, sequence): (&PagedRow, Sequence)| PagedRow {
            context_len: sequence.context_len,
            new_len: 1,
            query_len: 1,
            ..row.clone()
        };
        at_once.rows.iter().zip(of_step(step)).map(row).collect()
    };
    let rows = rows(0);
    let mut table = PageTable::new(&rows, page.len, 6, &device);
    assert_eq!(table.width(), 6);
    let plan = Plan::new(&client, states[0].meta.shape().dims(), table.width(), &rows).unwrap();
    let (tokens, queries) = (Tokens::new(&rows, &device), Queries::new(&rows, plan.queries(), &device));
    let mut found = vec![Vec::new(); lens.len()];
    for step in 0..steps {
        let batch = Batch { rows: rows.clone(), pages: 0, page, sequences: of_step(step).to_vec() };
        states = append(states, batch.new_states(&gpu).map(primitive), &table, &tokens);
        let out = attend(primitive(batch.query(&gpu)), states.clone(), &table, &queries, plan);
        let out = batch.of_rows(Tensor::from_primitive::<CubeBackend>(out));
        found.iter_mut().zip(out).for_each(|(found, out)| found.extend(out));
        table.context_lens = CubeBackend::int_add_scalar(table.context_lens, 1.into());
    }
    assert_eq!(found, expected);
}

/// The host does not see what stands on the device: whatever it is, nothing else is read or written.
#[test]
fn tables_that_say_what_is_not_there_do_no_harm() {
    let Some(gpu) = gpu() else { return };
    let row = PagedRow { pages: vec![0, 1], context_len: 20, new_len: 2, query_len: 2 };
    let slabs = |device: &Device| [0, 1].map(|part| on(&random([2, 2, 16, 8], part), device));
    let new = || [2, 3].map(|part| primitive(on(&random([2, 2, 8], part), &gpu)));
    let [keys, values] = slabs(&gpu).map(primitive);
    let table = PageTable::new(&[row.clone()], 16, 2, &keys.device);
    let (tokens, queries) = (Tokens::new(&[row.clone()], &keys.device), Queries::new(&[row.clone()], 2, &keys.device));
    let written = |table: &PageTable, tokens: &Tokens| {
        let states = append(slabs(&gpu).map(primitive), new(), table, tokens);
        states.map(|states| Tensor::<4>::from_primitive::<CubeBackend>(states).into_data())
    };
    let of_nothing = slabs(&gpu).map(Tensor::into_data);
    assert!(written(&table, &tokens) != of_nothing);
    let lens = |len: i32| PageTable { context_lens: ints(vec![len], [1], &keys), ..table.clone() };
    let pages = |pages: [u32; 2]| {
        let pages = CubeBackend::int_from_data(TensorData::new(pages.to_vec(), [1, 2]), &keys.device);
        PageTable { pages, ..table.clone() }
    };
    let places = |places: [i32; 4]| Tokens { places: ints(places.to_vec(), [2, 2], &keys) };
    for len in [-1, i32::MIN, 32, i32::MAX] {
        assert_eq!(written(&lens(len), &tokens), of_nothing, "{len} tokens");
    }
    assert_eq!(written(&pages([u32::MAX, 2]), &tokens), of_nothing);
    assert_eq!(written(&table, &places([1, 0, i32::MAX, 0])), of_nothing);
    assert_eq!(written(&table, &places([0, 12, 0, i32::MAX])), of_nothing);

    let plan = Plan::new(&keys.client, [2, 2, 16, 8], 2, &[row]).unwrap();
    let attended = |table: &PageTable, blocks: [i32; 4], is_walk: bool| {
        let query = primitive(on(&random([2, 2, 8], 4), &gpu));
        let queries = Queries { blocks: ints(blocks.to_vec(), [1, 4], &keys) };
        let out = attend(query, [keys.clone(), values.clone()], table, &queries, plan.with_walk(is_walk));
        Tensor::<2>::from_primitive::<CubeBackend>(out).into_data()
    };
    for is_walk in [true, false] {
        let of_all = |table: &PageTable| attended(table, [0, 0, 0, 2], is_walk);
        let query = primitive(on(&random([2, 2, 8], 4), &gpu));
        let out = attend(query, [keys.clone(), values.clone()], &table, &queries, plan.with_walk(is_walk));
        assert_eq!(of_all(&table), Tensor::<2>::from_primitive::<CubeBackend>(out).into_data());
        // A length is as near to what it says as can be, and so is a page.
        assert_eq!(of_all(&lens(-5)), of_all(&lens(0)));
        assert_eq!(of_all(&lens(i32::MAX)), of_all(&lens(32)));
        assert_eq!(of_all(&pages([0, u32::MAX])), of_all(&pages([0, 1])));
        for blocks in [[9, 0, 0, 2], [0, i32::MAX, 0, 2], [0, 0, 5, 2], [0, 0, 1, 9], [-1, -1, -1, -1]] {
            drop(attended(&table, blocks, is_walk));
        }
    }
    assert_eq!([keys, values].map(|states| Tensor::<4>::from_primitive::<CubeBackend>(states).into_data()), of_nothing);
}
