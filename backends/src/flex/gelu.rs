//! GELU in its tanh form.

use pulp::Simd;

use super::lanes::{LANES, add, div, exp, load, mul, mul_add, splat, store};

/// `0.5 x (1 + tanh u)` with `u = sqrt(2/pi) (x + 0.044715 x^3)`, as `x / (1 + e^(-2u))`, which is the same function.
#[inline(always)]
pub fn gelu<S: Simd, const V: usize>(simd: S, values: &mut [f32; LANES]) {
    const SLOPE: f32 = 1.595_769; // 2 sqrt(2/pi)
    let x = load::<S, V>(simd, values);
    let inner = mul_add(simd, mul(simd, x, x), splat(simd, -SLOPE * 0.044_715), splat(simd, -SLOPE));
    let minus_two_u = mul(simd, inner, x);
    let denominator = add(simd, exp(simd, minus_two_u), splat(simd, 1.0));
    store(simd, div(simd, x, denominator), values);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flex::lanes::with_width;
    use pulp::{Arch, WithSimd};

    struct Gelu<'a>(&'a mut [f32; LANES]);

    impl WithSimd for Gelu<'_> {
        type Output = ();

        fn with_simd<S: Simd>(self, simd: S) {
            with_width!(simd: S => gelu(self.0))
        }
    }

    #[test]
    fn it_is_the_tanh_form() {
        for start in -1200..1200 {
            let x: [f32; LANES] = std::array::from_fn(|lane| (start as f32 + lane as f32 / 16.0) / 100.0);
            let mut found = x;
            Arch::new().dispatch(Gelu(&mut found));
            for (x, found) in x.iter().zip(found) {
                let x = f64::from(*x);
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                let expected = 0.5 * x * (1.0 + u.tanh());
                assert!((f64::from(found) - expected).abs() < 5e-7 * (1.0 + x.abs()), "gelu({x}) = {found}");
            }
        }
        let mut far = [
            -1e30,
            1e30,
            f32::NEG_INFINITY,
            f32::INFINITY,
            f32::NAN,
            0.0,
            -0.0,
            1.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
        ];
        Arch::new().dispatch(Gelu(&mut far));
        assert!(far[0].abs() < 1e-6 && far[1] == 1e30 && far[4].is_nan() && far[5] == 0.0, "{far:?}");
    }
}
