//! Element types of weights, widened to f32 as they are read.

use burn::tensor::{bf16, f16};

/// An element type of weights.
pub trait Element: burn::tensor::Element + bytemuck::Pod {
    /// The same numbers in f32.
    fn widen<const N: usize>(from: &[Self; N]) -> [f32; N];
}

impl Element for f32 {
    #[inline(always)]
    fn widen<const N: usize>(from: &[Self; N]) -> [f32; N] {
        *from
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen<const N: usize>(from: &[Self; N]) -> [f32; N] {
        let mut wide = [0.0; N];
        for i in 0..N {
            wide[i] = f32::from_bits(u32::from(from[i].to_bits()) << 16);
        }
        wide
    }
}

impl Element for f16 {
    /// By moving the bits to where f32 has them and multiplying by 2^112 for the other bias of the exponent, which is right
    /// for subnormal numbers too; infinity and NaN come out finite from that, and get their exponent back.
    #[inline(always)]
    fn widen<const N: usize>(from: &[Self; N]) -> [f32; N] {
        const BIAS: f32 = f32::from_bits((127 + 112) << 23);
        let mut wide = [0.0; N];
        for i in 0..N {
            let bits = u32::from(from[i].to_bits());
            let magnitude = f32::from_bits((bits & 0x7fff) << 13) * BIAS;
            let exponent = if magnitude >= 65_536.0 { f32::INFINITY.to_bits() } else { 0 };
            wide[i] = f32::from_bits(magnitude.to_bits() | exponent | ((bits & 0x8000) << 16));
        }
        wide
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            for (found, expected) in
                [(f16::widen(&[half])[0], half.to_f32()), (bf16::widen(&[brain])[0], brain.to_f32())]
            {
                assert!(found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()), "{bits:x}");
            }
        }
    }
}
