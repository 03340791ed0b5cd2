//! Causal self-attention over a cache, from burn's operations; a prepared model's is `backends::attend`.

use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Bool, DType, Device, Tensor, activation};

use super::apart::queries_apart;
use super::span::Mode;
use super::{Linear, Span};
use crate::cache::KvCache;
use crate::{Gpt2Config, backends};

/// Multi-head causal self-attention (Vaswani et al., *Attention Is All You Need*, 2017, section 3.2).
#[derive(Module, Debug)]
pub struct CausalSelfAttention {
    /// Queries, keys and values at once: `[d, 3 d]`.
    pub(super) c_attn: Linear,
    /// Output projection: `[d, d]`.
    pub(super) c_proj: Linear,
    attn_dropout: Dropout,
    resid_dropout: Dropout,
    n_head: usize,
}

/// Keys and values of consecutive positions.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    /// `[B, H, L, D]`; B may be 1 for all rows.
    pub keys: Tensor<4>,
    /// `[B, H, L, D]`; B may be 1 for all rows.
    pub values: Tensor<4>,
}

impl Segment {
    /// The same in another element type; nothing happens if it is theirs.
    pub(crate) fn cast(self, dtype: DType) -> Self {
        if self.keys.dtype() == dtype {
            return self;
        }
        Self { keys: self.keys.cast(dtype), values: self.values.cast(dtype) }
    }

    /// The same as a cache in `dtype` holds it. What is more than the largest half is NaN in halves, and not infinite: a key
    /// could get a score of minus infinity, and would be left out without a word.
    pub(crate) fn rounded(self, dtype: DType) -> Self {
        let Self { keys, values } = self.cast(dtype);
        if dtype != DType::F16 {
            return Self { keys, values };
        }
        let [keys, values] = [keys, values].map(|states| {
            let infinite = states.clone().is_inf();
            states.mask_fill(infinite, f32::NAN)
        });
        Self { keys, values }
    }
}

impl CausalSelfAttention {
    pub(super) fn new(config: &Gpt2Config, device: &Device) -> Self {
        let d = config.n_embd;
        Self {
            c_attn: Linear::new([d, 3 * d], config.bias, config.normal(), device),
            c_proj: Linear::new([d, d], config.bias, config.normal_residual(), device),
            attn_dropout: DropoutConfig::new(config.attn_pdrop).init(),
            resid_dropout: DropoutConfig::new(config.resid_pdrop).init(),
            n_head: config.n_head,
        }
    }

    /// Appends the keys and values of `x`, `[B T, d]`, to the cache, attends over it, and adds the result to the residual
    /// stream, `[B T, d]`.
    pub(super) fn forward(
        &self,
        x: Tensor<2>,
        residual: Tensor<2>,
        span: &Span,
        cache: &mut KvCache,
        layer: usize,
    ) -> Tensor<2> {
        let [rows, width] = x.dims();
        let [query, keys, values] = self.project(x, span); // 3 x [B, H, T, D]
        let own = cache.append(layer, Segment { keys, values }, span.past_on_device(), span.new_lens()); // [B, H, L, D]
        let dtype = query.dtype();
        let y = match span.mode() {
            Mode::Kernels { past } => {
                backends::attend(query, own.keys, own.values, past.clone()).reshape([rows, width]) // [B T, d]
            }
            Mode::Apart => {
                let each = |query, own| attend(query, None, own, None, &self.attn_dropout);
                queries_apart(&query, &own.cast(dtype), span.past(), each).swap_dims(1, 2).reshape([rows, width]) // [B T, d]
            }
            Mode::Together { hidden } => {
                attend(query, None, own.cast(dtype), hidden.clone(), &self.attn_dropout)
                    .swap_dims(1, 2)
                    .reshape([rows, width]) // [B T, d]
            }
        };
        self.c_proj.forward_add(y, residual, &self.resid_dropout, span.is_apart())
    }

    /// Query, key and value, each `[B, H, T, D]`, of `[B T, d]`.
    pub(super) fn project(&self, x: Tensor<2>, span: &Span) -> [Tensor<4>; 3] {
        let [rows, width] = x.dims();
        let batch = span.batch();
        let (time, head_dim) = (rows / batch, width / self.n_head);
        let qkv = self.c_attn.forward(x, span.is_apart()); // [B T, 3 d]
        let qkv = qkv.reshape([batch, time, 3 * self.n_head, head_dim]); // [B, T, 3 H, D]
        // Views; a GPU may copy those that do not begin where it can address them.
        [0, 1, 2].map(|part| qkv.clone().narrow(2, part * self.n_head, self.n_head).swap_dims(1, 2)) // [B, H, T, D]
    }
}

/// `softmax(q k^T / sqrt D) v` over two segments of keys, as if they were one.
///
/// The shared segment comes first and is before every query, so nothing of it is hidden; it can be one row's for
/// the whole batch, so that a common prefix is read in place.
///
/// # Shapes
///
/// - query: `[B, H, T, D]`
/// - shared: `[B or 1, H, S, D]`
/// - own: `[B, H, L, D]`
/// - hidden: `[B or 1, 1, T, L]`, true where query t may not see the own key l; none: all are visible
/// - result: `[B, H, T, D]`
pub(super) fn attend(
    query: Tensor<4>,
    shared: Option<Segment>,
    own: Segment,
    hidden: Option<Tensor<4, Bool>>,
    dropout: &Dropout,
) -> Tensor<4> {
    let scores = scores(query.clone(), own.keys, hidden); // [B, H, T, L]
    let Some(shared) = shared else {
        let weights = dropout.forward(activation::softmax(scores, 3));
        return weights.matmul(own.values);
    };
    let split = shared.keys.dims()[2];
    let shared_scores = self::scores(query, shared.keys, None); // [B, H, T, S]
    let scores = Tensor::cat(vec![shared_scores, scores], 3); // [B, H, T, S + L]
    let weights = dropout.forward(activation::softmax(scores, 3));
    let [_, _, _, total] = weights.dims();
    let of_shared = weights.clone().narrow(3, 0, split).matmul(shared.values);
    of_shared + weights.narrow(3, split, total - split).matmul(own.values)
}

/// `q k^T / sqrt D`, `[B, H, T, L]`, with what is hidden at minus infinity.
pub(super) fn scores(query: Tensor<4>, keys: Tensor<4>, hidden: Option<Tensor<4, Bool>>) -> Tensor<4> {
    let [_, _, _, head_dim] = query.dims();
    // Scaling the query costs T D multiplications, scaling the scores T L.
    let scores = (query / (head_dim as f64).sqrt()).matmul(keys.swap_dims(2, 3));
    match hidden {
        Some(hidden) => scores.mask_fill(hidden, f32::NEG_INFINITY),
        None => scores,
    }
}
