//! Element types of weights, widened to f32 as they are read.
#![allow(unsafe_code)] // one instruction that no portable code is compiled to

#[cfg(target_arch = "x86_64")]
use std::any::TypeId;

use burn::tensor::{ElementConversion, bf16, f16};
use half::slice::HalfFloatSliceExt;
use pulp::Simd;

use super::lanes::LANES;

/// An element type of weights.
pub trait Element: burn::tensor::Element + bytemuck::Pod {
    /// Whether numbers that f32 holds are infinite in it.
    const OVERFLOWS: bool = false;

    /// The same numbers in f32.
    fn widen<const N: usize>(from: &[Self; N]) -> [f32; N];

    /// The nearest numbers to these. What is too large for a half is NaN, as `ops::default::rounded` says.
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.iter_mut().zip(from).for_each(|(to, x)| *to = x.elem());
    }

    /// The same, by the machine's own instructions if `S` has them.
    #[inline(always)]
    fn widen_with<S: Simd, const N: usize>(_: S, from: &[Self; N]) -> [f32; N] {
        Self::widen(from)
    }
}

impl Element for f32 {
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }

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

/// Integers that a scale belongs to.
impl Element for i8 {
    #[inline(always)]
    fn widen<const N: usize>(from: &[Self; N]) -> [f32; N] {
        let mut wide = [0.0; N];
        for i in 0..N {
            wide[i] = f32::from(from[i]);
        }
        wide
    }
}

impl Element for f16 {
    const OVERFLOWS: bool = true;

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
        to.iter_mut().filter(|x| x.is_infinite()).for_each(|x| *x = Self::NAN);
    }

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

    #[inline(always)]
    fn widen_with<S: Simd, const N: usize>(_: S, from: &[Self; N]) -> [f32; N] {
        #[cfg(target_arch = "x86_64")]
        if TypeId::of::<S>() == TypeId::of::<pulp::x86::V4>() && N.is_multiple_of(LANES) {
            let mut wide = [0.0; N];
            for (from, to) in from.as_chunks::<LANES>().0.iter().zip(wide.as_chunks_mut::<LANES>().0) {
                // SAFETY: a `V4` exists only where AVX-512 was found.
                unsafe { x86::widen(from, to) };
            }
            return wide;
        }
        Self::widen(from)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps, _mm512_storeu_ps};

    use super::{LANES, f16};

    /// One instruction, where shifting and multiplying take eight.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub fn widen(from: &[f16; LANES], to: &mut [f32; LANES]) {
        // SAFETY: 16 halves are read and 16 floats written, as many as there are; no alignment is needed.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast()))) };
    }
}

/// Sixteen elements from `start` on, zeros where there are no more.
#[inline(always)]
pub fn lanes_at<S: Simd, E: Element>(simd: S, elements: &[E], start: usize) -> [f32; LANES] {
    if let Some(lanes) = elements.get(start..start + LANES).and_then(|lanes| lanes.as_array()) {
        return E::widen_with::<S, LANES>(simd, lanes);
    }
    let mut lanes = [E::zeroed(); LANES];
    let rest = &elements[start..];
    lanes[..rest.len()].copy_from_slice(rest);
    E::widen_with(simd, &lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Widen<'a>(&'a [f16; LANES]);

    impl pulp::WithSimd for Widen<'_> {
        type Output = [f32; LANES];

        fn with_simd<S: Simd>(self, simd: S) -> [f32; LANES] {
            f16::widen_with(simd, self.0)
        }
    }

    #[test]
    fn instructions_widen_as_shifts_do() {
        for start in (0..=u16::MAX).step_by(LANES) {
            let halves = std::array::from_fn(|lane| f16::from_bits(start + lane as u16));
            for (found, half) in pulp::Arch::new().dispatch(Widen(&halves)).iter().zip(halves) {
                assert!(found.to_bits() == half.to_f32().to_bits() || (found.is_nan() && half.is_nan()), "{half:?}");
            }
        }
    }

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
