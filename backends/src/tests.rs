//! The kernels of the CPU against the default bodies.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::backend::Flex;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Device, Distribution, Int, Shape, Tensor, TensorData, f16};
use proptest::prelude::*;

use crate::elements::Elements;
use crate::ops::{GROUP, LEAST_SCALE, default, default_int8};
use crate::{AttentionMetadata, DecodeState, Gelu, PackedMatrix, PackedRow, WeightFormat};
use crate::{advance, append, argmax, attend};

const FORMATS: &[WeightFormat] = &[WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16, WeightFormat::Int8];

pub(crate) fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(Shape::new(shape), Distribution::Uniform(-1.0, 1.0), &Device::flex())
}

#[track_caller]
pub(crate) fn assert_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
    assert_eq!(found.dims(), expected.dims());
    let worst: f32 = (found - expected).abs().max().into_scalar();
    assert!(worst < 1e-4, "they differ by {worst}");
}

/// A random matrix in one of several ways to lie in memory: by itself, transposed, every other row of a longer one, or
/// columns out of the middle of a wider one.
fn lying(rows: usize, columns: usize, way: usize) -> Tensor<2> {
    match way % 4 {
        0 => random([rows, columns]),
        1 => random([columns, rows]).transpose(),
        2 => random([2 * rows, columns]).slice(burn::tensor::s![0..;2, ..]),
        _ => random([rows, columns + 5]).narrow(1, 2, columns),
    }
}

pub(crate) fn flex<const D: usize>(tensor: &Tensor<D>) -> FloatTensor<Flex> {
    tensor.clone().try_into_primitive::<Flex>().unwrap()
}

fn ints<const D: usize>(tensor: &Tensor<D, Int>) -> IntTensor<Flex> {
    tensor.clone().try_into_primitive::<Flex>().unwrap()
}

fn check_products([rows, inputs, outputs]: [usize; 3], ways: [usize; 3], format: WeightFormat, gelu: Option<Gelu>) {
    let (x, matrix) = (lying(rows, inputs, ways[0]), lying(inputs, outputs, ways[1]));
    let (bias, residual) = (random([outputs]), lying(rows, outputs, ways[2]));
    let packed = PackedMatrix::new(matrix.clone(), format);
    assert_eq!(packed.dims(), [inputs, outputs]);
    let ids = Tensor::<1, Int>::from_data([outputs as i32 - 1, 0, outputs as i32 / 2], &Device::flex());
    let tensor = |primitive| Tensor::<2>::from_primitive::<Flex>(primitive);

    let of_bias = || flex(&bias);
    let (product, sum, columns) = match &packed.blocks[0].elements {
        Elements::Float(tiles) => {
            assert_close(
                Tensor::<3>::from_primitive::<Flex>(default::pack::<Flex>(flex(&matrix.cast(format.float())))),
                tiles.clone(),
            );
            (
                default::packed_linear::<Flex>(flex(&x), flex(tiles), of_bias(), outputs, gelu),
                default::packed_linear_add::<Flex>(flex(&x), flex(tiles), of_bias(), flex(&residual)),
                default::packed_columns::<Flex>(flex(tiles), ints(&ids)),
            )
        }
        Elements::Int8 { weights, scales } => {
            let (words, steps) = default_int8::quantize::<Flex>(flex(&matrix), DType::F16);
            let words = Tensor::<3, Int>::from_primitive::<Flex>(words);
            assert_eq!(words.into_data(), weights.clone().into_data());
            assert_close(Tensor::<3>::from_primitive::<Flex>(steps).cast(DType::F32), scales.clone().cast(DType::F32));
            let matrix = || (ints(weights), flex(scales));
            let ((a, b), (c, d), (e, f)) = (matrix(), matrix(), matrix());
            (
                default_int8::linear::<Flex>(flex(&x), a, b, of_bias(), outputs, gelu),
                default_int8::linear_add::<Flex>(flex(&x), c, d, of_bias(), flex(&residual)),
                default_int8::columns::<Flex>(e, f, ints(&ids), inputs),
            )
        }
    };
    assert_close(packed.linear(x.clone(), bias.clone(), gelu), tensor(product));
    assert_close(packed.linear_add(x, bias.clone(), residual), tensor(sum));
    assert_close(packed.columns(ids), tensor(columns));
}

/// Rows of so many context and new tokens, in slots of which some are next to each other and some are not.
pub(crate) fn rows_of(lens: &[(usize, usize)]) -> Vec<PackedRow> {
    let slot = |row: usize| if row < 2 { row + 1 } else { 2 * row + 1 };
    let row = |(row, (context_len, query_len)): (usize, &(usize, usize))| PackedRow {
        slot: slot(row),
        context_len: *context_len,
        query_len: *query_len,
    };
    lens.iter().enumerate().map(row).collect()
}

/// The shape of buffers that have these rows, some slots more, and `spare` positions more than they need.
pub(crate) fn buffer_of(rows: &[PackedRow], [heads, head_dim]: [usize; 2], spare: usize) -> [usize; 4] {
    let slots = rows.iter().map(|row| row.slot).max().unwrap_or(0) + 2;
    let capacity = rows.iter().map(PackedRow::seq_len).max().unwrap_or(0) + spare;
    [slots, heads, capacity, head_dim]
}

fn tokens_of(rows: &[PackedRow]) -> usize {
    rows.iter().map(|row| row.query_len).sum()
}

fn flex_metadata(rows: &[PackedRow]) -> AttentionMetadata {
    AttentionMetadata::new(rows.to_vec(), &Device::flex())
}

fn check_attention(lens: &[(usize, usize)], shape: [usize; 2], spare: usize, dtype: DType, query_is_part: bool) {
    let (rows, [heads, head_dim]) = (rows_of(lens), shape);
    let metadata = flex_metadata(&rows);
    // Positions in the midst of a longer buffer.
    let [slots, _, capacity, _] = buffer_of(&rows, shape, spare);
    let states = || random([slots, heads, capacity + 3, head_dim]).narrow(2, 2, capacity).cast(dtype);
    let (keys, values) = (states(), states());
    // Heads out of the midst of others, as a projection gives them.
    let tokens = tokens_of(&rows);
    let query = match query_is_part {
        true => random([tokens, 3 * heads, head_dim]).narrow(1, heads, heads),
        false => random([tokens, heads, head_dim]),
    };
    let (context_lens, _) = metadata.on_device();
    let expected = default::attend::<Flex>(flex(&query), flex(&keys), flex(&values), ints(&context_lens), &rows);
    assert_close(attend(query, keys, values, &metadata), Tensor::from_primitive::<Flex>(expected));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn products_are_those_of_the_default_bodies(
        (rows, inputs, outputs) in (1_usize..30, 1_usize..200, 1_usize..100),
        ways in any::<[usize; 3]>(),
        format in prop::sample::select(FORMATS),
        gelu in prop::sample::select(&[None, Some(Gelu::Tanh), Some(Gelu::Erf)][..]),
    ) {
        check_products([rows, inputs, outputs], ways, format, gelu);
    }

    #[test]
    fn attention_is_that_of_the_default_body(
        (heads, head_dim, spare) in (1_usize..4, 1_usize..80, 0_usize..6),
        lens in prop::collection::vec((0_usize..50, prop_oneof![Just(1_usize), 1_usize..40]), 1..5),
        dtype in prop::sample::select(&[DType::F32, DType::F16, DType::BF16][..]),
        query_is_part in any::<bool>(),
    ) {
        check_attention(&lens, [heads, head_dim], spare, dtype, query_is_part);
    }
}

#[test]
fn appending_is_that_of_the_default_body_and_happens_in_place() {
    let shape = [3, 8];
    for lens in [&[(4, 5), (4, 5)][..], &[(0, 7), (13, 2), (13, 2)], &[(20, 0), (3, 1), (0, 4)], &[(2, 3), (9, 3)]] {
        let rows = rows_of(lens);
        let metadata = flex_metadata(&rows);
        for dtype in [DType::F32, DType::F16] {
            let buffer = || random(buffer_of(&rows, shape, 5)).cast(dtype);
            let new = || random([tokens_of(&rows), 9, 8]).narrow(1, 3, 3);
            let (left, new) = ([buffer(), buffer()], [new(), new()]);
            // The same, a position at a time.
            let expected = [0, 1].map(|part| {
                let mut token = 0;
                let mut expected: Tensor<4> = left[part].clone();
                for row in &rows {
                    for position in row.context_len..row.seq_len() {
                        let one = new[part].clone().narrow(0, token, 1).reshape([1, 3, 1, 8]).cast(dtype);
                        let at = [row.slot..row.slot + 1, 0..3, position..position + 1, 0..8];
                        expected = expected.slice_assign(at, one);
                        token += 1;
                    }
                }
                expected.into_data()
            });
            let default = [0, 1].map(|part| {
                let appended = default::append::<Flex>(flex(&left[part]), flex(&new[part]), &rows);
                Tensor::<4>::from_primitive::<Flex>(appended).into_data()
            });
            assert_eq!(default, expected, "{lens:?}");
            let copied = append(left.clone(), new.clone(), &metadata);
            assert_eq!(copied.map(Tensor::into_data), expected, "{lens:?}");
            let start = |tensor: &Tensor<4>| flex(tensor).bytes().as_ptr();
            let before = left.each_ref().map(start);
            let written = append(left, new, &metadata);
            assert_eq!(written.each_ref().map(start), before);
            assert_eq!(written.map(Tensor::into_data), expected);
        }
    }
}

#[test]
fn a_matrix_packed_in_chunks_is_the_same() {
    // More columns than a chunk has, and a last one that is no whole tile.
    let (inputs, outputs) = (3000, 800);
    let matrix = random([inputs, outputs]);
    for format in FORMATS {
        let mut chunks = 0;
        let in_chunks = PackedMatrix::from_column_chunks([inputs, outputs], *format, &Device::flex(), |columns| {
            chunks += 1;
            Ok::<_, ()>(matrix.clone().narrow(1, columns.start, columns.len()))
        });
        assert!(chunks > 2);
        let whole = PackedMatrix::new(matrix.clone(), *format);
        let (in_chunks, ids) = (in_chunks.unwrap(), Tensor::<1, Int>::arange(0..outputs as i64, &Device::flex()));
        assert_eq!(in_chunks.bytes(), whole.bytes());
        assert_eq!(in_chunks.columns(ids.clone()).into_data(), whole.columns(ids).into_data(), "{format:?}");
    }
    let failed = PackedMatrix::from_column_chunks([4, 4], WeightFormat::F32, &Device::flex(), |_| Err("no"));
    assert_eq!(failed.unwrap_err(), "no");
}

#[test]
fn formats_take_the_bytes_that_they_say() {
    let bytes = |format| PackedMatrix::new(random([128, 64]), format).bytes();
    assert_eq!(FORMATS.iter().map(|format| bytes(*format)).collect::<Vec<_>>(), [32_768, 16_384, 16_384, 8_448]);
}

/// Random numbers on any device.
fn random_on<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(random(shape).into_data(), (device, DType::F32))
}

/// What a piece of work panics with.
#[track_caller]
pub(crate) fn panic_of<T>(work: impl FnOnce() -> T) -> String {
    let Err(panic) = catch_unwind(AssertUnwindSafe(work)) else { panic!("it went through") };
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Types of integers other than the usual one that a device has.
pub(crate) fn integer_types(device: &Device) -> Vec<DType> {
    let all = [DType::I64, DType::I16, DType::I8, DType::U64, DType::U32, DType::U16, DType::U8];
    all.into_iter().filter(|dtype| device.supports_dtype(*dtype)).collect()
}

/// Lengths or ids in a type of integers.
pub(crate) fn integers(values: &[i32], dtype: DType, device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (device, dtype))
}

/// Everything that takes lengths or ids takes them in any type.
#[track_caller]
pub(crate) fn check_integer_types(device: &Device) {
    let buffer = || random_on([2, 2, 300, 8], device);
    let (query, keys, values) = (random_on([240, 2, 8], device), buffer(), buffer());
    let new = random_on([5, 2, 8], device);
    let packed = PackedMatrix::new(random_on([8, 100], device), WeightFormat::F32);
    let logits = random_on([2, 50], device);
    let all = |dtype: DType| {
        // Lengths with new ones behind them that some of the types do not hold.
        let context_lens = || integers(&[120, 7], dtype, device);
        let metadata = |query_lens: [usize; 2]| {
            let rows = [(0, 120), (1, 7)].map(|(slot, context_len)| PackedRow {
                slot,
                context_len,
                query_len: query_lens[slot],
            });
            AttentionMetadata::new(rows.to_vec(), device).with_context_lens(context_lens())
        };
        let [after, _] = append([keys.clone(), values.clone()], [new.clone(), new.clone()], &metadata([3, 2]));
        let state = DecodeState {
            ids: integers(&[1, 2], dtype, device),
            context_lens: context_lens(),
            chosen: integers(&[9; 6], dtype, device).reshape([2, 3]),
        };
        let state = advance(logits.clone(), state);
        (
            attend(query.clone(), keys.clone(), values.clone(), &metadata([120, 120])).into_data(),
            after.into_data(),
            packed.columns(integers(&[99, 0, 31], dtype, device)).into_data(),
            [state.ids.into_data(), state.context_lens.into_data(), state.chosen.into_data()],
        )
    };
    let expected = all(DType::I32);
    for dtype in integer_types(device) {
        assert_eq!(all(dtype), expected, "{dtype:?}");
    }
}

/// Rows of logits of all kinds, and what is chosen of each.
#[track_caller]
pub(crate) fn check_argmax(device: &Device) {
    const COUNT: usize = 1000;
    let row = |others: f32, which: &[(usize, f32)]| {
        let mut row = vec![others; COUNT];
        which.iter().for_each(|(at, value)| row[*at] = *value);
        row
    };
    let (bottom, top) = (f32::NEG_INFINITY, f32::INFINITY);
    let rows = [
        (row(bottom, &[]), -1),
        (row(0.0, &[(5, f32::NAN)]), -1),
        (row(bottom, &[(COUNT - 1, f32::NAN)]), -1),
        (row(0.0, &[(7, top)]), -1),
        (row(bottom, &[(300, f32::MIN)]), 300),
        (row(f32::MIN, &[]), 0),
        (row(bottom, &[(999, 1.0), (998, -1.0)]), 999),
        (row(0.0, &[(2, f32::MAX), (900, f32::MAX)]), 2),
        (row(-1.0, &[(0, bottom)]), 1),
    ];
    let expected = rows.each_ref().map(|(_, id)| *id);
    let logits: Vec<f32> = rows.iter().flat_map(|(row, _)| row.clone()).collect();
    let logits = Tensor::<2>::from_data(TensorData::new(logits, [rows.len(), COUNT]), device);
    assert_eq!(argmax(logits.clone()).try_into_vec_as::<i32>().unwrap(), expected);

    let ints = |value: i32| integers(&[value; 9], DType::I32, device);
    let state = DecodeState {
        ids: ints(8),
        context_lens: ints(3),
        chosen: integers(&[5; 18], DType::I32, device).reshape([9, 2]),
    };
    let DecodeState { ids, context_lens, chosen } = advance(logits, state);
    let ids: Vec<i32> = ids.try_into_vec_as().unwrap();
    let chosen: Vec<i32> = chosen.try_into_vec_as().unwrap();
    for (row, id) in expected.into_iter().enumerate() {
        assert_eq!(chosen[2 * row..][..2], [5, id], "row {row}");
        // What is looked up next is in the vocabulary, whatever was chosen.
        assert!((0..COUNT as i32).contains(&ids[row]) && (id < 0 || ids[row] == id), "row {row}: {}", ids[row]);
    }
    assert_eq!(context_lens.try_into_vec_as::<i32>().unwrap(), [4; 9]);
}

#[test]
fn a_row_without_a_finite_logit_has_no_argmax() {
    check_argmax(&Device::flex());
    #[cfg(feature = "ndarray")]
    check_argmax(&crate::device("ndarray").unwrap());
    let (bottom, half) = (f16::NEG_INFINITY, f16::from_f32);
    let logits = [[bottom; 3], [half(0.0), f16::NAN, bottom], [bottom, half(-2.0), half(-3.0)]].concat();
    let logits = Tensor::<2>::from_data(TensorData::new(logits, [3, 3]), (&Device::flex(), DType::F16));
    assert_eq!(argmax(logits).try_into_vec_as::<i32>().unwrap(), [-1, -1, 1]);
}

#[test]
fn keys_of_another_type_than_values_are_refused() {
    let of = |dtype: DType| random([1, 1, 8, 64]).cast(dtype);
    let new = |dtype: DType| random([1, 1, 64]).cast(dtype);
    let (whole, half) = (DType::F32, DType::F16);
    let metadata = flex_metadata(&[PackedRow { slot: 0, context_len: 4, query_len: 1 }]);
    let buffers = panic_of(|| append([of(whole), of(half)], [new(whole), new(whole)], &metadata));
    let new = panic_of(|| append([of(whole), of(whole)], [new(whole), new(half)], &metadata));
    let attended = panic_of(|| attend(random([1, 1, 64]), of(whole), of(half), &metadata));
    for text in [buffers, new, attended] {
        assert!(text.contains("types of") && text.contains("F16"), "{text}");
    }
}

#[test]
fn lengths_and_ids_may_be_in_any_type_of_integers() {
    assert_eq!(integer_types(&Device::flex()).len(), 7);
    check_integer_types(&Device::flex());
}

/// With burn's operations, which do not look at it on the host.
#[test]
fn a_negative_length_is_none() {
    let states = || random([1, 2, 20, 8]);
    let (query, keys, values) = (random([5, 2, 8]), states(), states());
    let of = |context_len: i32| {
        let context_len = ints(&integers(&[context_len], DType::I32, &Device::flex()));
        let rows = [PackedRow { slot: 0, context_len: 0, query_len: 5 }];
        let found = default::attend::<Flex>(flex(&query), flex(&keys), flex(&values), context_len, &rows);
        Tensor::<2>::from_primitive::<Flex>(found)
    };
    assert_eq!(of(-4).into_data(), of(0).into_data());
}

#[test]
fn rows_that_do_not_fit_are_refused() {
    let states = || random([2, 2, 20, 8]);
    let row = |slot: usize, context_len: usize, query_len: usize| PackedRow { slot, context_len, query_len };
    for (rows, tokens) in [
        (vec![row(2, 0, 1)], 1),
        (vec![row(0, 20, 1)], 1),
        (vec![row(0, usize::MAX >> 33, 2)], 2),
        (vec![row(0, 3, 2)], 3),
        (vec![row(0, 3, 2), row(1, 0, 1)], 2),
    ] {
        let metadata = flex_metadata(&rows);
        let new = || random([tokens, 2, 8]);
        panic_of(|| attend(new(), states(), states(), &metadata));
        panic_of(|| append([states(), states()], [new(), new()], &metadata));
    }
    assert!(panic_of(|| flex_metadata(&[row(1, 0, 1), row(0, 0, 1), row(1, 3, 1)])).contains("a slot for each"));
}

#[test]
fn an_id_that_is_no_column_is_refused() {
    for format in [WeightFormat::F32, WeightFormat::Int8] {
        let packed = PackedMatrix::new(random([8, 64]), format);
        for id in [64, -1] {
            let text = panic_of(|| packed.columns(integers(&[0, id], DType::I32, &Device::flex())));
            assert!(text.contains(&id.to_string()), "{text}");
        }
    }
}

#[test]
fn a_matrix_in_f64_is_packed_in_every_format() {
    let (matrix, x, bias) = (random([64, 64]), random([3, 64]), random([64]));
    // Just above the middle of two numbers in bf16, by less than the upper half of a double shows.
    let above = Tensor::full([1, 64], 1.0 + 2.0_f64.powi(-8) + 2.0_f64.powi(-22), &Device::flex());
    let matrix = matrix.slice_assign([0..1, 0..64], above);
    for format in FORMATS {
        let product = |matrix: Tensor<2>| PackedMatrix::new(matrix, *format).linear(x.clone(), bias.clone(), None);
        assert_eq!(
            product(matrix.clone().cast(DType::F64)).into_data(),
            product(matrix.clone()).into_data(),
            "{format:?}"
        );
    }
}

#[test]
fn groups_of_tiny_weights_are_quantized_alike_by_kernel_and_default_body() {
    for size in [1e-9, 2e-8, 1e-7, 1e-6, 3.7e-6, 1e-5, 1e-4, 1e-3, 1e-2] {
        let matrix = random([70, 40]) * size;
        let packed = PackedMatrix::new(matrix.clone(), WeightFormat::Int8);
        let Elements::Int8 { weights, scales } = &packed.blocks[0].elements else { panic!("it was quantized") };
        let (words, steps) = default_int8::quantize::<Flex>(flex(&matrix), DType::F16);
        let (words, steps) =
            (Tensor::<3, Int>::from_primitive::<Flex>(words), Tensor::<3>::from_primitive::<Flex>(steps));
        assert_eq!(words.into_data(), weights.clone().into_data(), "{size}");
        assert_eq!(steps.into_data(), scales.clone().into_data(), "{size}");
        // No weight is further from its own than half a scale, and no scale larger than f16 has to have it.
        let ids = integers(&(0..40).collect::<Vec<i32>>(), DType::I32, &Device::flex());
        let found: Vec<f32> = packed.columns(ids).try_into_vec_as().unwrap(); // [40, 70]
        let expected: Vec<f32> = matrix.transpose().try_into_vec_as().unwrap();
        for (found, expected) in found.chunks(70).zip(expected.chunks(70)) {
            for (found, expected) in found.chunks(GROUP).zip(expected.chunks(GROUP)) {
                let max = expected.iter().fold(0.0_f32, |max, weight| max.max(weight.abs()));
                let scale = (max / 127.0 * 1.001).max(max / 127.0 + LEAST_SCALE);
                let worst = found.iter().zip(expected).fold(0.0_f32, |worst, (a, b)| worst.max((a - b).abs()));
                assert!(worst <= scale * 0.501, "{worst} of {max}");
            }
        }
    }
}

/// An infinite key would get a score of minus infinity, and be as if it were not there.
pub fn check_overflow(device: &Device) {
    for time in [1, 5, 20] {
        let new = |[first, rest]: [f32; 2]| {
            let values = [vec![first; 4], vec![rest; 4 * (time - 1)]].concat();
            Tensor::<3>::from_data(TensorData::new(values, [time, 1, 4]), device)
        };
        let metadata = AttentionMetadata::new(vec![PackedRow { slot: 0, context_len: 0, query_len: time }], device);
        let buffer = || Tensor::<4>::ones([1, 1, 32, 4], (device, DType::F16));
        for (key, is_kept) in [(65_500.0, true), (70_000.0, false), (-70_000.0, false), (1e30, false)] {
            let [keys, values] = append([buffer(), buffer()], [new([key, 0.5]), new([1.0, 2.0])], &metadata);
            let query = new([-key.signum(), -key.signum()]);
            let found = attend(query, keys, values, &metadata).try_into_vec_as::<f32>().unwrap();
            assert!(found.iter().all(|x| x.is_finite() == is_kept), "{key} of {time}: {found:?}");
        }
        let [_, values] = append([buffer(), buffer()], [new([1.0, 2.0]), new([1e6, 1.0])], &metadata);
        let values = values.cast(DType::F32).try_into_vec_as::<f32>().unwrap();
        assert!(values[..4].iter().all(|x| x.is_nan()) && values[4..].iter().all(|x| x.is_finite()), "{values:?}");
    }
}

#[test]
fn keys_that_a_half_cannot_hold_are_not_left_out_silently() {
    check_overflow(&Device::flex());
}
