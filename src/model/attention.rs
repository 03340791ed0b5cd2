//! Causal self-attention over a cache, from burn's operations; that over pages is `backends::attend_pages`, and a packed model's over
//! buffers `backends::attend`.

use burn::module::Module;
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::{Bool, Device, Tensor, activation};

use super::Linear;
use super::batch_invariant::batch_invariant_attention;
use super::plan::{MaskedGroup, Mode, Plan};
use super::wanted::Wanted;
use crate::backends::PagedRow;
use crate::cache::{KvCache, States, rectangle};
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

    /// Appends the keys and values of `x`, `[N, d]`, to the cache, attends over it, and adds the result to the residual stream,
    /// `[N, d]`. Without a cache the new tokens see themselves alone.
    pub(super) fn forward(
        &self,
        x: Tensor<2>,
        residual: Tensor<2>,
        plan: &Plan,
        cache: Option<&mut KvCache>,
        layer: usize,
    ) -> Tensor<2> {
        let [query, keys, values] = self.project(x, plan.is_batch_invariant()); // 3 x [N, H, D]
        let y = match (cache, plan.mode()) {
            (Some(cache), Mode::Pages(rows)) => {
                cache.attend(layer, Some(query), [keys, values], rows.clone()).expect("there is a query")
            }
            (Some(cache), _) => {
                let states = cache.append(layer, [keys, values], plan.metadata()); // [S, H, L, D]
                self.attend(query, &states, plan)
            }
            (None, _) => self.attend_without_cache(query, [keys, values], plan),
        };
        self.c_proj.forward_add(y, residual, &self.resid_dropout, plan.is_batch_invariant())
    }

    /// The same for a packed model's last layer: keys and values of all tokens go to the cache, but only the last `counts[b]`
    /// tokens of each row, which are the tokens `wanted`, `[M]`, attend. `residual` and the result are theirs, `[M, d]`.
    pub(super) fn forward_last(
        &self,
        x: Tensor<2>,
        residual: Tensor<2>,
        plan: &Plan,
        cache: &mut KvCache,
        layer: usize,
        wanted: &Wanted,
    ) -> Option<Tensor<2>> {
        let [_, width] = x.dims();
        let heads = |x: Tensor<2>, count: usize| {
            let [tokens, _] = x.dims();
            x.reshape([tokens, count * self.n_head, width / self.n_head])
        };
        let states = heads(self.c_attn.forward_columns(x.clone(), width..3 * width), 2); // [N, 2 H, D]
        let [keys, values] = [0, 1].map(|part| states.clone().narrow(1, part * self.n_head, self.n_head));
        let tokens = wanted.tokens.clone();
        let query = tokens.map(|tokens| heads(self.c_attn.forward_columns(x.select(0, tokens), 0..width), 1)); // [M, H, D]
        let y = match plan.mode() {
            Mode::Pages(rows) => {
                let of_wanted = |(row, count): (&PagedRow, &usize)| PagedRow { query_len: *count, ..row.clone() };
                let rows = rows.iter().zip(&wanted.counts).map(of_wanted).collect();
                cache.attend(layer, query, [keys, values], rows)?
            }
            _ => {
                let states = cache.append(layer, [keys, values], plan.metadata());
                backends::attend(query?, states.keys, states.values, &plan.metadata().last(&wanted.counts))
            }
        }; // [M, d]
        Some(self.c_proj.forward_add(y, residual, &self.resid_dropout, false))
    }

    /// `[N, H, D]` to `[N, d]`, over what the cache holds, `[S, H, L, D]`.
    fn attend(&self, query: Tensor<3>, states: &States, plan: &Plan) -> Tensor<2> {
        let dtype = query.dtype();
        match plan.mode() {
            Mode::Kernels => backends::attend(query, states.keys.clone(), states.values.clone(), plan.metadata()),
            Mode::BatchInvariant => {
                let states = states.clone().cast(dtype);
                batch_invariant_attention(&query, &states, plan.metadata(), |query, own| {
                    attend(query, own, None, &self.attn_dropout)
                })
            }
            Mode::Pages(_) => unreachable!("pages are attended to where they are"),
            Mode::Together(groups) => {
                let of_group = |masked: &MaskedGroup| {
                    let slots = masked.group.slots.clone();
                    let part =
                        |all: &Tensor<4>| all.clone().narrow(0, slots.start, slots.len()).narrow(2, 0, masked.keys);
                    let states = States { keys: part(&states.keys), values: part(&states.values) };
                    self.attend_group(&query, states.cast(dtype), masked)
                };
                Tensor::cat(groups.iter().map(of_group).collect(), 0)
            }
        }
    }

    /// The same over the new keys and values alone, `[N, H, D]` each.
    fn attend_without_cache(&self, query: Tensor<3>, [keys, values]: [Tensor<3>; 2], plan: &Plan) -> Tensor<2> {
        let Mode::Together(groups) = plan.mode() else { unreachable!("other ways of computing have a cache") };
        let of_group = |masked: &MaskedGroup| {
            let states = States { keys: rectangle(&keys, &masked.group), values: rectangle(&values, &masked.group) };
            self.attend_group(&query, states, masked)
        };
        Tensor::cat(groups.iter().map(of_group).collect(), 0)
    }

    /// A group's part of `query`, `[N, H, D]`, over its `states`, `[B, H, L, D]`: `[B T, d]`.
    fn attend_group(&self, query: &Tensor<3>, states: States, masked: &MaskedGroup) -> Tensor<2> {
        let [_, heads, head_dim] = query.dims();
        let y = attend(rectangle(query, &masked.group), states, masked.mask.clone(), &self.attn_dropout); // [B, H, T, D]
        y.swap_dims(1, 2).reshape([masked.group.tokens.len(), heads * head_dim])
    }

    /// Query, key and value, each `[N, H, D]`, of `[N, d]`.
    pub(super) fn project(&self, x: Tensor<2>, batch_invariant: bool) -> [Tensor<3>; 3] {
        let [tokens, width] = x.dims();
        let qkv = self.c_attn.forward(x, batch_invariant); // [N, 3 d]
        let qkv = qkv.reshape([tokens, 3 * self.n_head, width / self.n_head]); // [N, 3 H, D]
        // Views; a GPU may copy those that do not begin where it can address them.
        [0, 1, 2].map(|part| qkv.clone().narrow(1, part * self.n_head, self.n_head)) // [N, H, D]
    }
}

/// `softmax(q k^T / sqrt D) v`.
///
/// # Shapes
///
/// - query: `[B, H, T, D]`
/// - own: `[B, H, L, D]`
/// - mask: `[B or 1, 1, T, L]`, true where query t may not see key l; none: all are visible
/// - result: `[B, H, T, D]`
pub(super) fn attend(query: Tensor<4>, own: States, mask: Option<Tensor<4, Bool>>, dropout: &Dropout) -> Tensor<4> {
    let weights = activation::softmax(scores(query, own.keys, mask), 3); // [B, H, T, L]
    dropout.forward(weights).matmul(own.values)
}

/// `q k^T / sqrt D`, `[B, H, T, L]`, with what is masked at minus infinity.
pub(super) fn scores(query: Tensor<4>, keys: Tensor<4>, mask: Option<Tensor<4, Bool>>) -> Tensor<4> {
    let [_, _, _, head_dim] = query.dims();
    // Scaling the query costs T D multiplications, scaling the scores T L.
    let scores = (query / (head_dim as f64).sqrt()).matmul(keys.swap_dims(2, 3));
    match mask {
        Some(mask) => scores.mask_fill(mask, f32::NEG_INFINITY),
        None => scores,
    }
}
