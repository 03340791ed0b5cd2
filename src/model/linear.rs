//! [`Linear`]: the linear layers of the blocks.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor, module};

use super::apart::rows_apart;

/// `x W + b`.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[d_input, d_output]`, as GPT-2's checkpoints store it.
    weight: Param<Tensor<2>>,
    /// `[d_output]`; none for models without biases.
    bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Weights that `weight` draws, and a bias of zeros.
    pub(super) fn new([d_input, d_output]: [usize; 2], bias: bool, weight: Initializer, device: &Device) -> Self {
        Self {
            weight: weight.init([d_input, d_output], device),
            bias: bias.then(|| Initializer::Zeros.init([d_output], device)),
        }
    }

    /// `[N, d_input]` to `[N, d_output]`; row by row if `apart`.
    pub(super) fn forward(&self, x: Tensor<2>, apart: bool) -> Tensor<2> {
        let product = |x| module::linear(x, self.weight.val(), self.bias.as_ref().map(Param::val));
        rows_apart(x, apart, product)
    }
}
