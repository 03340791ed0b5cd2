//! [`Plan`]: which forwards compute the prompts of a batch, each prefix that several of them share once.

use std::collections::HashMap;
use std::fmt;

use super::{Reuse, sources};
use crate::ModelShape;

/// The tokens of a prompt that are computed for it, in one forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PromptChunk {
    /// The prompt.
    pub prompt: usize,
    /// The first of them.
    pub start: usize,
    /// The first behind them: the prompt's end.
    pub end: usize,
    /// The chunk that computes the tokens before the start; none: what is there was held before.
    pub before: Option<usize>,
}

impl PromptChunk {
    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.end - self.start
    }
}

/// Forwards that compute a batch of prompts, as far as they are not held already. The first prompt with a prefix computes it,
/// and the others wait for that. Identical prompts are computed once.
///
/// k prompts that share P tokens take P tokens and what follows them in each. Of every unique prompt at least the last token is
/// computed, since its logits are wanted.
///
/// ```
/// use gpt2_burn_core::prefix::{Plan, Reuse};
///
/// let prompts: [&[u32]; 4] = [&[1, 2, 3, 4], &[1, 2, 3, 5], &[1, 2, 6], &[1, 2, 6]];
/// let plan = Plan::new(&prompts, Reuse::Radix, |_| 0);
/// assert_eq!((plan.requested_tokens(), plan.computed_tokens()), (14, 6));
/// assert_eq!(plan.forwards().count(), 2); // [1, 2, 3, 4], then [5] and [6]
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The unique prompts, by the index of the first of each.
    unique_prompts: Vec<usize>,
    /// Which of them each prompt is.
    unique_of_prompt: Vec<usize>,
    /// Tokens of each prompt.
    lens: Vec<usize>,
    /// Tokens of each unique prompt that were held before.
    held: Vec<usize>,
    /// Of each unique prompt.
    chunks: Vec<PromptChunk>,
    /// The chunks of each forward.
    forwards: Vec<Vec<usize>>,
}

impl Plan {
    /// A plan for prompts of at least one token. `held` is asked once for each unique one how many of its tokens need not
    /// be computed; its last token is in any case. With [`Reuse::Exact`] only identical prompts share something.
    pub fn new(prompts: &[&[u32]], reuse: Reuse, mut held: impl FnMut(&[u32]) -> usize) -> Self {
        let mut known: HashMap<&[u32], usize> = HashMap::new();
        let mut unique_prompts = Vec::new();
        let mut unique_of_prompt = Vec::with_capacity(prompts.len());
        for (index, ids) in prompts.iter().enumerate() {
            let unique = *known.entry(ids).or_insert(unique_prompts.len());
            if unique == unique_prompts.len() {
                unique_prompts.push(index);
            }
            unique_of_prompt.push(unique);
        }
        let ids: Vec<&[u32]> = unique_prompts.iter().map(|&prompt| prompts[prompt]).collect();
        let held: Vec<usize> = ids.iter().map(|ids| held(ids).min(ids.len().saturating_sub(1))).collect();
        let (mut chunks, mut forwards): (Vec<PromptChunk>, Vec<Vec<usize>>) = (Vec::new(), Vec::new());
        let mut forward_of: Vec<usize> = Vec::new();
        for (at, source) in sources(&ids, &held, reuse, 1).into_iter().enumerate() {
            let (start, before) = source.map_or((held[at], None), |source| (source.tokens, Some(source.from)));
            let forward = before.map_or(0, |before| forward_of[before] + 1);
            forwards.resize_with(forwards.len().max(forward + 1), Vec::new);
            forwards[forward].push(at);
            forward_of.push(forward);
            chunks.push(PromptChunk { prompt: unique_prompts[at], start, end: ids[at].len(), before });
        }
        Self {
            unique_prompts,
            unique_of_prompt,
            lens: prompts.iter().map(|ids| ids.len()).collect(),
            held,
            chunks,
            forwards,
        }
    }

    /// What is computed for each unique prompt, in their order.
    pub fn chunks(&self) -> &[PromptChunk] {
        &self.chunks
    }

    /// The forwards in their order: the indices of their chunks.
    pub fn forwards(&self) -> impl Iterator<Item = &[usize]> {
        self.forwards.iter().map(Vec::as_slice)
    }

    /// The unique prompts, by the index of the first of each.
    pub fn unique_prompts(&self) -> &[usize] {
        &self.unique_prompts
    }

    /// Which of the unique prompts each prompt is.
    pub fn unique_of_prompt(&self) -> &[usize] {
        &self.unique_of_prompt
    }

    /// Tokens of each unique prompt that are held already.
    pub fn held(&self) -> &[usize] {
        &self.held
    }

    /// Tokens of all prompts.
    pub fn requested_tokens(&self) -> usize {
        self.lens.iter().sum()
    }

    /// Tokens that are computed.
    pub fn computed_tokens(&self) -> usize {
        self.chunks.iter().map(PromptChunk::tokens).sum()
    }

    /// Tokens that need not be computed.
    pub fn saved_tokens(&self) -> usize {
        self.requested_tokens() - self.computed_tokens()
    }

    /// Floating-point operations of the matrices of a model of this shape, and of its attention: a multiplication and an
    /// addition each. All layers are counted for all tokens, the head once a chunk: what kernels skip of the last layer is skipped
    /// with and without sharing.
    pub fn flops(&self, shape: impl Into<ModelShape>) -> f64 {
        let shape = shape.into();
        self.chunks.iter().map(|chunk| flops(shape, chunk.start, chunk.end) + head_flops(shape)).sum()
    }

    /// The same if every prompt were computed by itself, from its first token.
    pub fn flops_without(&self, shape: impl Into<ModelShape>) -> f64 {
        let shape = shape.into();
        self.lens.iter().map(|&len| flops(shape, 0, len) + head_flops(shape)).sum()
    }
}

/// One line with the numbers.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (requested, computed) = (self.requested_tokens(), self.computed_tokens());
        let share = 100.0 * computed as f64 / requested.max(1) as f64;
        let (prompts, unique_prompts, forwards) = (self.lens.len(), self.unique_prompts.len(), self.forwards().count());
        write!(
            f,
            "{prompts} prompts, {unique_prompts} of them unique: {computed} of {requested} tokens ({share:.1}%) in {forwards} forwards"
        )
    }
}

/// Of tokens `start..end` of a sequence, in all blocks.
fn flops(shape: ModelShape, start: usize, end: usize) -> f64 {
    let (width, inner, layers) = (shape.n_embd as f64, shape.inner() as f64, shape.n_layer as f64);
    let up_to = |tokens: usize| tokens as f64 * (tokens as f64 + 1.0) / 2.0;
    // Each token takes part in the products with all matrices, and each pair of a token and one that it sees in two of width d.
    let matrices = 2.0 * (4.0 * width * width + 2.0 * width * inner) * (end - start) as f64;
    layers * (matrices + 4.0 * width * (up_to(end) - up_to(start)))
}

/// Of one position's logits.
fn head_flops(shape: ModelShape) -> f64 {
    2.0 * shape.n_embd as f64 * shape.vocab_size as f64
}
