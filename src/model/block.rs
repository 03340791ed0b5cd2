//! [`Block`]: attention and MLP, each behind a norm and added to the residual stream.

use burn::module::Module;
use burn::nn::LayerNorm;
use burn::tensor::{Device, Tensor};

use super::norm::norm;
use super::{CausalSelfAttention, Mlp, Span};
use crate::Gpt2Config;
use crate::cache::KvCache;

/// A pre-norm transformer block.
#[derive(Module, Debug)]
pub struct Block {
    /// Norm before the attention.
    pub ln_1: LayerNorm,
    /// Causal self-attention.
    pub attn: CausalSelfAttention,
    /// Norm before the MLP.
    pub ln_2: LayerNorm,
    /// The MLP.
    pub mlp: Mlp,
    epsilon: f64,
}

impl Block {
    pub(super) fn new(config: &Gpt2Config, device: &Device) -> Self {
        Self {
            ln_1: config.layer_norm(device),
            attn: CausalSelfAttention::new(config, device),
            ln_2: config.layer_norm(device),
            mlp: Mlp::new(config, device),
            epsilon: config.layer_norm_epsilon,
        }
    }

    /// `[B T, d]` to `[B T, d]`; the new keys and values go to layer `layer` of the cache.
    pub(super) fn forward(&self, x: Tensor<2>, span: &Span, cache: &mut KvCache, layer: usize) -> Tensor<2> {
        let norm = |module, x: &Tensor<2>| norm(module, self.epsilon, x.clone(), span.is_for_kernels());
        let x = self.attn.forward(norm(&self.ln_1, &x), x, span, cache, layer);
        self.mlp.forward(norm(&self.ln_2, &x), x, span.is_apart())
    }
}
