//! [`Block`]: attention and MLP, each behind a norm and added to the residual stream.

use burn::module::Module;
use burn::nn::LayerNorm;
use burn::tensor::{Device, Tensor};

use super::norm::norm;
use super::plan::Plan;
use super::wanted::Wanted;
use super::{CausalSelfAttention, Mlp};
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

    /// `[N, d]` to `[N, d]`; the new keys and values go to layer `layer` of the cache.
    pub(super) fn forward(&self, x: Tensor<2>, plan: &Plan, cache: Option<&mut KvCache>, layer: usize) -> Tensor<2> {
        let x = self.attn.forward(self.norm(&self.ln_1, &x, plan), x, plan, cache, layer);
        self.mlp.forward(self.norm(&self.ln_2, &x, plan), x, plan.is_batch_invariant())
    }

    /// As [`forward`](Self::forward) for a packed model's last block: `[M, d]`, for the wanted tokens alone; none if there are
    /// none. Keys and values of the others go to the cache all the same.
    pub(super) fn forward_last(
        &self,
        x: Tensor<2>,
        plan: &Plan,
        cache: &mut KvCache,
        layer: usize,
        wanted: &Wanted,
    ) -> Option<Tensor<2>> {
        let normed = self.norm(&self.ln_1, &x, plan);
        let residual = wanted.select(x.clone()).unwrap_or(x);
        let x = self.attn.forward_last(normed, residual, plan, cache, layer, wanted)?;
        Some(self.mlp.forward(self.norm(&self.ln_2, &x, plan), x, false))
    }

    fn norm(&self, module: &LayerNorm, x: &Tensor<2>, plan: &Plan) -> Tensor<2> {
        norm(module, self.epsilon, x.clone(), plan.is_packed())
    }
}
