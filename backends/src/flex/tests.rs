//! Kernels against sums in double precision, over shapes of all kinds.

use burn::tensor::{ElementConversion, bf16, f16};
use proptest::prelude::*;
use pulp::Arch;

use super::attend::{Attention, View, attend};
use super::element::Element;
use super::epilogue::Epilogue;
use super::int8::{self, GROUP, Multiplier, Quantized};
use super::linear::{Packed, linear, pack};
use crate::PackedRow;
use crate::ops::Gelu;
use crate::tests::{buffer_of, rows_of};

/// What kernels can be run on here: what was found, and what there is less of.
pub(super) fn all() -> Vec<Arch> {
    let mut all = vec![Arch::new(), Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    all.extend(pulp::x86::V3::try_new().map(Arch::V3));
    all
}

/// Numbers between -1 and 1 that depend on their place and a seed alone.
pub(super) fn numbers(count: usize, seed: u64) -> Vec<f32> {
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
    let max = x.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    let (per_step, step) = (127.0 / max, f64::from(max / 127.0));
    x.iter().map(|x| f64::from((x * per_step).round_ties_even()) * step).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
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

fn check_attention<E: Element>(lens: &[(usize, usize)], [heads, head_dim]: [usize; 2], spare: usize) {
    let rows = rows_of(lens);
    let tokens: usize = rows.iter().map(|row| row.query_len).sum();
    let [slots, _, capacity, _] = buffer_of(&rows, [heads, head_dim], 0);
    let query = Buffer::<f32>::new([1, heads, tokens, head_dim], 1, 5);
    let states = [6, 7].map(|seed| Buffer::<E>::new([slots, heads, capacity, head_dim], spare, seed));
    let attention = Attention {
        query: query.view(),
        keys: states[0].view(),
        values: states[1].view(),
        rows: &rows,
        shape: [heads, head_dim],
    };
    let width = heads * head_dim;
    let mut found = vec![f32::NAN; tokens * width];
    attend(Arch::new(), attention, &mut found);
    for arch in all() {
        let mut other = vec![f32::NAN; tokens * width];
        attend(arch, attention, &mut other);
        assert_eq!(bits(&other), bits(&found), "{arch:?}");
    }

    let mut token = 0;
    for row in &rows {
        for t in 0..row.query_len {
            let visible = row.context_len + t + 1;
            for head in 0..heads {
                let state = |n: usize, which: usize, column: usize| states[which].at([row.slot, head, n, column]);
                let score = |n: usize| {
                    let product = |c: usize| query.at([0, head, token, c]) * state(n, 0, c);
                    (0..head_dim).map(product).sum::<f64>() / (head_dim as f64).sqrt()
                };
                let weights: Vec<f64> = (0..visible).map(|n| score(n).exp()).collect();
                let total: f64 = weights.iter().sum();
                for column in 0..head_dim {
                    let value: f64 =
                        weights.iter().enumerate().map(|(n, w)| w * state(n, 1, column)).sum::<f64>() / total;
                    let found = f64::from(found[token * width + head * head_dim + column]);
                    assert!((found - value).abs() < 1e-5, "{lens:?}: {found} and {value}");
                }
            }
            // The same bits by itself, with nothing else in the batch.
            let one = PackedRow { context_len: row.context_len + t, query_len: 1, ..*row };
            let view = query.view();
            let view = View { start: view.start + token * head_dim, ..view };
            let mut alone = vec![f32::NAN; width];
            attend(Arch::new(), Attention { query: view, rows: &[one], ..attention }, &mut alone);
            assert_eq!(bits(&alone), bits(&found[token * width..][..width]), "query {t} of {row:?}");
            token += 1;
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
        (heads, head_dim, spare) in (1_usize..4, 1_usize..80, 0_usize..5),
        lens in proptest::collection::vec((0_usize..40, 0_usize..40), 1..4),
    ) {
        check_attention::<f32>(&lens, [heads, head_dim], spare);
        check_attention::<f16>(&lens, [heads, head_dim], spare);
        check_attention::<bf16>(&lens, [heads, head_dim], spare);
    }
}

#[test]
fn a_product_large_enough_for_threads_is_the_same() {
    check_linear::<f32>([130, 96, 700], [true, true, true]);
    check_int8([130, 96, 700], [true, true, true]);
    check_attention::<f32>(&[(70, 40), (12, 40), (103, 1)], [4, 64], 3);
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
