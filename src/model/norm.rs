//! Layer norm, by the module's own operation or by a packed model's kernel.

use burn::module::Param;
use burn::nn::LayerNorm;
use burn::tensor::Tensor;
use gpt2_burn_backends::{is_asynchronous, layer_norm};

/// The norm of each row of `x`, `[N, d]`. If it is a packed model's, on a device where each operation of burn's would be
/// launched by itself, it is one kernel.
pub(super) fn norm(module: &LayerNorm, epsilon: f64, x: Tensor<2>, is_packed: bool) -> Tensor<2> {
    if !is_packed || !is_asynchronous(&x.device()) {
        return module.forward(x);
    }
    let gamma = module.gamma.val();
    let beta = module.beta.as_ref().map_or_else(|| gamma.zeros_like(), Param::val);
    layer_norm(x, gamma, beta, epsilon)
}
