//! [`Linear`]: the linear layers of the blocks.

use std::ops::Range;

use burn::module::{Initializer, Module, Param};
use burn::nn::Dropout;
use burn::tensor::{Device, Tensor, module};

use super::batch_invariant::batch_invariant_rows;
use super::gelu::gelu;
use super::pack::Packed;
use crate::backends::Gelu;
use crate::config::Activation;

/// `x W + b`.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[d_input, d_output]`, as GPT-2's checkpoints store it.
    pub(super) weight: Param<Tensor<2>>,
    /// `[d_output]`; none for models without biases.
    pub(super) bias: Option<Param<Tensor<1>>>,
    /// What stands for the weight in a packed model.
    #[module(skip)]
    pub(super) packed: Option<Packed>,
}

impl Linear {
    /// Weights that `weight` draws, and a bias of zeros.
    pub(super) fn new([d_input, d_output]: [usize; 2], bias: bool, weight: Initializer, device: &Device) -> Self {
        Self {
            weight: weight.init([d_input, d_output], device),
            bias: bias.then(|| Initializer::Zeros.init([d_output], device)),
            packed: None,
        }
    }

    /// `[N, d_input]` to `[N, d_output]`; row by row if `batch_invariant`.
    pub(super) fn forward(&self, x: Tensor<2>, batch_invariant: bool) -> Tensor<2> {
        if let Some(Packed { matrix, bias }) = &self.packed {
            return matrix.linear(x, bias.clone(), None);
        }
        let product = |x| module::linear(x, self.weight.val(), self.bias.as_ref().map(Param::val));
        batch_invariant_rows(x, batch_invariant, product)
    }

    /// Some columns of the same, of a packed model: `[N, d_input]` to `[N, columns]`.
    pub(super) fn forward_columns(&self, x: Tensor<2>, columns: Range<usize>) -> Tensor<2> {
        match &self.packed {
            Some(Packed { matrix, bias }) => matrix.linear_columns(x, bias.clone(), columns),
            None => self.forward(x, false).narrow(1, columns.start, columns.len()),
        }
    }

    /// The same, put through GELU.
    pub(super) fn forward_gelu(&self, x: Tensor<2>, form: Activation, batch_invariant: bool) -> Tensor<2> {
        let Some(Packed { matrix, bias }) = &self.packed else { return gelu(self.forward(x, batch_invariant), form) };
        let form = match form {
            Activation::GeluTanh => Gelu::Tanh,
            Activation::GeluErf => Gelu::Erf,
        };
        matrix.linear(x, bias.clone(), Some(form))
    }

    /// The same, through dropout, added to the residual stream, `[N, d_output]`.
    pub(super) fn forward_add(
        &self,
        x: Tensor<2>,
        residual: Tensor<2>,
        dropout: &Dropout,
        batch_invariant: bool,
    ) -> Tensor<2> {
        match &self.packed {
            Some(Packed { matrix, bias }) => matrix.linear_add(x, bias.clone(), residual),
            None => residual + dropout.forward(self.forward(x, batch_invariant)),
        }
    }
}
