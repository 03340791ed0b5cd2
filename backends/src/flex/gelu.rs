//! The two forms of GELU.

use pulp::Simd;

use super::lanes::{LANES, Wide, add, div, exp, load, mul, mul_add, splat, store, sub};
use crate::ops::Gelu;

/// Puts 16 values through GELU.
#[inline(always)]
pub fn gelu<S: Simd, const V: usize>(simd: S, values: &mut [f32; LANES], form: Gelu) {
    let x = load::<S, V>(simd, values);
    let y = match form {
        Gelu::Tanh => tanh_form(simd, x),
        Gelu::Erf => erf_form(simd, x),
    };
    store(simd, y, values);
}

/// `0.5 x (1 + tanh u)` with `u = sqrt(2/pi) (x + 0.044715 x^3)`, as `x / (1 + e^(-2u))`, which is the same function.
#[inline(always)]
fn tanh_form<S: Simd, const V: usize>(simd: S, x: Wide<S, V>) -> Wide<S, V> {
    const SLOPE: f32 = 1.595_769; // 2 sqrt(2/pi)
    let inner = mul_add(simd, mul(simd, x, x), splat(simd, -SLOPE * 0.044_715), splat(simd, -SLOPE));
    let minus_two_u = mul(simd, inner, x);
    div(simd, x, add(simd, exp(simd, minus_two_u), splat(simd, 1.0)))
}

/// `0.5 x (1 + erf(x / sqrt 2))`, with the rational approximation of erfc for positive numbers by Hastings (Abramowitz and
/// Stegun, 1964, 7.1.26), which is within 1.5e-7; a negative x needs erfc of the positive one, and cancels nothing.
#[inline(always)]
fn erf_form<S: Simd, const V: usize>(simd: S, x: Wide<S, V>) -> Wide<S, V> {
    const P: f32 = 0.327_591_1;
    const A: [f32; 5] = [1.061_405_4, -1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];
    let mut z = x;
    for v in 0..V {
        z[v] = simd.mul_f32s(simd.abs_f32s(x[v]), simd.splat_f32s(std::f32::consts::FRAC_1_SQRT_2));
    }
    let t = div(simd, splat(simd, 1.0), mul_add(simd, z, splat(simd, P), splat(simd, 1.0)));
    let mut polynomial = splat(simd, A[0]);
    for a in &A[1..] {
        polynomial = mul_add(simd, polynomial, t, splat(simd, *a));
    }
    let e = exp(simd, sub(simd, splat(simd, 0.0), mul(simd, z, z)));
    let half_erfc = mul(simd, mul(simd, polynomial, t), mul(simd, e, splat(simd, 0.5)));
    let mut share = sub(simd, splat(simd, 1.0), half_erfc);
    for v in 0..V {
        let is_negative = simd.less_than_f32s(x[v], simd.splat_f32s(0.0));
        share[v] = simd.select_f32s(is_negative, half_erfc[v], share[v]);
    }
    mul(simd, x, share)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flex::lanes::with_width;
    use pulp::{Arch, WithSimd};

    struct Apply<'a>(&'a mut [f32; LANES], Gelu);

    impl WithSimd for Apply<'_> {
        type Output = ();

        fn with_simd<S: Simd>(self, simd: S) {
            with_width!(simd: S => gelu(self.0, self.1))
        }
    }

    /// `erf x` from its Taylor series, for x that are not large.
    fn erf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn both_forms_are_what_they_are_called() {
        for start in -500..500 {
            let x: [f32; LANES] = std::array::from_fn(|lane| (start as f32 + lane as f32 / 16.0) / 100.0);
            let (mut tanh, mut exact) = (x, x);
            Arch::new().dispatch(Apply(&mut tanh, Gelu::Tanh));
            Arch::new().dispatch(Apply(&mut exact, Gelu::Erf));
            for ((x, tanh), exact) in x.iter().zip(tanh).zip(exact) {
                let x = f64::from(*x);
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                let expected = 0.5 * x * (1.0 + u.tanh());
                assert!((f64::from(tanh) - expected).abs() < 5e-7 * (1.0 + x.abs()), "tanh form at {x}: {tanh}");
                let expected = 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2));
                assert!((f64::from(exact) - expected).abs() < 5e-7 * (1.0 + x.abs()), "erf form at {x}: {exact}");
            }
        }
        for form in [Gelu::Tanh, Gelu::Erf] {
            let mut far = [0.0; LANES];
            far[..5].copy_from_slice(&[-1e18, 1e18, f32::NAN, -12.0, 12.0]);
            Arch::new().dispatch(Apply(&mut far, form));
            assert!(far[0].abs() < 1e-6 && far[1] == 1e18 && far[2].is_nan(), "{far:?}");
            assert!(far[3].abs() < 1e-6 && far[4] == 12.0 && far[5] == 0.0, "{far:?}");
        }
    }
}
