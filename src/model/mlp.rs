//! [`Mlp`]: two linear layers with a GELU between them.

use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Device, Tensor};

use super::Linear;
use crate::Gpt2Config;
use crate::config::Activation;

/// The position-wise feed-forward network.
#[derive(Module, Debug)]
pub struct Mlp {
    /// Up: `[d, inner]`.
    pub(super) c_fc: Linear,
    /// Down: `[inner, d]`.
    pub(super) c_proj: Linear,
    dropout: Dropout,
    #[module(skip)]
    activation: Activation,
}

impl Mlp {
    pub(super) fn new(config: &Gpt2Config, device: &Device) -> Self {
        let (d, inner) = (config.n_embd, config.inner());
        Self {
            c_fc: Linear::new([d, inner], config.bias, config.normal(), device),
            c_proj: Linear::new([inner, d], config.bias, config.normal_residual(), device),
            dropout: DropoutConfig::new(config.resid_pdrop).init(),
            activation: config.activation_function,
        }
    }

    /// Adds to the residual stream, `[N, d]`, what it makes of `x`, `[N, d]`; row by row if `batch_invariant`.
    pub(super) fn forward(&self, x: Tensor<2>, residual: Tensor<2>, batch_invariant: bool) -> Tensor<2> {
        let x = self.c_fc.forward_gelu(x, self.activation, batch_invariant); // [N, inner]
        self.c_proj.forward_add(x, residual, &self.dropout, batch_invariant) // [N, d]
    }
}
