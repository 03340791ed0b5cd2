//! Sums of a tile's columns, by the best instructions that there are.
#![allow(clippy::needless_range_loop)] // an index runs over several arrays at once

use burn::tensor::f16;

use super::QUADS;
use super::rows::GroupRows;
use super::weights::OFFSET;
use crate::flex::element::Element;
use crate::ops::TILE;

/// Instructions that multiply bytes. The sums are the same to the last bit with all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Multiplier(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Multiplier {
    /// The best that this machine has.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
                return Self(Kind::Vnni);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self(Kind::Avx2);
            }
        }
        Self(Kind::Portable)
    }

    /// All that this machine has.
    #[cfg(test)]
    pub fn all() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), allow(unused_mut))]
        let mut all = vec![Self(Kind::Portable), Self::best()];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(Self(Kind::Avx2));
        }
        all
    }

    /// Sums of `R` rows and the columns of a tile: `quads` and `scales` are the tile's.
    #[allow(unsafe_code)]
    pub fn product<const R: usize>(
        self,
        quads: &[[i32; TILE]],
        scales: &[[f16; TILE]],
        x: GroupRows<'_, R>,
    ) -> [[f32; TILE]; R] {
        match self.0 {
            Kind::Portable => portable(quads, scales, x),
            // SAFETY: this kind is made only where AVX2 and FMA were found.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { x86::avx2(quads, scales, x) },
            // SAFETY: this kind is made only where AVX-512 and VNNI were found.
            #[cfg(target_arch = "x86_64")]
            Kind::Vnni => unsafe { x86::vnni(quads, scales, x) },
        }
    }
}

fn portable<const R: usize>(quads: &[[i32; TILE]], scales: &[[f16; TILE]], x: GroupRows<'_, R>) -> [[f32; TILE]; R] {
    let mut sums = [[0.0_f32; TILE]; R];
    for (group, quads) in quads.chunks(QUADS).enumerate() {
        let scales = f16::widen(&scales[group]);
        let mut whole = x.starts[group].map(|start| [start; TILE]);
        for (quad, x) in quads.iter().zip(&x.quads[group * QUADS..]) {
            for row in 0..R {
                let x = x[row].to_le_bytes();
                for column in 0..TILE {
                    let weights = quad[column].to_le_bytes();
                    for i in 0..x.len() {
                        whole[row][column] += i32::from(weights[i]) * i32::from(x[i] as i8);
                    }
                }
            }
        }
        for row in 0..R {
            let of_row = x.scales[group][row];
            for column in 0..TILE {
                sums[row][column] = (whole[row][column] as f32).mul_add(scales[column] * of_row, sums[row][column]);
            }
        }
    }
    sums
}

const _: () = assert!(OFFSET == 128, "a byte of a weight is its number plus 128, which `starts` takes off again");

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)] // loads and stores of registers
mod x86 {
    use std::arch::x86_64::*;

    use super::*;
    use crate::flex::prefetch::prefetch_behind;

    /// 16 words of four bytes are multiplied with four bytes, and added to 16 sums, by one instruction.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn vnni<const R: usize>(
        quads: &[[i32; TILE]],
        scales: &[[f16; TILE]],
        x: GroupRows<'_, R>,
    ) -> [[f32; TILE]; R] {
        const V: usize = TILE / 16;
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        for (group, quads) in quads.chunks(QUADS).enumerate() {
            let mut whole = [[_mm512_setzero_si512(); V]; R];
            for row in 0..R {
                whole[row] = [_mm512_set1_epi32(x.starts[group][row]); V];
            }
            for (quad, x) in quads.iter().zip(&x.quads[group * QUADS..]) {
                prefetch_behind(quad);
                // SAFETY: both halves are in the tile's 32 words; no alignment is needed.
                let weights: [_; V] = unsafe {
                    [_mm512_loadu_si512(quad[..16].as_ptr().cast()), _mm512_loadu_si512(quad[16..].as_ptr().cast())]
                };
                for row in 0..R {
                    let x = _mm512_set1_epi32(x[row]);
                    for v in 0..V {
                        whole[row][v] = _mm512_dpbusd_epi32(whole[row][v], weights[v], x);
                    }
                }
            }
            let halves: &[f16; TILE] = &scales[group];
            // SAFETY: both halves are in the tile's 32 scales; no alignment is needed.
            let scales: [_; V] = unsafe {
                [_mm256_loadu_si256(halves[..16].as_ptr().cast()), _mm256_loadu_si256(halves[16..].as_ptr().cast())]
            };
            for row in 0..R {
                let of_row = _mm512_set1_ps(x.scales[group][row]);
                for v in 0..V {
                    let scale = _mm512_mul_ps(_mm512_cvtph_ps(scales[v]), of_row);
                    sums[row][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[row][v]), scale, sums[row][v]);
                }
            }
        }
        let mut out = [[0.0; TILE]; R];
        for row in 0..R {
            for v in 0..V {
                let out = &mut out[row][v * 16..][..16];
                // SAFETY: there is room for 16 floats; no alignment is needed.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sums[row][v]) };
            }
        }
        out
    }

    /// Bytes are widened to 16 bits, since the products of bytes can exceed what AVX2 adds them in; 8 columns at a time, so
    /// that sums of six rows stay in registers.
    #[target_feature(enable = "avx2,fma")]
    pub fn avx2<const R: usize>(
        quads: &[[i32; TILE]],
        scales: &[[f16; TILE]],
        x: GroupRows<'_, R>,
    ) -> [[f32; TILE]; R] {
        const LANES: usize = 8;
        let low_bytes = _mm256_set1_epi16(0xff);
        let mut sums = [[0.0; TILE]; R];
        for (group, quads) in quads.chunks(QUADS).enumerate() {
            let scales = f16::widen(&scales[group]);
            for first in (0..TILE).step_by(LANES) {
                let mut whole = [_mm256_setzero_si256(); R];
                for row in 0..R {
                    whole[row] = _mm256_set1_epi32(x.starts[group][row]);
                }
                for (quad, x) in quads.iter().zip(&x.quads[group * QUADS..]) {
                    // SAFETY: the eight words are in the tile's 32; no alignment is needed.
                    let weights = unsafe { _mm256_loadu_si256(quad[first..][..LANES].as_ptr().cast()) };
                    let even = _mm256_and_si256(weights, low_bytes);
                    let odd = _mm256_srli_epi16::<8>(weights);
                    for row in 0..R {
                        let x = _mm256_set1_epi32(x[row]);
                        let x_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
                        let x_odd = _mm256_srai_epi16::<8>(x);
                        let products = _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd));
                        whole[row] = _mm256_add_epi32(whole[row], products);
                    }
                }
                for row in 0..R {
                    // SAFETY: there are eight scales and sums from `first` on; no alignment is needed.
                    unsafe {
                        let scale = _mm256_loadu_ps(scales[first..][..LANES].as_ptr());
                        let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[group][row]));
                        let sums = sums[row][first..][..LANES].as_mut_ptr();
                        let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[row]), scale, _mm256_loadu_ps(sums));
                        _mm256_storeu_ps(sums, sum);
                    }
                }
            }
        }
        sums
    }
}
