//! The linear layers of a block: the one list of them.

use super::{Block, Linear};
use crate::Gpt2Config;

/// A linear layer of a block, as checkpoints have it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinearShape {
    /// Its name within the block.
    pub name: &'static str,
    /// `[d_input, d_output]`.
    pub shape: [usize; 2],
    /// Whether it is at the end of a residual branch.
    pub is_residual: bool,
}

/// Names within a block, in the order of a forward.
pub(crate) const LINEARS: [&str; 4] = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"];

impl Gpt2Config {
    /// The linear layers of a block, in the order of [`LINEARS`].
    pub(crate) fn linears(&self) -> [LinearShape; 4] {
        let (d, inner) = (self.n_embd, self.inner());
        let shapes = [[d, 3 * d], [d, d], [d, inner], [inner, d]];
        std::array::from_fn(|at| LinearShape { name: LINEARS[at], shape: shapes[at], is_residual: at % 2 == 1 })
    }
}

impl Block {
    /// The linear layers, in the order of [`LINEARS`].
    pub(super) fn linears(&self) -> [&Linear; 4] {
        [&self.attn.c_attn, &self.attn.c_proj, &self.mlp.c_fc, &self.mlp.c_proj]
    }

    /// The linear layers, in the order of [`LINEARS`].
    pub(super) fn linears_mut(&mut self) -> [&mut Linear; 4] {
        [&mut self.attn.c_attn, &mut self.attn.c_proj, &mut self.mlp.c_fc, &mut self.mlp.c_proj]
    }
}
