//! The kernels of the CPU against the default bodies.

use burn::backend::Flex;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Device, Distribution, Int, Shape, Tensor};
use proptest::prelude::*;

use crate::elements::Elements;
use crate::ops::{default, default_int8};
use crate::{Gelu, PackedMatrix, WeightFormat, append, attend, attend_shared};

const FORMATS: &[WeightFormat] = &[WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16, WeightFormat::Int8];

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(Shape::new(shape), Distribution::Uniform(-1.0, 1.0), &Device::flex())
}

#[track_caller]
fn assert_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>) {
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

fn flex<const D: usize>(tensor: &Tensor<D>) -> FloatTensor<Flex> {
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
    let (product, sum, columns) = match &packed.parts[0].elements {
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

#[derive(Clone, Debug)]
struct Sizes {
    heads: usize,
    time: usize,
    head_dim: usize,
    shared: usize,
    spare: usize,
    past: Vec<usize>,
}

fn check_attention(sizes: Sizes, dtype: DType, query_is_split: bool) {
    let Sizes { heads, time, head_dim, shared, spare, past } = sizes;
    let (batch, count) = (past.len(), past.iter().max().unwrap() + time);
    let own = || random([batch, heads, count + spare, head_dim]).narrow(2, spare / 2, count).cast(dtype);
    let (keys, values) = (own(), own());
    let [shared_keys, shared_values] = [0, 1].map(|_| random([1, heads, shared, head_dim]).cast(dtype));
    // Heads that are not contiguous, as a projection gives them.
    let query = match query_is_split {
        true => random([batch, time, heads, head_dim]).swap_dims(1, 2),
        false => random([batch, heads, time, head_dim]),
    };
    let lens: Vec<i32> = past.iter().map(|&past| past as i32).collect();
    let past = Tensor::<1, Int>::from_data(lens.as_slice(), &Device::flex());

    let expected = default::attend::<Flex>(flex(&query), flex(&keys), flex(&values), ints(&past));
    let found = attend(query.clone(), keys.clone(), values.clone(), past.clone());
    assert_close(found.clone(), Tensor::from_primitive::<Flex>(expected));
    if shared == 0 {
        return;
    }
    let expected = default::attend_shared::<Flex>(
        flex(&query),
        flex(&shared_keys),
        flex(&shared_values),
        flex(&keys),
        flex(&values),
        ints(&past),
    );
    let found = attend_shared(query, [shared_keys, shared_values], [keys, values], past);
    assert_close(found, Tensor::from_primitive::<Flex>(expected));
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
        (heads, time, head_dim) in (1_usize..4, 1_usize..40, 1_usize..80),
        (shared, spare) in (0_usize..20, 0_usize..6),
        past in prop::collection::vec(0_usize..50, 1..4),
        dtype in prop::sample::select(&[DType::F32, DType::F16, DType::BF16][..]),
        query_is_split in any::<bool>(),
    ) {
        check_attention(Sizes { heads, time, head_dim, shared, spare, past }, dtype, query_is_split);
    }
}

#[test]
fn appending_is_that_of_the_default_body_and_happens_in_place() {
    let (heads, capacity, head_dim) = (3, 20, 8);
    for (starts, counts) in [(vec![4, 4], vec![5, 5]), (vec![0, 13], vec![7, 2]), (vec![20, 3], vec![0, 1])] {
        for dtype in [DType::F32, DType::F16] {
            let buffer = || random([2, heads, capacity, head_dim]).cast(dtype);
            let new = || random([2, 7, heads, head_dim]).swap_dims(1, 2);
            let (left, new) = ([buffer(), buffer()], [new(), new()]);
            let expected = [0, 1].map(|part| {
                let expected = default::append::<Flex>(flex(&left[part]), flex(&new[part]), &starts, &counts);
                Tensor::<4>::from_primitive::<Flex>(expected).into_data()
            });
            let copied = append(left.clone(), new.clone(), None, &starts, &counts);
            assert_eq!(copied.map(Tensor::into_data), expected);
            let start = |tensor: &Tensor<4>| flex(tensor).bytes().as_ptr();
            let before = left.each_ref().map(start);
            let written = append(left, new, None, &starts, &counts);
            assert_eq!(written.each_ref().map(start), before);
            assert_eq!(written.map(Tensor::into_data), expected);
        }
    }
}

#[test]
fn a_matrix_packed_in_pieces_is_the_same() {
    // More columns than a piece has, and a last one that is no whole tile.
    let (inputs, outputs) = (3000, 800);
    let matrix = random([inputs, outputs]);
    for format in FORMATS {
        let mut pieces = 0;
        let in_pieces = PackedMatrix::from_pieces([inputs, outputs], *format, &Device::flex(), |columns| {
            pieces += 1;
            Ok::<_, ()>(matrix.clone().narrow(1, columns.start, columns.len()))
        });
        assert!(pieces > 2);
        let whole = PackedMatrix::new(matrix.clone(), *format);
        let (in_pieces, ids) = (in_pieces.unwrap(), Tensor::<1, Int>::arange(0..outputs as i64, &Device::flex()));
        assert_eq!(in_pieces.bytes(), whole.bytes());
        assert_eq!(in_pieces.columns(ids.clone()).into_data(), whole.columns(ids).into_data(), "{format:?}");
    }
    let failed = PackedMatrix::from_pieces([4, 4], WeightFormat::F32, &Device::flex(), |_| Err("no"));
    assert_eq!(failed.unwrap_err(), "no");
}

#[test]
fn formats_take_the_bytes_that_they_say() {
    let bytes = |format| PackedMatrix::new(random([128, 64]), format).bytes();
    assert_eq!(FORMATS.iter().map(|format| bytes(*format)).collect::<Vec<_>>(), [32_768, 16_384, 16_384, 8_448]);
}
