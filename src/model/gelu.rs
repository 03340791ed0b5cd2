//! The two forms of the Gaussian error linear unit (Hendrycks and Gimpel, 2016).

use std::f64::consts::{FRAC_2_SQRT_PI, SQRT_2};

use burn::tensor::{Tensor, activation};

use crate::config::Activation;

/// GELU in the form that `form` names, element by element.
pub(super) fn gelu<const D: usize>(x: Tensor<D>, form: Activation) -> Tensor<D> {
    match form {
        Activation::GeluErf => activation::gelu(x),
        Activation::GeluTanh => gelu_tanh(x),
    }
}

/// `0.5 x (1 + tanh u)` with `u = sqrt(2/pi) (x + 0.044715 x^3)`, written as `x sigmoid(2u)`: the same function, since
/// `(1 + tanh u) / 2 = sigmoid(2u)`, in fewer passes than burn's, which also raises to a power to get the cube.
fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let two_u_over_x = 2.0 * FRAC_2_SQRT_PI / SQRT_2;
    let square = x.clone() * x.clone();
    let twice_u = (square * (0.044715 * two_u_over_x) + two_u_over_x) * x.clone();
    activation::sigmoid(twice_u) * x
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use serde_json::Value;

    #[test]
    fn both_forms_match_values_computed_in_double_precision() {
        let recorded: Value = serde_json::from_str(include_str!("../../tests/fixtures/gelu.json")).unwrap();
        let column = |name: &str| -> Vec<f32> { serde_json::from_value(recorded[name].clone()).unwrap() };
        let x = column("x");
        for (name, form) in [("tanh", Activation::GeluTanh), ("erf", Activation::GeluErf)] {
            let y = gelu(Tensor::<1>::from_data(x.as_slice(), &Device::default()), form);
            for ((y, expected), x) in y.into_data().try_to_vec::<f32>().unwrap().iter().zip(column(name)).zip(&x) {
                assert!((y - expected).abs() < 2e-6, "{name}({x}) = {y}, expected {expected}");
            }
        }
    }
}
