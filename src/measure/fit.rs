//! [`CurveFit`]: what of a measured curve is constant, grows linearly, and grows with the square.

use std::fmt;

/// `y = c[0] + c[1] x + c[2] x^2`, without negative parts.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct CurveFit {
    /// Constant, linear and quadratic.
    pub coefficients: [f64; 3],
}

/// How a curve grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Growth {
    /// Three quarters and more of the value are the constant part.
    Constant,
    /// Of what grows, most grows linearly.
    Linear,
    /// Of what grows, most grows with the square.
    Quadratic,
}

impl fmt::Display for Growth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Constant => "nearly constant",
            Self::Linear => "linear",
            Self::Quadratic => "quadratic",
        })
    }
}

impl CurveFit {
    /// The best fit of points `(x, y)`, with all parts from 0 up: least squares of the relative deviations, over every choice
    /// of parts. None of fewer than three points, or if a coordinate is not a positive number.
    pub fn new(points: &[(f64, f64)]) -> Option<Self> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if points.len() < 3 || !points.iter().all(|(x, y)| positive(*x) && positive(*y)) {
            return None;
        }
        // In units of the largest x, so that the equations are well conditioned.
        let max = points.iter().map(|(x, _)| *x).fold(0.0, f64::max);
        let scaled: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x / max, *y)).collect();
        let fits = (1..8_u8).filter_map(|parts| {
            let used: Vec<i32> = (0..3).filter(|power| parts >> power & 1 == 1).collect();
            let solution = least_squares(&scaled, &used)?;
            solution.iter().all(|c| *c >= 0.0).then(|| {
                let mut coefficients = [0.0; 3];
                used.iter().zip(&solution).for_each(|(&power, c)| coefficients[power as usize] = *c);
                (deviation(&scaled, &coefficients), coefficients)
            })
        });
        let (_, scaled) = fits.min_by(|a, b| a.0.total_cmp(&b.0))?;
        let unscaled = |power: i32| scaled[power as usize] / max.powi(power);
        Some(Self { coefficients: [unscaled(0), unscaled(1), unscaled(2)] })
    }

    /// Its value at x.
    pub fn at(&self, x: f64) -> f64 {
        let [a, b, c] = self.coefficients;
        a + b * x + c * x * x
    }

    /// Shares of the value at x that are constant, linear and quadratic.
    pub fn shares(&self, x: f64) -> [f64; 3] {
        let [a, b, c] = self.coefficients;
        [a, b * x, c * x * x].map(|part| part / self.at(x))
    }

    /// In a word, how it grows up to x.
    pub fn growth(&self, x: f64) -> Growth {
        match self.shares(x) {
            [constant, _, _] if constant > 0.75 => Growth::Constant,
            [_, linear, quadratic] if quadratic > linear => Growth::Quadratic,
            _ => Growth::Linear,
        }
    }
}

/// Sum of the squares of relative deviations.
fn deviation(points: &[(f64, f64)], [a, b, c]: &[f64; 3]) -> f64 {
    points.iter().map(|(x, y)| ((a + b * x + c * x * x) / y - 1.0).powi(2)).sum()
}

/// Solves the normal equations for the powers of x in `used`, each point weighted by 1 / y^2.
fn least_squares(points: &[(f64, f64)], used: &[i32]) -> Option<Vec<f64>> {
    let n = used.len();
    let mut rows = vec![vec![0.0; n + 1]; n];
    for (x, y) in points {
        for (row, &power) in rows.iter_mut().zip(used) {
            let left = x.powi(power) / y;
            row.iter_mut().zip(used).for_each(|(cell, &other)| *cell += left * x.powi(other) / y);
            row[n] += left;
        }
    }
    // Gauss and Jordan; the matrix is positive definite unless points coincide.
    for pivot in 0..n {
        let scale = rows[pivot][pivot];
        if scale.abs() < 1e-12 * rows[0][0].abs() || !scale.is_finite() {
            return None;
        }
        rows[pivot].iter_mut().for_each(|cell| *cell /= scale);
        let base = rows[pivot].clone();
        for (_, row) in rows.iter_mut().enumerate().filter(|(at, _)| *at != pivot) {
            let factor = row[pivot];
            row.iter_mut().zip(&base).for_each(|(cell, base)| *cell -= factor * base);
        }
    }
    Some(rows.into_iter().map(|row| row[n]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(of: impl Fn(f64) -> f64) -> CurveFit {
        let points: Vec<(f64, f64)> = [16.0, 64.0, 200.0, 500.0, 900.0].map(|x| (x, of(x))).into();
        CurveFit::new(&points).unwrap()
    }

    #[test]
    fn parts_of_a_polynomial_are_found() {
        for wanted in [[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.5, 0.0], [10.0, 0.1, 0.002], [0.0, 0.0, 5.0]] {
            let [a, b, c] = wanted;
            let found = fit(|x| a + b * x + c * x * x).coefficients;
            assert!(found.iter().zip(&wanted).all(|(f, w)| (f - w).abs() < 1e-6 * w.max(1.0)), "{found:?}, {wanted:?}");
        }
    }

    #[test]
    fn no_part_is_negative_and_growth_has_a_name() {
        let falling = fit(|x| 100.0 - 0.01 * x);
        assert!(falling.coefficients.iter().all(|c| *c >= 0.0));
        assert_eq!(falling.growth(900.0), Growth::Constant);
        assert_eq!(fit(|x| 5.0 + x).growth(900.0), Growth::Linear);
        let quadratic = fit(|x| 5.0 + 0.1 * x + 0.001 * x * x);
        assert_eq!(quadratic.growth(900.0), Growth::Quadratic);
        assert!((quadratic.shares(900.0).iter().sum::<f64>() - 1.0).abs() < 1e-9);
        assert!(CurveFit::new(&[(1.0, 1.0), (2.0, 2.0)]).is_none());
        for y in [f64::NAN, 0.0, f64::INFINITY] {
            assert!(CurveFit::new(&[(1.0, 1.0), (2.0, y), (3.0, 1.0)]).is_none());
        }
        // Points that coincide fix no slope: what is left is a constant.
        assert!((CurveFit::new(&[(2.0, 3.0); 4]).unwrap().at(2.0) - 3.0).abs() < 1e-9);
    }
}
