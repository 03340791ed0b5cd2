//! The kernels of GPUs against the CPU: on the device in `GPT2_BURN_TEST_DEVICE`, or on the first that there is.
#![cfg(feature = "flex")]

use std::io::Write;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use proptest::prelude::*;

use crate::{Gelu, PackedMatrix, WeightFormat, append, argmax, attend, attend_shared, layer_norm, runs_ahead};

/// Some device that is not the CPU's; none if there is none, which is said.
fn gpu() -> Option<Device> {
    let named = std::env::var("GPT2_BURN_TEST_DEVICE").unwrap_or_default();
    let names = named.split(',').chain(crate::available());
    let found = names.filter_map(|name| crate::device(name).ok()).find(runs_ahead);
    if found.is_none() {
        let _ = writeln!(std::io::stderr(), "SKIPPED: there is no GPU");
    }
    found
}

fn cpu() -> Device {
    Device::flex()
}

/// The same numbers at each call for the same shape and seed.
fn random<const D: usize>(shape: [usize; D], seed: u64) -> Tensor<D> {
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
fn on<const D: usize>(tensor: &Tensor<D>, device: &Device) -> Tensor<D> {
    let dtype = tensor.dtype();
    Tensor::from_data(tensor.clone().into_data(), (device, dtype))
}

fn ints(values: &[usize], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.iter().map(|value| *value as i32).collect();
    Tensor::from_data(values.as_slice(), (device, DType::I32))
}

#[track_caller]
fn assert_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>, tolerance: f32) {
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
        (heads, time, head_dim) in (1_usize..4, 1_usize..20, 1_usize..100),
        (shared, spare) in (0_usize..150, 0_usize..6),
        past in prop::collection::vec(0_usize..300, 1..4),
        is_half in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let is_half = is_half && gpu.supports_dtype(DType::F16);
        let dtype = if is_half { DType::F16 } else { DType::F32 };
        let (batch, count) = (past.len(), past.iter().max().unwrap() + time + spare);
        let buffer = |seed| random([batch, heads, count, head_dim], seed).cast(dtype);
        let (keys, values) = (buffer(seed), buffer(seed ^ 1));
        let of_all = |seed| random([1, heads, shared.max(1), head_dim], seed).cast(dtype);
        let (shared_keys, shared_values) = (of_all(seed ^ 2), of_all(seed ^ 3));
        // Heads that are not contiguous, as a projection gives them.
        let query = random([batch, time, heads, head_dim], seed ^ 4);
        let split = |query: Tensor<4>| query.swap_dims(1, 2);

        let here = |tensor: &Tensor<4>| on(tensor, &gpu);
        let found = attend(split(here(&query)), here(&keys), here(&values), ints(&past, &gpu));
        let expected = attend(split(query.clone()), keys.clone(), values.clone(), ints(&past, &cpu()));
        assert_close(found, expected, 1e-4);
        let (shared_here, own_here) = ([here(&shared_keys), here(&shared_values)], [here(&keys), here(&values)]);
        let found = attend_shared(split(here(&query)), shared_here, own_here, ints(&past, &gpu));
        let shared = [shared_keys, shared_values];
        let expected = attend_shared(split(query), shared, [keys, values], ints(&past, &cpu()));
        assert_close(found, expected, 1e-4);
    }

    #[test]
    fn appending_is_that_of_the_cpu(
        (heads, time, head_dim) in (1_usize..4, 1_usize..9, 1_usize..40),
        rows in prop::collection::vec((0_usize..12, 0_usize..9), 1..4),
        is_half in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let Some(gpu) = gpu() else { return Ok(()) };
        let dtype = if is_half && gpu.supports_dtype(DType::F16) { DType::F16 } else { DType::F32 };
        let starts: Vec<usize> = rows.iter().map(|(start, _)| *start).collect();
        let counts: Vec<usize> = rows.iter().map(|(_, count)| (*count).min(time)).collect();
        let batch = rows.len();
        let buffers = [0, 1].map(|part| random([batch, heads, 20, head_dim], seed ^ part).cast(dtype));
        let new = [2, 3].map(|part| random([batch, time, heads, head_dim], seed ^ part));
        let split = |tensor: Tensor<4>| tensor.swap_dims(1, 2);
        let here = |tensor: &Tensor<4>| on(tensor, &gpu);
        let expected = append(buffers.clone(), new.clone().map(split), None, &starts, &counts);
        let held = buffers.each_ref().map(here);
        let kept = held.clone();
        let found = append(held, new.each_ref().map(here).map(split), None, &starts, &counts);
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
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert_eq!(found as usize, row.iter().position(|value| *value == most).unwrap());
        }
    }
}

#[test]
fn a_row_that_is_no_number_has_no_likeliest() {
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
    let packed = PackedMatrix::from_pieces([inputs, outputs], WeightFormat::F32, &gpu, |columns| {
        let row: Vec<f32> = columns.clone().map(column).collect();
        let row = Tensor::<2>::from_data(TensorData::new(row, [1, columns.len()]), &gpu);
        Ok::<_, ()>(row.expand([inputs, columns.len()]))
    });
    let packed = packed.unwrap();
    assert!(packed.parts.len() > 1);
    let cut = packed.parts[1].columns.start;
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
