//! Kernels against sums in double precision, over shapes of all kinds.

use burn::tensor::{ElementConversion, bf16, f16};
use proptest::prelude::*;
use pulp::Arch;

use super::attend::{Attention, Segment, View, attend};
use super::element::Element;
use super::epilogue::Epilogue;
use super::int8::{self, GROUP, Multiplier, Quantized};
use super::linear::{Packed, linear, pack};
use crate::ops::Gelu;

/// What kernels can be run on here: what was found, and what there is less of.
fn all() -> Vec<Arch> {
    let mut all = vec![Arch::new(), Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    all.extend(pulp::x86::V3::try_new().map(Arch::V3));
    all
}

/// Numbers between -1 and 1 that depend on their place and a seed alone.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let number = |index: usize| {
        let mixed = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed.wrapping_mul(0xd134_2543_de82_ef95);
        let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(number).collect()
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
}

fn check_linear<E: Element>([rows, inputs, outputs]: [usize; 3], [bias, use_gelu, residual]: [bool; 3]) {
    let x = numbers(rows * inputs, 1);
    let weights: Vec<E> = numbers(inputs * outputs, 2).into_iter().map(|x| x.elem()).collect();
    let tiles = pack(inputs, outputs, |input, output| weights[input * outputs + output]);
    let packed = Packed::new(&tiles, inputs, outputs);
    let (of_bias, of_residual) = (numbers(outputs, 3), numbers(rows * outputs, 4));
    let epilogue = Epilogue {
        bias: bias.then_some(&of_bias),
        gelu: use_gelu.then_some(Gelu::Tanh),
        residual: residual.then_some(&of_residual),
    };
    let mut found = vec![f32::NAN; rows * outputs];
    linear(Arch::new(), &x, packed, epilogue, &mut found);
    for arch in all() {
        let mut other = vec![f32::NAN; rows * outputs];
        linear(arch, &x, packed, epilogue, &mut other);
        assert_eq!(bits(&other), bits(&found), "{arch:?}");
    }
    for row in 0..rows {
        let x = &x[row * inputs..][..inputs];
        for output in 0..outputs {
            let product =
                |input: usize| f64::from(x[input]) * f64::from(E::widen(&[weights[input * outputs + output]])[0]);
            let mut expected: f64 = (0..inputs).map(product).sum();
            expected += f64::from(u8::from(bias)) * f64::from(of_bias[output]);
            expected = if use_gelu { gelu(expected) } else { expected };
            expected += f64::from(u8::from(residual)) * f64::from(of_residual[row * outputs + output]);
            let difference = (f64::from(found[row * outputs + output]) - expected).abs();
            assert!(difference < 1e-5 * (1.0 + (inputs as f64).sqrt()), "{rows} x {inputs} x {outputs}: {difference}");
        }
        // The same bits by itself.
        let mut alone = vec![f32::NAN; outputs];
        let residual = epilogue.residual.map(|residual| &residual[row * outputs..][..outputs]);
        linear(Arch::new(), x, packed, Epilogue { residual, ..epilogue }, &mut alone);
        assert_eq!(bits(&alone), bits(&found[row * outputs..][..outputs]), "row {row} of {rows}");
    }
    for output in 0..outputs {
        let column: Vec<u32> = packed.column(output).map(|x| E::widen(&[x])[0].to_bits()).collect();
        let expected = (0..inputs).map(|input| E::widen(&[weights[input * outputs + output]])[0].to_bits());
        assert_eq!(column, expected.collect::<Vec<_>>());
    }
}

/// Products of rounded numbers are compared with the same products in double precision.
fn check_int8([rows, inputs, outputs]: [usize; 3], [bias, use_gelu, residual]: [bool; 3]) {
    let x = numbers(rows * inputs, 1);
    let weights = numbers(inputs * outputs, 2);
    let (words, scales) = int8::quantize(inputs, outputs, |input, output| weights[input * outputs + output]);
    let matrix = Quantized::new(&words, &scales, [inputs, outputs]);
    let (of_bias, of_residual) = (numbers(outputs, 3), numbers(rows * outputs, 4));
    let epilogue = Epilogue {
        bias: bias.then_some(&of_bias),
        gelu: use_gelu.then_some(Gelu::Tanh),
        residual: residual.then_some(&of_residual),
    };
    let mut found = vec![f32::NAN; rows * outputs];
    int8::linear(Arch::new(), Multiplier::best(), &x, matrix, epilogue, &mut found);
    for (arch, multiplier) in all().into_iter().flat_map(|arch| Multiplier::all().into_iter().map(move |m| (arch, m))) {
        let mut other = vec![f32::NAN; rows * outputs];
        int8::linear(arch, multiplier, &x, matrix, epilogue, &mut other);
        assert_eq!(bits(&other), bits(&found), "{arch:?}, {multiplier:?}");
    }
    let columns: Vec<Vec<f32>> = (0..outputs).map(|output| matrix.column(output).collect()).collect();
    for row in 0..rows {
        let x = &x[row * inputs..][..inputs];
        let rounded: Vec<f64> = x.chunks(GROUP).flat_map(rounded).collect();
        for (output, column) in columns.iter().enumerate() {
            let mut expected: f64 = rounded.iter().zip(column).map(|(x, weight)| x * f64::from(*weight)).sum();
            expected += f64::from(u8::from(bias)) * f64::from(of_bias[output]);
            expected = if use_gelu { gelu(expected) } else { expected };
            expected += f64::from(u8::from(residual)) * f64::from(of_residual[row * outputs + output]);
            let difference = (f64::from(found[row * outputs + output]) - expected).abs();
            assert!(difference < 1e-5 * (1.0 + (inputs as f64).sqrt()), "{rows} x {inputs} x {outputs}: {difference}");
        }
        let mut alone = vec![f32::NAN; outputs];
        let residual = epilogue.residual.map(|residual| &residual[row * outputs..][..outputs]);
        int8::linear(Arch::new(), Multiplier::best(), x, matrix, Epilogue { residual, ..epilogue }, &mut alone);
        assert_eq!(bits(&alone), bits(&found[row * outputs..][..outputs]), "row {row} of {rows}");
    }
}

/// Numbers in steps of the largest of them divided by 127.
fn rounded(x: &[f32]) -> Vec<f64> {
    let most = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let (per_step, step) = (127.0 / most, f64::from(most / 127.0));
    x.iter().map(|x| f64::from((x * per_step).round_ties_even()) * step).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    heads: usize,
    time: usize,
    head_dim: usize,
    shared: usize,
    spare: usize,
}

/// A `[B, H, N, D]` view with other numbers before, between and behind what it shows.
struct Buffer<E> {
    elements: Vec<E>,
    strides: [usize; 3],
}

impl<E: Element> Buffer<E> {
    fn new([batch, heads, positions, head_dim]: [usize; 4], spare: usize, seed: u64) -> Self {
        let strides = [heads * (positions + spare) * head_dim, (positions + spare) * head_dim, head_dim];
        let elements = numbers(7 + batch * strides[0], seed).into_iter().map(|x| x.elem()).collect();
        Self { elements, strides }
    }

    fn view(&self) -> View<'_, E> {
        View { elements: &self.elements, start: 7, strides: self.strides }
    }

    fn at(&self, [row, head, position, column]: [usize; 4]) -> f64 {
        let [of_row, of_head, of_position] = self.strides;
        let at = 7 + row * of_row + head * of_head + position * of_position + column;
        f64::from(E::widen(&[self.elements[at]])[0])
    }
}

fn segment<E: Element>(buffers: &[Buffer<E>; 2], of_all_rows: bool) -> Segment<'_, E> {
    let [keys, values] = [&buffers[0], &buffers[1]].map(|buffer| {
        let mut view = buffer.view();
        view.strides[0] *= usize::from(!of_all_rows);
        view
    });
    Segment { keys, values }
}

fn check_attention<E: Element>(sizes: Sizes, past: &[usize]) {
    let Sizes { batch, heads, time, head_dim, shared, spare } = sizes;
    let keys = past.iter().max().unwrap() + time;
    let query = Buffer::<f32>::new([batch, heads, time, head_dim], 1, 5);
    let own = [6, 7].map(|seed| Buffer::<E>::new([batch, heads, keys, head_dim], spare, seed));
    let common = [8, 9].map(|seed| Buffer::<E>::new([1, heads, shared, head_dim], spare, seed));
    let attention = Attention {
        query: query.view(),
        shared: (shared > 0).then(|| (segment(&common, true), shared)),
        own: segment(&own, false),
        past,
        keys,
        shape: [batch, heads, time, head_dim],
    };
    let width = heads * head_dim;
    let mut found = vec![f32::NAN; batch * time * width];
    attend(Arch::new(), attention, &mut found);
    for arch in all() {
        let mut other = vec![f32::NAN; batch * time * width];
        attend(arch, attention, &mut other);
        assert_eq!(bits(&other), bits(&found), "{arch:?}");
    }

    for row in 0..batch {
        for t in 0..time {
            for head in 0..heads {
                let visible = (past[row] + t + 1).min(keys);
                let key = |n: usize, which: usize, column: usize| match n.checked_sub(shared) {
                    None => common[which].at([0, head, n, column]),
                    Some(n) => own[which].at([row, head, n, column]),
                };
                let score = |n: usize| {
                    let product = |c: usize| query.at([row, head, t, c]) * key(n, 0, c);
                    (0..head_dim).map(product).sum::<f64>() / (head_dim as f64).sqrt()
                };
                let weights: Vec<f64> = (0..shared + visible).map(|n| score(n).exp()).collect();
                let total: f64 = weights.iter().sum();
                for column in 0..head_dim {
                    let value: f64 =
                        weights.iter().enumerate().map(|(n, w)| w * key(n, 1, column)).sum::<f64>() / total;
                    let found = f64::from(found[(row * time + t) * width + head * head_dim + column]);
                    assert!((found - value).abs() < 1e-5, "{sizes:?} {past:?}: {found} and {value}");
                }
            }
        }
    }

    // One query at a time has the same bits.
    for t in 0..time {
        let past: Vec<usize> = past.iter().map(|past| past + t).collect();
        let query = View { start: 7 + t * head_dim, ..query.view() };
        let one = Attention { query, past: &past, shape: [batch, heads, 1, head_dim], ..attention };
        let mut alone = vec![f32::NAN; batch * width];
        attend(Arch::new(), one, &mut alone);
        for row in 0..batch {
            let together = &found[(row * time + t) * width..][..width];
            assert_eq!(bits(&alone[row * width..][..width]), bits(together), "query {t} of row {row}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn linear_is_the_product_and_its_rows_do_not_depend_on_each_other(
        shape in (0_usize..40, 0_usize..70, 0_usize..100),
        epilogue in any::<[bool; 3]>(),
    ) {
        let shape = [shape.0, shape.1, shape.2];
        check_linear::<f32>(shape, epilogue);
        check_linear::<f16>(shape, epilogue);
        check_linear::<bf16>(shape, epilogue);
    }

    #[test]
    fn a_product_with_eight_bits_is_that_of_the_rounded_numbers(
        shape in (0_usize..20, 0_usize..300, 0_usize..100),
        epilogue in any::<[bool; 3]>(),
    ) {
        check_int8([shape.0, shape.1, shape.2], epilogue);
    }

    #[test]
    fn attention_is_the_weighted_mean_and_its_queries_do_not_depend_on_each_other(
        (batch, heads, time, head_dim) in (1_usize..4, 1_usize..4, 1_usize..40, 1_usize..80),
        (shared, spare) in (0_usize..20, 0_usize..5),
        past in proptest::collection::vec(0_usize..40, 3),
    ) {
        let sizes = Sizes { batch, heads, time, head_dim, shared, spare };
        check_attention::<f32>(sizes, &past[..batch]);
        check_attention::<f16>(sizes, &past[..batch]);
        check_attention::<bf16>(sizes, &past[..batch]);
    }
}

#[test]
fn a_product_large_enough_for_threads_is_the_same() {
    check_linear::<f32>([130, 96, 700], [true, true, true]);
    check_int8([130, 96, 700], [true, true, true]);
    check_attention::<f32>(Sizes { batch: 2, heads: 4, time: 40, head_dim: 64, shared: 33, spare: 3 }, &[70, 12]);
}

#[test]
fn the_largest_sums_of_eight_bits_do_not_overflow() {
    // Every product is 127 x 127, of both signs.
    for sign in [1.0, -1.0] {
        let x = [1.0; 256];
        let (words, scales) = int8::quantize(256, 32, |_, _| sign);
        let matrix = Quantized::new(&words, &scales, [256, 32]);
        for multiplier in Multiplier::all() {
            let mut out = [f32::NAN; 32];
            int8::linear(Arch::new(), multiplier, &x, matrix, Epilogue::default(), &mut out);
            assert!(out.iter().all(|sum| (sum - sign * 256.0).abs() < 0.1), "{multiplier:?}: {out:?}");
        }
    }
}

#[test]
fn a_number_that_is_not_finite_reaches_the_sums_of_its_row_and_no_others() {
    let (words, scales) = int8::quantize(70, 40, |_, _| 0.5);
    let matrix = Quantized::new(&words, &scales, [70, 40]);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = [1.0; 3 * 70];
        x[70 + 66] = bad;
        let mut out = [0.0; 3 * 40];
        int8::linear(Arch::new(), Multiplier::best(), &x, matrix, Epilogue::default(), &mut out);
        for (row, out) in out.chunks(40).enumerate() {
            assert!(out.iter().all(|sum| sum.is_finite() == (row != 1)), "row {row}: {out:?}");
        }
    }
}

/// Also one that cannot be added to.
#[test]
fn a_length_beyond_all_keys_sees_all_of_them() {
    let (heads, head_dim, keys) = (2, 8, 20);
    for time in [1, 16] {
        let query = Buffer::<f32>::new([1, heads, time, head_dim], 0, 5);
        let own = [6, 7].map(|seed| Buffer::<f32>::new([1, heads, keys, head_dim], 0, seed));
        let of = |past: usize| {
            let mut out = vec![f32::NAN; time * heads * head_dim];
            let (query, own, past) = (query.view(), segment(&own, false), &[past]);
            let attention = Attention { query, shared: None, own, past, keys, shape: [1, heads, time, head_dim] };
            attend(Arch::new(), attention, &mut out);
            bits(&out)
        };
        assert_eq!(of(usize::MAX - 3), of(keys));
    }
}
