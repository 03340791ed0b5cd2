//! What a forward takes beside the weights and the cache, reckoned before it is asked for.

use burn::tensor::DType;

use super::{Gpt2, TokenBatch};
use crate::backends::max_rows;
use crate::cache::KvCache;
use crate::memory::{check_buffer, product, sum};
use crate::{MemoryLimit, Result};

/// How much goes through a forward.
#[derive(Clone, Copy)]
pub(crate) struct ForwardSize {
    /// New tokens of all rows.
    pub tokens: usize,
    /// Keys that the longest row has then.
    pub keys: usize,
    /// Positions of all rows whose logits are made.
    pub logits: usize,
}

impl Gpt2 {
    /// Bytes of activations and logits that a forward holds at once, at most; `usize::MAX` if they cannot be counted.
    pub(crate) fn forward_bytes(&self, size: ForwardSize) -> usize {
        let config = self.config();
        let element = self.dtype().size();
        let ForwardSize { tokens, keys, logits } = size;
        let at_once = self.tokens_at_once(tokens);
        // Ids, positions, and what masks are made from.
        let ids = product([tokens, 64]);
        // What goes in and comes out of all chunks.
        let between = product([tokens, 4, config.n_embd, element]);
        // Kernels keep the scores of some queries. burn's operations make all of them, scaled, masked and as weights, and the
        // mask too; or, in the deterministic mode, those of a query at a time.
        let scores = match (self.is_packed(), self.is_deterministic()) {
            (true, _) => 0,
            (false, true) => product([4, config.n_head, keys, sum([2 * config.head_dim(), 4]), element]),
            (false, false) => product([tokens, keys, sum([4 * config.n_head * element, 16])]),
        };
        // Within a layer the residual stream and a norm, and beside them one after the other: queries, keys, values and scores
        // with what attention gives, and the MLP's hidden layer before and after its GELU.
        let attention = sum([product([at_once, 8 * config.n_embd, element]), scores]);
        let mlp = product([at_once, sum([4 * config.n_embd, 4 * config.inner()]), element]);
        sum([ids, between, attention.max(mlp), self.logits_bytes(logits)])
    }

    /// Tokens that are between two layers at once: kernels take a long prompt through all layers a chunk at a time.
    fn tokens_at_once(&self, tokens: usize) -> usize {
        let chunk = if self.is_packed() { max_rows(&self.device(), self.widest()) } else { None };
        chunk.map_or(tokens, |max| tokens.min(max))
    }

    /// Bytes of logits where they are computed, and in f32 on the host.
    fn logits_bytes(&self, positions: usize) -> usize {
        let config = self.config();
        product([positions, sum([product([config.vocab_size, 2 * self.dtype().size() + 4]), 2 * config.n_embd * 4])])
    }

    /// Checks that a forward of `tokens` behind what `cache` holds, if there is one, with logits for so many positions, takes
    /// no more than the cache's limit or the system's, and no buffer that the device cannot read.
    pub(super) fn check_room(&self, tokens: &TokenBatch, cache: Option<&KvCache>, logits: usize) -> Result<()> {
        let context_len = |row: usize| cache.map_or(0, |cache| cache.len(row));
        let seq_lens = tokens.query_lens().iter().enumerate().map(|(row, len)| context_len(row).saturating_add(*len));
        let size = ForwardSize { tokens: tokens.tokens(), keys: seq_lens.max().unwrap_or(0), logits };
        let (config, device, element) = (self.config(), self.device(), self.dtype().size());
        let of_logits = product([logits, config.vocab_size, element]);
        check_buffer("bytes of logits", of_logits, &device)?;
        let widest = product([self.tokens_at_once(size.tokens), self.widest(), element]);
        check_buffer("bytes of activations", widest, &device)?;
        if !self.is_packed() && !self.is_deterministic() {
            let scores = product([config.n_head, size.tokens, size.keys, element]);
            check_buffer("bytes of attention scores", scores, &device)?;
        }
        let on_host = product([logits, config.vocab_size, DType::F32.size()]);
        let limit = cache.map_or_else(MemoryLimit::system, KvCache::limit);
        limit.check_on(&device, "a forward", on_host, self.forward_bytes(size))
    }

    /// Checks that a matrix of hidden states may be made logits of.
    pub(super) fn check_logits(&self, positions: usize) -> Result<()> {
        let bytes = product([positions, self.config().vocab_size, self.dtype().size()]);
        check_buffer("bytes of logits", bytes, &self.device())?;
        MemoryLimit::system().check("logits", self.logits_bytes(positions))
    }
}
