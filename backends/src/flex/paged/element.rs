//! [`PageElement`]: what pages are made of.

use burn::tensor::{bf16, f16};

use crate::flex::element::Element;
use crate::int8_width;

/// Element type of pages: floats, or integers of a byte with a scale for each head and position.
pub trait PageElement: Element {
    /// In which numbers are handed out.
    type Number;

    /// Elements of a page's part for a head, those that stand for scales included.
    fn part_len(page_len: usize, head_dim: usize) -> usize {
        page_len * head_dim
    }

    /// The scale of each position; none if elements are numbers.
    fn scales(_part: &[Self], _page_len: usize) -> &[f32] {
        &[]
    }

    /// The same, to be written.
    fn scales_mut(_part: &mut [Self], _page_len: usize) -> &mut [f32] {
        &mut []
    }

    /// Writes numbers of a head and position as elements, and returns their scale.
    #[inline(always)]
    fn write(x: &[f32], to: &mut [Self]) -> f32 {
        Self::narrow(x, to);
        1.0
    }

    /// What an element stands for.
    fn number(self, scale: f32) -> Self::Number;
}

macro_rules! floats {
    ($($type:ty),*) => {
        $(impl PageElement for $type {
            type Number = Self;

            fn number(self, _: f32) -> Self {
                self
            }
        })*
    };
}
floats!(f32, f16, bf16);

impl PageElement for i8 {
    type Number = f32;

    fn part_len(page_len: usize, head_dim: usize) -> usize {
        4 * page_len * int8_width(head_dim)
    }

    fn scales(part: &[Self], page_len: usize) -> &[f32] {
        bytemuck::cast_slice(&part[part.len() - 4 * page_len..])
    }

    fn scales_mut(part: &mut [Self], page_len: usize) -> &mut [f32] {
        let start = part.len() - 4 * page_len;
        bytemuck::cast_slice_mut(&mut part[start..])
    }

    /// The largest number is 127 times the scale. Numbers that were read are written as they were: the scale is one that comes out again
    /// where the largest number is divided by 127. Of numbers that are none, all become none.
    #[inline(always)]
    fn write(x: &[f32], to: &mut [Self]) -> f32 {
        // Of positive floats, bits are in the order of numbers; infinities and NaN are above all others.
        let mut max = 0;
        for x in x {
            max = max.max(x.abs().to_bits());
        }
        let max = f32::from_bits(max);
        if !max.is_finite() {
            to.fill(0);
            return f32::NAN;
        }
        let scale = stable_scale(max);
        let factor = if scale > 0.0 { scale } else { 1.0 };
        for (to, x) in to.iter_mut().zip(x) {
            // Added to what has no bits for them, fractions are rounded away, to the even one of two neighbours.
            let rounded = (x / factor).clamp(-MAX, MAX) + TO_INTEGER;
            *to = (rounded.to_bits() as u8).cast_signed();
        }
        scale
    }

    fn number(self, scale: f32) -> f32 {
        f32::from(self) * scale
    }
}

/// The largest integer, and the smallest without its sign.
const MAX: f32 = 127.0;

/// 3 x 2^22: the sum with an integer has it in its lowest bits, and no bits for fractions.
const TO_INTEGER: f32 = 12_582_912.0;

/// About a 127th of a number, such that a 127th of 127 times it is the same.
fn stable_scale(max: f32) -> f32 {
    let mut scale = max / MAX;
    // Each is within a last digit of the one before; few take a second turn.
    for _ in 0..4 {
        scale = scale * MAX / MAX;
    }
    scale
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_read_is_written_as_it_was(x in proptest::collection::vec(-1e30_f32..1e30, 1..70), small in -44_i32..1) {
            let x: Vec<f32> = x.into_iter().map(|x| x * 10_f32.powi(small)).collect();
            let (mut first, mut second) = (vec![0; x.len()], vec![0; x.len()]);
            let scale = i8::write(&x, &mut first);
            let read: Vec<f32> = first.iter().map(|x| x.number(scale)).collect();
            let largest = x.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
            for (x, read) in x.iter().zip(&read) {
                prop_assert!((x - read).abs() <= largest / 127.0 * 0.501 + f32::MIN_POSITIVE, "{x} as {read}");
            }
            prop_assert_eq!(i8::write(&read, &mut second).to_bits(), scale.to_bits());
            prop_assert_eq!(first, second);
        }
    }

    #[test]
    fn zeros_are_zeros_and_what_is_no_number_stays_none() {
        let mut to = [1; 3];
        assert_eq!((i8::write(&[0.0; 3], &mut to), to), (0.0, [0; 3]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let scale = i8::write(&[1.0, bad, -2.0], &mut to);
            assert!(to.iter().all(|x| x.number(scale).is_nan()), "{bad}");
        }
    }
}
