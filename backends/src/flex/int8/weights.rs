//! Weights as whole numbers from -127 to 127, and their scales.

use burn::tensor::f16;
use rayon::prelude::*;

use super::{GROUP, QUAD, QUADS};
use crate::flex::element::Element;
use crate::ops::{MAX_STEPS, TILE};
use crate::pages::zeroed;

/// What is added to a weight, so that its byte has no sign.
pub const OFFSET: i32 = 128;

/// A matrix `[inputs, outputs]` in tiles of 32 columns.
#[derive(Clone, Copy)]
pub struct Quantized<'a> {
    /// `[tiles, quads, 32]`: four weights, each with 128 added, as the bytes of a word; columns behind the last, and inputs
    /// behind the last of a quad, are 0 + 128.
    pub quads: &'a [[i32; TILE]],
    /// `[tiles, groups, 32]`.
    pub scales: &'a [[f16; TILE]],
    pub inputs: usize,
    pub outputs: usize,
}

impl<'a> Quantized<'a> {
    /// What [`quantize`] made of `[inputs, outputs]`.
    ///
    /// # Panics
    ///
    /// If there are not as many words or scales.
    pub fn new(quads: &'a [i32], scales: &'a [f16], [inputs, outputs]: [usize; 2]) -> Self {
        let tiles = outputs.div_ceil(TILE);
        assert_eq!(quads.len(), tiles * inputs.div_ceil(QUAD) * TILE, "words of a packed [{inputs}, {outputs}]");
        assert_eq!(scales.len(), tiles * inputs.div_ceil(GROUP) * TILE, "scales of a packed [{inputs}, {outputs}]");
        Self { quads: quads.as_chunks().0, scales: scales.as_chunks().0, inputs, outputs }
    }

    /// Words and scales of a tile.
    pub fn tile(&self, tile: usize) -> (&'a [[i32; TILE]], &'a [[f16; TILE]]) {
        let (quads, groups) = (self.inputs.div_ceil(QUAD), self.inputs.div_ceil(GROUP));
        (&self.quads[tile * quads..][..quads], &self.scales[tile * groups..][..groups])
    }

    /// Column `output` of the matrix: what its numbers stand for.
    pub fn column(&self, output: usize) -> impl Iterator<Item = f32> + 'a {
        let ((quads, scales), column) = (self.tile(output / TILE), output % TILE);
        let scales = scales.iter().flat_map(move |scales| [f16::widen(&[scales[column]])[0]; GROUP]);
        let weights = quads.iter().flat_map(move |quad| quad[column].to_le_bytes());
        weights.zip(scales).map(|(weight, scale)| (i32::from(weight) - OFFSET) as f32 * scale).take(self.inputs)
    }
}

/// Words and scales of a matrix: `at(input, output)` is an element.
///
/// A group's scale is its largest weight divided by 127, rounded to f16: that weight is 127 or -127. In groups without a weight
/// above a thousandth or so, where rounding is coarse, the scale may be larger, and is never less than f16's smallest number:
/// so each weight is within half a scale of its own. If one of a group's weights is not finite, nor is its scale, and so
/// nothing that is computed from it.
pub fn quantize(inputs: usize, outputs: usize, at: impl Fn(usize, usize) -> f32 + Sync) -> (Vec<i32>, Vec<f16>) {
    let (of_column, groups) = (inputs.div_ceil(QUAD), inputs.div_ceil(GROUP));
    let tiles = outputs.div_ceil(TILE);
    let mut quads = zeroed::<i32>(tiles * of_column * TILE);
    let mut scales = zeroed::<f16>(tiles * groups * TILE);
    if inputs == 0 {
        return (quads, scales);
    }
    let tiles = quads.par_chunks_exact_mut(of_column * TILE).zip(scales.par_chunks_exact_mut(groups * TILE));
    tiles.enumerate().for_each(|(tile, (quads, scales))| {
        quads.fill(i32::from_le_bytes([OFFSET as u8; QUAD]));
        let groups = quads.as_chunks_mut::<TILE>().0.chunks_mut(QUADS).zip(scales.as_chunks_mut::<TILE>().0);
        for (group, (quads, scales)) in groups.enumerate() {
            let columns = TILE.min(outputs - tile * TILE);
            for column in 0..columns {
                let count = GROUP.min(inputs - group * GROUP);
                let mut weights = [0.0; GROUP];
                for (index, weight) in weights[..count].iter_mut().enumerate() {
                    *weight = at(group * GROUP + index, tile * TILE + column);
                }
                scales[column] = scale(&weights);
                for (quad, weights) in quads.iter_mut().zip(weights.as_chunks().0) {
                    quad[column] = word(weights, scales[column].to_f32());
                }
            }
        }
    });
    (quads, scales)
}

/// The largest magnitude divided by 127; not finite if a weight is not.
fn scale(weights: &[f32]) -> f16 {
    // As whole numbers, magnitudes have the same order, and NaN is the largest.
    let max = f32::from_bits(weights.iter().map(|weight| weight.abs().to_bits()).max().unwrap_or(0));
    let nearest = f16::from_f32(max / 127.0);
    // Never so for what is not finite, nor where f16 has its 11 significant bits.
    match nearest.to_f32() * MAX_STEPS < max {
        true => f16::from_bits(nearest.to_bits() + 1),
        false => nearest,
    }
}

/// Four weights, each with 128 added, in a word.
fn word(weights: &[f32; QUAD], scale: f32) -> i32 {
    let byte = |weight: &f32| {
        let whole = if scale > 0.0 { (weight / scale).round_ties_even().clamp(-127.0, 127.0) } else { 0.0 };
        (whole as i32 + OFFSET) as u8
    };
    i32::from_le_bytes(weights.each_ref().map(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::LEAST_SCALE;

    #[test]
    fn a_weight_is_within_half_a_step_of_its_own() {
        let at = |input: usize, output: usize| ((input * 37 + output * 11) % 101) as f32 * 0.01 - 0.5;
        for [inputs, outputs] in [[1, 1], [63, 33], [64, 32], [130, 70]] {
            let (quads, scales) = quantize(inputs, outputs, at);
            let matrix = Quantized::new(&quads, &scales, [inputs, outputs]);
            for output in 0..outputs {
                let column: Vec<f32> = matrix.column(output).collect();
                assert_eq!(column.len(), inputs);
                for (input, found) in column.iter().enumerate() {
                    let group = input / GROUP * GROUP..(input / GROUP * GROUP + GROUP).min(inputs);
                    let max = group.map(|input| at(input, output).abs()).fold(0.0, f32::max);
                    // Half a step, and what rounding the scale to f16 costs.
                    let allowed = max / 127.0 * 0.5 + max * 1e-3;
                    assert!((found - at(input, output)).abs() <= allowed, "[{input}, {output}]: {found}");
                }
            }
        }
    }

    /// Their scale would be less than half of f16's smallest number, or would be rounded to a multiple of it that is far from it.
    #[test]
    fn groups_of_tiny_weights_are_kept_to_half_a_scale_that_f16_can_hold() {
        for max in (-40..0).map(|exponent| 1.37 * 2.0_f32.powi(exponent)).chain([3.7e-6, 3.8e-6, 7.6e-6, 1.1e-5]) {
            // The largest is among them, of either sign.
            let at = |input: usize, output: usize| {
                max * ((input * 37 + output * 11) % 64) as f32 / 63.0 * [1.0, -1.0][input % 2]
            };
            let (quads, scales) = quantize(64, 32, at);
            let matrix = Quantized::new(&quads, &scales, [64, 32]);
            for (output, scale) in scales.iter().enumerate() {
                let step = scale.to_f32();
                let wanted = max / 127.0;
                assert!(
                    step >= wanted * 0.996 && step <= (wanted + LEAST_SCALE).max(wanted * 1.001),
                    "{step} of {max}"
                );
                for (input, found) in matrix.column(output).enumerate() {
                    let distance = (found - at(input, output)).abs();
                    assert!(distance <= step * 0.5001, "[{input}, {output}] of {max}: {found}");
                }
            }
        }
        // Nothing else is another number than it was.
        let (_, scales) = quantize(64, 1, |input, _| input as f32 * 1e-3);
        assert_eq!(scales[0], f16::from_f32(63.0 * 1e-3 / 127.0));
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (quads, scales) = quantize(70, 3, |input, output| if (input, output) == (3, 1) { bad } else { 1.0 });
            let matrix = Quantized::new(&quads, &scales, [70, 3]);
            assert!(matrix.column(1).take(GROUP).all(|weight| !weight.is_finite()));
            assert!(matrix.column(1).skip(GROUP).chain(matrix.column(0)).all(|weight| (weight - 1.0).abs() < 1e-3));
        }
    }
}
