//! What a forward takes beside the weights and the cache, reckoned before it is asked for.

use burn::tensor::DType;

use super::{Gpt2, TokenBatch};
use crate::backends::{most_rows, runs_ahead};
use crate::cache::KvCache;
use crate::memory::{check_buffer, product, sum};
use crate::{MemoryLimit, Result};

/// The tokens of a forward.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub rows: usize,
    /// New tokens of the longest row: all others are filled up to it.
    pub new: usize,
    /// Keys that the longest row has then.
    pub keys: usize,
    /// Positions of all rows whose logits are made.
    pub logits: usize,
}

impl Gpt2 {
    /// Bytes of activations and logits that a forward holds at once, at most; `usize::MAX` if they cannot be counted.
    pub(crate) fn forward_bytes(&self, shape: Shape) -> usize {
        let config = self.config();
        let size = self.dtype().size();
        let tokens = product([shape.rows, shape.new]);
        // Kernels take a long prompt through all layers a part at a time.
        let parts = if self.is_prepared() { most_rows(&self.device(), self.widest()) } else { None };
        let at_once = parts.map_or(tokens, |rows| tokens.min(rows.saturating_add(shape.rows)));
        // Ids, positions, and what masks are made from.
        let ids = product([tokens, 64]);
        // What goes in and comes out of all parts; within a layer the residual stream, norms, queries, keys, values, what
        // attention gives, and the MLP's hidden layer before and after its GELU.
        let between = product([tokens, 4, config.n_embd, size]);
        let within = product([at_once, sum([12 * config.n_embd, 4 * config.inner()]), size]);
        // Kernels keep the scores of some queries. burn's operations make all of them, scaled, masked and as weights, and the
        // mask too; or, in the deterministic mode, those of a query at a time.
        let scores = match (self.is_prepared(), self.is_deterministic()) {
            (true, _) => 0,
            (false, true) => product([4, config.n_head, shape.keys, sum([2 * config.head_dim(), 4]), size]),
            (false, false) => product([shape.rows, shape.new, shape.keys, sum([4 * config.n_head * size, 16])]),
        };
        sum([ids, between, within, scores, self.logits_bytes(shape.logits)])
    }

    /// Bytes of logits where they are computed, and in f32 on the host.
    fn logits_bytes(&self, positions: usize) -> usize {
        let config = self.config();
        product([positions, sum([product([config.vocab_size, 2 * self.dtype().size() + 4]), 2 * config.n_embd * 4])])
    }

    /// Checks that a forward of `tokens` behind what `cache` holds, with logits for so many positions, takes no more than
    /// the cache's limit, and no buffer that the device cannot read.
    pub(super) fn check_room(&self, tokens: &TokenBatch, cache: &KvCache, logits: usize) -> Result<()> {
        let [rows, new] = tokens.ids().dims();
        let held = cache.lens().iter().copied().max().unwrap_or(0);
        let shape = Shape { rows, new, keys: held.saturating_add(new), logits };
        let device = self.device();
        check_buffer("bytes of logits", product([logits, self.config().vocab_size, self.dtype().size()]), &device)?;
        if !self.is_prepared() && !self.is_deterministic() {
            let scores = product([rows, self.config().n_head, new, shape.keys, self.dtype().size()]);
            check_buffer("bytes of attention scores", scores, &device)?;
        }
        let limit = cache.limit();
        // A GPU's memory is its own; what the host holds of logits is not.
        let bytes = match runs_ahead(&device) && limit.is_system() {
            true => product([logits, self.config().vocab_size, DType::F32.size()]),
            false => self.forward_bytes(shape),
        };
        limit.check("a forward", bytes)
    }

    /// Checks that a matrix of hidden states may be made logits of.
    pub(super) fn check_logits(&self, positions: usize) -> Result<()> {
        let bytes = product([positions, self.config().vocab_size, self.dtype().size()]);
        check_buffer("bytes of logits", bytes, &self.device())?;
        MemoryLimit::system().check("logits", self.logits_bytes(positions))
    }
}
