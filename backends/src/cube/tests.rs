//! The kernels of GPUs against the CPU: on the device in `GPT2_BURN_TEST_DEVICE`, or on the first that there is.
#![cfg(feature = "flex")]

use std::io::Write;
use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use proptest::prelude::*;

use crate::paged_tests::{attended_in_two_steps, check_pages_on, paged_rows};
use crate::tests::{buffer_of, check_argmax, check_integer_types, check_overflow, integer_types, integers, rows_of};
use crate::{
    AttentionMetadata, DecodeState, Gelu, Gpt2Ops, PackedMatrix, PackedRow, WeightFormat, advance, append, argmax,
    attend, attend_pages, is_asynchronous, layer_norm,
};

/// Some device that is not the CPU's; none if there is none, which is said.
pub(super) fn gpu() -> Option<Device> {
    let named = std::env::var("GPT2_BURN_TEST_DEVICE").unwrap_or_default();
    let names = named.split(',').chain(crate::available());
    let found = names.filter_map(|name| crate::device(name).ok()).find(is_asynchronous);
    if found.is_none() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: there is no GPU");
    }
    found
}

pub(super) fn cpu() -> Device {
    Device::flex()
}

/// The same numbers at each call for the same shape and seed.
pub(super) fn random<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
    let count: usize = shape.iter().product();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        // xorshift64*, for want of anything that has to be random
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..count).map(|_| next()).collect();
    Tensor::from_data(TensorData::new(values, shape), &cpu())
}

/// The same tensor elsewhere.
pub(super) fn on<const D: usize>(tensor: &Tensor<D>, device: &Device) -> Tensor<D> {
    let dtype = tensor.dtype();
    Tensor::from_data(tensor.clone().into_data(), (device, dtype))
}

fn ints(values: &[usize], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.iter().map(|value| *value as i32).collect();
    Tensor::from_data(values.as_slice(), (device, DType::I32))
}

#[track_caller]
pub(super) fn assert_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>, tolerance: f32) {
    assert_eq!(found.dims(), expected.dims());
    let found = on(&found.cast(DType::F32), &cpu());
    let worst: f32 = (found - expected.cast(DType::F32)).abs().max().into_scalar();
    assert!(worst <= tolerance, "they differ by {worst}");
}

/// Formats that a device holds.
fn formats(device: &Device) -> Vec<WeightFormat> {
    let all = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16, WeightFormat::Int8];
    all.into_iter().filter(|format| crate::check_format(device, *format).is_ok()).collect()
}

#[test]
fn what_is_written_to_pages_is_read_back() {
    if let Some(gpu) = gpu() {
        check_pages_on(&gpu);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn products_are_those_of_the_cpu(
        (rows, inputs, outputs) in (prop_oneof![1_usize..20, 30_usize..150], 1_usize..200, 1_usize..100),
        gelu in prop::sample::select(&[None, Some(Gelu::Tanh), Some(Gelu::Erf)][..]),
        seed in any::<u64>(),
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let (x, matrix) = (random([rows, inputs], seed), random([inputs, outputs], seed ^ 1));
        let (bias, residual) = (random([outputs], seed ^ 2), random([rows, outputs], seed ^ 3));
        for format in formats(&gpu) {
            let packed = PackedMatrix::new(on(&matrix, &gpu), format);
            // The matrix as it was rounded; the products of the CPU round x too.
            let ids: Vec<usize> = (0..outputs).collect();
            let columns = packed.columns(ints(&ids, &gpu));
            let rounded = on(&columns, &cpu()).transpose();
            let close = match format {
                WeightFormat::F32 => 0.0,
                WeightFormat::F16 => 1e-3,
                _ => 2e-2,
            };
            assert_close(on(&rounded, &gpu), matrix.clone(), close);
            let reference = PackedMatrix::new(rounded, WeightFormat::F32);
            let found = packed.linear(on(&x, &gpu), on(&bias, &gpu), gelu);
            assert_close(found, reference.linear(x.clone(), bias.clone(), gelu), 1e-4);
            let found = packed.linear_add(on(&x, &gpu), on(&bias, &gpu), on(&residual, &gpu));
            assert_close(found, reference.linear_add(x.clone(), bias.clone(), residual.clone()), 1e-4);
        }
    }

    #[test]
    fn attention_is_that_of_the_cpu(
        (heads, head_dim, spare) in (1_usize..4, 1_usize..100, 0_usize..6),
        lens in prop::collection::vec((0_usize..300, prop_oneof![Just(1_usize), 0_usize..20]), 1..4),
        is_half in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let is_half = is_half && gpu.supports_dtype(DType::F16);
        let dtype = if is_half { DType::F16 } else { DType::F32 };
        let rows = rows_of(&lens);
        let tokens: usize = rows.iter().map(|row| row.query_len).sum();
        prop_assume!(tokens > 0);
        let buffer = |seed| random(buffer_of(&rows, [heads, head_dim], spare), seed).cast(dtype);
        let (keys, values) = (buffer(seed), buffer(seed ^ 1));
        // Heads out of the midst of others, as a projection gives them.
        let query = random([tokens, 3 * heads, head_dim], seed ^ 4);
        let part = |query: Tensor<3>| query.narrow(1, heads, heads);
        let metadata = |device: &Device| AttentionMetadata::new(rows.clone(), device);
        let found = attend(part(on(&query, &gpu)), on(&keys, &gpu), on(&values, &gpu), &metadata(&gpu));
        assert_close(found, attend(part(query), keys, values, &metadata(&cpu())), 1e-4);
    }

    #[test]
    fn attention_over_pages_is_that_of_the_cpu(
        // Each other width is another kernel, which takes a driver seconds to compile.
        (heads, head_dim) in (1_usize..4, prop::sample::select(&[1_usize, 20, 33][..])),
        lens in prop::collection::vec([0..70_usize, 1..20_usize, 1..20_usize], 1..4),
        is_half in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let dtype = if is_half && gpu.supports_dtype(DType::F16) { DType::F16 } else { DType::F32 };
        let of = |device: &Device| {
            let random = |shape: [usize; 3], part: u64| on(&random(shape, seed ^ part), device);
            let attend = |query, new, pages, rows: Vec<_>| attend_pages(query, new, pages, rows.into());
            attended_in_two_steps(&paged_rows(&lens), [heads, head_dim], dtype, device, random, attend)
        };
        assert_close(of(&gpu), of(&cpu()), 1e-4);
    }

    #[test]
    fn appending_is_that_of_the_cpu(
        (heads, head_dim) in (1_usize..4, 1_usize..40),
        lens in prop::collection::vec((0_usize..12, 0_usize..9), 1..4),
        is_half in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let dtype = if is_half && gpu.supports_dtype(DType::F16) { DType::F16 } else { DType::F32 };
        let rows = rows_of(&lens);
        let tokens: usize = rows.iter().map(|row| row.query_len).sum();
        prop_assume!(tokens > 0);
        let shape = buffer_of(&rows, [heads, head_dim], 3);
        let buffers = [0, 1].map(|part| random(shape, seed ^ part).cast(dtype));
        let new = [2, 3].map(|part| random([tokens, 3 * heads, head_dim], seed ^ part));
        let part = |tensor: Tensor<3>| tensor.narrow(1, heads, heads);
        let here = |tensor: &Tensor<4>| on(tensor, &gpu);
        let metadata = |device: &Device| AttentionMetadata::new(rows.clone(), device);
        let expected = append(buffers.clone(), new.clone().map(part), &metadata(&cpu()));
        let held = buffers.each_ref().map(here);
        let kept = held.clone();
        let found = append(held, new.each_ref().map(|new| part(on(new, &gpu))), &metadata(&gpu));
        for part in 0..2 {
            assert_close(found[part].clone(), expected[part].clone(), 0.0);
            // A buffer that something else refers to is not written.
            assert_close(kept[part].clone(), buffers[part].clone(), 0.0);
        }
    }

    #[test]
    fn norms_and_the_likeliest_are_those_of_the_cpu(
        (rows, width) in (1_usize..40, 1_usize..700),
        seed in any::<u64>(),
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let x = random([rows, width], seed) * 3.0 + 1.0;
        let (gamma, beta) = (random([width], seed ^ 1), random([width], seed ^ 2));
        let found = layer_norm(on(&x, &gpu), on(&gamma, &gpu), on(&beta, &gpu), 1e-5);
        assert_close(found, layer_norm(x.clone(), gamma, beta, 1e-5), 2e-4);
        // Few different numbers, so that there are equal ones: the first of them counts.
        let coarse = (x * 2.0).round();
        let found: Vec<i32> = argmax(on(&coarse, &gpu)).try_into_vec_as().unwrap();
        let expected: Vec<Vec<f32>> =
            coarse.into_data().try_into_vec::<f32>().unwrap().chunks(width).map(<[f32]>::to_vec).collect();
        for (found, row) in found.into_iter().zip(expected) {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(found as usize, row.iter().position(|value| *value == max).unwrap());
        }
    }
}

#[test]
fn a_row_that_is_no_number_has_no_argmax() {
    let Some(gpu) = gpu() else { return };
    let mut values = vec![0.0_f32; 3000];
    (values[5], values[1700]) = (2.0, f32::NAN);
    (values[2000], values[2999]) = (f32::NEG_INFINITY, 1.0);
    let logits = Tensor::<2>::from_data(TensorData::new(values, [3, 1000]), &gpu);
    let found: Vec<i32> = argmax(logits).try_into_vec_as().unwrap();
    assert_eq!((found[0], found[2]), (5, 999));
    assert!(!(0..1000).contains(&found[1]));
}

/// With more columns than a kernel can read as one buffer, and ids on both sides of where they are cut.
#[test]
fn a_matrix_that_is_too_large_for_a_buffer_is_cut() {
    let Some(gpu) = gpu() else { return };
    let Some(limit) = crate::capabilities::largest_buffer(&gpu).filter(|limit| *limit <= 1 << 28) else { return };
    let inputs = 1024;
    let outputs = limit / 4 / inputs + 5000;
    let column = |column: usize| (column % 8191) as f32 / 8191.0;
    let packed = PackedMatrix::from_column_chunks([inputs, outputs], WeightFormat::F32, &gpu, |columns| {
        let row: Vec<f32> = columns.clone().map(column).collect();
        let row = Tensor::<2>::from_data(TensorData::new(row, [1, columns.len()]), &gpu);
        Ok::<_, ()>(row.expand([inputs, columns.len()]))
    });
    let packed = packed.unwrap();
    assert!(packed.blocks.len() > 1);
    let cut = packed.blocks[1].columns.start;
    let ids = [cut, 3, cut - 1, outputs - 1, cut + 7];
    let columns: Vec<f32> = packed.columns(ints(&ids, &gpu)).try_into_vec_as().unwrap();
    for (found, id) in columns.chunks(inputs).zip(ids) {
        assert!(found.iter().all(|element| *element == column(id)), "column {id}");
    }
    let x = Tensor::<2>::full([2, inputs], 1.0 / inputs as f32, &gpu);
    let bias = Tensor::<1>::zeros([outputs], &gpu);
    let product: Vec<f32> = packed.linear(x, bias, None).try_into_vec_as().unwrap();
    assert_eq!(product.len(), 2 * outputs);
    let worst = (0..2 * outputs).map(|at| (product[at] - column(at % outputs)).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "{worst}");
}

#[test]
fn a_row_without_a_finite_logit_has_no_argmax() {
    let Some(gpu) = gpu() else { return };
    check_argmax(&gpu);
}

#[test]
fn lengths_and_ids_may_be_in_any_type_of_integers() {
    let Some(gpu) = gpu() else { return };
    if integer_types(&gpu).is_empty() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: the GPU has one type of integers");
    }
    check_integer_types(&gpu);
}

/// The host does not see what stands on the device.
#[test]
fn a_negative_length_is_none_and_one_beyond_all_keys_is_theirs() {
    let Some(gpu) = gpu() else { return };
    let part = |len: usize, seed: u64| on(&random([1, 2, len, 8], seed), &gpu);
    let new = |tokens: usize, seed: u64| on(&random([tokens, 2, 8], seed), &gpu);
    let metadata = |tokens: usize, context_len: i32| {
        let rows = vec![PackedRow { slot: 0, context_len: 0, query_len: tokens }];
        AttentionMetadata::new(rows, &gpu).with_context_lens(integers(&[context_len], DType::I32, &gpu))
    };
    for time in [1, 16] {
        let of =
            |context_len: i32| attend(new(time, 1), part(20, 2), part(20, 3), &metadata(time, context_len)).into_data();
        for (context_len, expected) in [(-1, 0), (-4, 0), (i32::MIN, 0), (i32::MAX, 20), (i32::MAX - 3, 20)] {
            assert_eq!(of(context_len), of(expected), "{context_len} before {time}");
        }
    }
    // What would be written before the beginning is not written at all.
    let found = append([part(6, 1), part(6, 2)], [new(3, 3), new(3, 4)], &metadata(3, -1));
    assert_eq!(found.map(Tensor::into_data), [part(6, 1), part(6, 2)].map(Tensor::into_data));
}

/// The kernels have one type for both; so these go to the default bodies, of which one keeps to each buffer's own.
#[test]
fn keys_of_another_type_than_values_are_read_and_written_right() {
    let Some(gpu) = gpu() else { return };
    if !gpu.supports_dtype(DType::F16) {
        let _ = writeln!(std::io::stderr(), "SKIPPED: the GPU has no f16");
        return;
    }
    let half = DType::F16;
    let buffers = || [random([1, 1, 8, 64], 1), random([1, 1, 8, 64], 2).cast(half)];
    let new = || [random([1, 1, 64], 3).cast(half), random([1, 1, 64], 4)];
    let rows: Arc<[PackedRow]> = Arc::new([PackedRow { slot: 0, context_len: 4, query_len: 1 }]);
    let layout = |device: &Device| {
        let metadata = AttentionMetadata::new(rows.to_vec(), device);
        let (context_lens, layout) = metadata.on_device();
        (context_lens.into_dispatch(), layout.into_dispatch())
    };
    for is_swapped in [false, true] {
        fn order<T>(is_swapped: bool, [a, b]: [T; 2]) -> [T; 2] {
            if is_swapped { [b, a] } else { [a, b] }
        }
        let appended = |device: &Device| {
            let [keys, values] = order(is_swapped, buffers()).map(|tensor| on(&tensor, device).into_dispatch());
            let [new_keys, new_values] = order(is_swapped, new()).map(|tensor| on(&tensor, device).into_dispatch());
            let (context_lens, layout) = layout(device);
            let (keys, values) =
                <Dispatch as Gpt2Ops>::append(keys, values, new_keys, new_values, context_lens, layout, rows.clone());
            [keys, values].map(|tensor| Tensor::<4>::from_dispatch(tensor).into_data())
        };
        assert_eq!(appended(&gpu), appended(&cpu()));
        let attended = |device: &Device| {
            let [keys, values] = order(is_swapped, buffers()).map(|tensor| on(&tensor, device).into_dispatch());
            let query = on(&random([1, 1, 64], 5), device).into_dispatch();
            let (context_lens, layout) = layout(device);
            let found = <Dispatch as Gpt2Ops>::attend(query, keys, values, context_lens, layout, rows.clone());
            Tensor::<2>::from_dispatch(found)
        };
        assert_close(attended(&gpu), attended(&cpu()), 1e-3);
    }
}

/// A copy of what somebody holds may lie otherwise in memory.
#[test]
fn a_step_goes_on_right_if_somebody_holds_its_state() {
    let Some(gpu) = gpu() else { return };
    let of = |device: &Device| {
        let logits = on(&random([3, 70], 1), device);
        let chosen = Tensor::from_data(TensorData::new((0..15).collect::<Vec<i32>>(), [3, 5]), (device, DType::I32));
        let state = DecodeState { ids: ints(&[1, 2, 3], device), context_lens: ints(&[4, 5, 13], device), chosen };
        let held = state.clone();
        let mut found = Vec::new();
        for DecodeState { ids, context_lens, chosen } in [advance(logits, state), held] {
            for tensor in [ids.try_into_vec_as::<i32>(), context_lens.try_into_vec_as(), chosen.try_into_vec_as()] {
                found.push(tensor.unwrap());
            }
        }
        found
    };
    assert_eq!(of(&gpu), of(&cpu()));
}

/// Safe code that calls the operations themselves, with what a kernel would read or write out of bounds: all of it is refused.
#[test]
#[cfg(not(feature = "fusion"))] // which has threads of its own for it
fn operations_refuse_what_does_not_fit_together() {
    use crate::tests::panic_of;
    type Ops = Dispatch;

    let Some(gpu) = gpu() else { return };
    let floats = |shape: &[usize]| {
        let zeros = TensorData::zeros::<f32, _>(shape.to_vec());
        match shape.len() {
            1 => Tensor::<1>::from_data(zeros, (&gpu, DType::F32)).into_dispatch(),
            2 => Tensor::<2>::from_data(zeros, (&gpu, DType::F32)).into_dispatch(),
            3 => Tensor::<3>::from_data(zeros, (&gpu, DType::F32)).into_dispatch(),
            _ => Tensor::<4>::from_data(zeros, (&gpu, DType::F32)).into_dispatch(),
        }
    };
    let words = |shape: [usize; 3]| Tensor::<3, Int>::zeros(shape, (&gpu, DType::I32)).into_dispatch();
    let some = |count: usize| ints(&vec![0; count], &gpu).into_dispatch();
    let ints_of = |shape: [usize; 2]| Tensor::<2, Int>::zeros(shape, (&gpu, DType::I32)).into_dispatch();
    let refused =
        |what: &str, text: String| assert!(text.contains("and not") || text.contains("positions"), "{what}: {text}");

    // (x, tiles, bias, outputs), of which [2, 16], [2, 16, 32], [40] and 40 fit.
    let linear = |x: &[usize], tiles: &[usize], bias: usize, outputs: usize| {
        let [x, tiles, bias] = [floats(x), floats(tiles), floats(&[bias])];
        Ops::packed_linear(x, tiles, bias, outputs, None)
    };
    drop(linear(&[2, 16], &[2, 16, 32], 40, 40));
    refused("inputs", panic_of(|| linear(&[1, 4096], &[2, 16, 32], 40, 40)));
    refused("inputs of many rows", panic_of(|| linear(&[40, 4096], &[2, 16, 32], 40, 40)));
    refused("tiles", panic_of(|| linear(&[2, 16], &[2, 16, 32], 4000, 4000)));
    refused("more tiles", panic_of(|| linear(&[2, 16], &[9, 16, 32], 40, 40)));
    refused("width of tiles", panic_of(|| linear(&[2, 16], &[2, 16, 8], 40, 40)));
    refused("bias", panic_of(|| linear(&[2, 16], &[2, 16, 32], 4, 40)));
    let add = |residual: &[usize], bias: usize| {
        Ops::packed_linear_add(floats(&[2, 16]), floats(&[2, 16, 32]), floats(&[bias]), floats(residual))
    };
    drop(add(&[2, 40], 40));
    refused("residual", panic_of(|| add(&[1, 40], 40)));
    refused("bias beside a residual", panic_of(|| add(&[2, 40], 4)));

    // (inputs, words, scales), of which 70, [2, 18, 32] and [2, 2, 32] fit.
    let quantized = |inputs: usize, quads: usize, groups: usize| {
        let (words, scales) = (words([2, quads, 32]), floats(&[2, groups, 32]));
        Ops::quantized_linear(floats(&[2, inputs]), words, scales, floats(&[40]), 40, None)
    };
    drop(quantized(70, 18, 2));
    refused("words", panic_of(|| quantized(700, 18, 2)));
    refused("scales", panic_of(|| quantized(70, 18, 1)));
    let columns = |quads: usize, groups: usize, inputs: usize| {
        Ops::quantized_columns(words([2, quads, 32]), floats(&[2, groups, 32]), some(3), inputs)
    };
    drop(columns(18, 2, 70));
    refused("words of columns", panic_of(|| columns(18, 2, 700)));
    refused("scales of columns", panic_of(|| columns(18, 1, 70)));

    // Rows, new tokens and buffers that fit, and others.
    let row = |slot: usize, context_len: usize, query_len: usize| PackedRow { slot, context_len, query_len };
    let rows = [row(0, 7, 2), row(1, 0, 2)];
    let (buffer, new) = ([2, 3, 9, 8], [4, 3, 8]);
    let append = |keys: &[usize], values: &[usize], new: &[usize], rows: &[PackedRow]| {
        let (lens, layout) = (some(rows.len()), ints_of([rows.len(), 3]));
        Ops::append(floats(keys), floats(values), floats(new), floats(new), lens, layout, rows.into())
    };
    drop(append(&buffer, &buffer, &new, &rows));
    refused("heads", panic_of(|| append(&buffer, &buffer, &[4, 30, 8], &rows)));
    refused("width", panic_of(|| append(&buffer, &buffer, &[4, 3, 80], &rows)));
    refused("tokens", panic_of(|| append(&buffer, &buffer, &[5, 3, 8], &rows)));
    refused("capacity of values", panic_of(|| append(&buffer, &[2, 3, 4, 8], &new, &rows)));
    refused("end", panic_of(|| append(&buffer, &buffer, &new, &[row(0, 8, 2), row(1, 0, 2)])));
    refused(
        "an end that overflows",
        panic_of(|| append(&buffer, &buffer, &new, &[row(0, usize::MAX, 2), row(1, 0, 2)])),
    );
    refused("slot", panic_of(|| append(&buffer, &buffer, &new, &[row(0, 7, 2), row(2, 0, 2)])));

    let attend = |query: &[usize], keys: &[usize], values: &[usize], lens: usize, layout: [usize; 2]| {
        Ops::attend(floats(query), floats(keys), floats(values), some(lens), ints_of(layout), rows[..].into())
    };
    drop(attend(&new, &buffer, &buffer, 2, [2, 3]));
    refused("one slot", panic_of(|| attend(&new, &[1, 3, 9, 8], &[1, 3, 9, 8], 2, [2, 3])));
    refused("heads of keys", panic_of(|| attend(&new, &[2, 1, 9, 8], &[2, 1, 9, 8], 2, [2, 3])));
    refused("values", panic_of(|| attend(&new, &buffer, &[2, 3, 4, 8], 2, [2, 3])));
    refused("lengths", panic_of(|| attend(&new, &buffer, &buffer, 1, [2, 3])));
    refused("layout", panic_of(|| attend(&new, &buffer, &buffer, 2, [2, 2])));

    let norm = |width: usize| Ops::layer_norm(floats(&[2, 16]), floats(&[width]), floats(&[16]), 1e-5);
    drop(norm(16));
    refused("gamma", panic_of(|| norm(4)));
    refused("logits", panic_of(|| Ops::argmax(floats(&[5]))));
    let advance = |ids: usize, context_lens: usize, chosen: [usize; 2]| {
        Ops::advance(floats(&[2, 16]), some(ids), some(context_lens), ints_of(chosen))
    };
    drop(advance(2, 2, [2, 4]));
    refused("ids", panic_of(|| advance(1, 2, [2, 4])));
    refused("past", panic_of(|| advance(2, 1, [2, 4])));
    refused("columns", panic_of(|| advance(2, 2, [1, 4])));
}

#[test]
fn keys_that_a_half_cannot_hold_are_not_left_out_silently() {
    let Some(gpu) = gpu() else { return };
    if crate::check_dtype(&gpu, DType::F16).is_ok() {
        check_overflow(&gpu);
    }
}
