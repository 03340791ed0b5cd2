//! [`Gpt2::bytes`]: what the weights take.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;

use super::prepare::Packed;
use super::{Gpt2, Linear};

impl Gpt2 {
    /// Bytes of all weights as they are held: parameters, and what stands for them in a [prepared](Self::prepare) model.
    pub fn bytes(&self) -> usize {
        let mut parameters = Parameters { bytes: 0 };
        self.visit(&mut parameters);
        let linears = self.h.iter().flat_map(|block| {
            [&block.attn.c_attn, &block.attn.c_proj, &block.mlp.c_fc, &block.mlp.c_proj].map(Linear::packed_bytes)
        });
        parameters.bytes + linears.sum::<usize>() + self.packed_head.as_ref().map_or(0, Packed::bytes)
    }
}

impl Linear {
    fn packed_bytes(&self) -> usize {
        self.packed.as_ref().map_or(0, Packed::bytes)
    }
}

impl Packed {
    /// Of the matrix: biases are parameters, and share their buffers with them.
    fn bytes(&self) -> usize {
        self.matrix.bytes()
    }
}

struct Parameters {
    bytes: usize,
}

impl ModuleVisitor for Parameters {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        self.bytes += value.shape().num_elements() * value.dtype().size();
    }
}
