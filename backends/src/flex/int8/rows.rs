//! Rows of `x` as whole numbers from -127 to 127, and their scales.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::weights::OFFSET;
use super::{GROUP, QUAD, QUADS};
use crate::flex::schedule::Group;

/// Numbers above which several threads round them.
const WORTH_THREADS: usize = 1 << 15;

/// Rows in groups that are multiplied together: within one, first what belongs to the first inputs of all its rows, then to
/// the second ones...
pub struct Rows {
    /// Four numbers as the bytes of a word: `[quads, rows]` of each group of rows.
    quads: Vec<i32>,
    /// `[groups of inputs, rows]` of each group of rows.
    scales: Vec<f32>,
    /// What the sum of a group of inputs starts with, which undoes the offset of the weights; `[groups of inputs, rows]` of
    /// each group of rows.
    starts: Vec<i32>,
    inputs: usize,
}

/// `R` rows that are multiplied together.
#[derive(Clone, Copy)]
pub struct GroupRows<'a, const R: usize> {
    pub quads: &'a [[i32; R]],
    pub scales: &'a [[f32; R]],
    pub starts: &'a [[i32; R]],
}

impl Rows {
    /// Rounds `x`, `[rows, inputs]`.
    pub fn new(arch: Arch, x: &[f32], groups: &[Group], inputs: usize) -> Self {
        let rows: usize = groups.iter().map(|group| group.rows).sum();
        let (of_row, scales_of_row) = (inputs.div_ceil(QUAD), inputs.div_ceil(GROUP));
        let mut quads = vec![0; rows * of_row];
        let mut scales = vec![0.0; rows * scales_of_row];
        let mut starts = vec![0; rows * scales_of_row];
        let Some(size) = groups.first().map(|group| group.rows).filter(|_| inputs > 0) else {
            return Self { quads, scales, starts, inputs };
        };
        let rounded = quads.par_chunks_mut(size * of_row);
        let of_groups = scales.par_chunks_mut(size * scales_of_row).zip(starts.par_chunks_mut(size * scales_of_row));
        let work = x.par_chunks(size * inputs).zip(rounded).zip(of_groups);
        let least = (WORTH_THREADS / (size * inputs)).max(1);
        work.with_min_len(least).for_each(|((x, quads), (scales, starts))| {
            arch.dispatch(Round { x, inputs, quads, scales, starts });
        });
        Self { quads, scales, starts, inputs }
    }

    /// The rows of a group, of which there are `R`.
    pub fn part<const R: usize>(&self, group: Group) -> GroupRows<'_, R> {
        let (of_row, scales_of_row) = (self.inputs.div_ceil(QUAD), self.inputs.div_ceil(GROUP));
        let (quads, scales) = (group.first * of_row, group.first * scales_of_row);
        GroupRows {
            quads: self.quads[quads..][..R * of_row].as_chunks().0,
            scales: self.scales[scales..][..R * scales_of_row].as_chunks().0,
            starts: self.starts[scales..][..R * scales_of_row].as_chunks().0,
        }
    }
}

/// Rounds the rows of one group.
struct Round<'a> {
    x: &'a [f32],
    inputs: usize,
    quads: &'a mut [i32],
    scales: &'a mut [f32],
    starts: &'a mut [i32],
}

impl WithSimd for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let rows = self.x.len() / self.inputs;
        for (row, x) in self.x.chunks_exact(self.inputs).enumerate() {
            for (group, x) in x.chunks(GROUP).enumerate() {
                let mut filled = [0.0; GROUP];
                filled[..x.len()].copy_from_slice(x);
                let (words, scale, sum) = round(&filled);
                self.scales[group * rows + row] = scale;
                self.starts[group * rows + row] = -OFFSET * sum;
                let quads = self.quads[group * QUADS * rows + row..].iter_mut().step_by(rows);
                quads.zip(&words[..x.len().div_ceil(QUAD)]).for_each(|(quad, word)| *quad = *word);
            }
        }
    }
}

/// The numbers divided by their scale as words of four bytes, the scale, which is not finite if a number is not, and the sum of
/// the rounded numbers.
#[inline(always)]
fn round(x: &[f32; GROUP]) -> ([i32; QUADS], f32, i32) {
    /// Adding 1.5 x 2^23 rounds to a whole number, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// Below, the reciprocal of the scale might overflow; such numbers count as 0.
    const TINY: f32 = 1e-30;
    let mut max = 0;
    for x in x {
        max = max.max(x.abs().to_bits());
    }
    let max = f32::from_bits(max);
    let per_step = if max > TINY { 127.0 / max } else { 0.0 };
    let (mut bytes, mut sum) = ([0_u8; GROUP], 0);
    for i in 0..GROUP {
        let whole = (x[i] * per_step + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
        bytes[i] = whole as u8;
        sum += i32::from(bytes[i] as i8);
    }
    let mut words = [0; QUADS];
    for i in 0..QUADS {
        words[i] = i32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]);
    }
    (words, max / 127.0, sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_to_steps_of_the_largest_divided_by_127() {
        let mut x: [f32; GROUP] = std::array::from_fn(|i| i as f32 - 30.0);
        x[5] = 63.5;
        let (words, scale, sum) = round(&x);
        assert_eq!(scale, 0.5);
        let found: Vec<f32> =
            words.iter().flat_map(|word| word.to_le_bytes()).map(|b| f32::from(b as i8) * 0.5).collect();
        assert_eq!(found, x);
        assert_eq!(sum as f32 * 0.5, x.iter().sum::<f32>());
    }

    #[test]
    fn zeros_have_no_scale_and_what_is_not_finite_shows_in_it() {
        assert_eq!(round(&[0.0; GROUP]), ([0; QUADS], 0.0, 0));
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = [1.0; GROUP];
            x[63] = bad;
            assert!(!round(&x).1.is_finite());
        }
    }
}
