//! The product.

use pulp::{Arch, Simd, WithSimd};

use super::dot::Multiplier;
use super::rows::Rows;
use super::weights::Quantized;
use crate::flex::epilogue::Epilogue;
use crate::flex::output::Output;
use crate::flex::schedule::{Group, for_tiles, split};

/// Rows of `x` that are multiplied at a time: with AVX-512, as many as there are registers for their sums of whole numbers
/// and of floats.
const MAX_ROWS: usize = 6;

/// Below as many multiplications threads cost more than they bring.
const WORTH_THREADS: usize = 600_000;

/// `out = x W`, and what `epilogue` says; `x` is `[rows, inputs]`, `out` is `[rows, outputs]`.
///
/// # Panics
///
/// If the lengths do not fit together.
pub fn linear(
    arch: Arch,
    multiplier: Multiplier,
    x: &[f32],
    weights: Quantized<'_>,
    epilogue: Epilogue<'_>,
    out: &mut [f32],
) {
    let Quantized { inputs, outputs, .. } = weights;
    if outputs == 0 {
        return assert!(out.is_empty(), "length of the result");
    }
    let rows = out.len() / outputs;
    assert_eq!((x.len(), out.len()), (rows * inputs, rows * outputs), "lengths of x and of the result");
    epilogue.check(rows, outputs);
    if rows == 0 {
        return;
    }
    let groups = split(rows, MAX_ROWS);
    let x = Rows::new(arch, x, &groups, inputs);
    let out = Output::new(out, outputs);
    // A weight costs about as much to read as to multiply with six rows.
    let worth_threads = inputs * outputs * (rows + 6) >= WORTH_THREADS;
    for_tiles(outputs, &groups, worth_threads, |tile, groups| {
        arch.dispatch(Tile { tile, weights, multiplier, groups, x: &x, epilogue, out });
    });
}

/// One tile of the weights with the rows of some groups.
struct Tile<'a> {
    tile: usize,
    weights: Quantized<'a>,
    multiplier: Multiplier,
    groups: &'a [Group],
    x: &'a Rows,
    epilogue: Epilogue<'a>,
    out: Output<'a>,
}

impl WithSimd for Tile<'_> {
    type Output = ();

    #[allow(unsafe_code)]
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (quads, scales) = self.weights.tile(self.tile);
        for group in self.groups {
            macro_rules! for_rows {
                ($($rows:literal)*) => {
                    match group.rows {
                        $($rows => {
                            let sums = self.multiplier.product::<$rows>(quads, scales, self.x.part(*group));
                            // SAFETY: tasks differ in their tile or in their groups of rows.
                            unsafe { self.epilogue.write(simd, sums, [group.first, self.tile], self.out) };
                        })*
                        rows => unreachable!("{rows} rows at a time"),
                    }
                };
            }
            for_rows!(1 2 3 4 5 6);
        }
    }
}
