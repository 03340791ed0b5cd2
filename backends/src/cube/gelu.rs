//! GELU in the two forms of [`Gelu`], behind a product's bias.

use cubecl::prelude::*;

use crate::ops::Gelu;

/// A kernel's own copy of `Option<Gelu>`: what it is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    None,
    Tanh,
    Erf,
}

impl From<Option<Gelu>> for Activation {
    fn from(gelu: Option<Gelu>) -> Self {
        match gelu {
            None => Self::None,
            Some(Gelu::Tanh) => Self::Tanh,
            Some(Gelu::Erf) => Self::Erf,
        }
    }
}

#[cube]
pub fn activate(x: f32, #[comptime] activation: Activation) -> f32 {
    let mut result = x;
    if comptime!(activation == Activation::Tanh) {
        result = gelu_tanh(x);
    }
    if comptime!(activation == Activation::Erf) {
        result = gelu_erf(x);
    }
    result
}

/// `0.5 x (1 + tanh u) = x / (1 + exp(-2 u))`.
#[cube]
fn gelu_tanh(x: f32) -> f32 {
    // -2 sqrt(2 / pi), and that times 0.044715.
    let minus_two_u = x * (-1.595_769_f32 - 0.071_354_82_f32 * x * x);
    // Beyond 80 the result rounds to 0, and the exponential would leave the range of f32.
    let bounded = f32::min(minus_two_u, 80.0_f32);
    x / (1.0_f32 + f32::exp(bounded))
}

#[cube]
fn gelu_erf(x: f32) -> f32 {
    let share = Erf::erf(x * 0.707_106_77_f32);
    0.5_f32 * x * (1.0_f32 + share)
}
