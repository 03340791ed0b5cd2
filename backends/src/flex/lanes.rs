//! Sixteen floats at a time, whatever the width of the machine's registers.
//!
//! Kernels are written for sixteen lanes and hold them in as many registers as it takes: one with AVX-512, two with
//! AVX2, four with NEON, sixteen where there are no vectors. So their sums have the same order, and their results the same
//! bits, on all of them.
//!
//! Loops are spelled out where closures would be shorter: a closure does not inherit the vector instructions of the
//! function around it, and is not inlined into it.

use pulp::Simd;

/// Floats that are computed at a time.
pub const LANES: usize = 16;

/// Sixteen lanes in `V` registers.
pub type Wide<S, const V: usize> = [<S as Simd>::f32s; V];

/// Calls `$kernel::<S, V>(simd, $arguments)`, or `$kernel::<S, V, E>`, with as many registers as sixteen lanes take.
macro_rules! with_width {
    ($simd:ident: $S:ident $(, $E:ident)? => $kernel:ident($($argument:expr),*)) => {
        match $S::F32_LANES {
            16 => $kernel::<$S, 1 $(, $E)?>($simd, $($argument),*),
            8 => $kernel::<$S, 2 $(, $E)?>($simd, $($argument),*),
            4 => $kernel::<$S, 4 $(, $E)?>($simd, $($argument),*),
            _ => $kernel::<$S, 16 $(, $E)?>($simd, $($argument),*),
        }
    };
}
pub(super) use with_width;

#[inline(always)]
pub fn splat<S: Simd, const V: usize>(simd: S, x: f32) -> Wide<S, V> {
    [simd.splat_f32s(x); V]
}

#[inline(always)]
pub fn load<S: Simd, const V: usize>(_: S, x: &[f32; LANES]) -> Wide<S, V> {
    let (x, _) = S::as_simd_f32s(x);
    let mut wide = [x[0]; V];
    wide.copy_from_slice(&x[..V]);
    wide
}

#[inline(always)]
pub fn store<S: Simd, const V: usize>(_: S, wide: Wide<S, V>, out: &mut [f32; LANES]) {
    let (out, _) = S::as_mut_simd_f32s(out);
    out[..V].copy_from_slice(&wide);
}

/// `a * b + c`, rounded once.
#[inline(always)]
pub fn mul_add<S: Simd, const V: usize>(simd: S, a: Wide<S, V>, b: Wide<S, V>, c: Wide<S, V>) -> Wide<S, V> {
    let mut out = c;
    for v in 0..V {
        out[v] = simd.mul_add_f32s(a[v], b[v], c[v]);
    }
    out
}

macro_rules! lane_by_lane {
    ($($name:ident: $operation:ident),*) => {
        $(#[inline(always)]
        pub fn $name<S: Simd, const V: usize>(simd: S, a: Wide<S, V>, b: Wide<S, V>) -> Wide<S, V> {
            let mut out = a;
            for v in 0..V {
                out[v] = simd.$operation(a[v], b[v]);
            }
            out
        })*
    };
}
lane_by_lane!(add: add_f32s, sub: sub_f32s, mul: mul_f32s, div: div_f32s, max: max_f32s);

/// `a` in lanes in which `condition` is above 0, `b` in the others.
#[inline(always)]
pub fn select<S: Simd, const V: usize>(simd: S, condition: Wide<S, V>, a: Wide<S, V>, b: Wide<S, V>) -> Wide<S, V> {
    let mut out = a;
    for v in 0..V {
        out[v] = simd.select_f32s(simd.less_than_f32s(simd.splat_f32s(0.0), condition[v]), a[v], b[v]);
    }
    out
}

/// The sum of all lanes: halves are added until one is left.
#[inline(always)]
pub fn sum<S: Simd, const V: usize>(simd: S, x: Wide<S, V>) -> f32 {
    let mut a = [0.0; LANES];
    store(simd, x, &mut a);
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            a[lane] += a[lane + half];
        }
        half /= 2;
    }
    a[0]
}

/// The largest of all lanes.
#[inline(always)]
pub fn largest<S: Simd, const V: usize>(simd: S, x: Wide<S, V>) -> f32 {
    let mut a = [0.0; LANES];
    store(simd, x, &mut a);
    let mut max = a[0];
    for value in a {
        max = if value > max { value } else { max };
    }
    max
}

/// `e^x` for x up to 88, within 2e-7 of it in proportion; 0 below -87.3, NaN of NaN.
///
/// `x = n ln 2 + r` with a whole n, so that `e^x = 2^n e^r` with a small r (Cody and Waite, 1980); `e^r` is the polynomial
/// of Cephes' `expf`.
#[inline(always)]
pub fn exp<S: Simd, const V: usize>(simd: S, x: Wide<S, V>) -> Wide<S, V> {
    const SMALLEST: f32 = -87.3;
    const LARGEST: f32 = 88.3;
    /// Adding 1.5 x 2^23 rounds to a whole number, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const POLYNOMIAL: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5];
    let mut out = x;
    for v in 0..V {
        let is_zero = simd.less_than_f32s(x[v], simd.splat_f32s(SMALLEST));
        let clamped = simd.min_f32s(simd.splat_f32s(LARGEST), simd.max_f32s(simd.splat_f32s(SMALLEST), x[v]));
        let shifted = simd.mul_add_f32s(clamped, simd.splat_f32s(std::f32::consts::LOG2_E), simd.splat_f32s(ROUND));
        let n = simd.sub_f32s(shifted, simd.splat_f32s(ROUND));
        let r = simd.mul_add_f32s(n, simd.splat_f32s(-LN_2_HIGH), clamped);
        let r = simd.mul_add_f32s(n, simd.splat_f32s(-LN_2_LOW), r);
        let mut polynomial = simd.splat_f32s(POLYNOMIAL[0]);
        for coefficient in &POLYNOMIAL[1..] {
            polynomial = simd.mul_add_f32s(polynomial, r, simd.splat_f32s(*coefficient));
        }
        let e_r = simd.mul_add_f32s(polynomial, simd.mul_f32s(r, r), simd.add_f32s(r, simd.splat_f32s(1.0)));
        // n is added to the exponent of 1.
        let n = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
        let two_n = simd.transmute_f32s_u32s(simd.add_u32s(n, simd.splat_u32s(1.0_f32.to_bits())));
        let positive = simd.select_f32s(is_zero, simd.splat_f32s(0.0), simd.mul_f32s(e_r, two_n));
        // Not every machine's minimum and maximum keep a NaN.
        out[v] = simd.select_f32s(simd.equal_f32s(x[v], x[v]), positive, x[v]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::{Arch, WithSimd};

    struct Exp<'a>(&'a [f32; LANES]);

    impl WithSimd for Exp<'_> {
        type Output = [f32; LANES];

        fn with_simd<S: Simd>(self, simd: S) -> [f32; LANES] {
            with_width!(simd: S => exp_of(self.0))
        }
    }

    fn exp_of<S: Simd, const V: usize>(simd: S, x: &[f32; LANES]) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        store(simd, exp::<S, V>(simd, load(simd, x)), &mut out);
        out
    }

    #[test]
    fn exp_is_e_to_the_x() {
        for start in -900..880 {
            let x: [f32; LANES] = std::array::from_fn(|lane| (start as f32 + lane as f32 / 16.0) / 10.0);
            for found in [Arch::new().dispatch(Exp(&x)), pulp::Scalar::new().vectorize(Exp(&x))] {
                for (x, found) in x.iter().zip(found) {
                    let expected = if *x < -87.3 { 0.0 } else { f64::from(*x).exp() };
                    assert!((f64::from(found) - expected).abs() <= 2e-7 * expected, "exp({x}) = {found}");
                }
            }
        }
        let special = [
            f32::NEG_INFINITY,
            f32::MIN,
            -0.0,
            0.0,
            f32::NAN,
            88.0,
            -87.0,
            -1e-30,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
        ];
        for found in [Arch::new().dispatch(Exp(&special)), pulp::Scalar::new().vectorize(Exp(&special))] {
            assert_eq!(found[..4], [0.0, 0.0, 1.0, 1.0]);
            assert!(found[4].is_nan(), "{}", found[4]);
        }
    }
}
