//! [`Plan`]: which forwards compute the prompts of a batch, each beginning that several of them share once.

use std::collections::HashMap;
use std::fmt;

use super::{Payload, RadixTree, Reuse};
use crate::ModelShape;

/// Consecutive tokens of a prompt that are computed in one forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Piece {
    /// A prompt that has them.
    pub prompt: usize,
    /// The first of them.
    pub start: usize,
    /// The first behind them.
    pub end: usize,
    /// The piece that ends, or is used up to, where this one starts; none: what is there was held before.
    pub before: Option<usize>,
}

impl Piece {
    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.end - self.start
    }
}

/// Forwards that compute a batch of prompts, as far as they are not held already: first what several prompts share, from the
/// front on, then the end of each prompt. Identical prompts are computed once.
///
/// k prompts that share P tokens take P tokens and what follows them in each. Of every prompt at least the last token is
/// computed by itself, since its logits are wanted.
///
/// ```
/// use gpt2_burn_core::prefix::{Plan, Reuse};
///
/// let prompts: [&[u32]; 4] = [&[1, 2, 3, 4], &[1, 2, 3, 5], &[1, 2, 6], &[1, 2, 6]];
/// let plan = Plan::new(&prompts, Reuse::Radix, |_| 0);
/// assert_eq!((plan.requested_tokens(), plan.computed_tokens()), (14, 6));
/// assert_eq!(plan.forwards().count(), 2); // [1, 2, 3], then [4], [5] and [6], the last behind [1, 2]
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The distinct prompts, by the place of the first of each.
    distinct: Vec<usize>,
    /// Which of them each prompt is.
    of_prompt: Vec<usize>,
    /// Tokens of each prompt.
    lens: Vec<usize>,
    /// Tokens of each distinct prompt that were held before.
    held: Vec<usize>,
    /// What is shared, and behind that the end of each distinct prompt.
    pieces: Vec<Piece>,
    /// The forwards of what is shared: the pieces of each.
    shared: Vec<Vec<usize>>,
    /// The pieces of the forward of the ends.
    ends: Vec<usize>,
}

/// Which tokens a node of the planner's own tree stands for.
struct Stretch {
    prompt: usize,
    start: usize,
    end: usize,
}

impl Payload for Stretch {
    fn tokens(&self) -> usize {
        self.end - self.start
    }

    fn bytes(&self) -> usize {
        0
    }

    fn split(self, at: usize) -> (Self, Self) {
        let Self { prompt, start, end } = self;
        (Self { prompt, start, end: start + at }, Self { prompt, start: start + at, end })
    }
}

impl Plan {
    /// A plan for prompts of at least one token. `held` is asked once for each distinct one how many of its tokens need not
    /// be computed; its last token is in any case. With [`Reuse::Exact`] only identical prompts share something.
    pub fn new(prompts: &[&[u32]], reuse: Reuse, mut held: impl FnMut(&[u32]) -> usize) -> Self {
        let mut known: HashMap<&[u32], usize> = HashMap::new();
        let mut distinct = Vec::new();
        let mut of_prompt = Vec::with_capacity(prompts.len());
        for (index, ids) in prompts.iter().enumerate() {
            let place = *known.entry(ids).or_insert(distinct.len());
            if place == distinct.len() {
                distinct.push(index);
            }
            of_prompt.push(place);
        }
        let most = |ids: &[u32]| ids.len().saturating_sub(1);
        let held: Vec<usize> =
            distinct.iter().map(|&prompt| held(prompts[prompt]).min(most(prompts[prompt]))).collect();
        let lens = prompts.iter().map(|ids| ids.len()).collect();
        let mut plan =
            Self { distinct, of_prompt, lens, held, pieces: Vec::new(), shared: Vec::new(), ends: Vec::new() };
        let shared = match reuse {
            Reuse::Radix => plan.shared_tokens(prompts),
            Reuse::Exact => plan.held.clone(),
        };
        plan.add_pieces(prompts, &shared);
        plan
    }

    /// How many of the first tokens of each distinct prompt another one shares that as much is held of.
    fn shared_tokens(&self, prompts: &[&[u32]]) -> Vec<usize> {
        let ids = |at: usize| prompts[self.distinct[at]];
        let mut order: Vec<usize> = (0..self.distinct.len()).collect();
        order.sort_unstable_by_key(|&at| (self.held[at], ids(at)));
        let mut shared = self.held.clone();
        // In this order, the one that shares most with a prompt stands beside it.
        for pair in order.windows(2) {
            let [one, other] = [pair[0], pair[1]];
            if self.held[one] == self.held[other] {
                let common = ids(one).iter().zip(ids(other)).take_while(|(one, other)| one == other).count();
                shared[one] = shared[one].max(common);
                shared[other] = shared[other].max(common);
            }
        }
        shared
    }

    fn add_pieces(&mut self, prompts: &[&[u32]], shared: &[usize]) {
        let ids = |at: usize| prompts[self.distinct[at]];
        let mut tree: RadixTree<usize, Stretch> = RadixTree::default();
        for (at, &end) in shared.iter().enumerate().filter(|(at, end)| **end > self.held[*at]) {
            let stretch = Stretch { prompt: self.distinct[at], start: 0, end };
            tree.insert(self.held[at], &ids(at)[..end], 0, stretch).expect("the stretch is as long as the ids");
        }

        // By where they end; a node of which all is held is no piece.
        let mut places: HashMap<(usize, usize), usize> = HashMap::new();
        let (mut of_entry, mut levels): (Vec<Option<usize>>, Vec<Vec<usize>>) = (Vec::new(), Vec::new());
        let mut level_of: Vec<usize> = Vec::new();
        for entry in tree.entries() {
            let Stretch { prompt, start, end } = *entry.payload;
            let before = entry.parent.and_then(|parent| of_entry[parent]);
            let start = start.max(entry.space);
            if start >= end {
                of_entry.push(None);
                continue;
            }
            let (place, level) = (self.pieces.len(), before.map_or(0, |before| level_of[before] + 1));
            self.pieces.push(Piece { prompt, start, end, before });
            places.insert((prompt, end), place);
            of_entry.push(Some(place));
            level_of.push(level);
            levels.resize_with(levels.len().max(level + 1), Vec::new);
            levels[level].push(place);
        }
        self.shared = levels;

        let first_end = self.pieces.len();
        for (at, (&shared, &held)) in shared.iter().zip(&self.held).enumerate() {
            let end = ids(at).len();
            let start = shared.min(end.saturating_sub(1)).max(held);
            let path = tree.peek(held, &ids(at)[..start]);
            let last = path.parts.last().filter(|_| start > held);
            let before = last.and_then(|(stretch, _)| places.get(&(stretch.prompt, stretch.end)).copied());
            self.pieces.push(Piece { prompt: self.distinct[at], start, end, before });
        }
        self.ends = (first_end..self.pieces.len()).collect();
    }

    /// The pieces, each behind those before it; the ends of the distinct prompts come last.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The forwards in their order: the places of their pieces.
    pub fn forwards(&self) -> impl Iterator<Item = &[usize]> {
        self.shared.iter().chain([&self.ends]).map(Vec::as_slice).filter(|places| !places.is_empty())
    }

    /// The forwards of what several prompts share, whose logits are not wanted.
    pub fn shared_forwards(&self) -> &[Vec<usize>] {
        &self.shared
    }

    /// The pieces of the last forward: the end of each distinct prompt.
    pub fn ends(&self) -> &[usize] {
        &self.ends
    }

    /// The distinct prompts, by the place of the first of each.
    pub fn distinct(&self) -> &[usize] {
        &self.distinct
    }

    /// Which of the distinct prompts each prompt is.
    pub fn of_prompt(&self) -> &[usize] {
        &self.of_prompt
    }

    /// Tokens of each distinct prompt that are held already.
    pub fn held(&self) -> &[usize] {
        &self.held
    }

    /// Tokens of all prompts.
    pub fn requested_tokens(&self) -> usize {
        self.lens.iter().sum()
    }

    /// Tokens that are computed.
    pub fn computed_tokens(&self) -> usize {
        self.pieces.iter().map(Piece::tokens).sum()
    }

    /// Tokens that need not be computed.
    pub fn saved_tokens(&self) -> usize {
        self.requested_tokens() - self.computed_tokens()
    }

    /// Floating-point operations of the matrices of a model of this shape, and of its attention: a multiplication and an
    /// addition each.
    pub fn flops(&self, shape: impl Into<ModelShape>) -> f64 {
        let shape = shape.into();
        let pieces = self.pieces.iter().map(|piece| flops(shape, piece.start, piece.end));
        pieces.sum::<f64>() + self.ends.len() as f64 * head_flops(shape)
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
        let (prompts, distinct, forwards) = (self.lens.len(), self.distinct.len(), self.forwards().count());
        write!(
            f,
            "{prompts} prompts, {distinct} of them distinct: {computed} of {requested} tokens ({share:.1}%) in {forwards} forwards"
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
