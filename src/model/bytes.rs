//! [`Gpt2::bytes`]: what the weights take.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;

use super::Gpt2;
use crate::backends::PackedMatrix;

impl Gpt2 {
    /// Bytes of all weights as they are held: parameters, and what stands for them in a [packed](Self::pack) model.
    pub fn bytes(&self) -> usize {
        let mut parameters = Parameters { bytes: 0 };
        self.visit(&mut parameters);
        // Biases are parameters, and share their buffers with what is packed.
        parameters.bytes + self.packed_matrices().map(PackedMatrix::bytes).sum::<usize>()
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
