//! The table of terms: what each step of a forward computes, reads and writes.

use std::iter::Sum;
use std::ops::{Add, Mul};

use super::{Cost, Pass};
use crate::Result;

/// Floating-point operations and bytes moved.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Floating-point operations: a multiplication and an addition are two.
    pub flops: f64,
    /// Bytes read from memory and written to it.
    pub bytes: f64,
}

impl Work {
    /// FLOPs per byte.
    pub fn intensity(self) -> f64 {
        self.flops / self.bytes
    }
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

impl Mul<f64> for Work {
    type Output = Self;

    fn mul(self, times: f64) -> Self {
        Self { flops: self.flops * times, bytes: self.bytes * times }
    }
}

impl Sum for Work {
    fn sum<I: Iterator<Item = Self>>(works: I) -> Self {
        works.fold(Self::default(), Add::add)
    }
}

/// Bytes of an element of what is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ElementBytes {
    /// Matrices, biases, norms and embeddings.
    pub weights: usize,
    /// What passes from one operation to the next.
    pub activations: usize,
    /// Keys and values in the cache.
    pub cache: usize,
}

impl From<usize> for ElementBytes {
    /// The same for everything.
    fn from(bytes: usize) -> Self {
        Self { weights: bytes, activations: bytes, cache: bytes }
    }
}

impl ElementBytes {
    /// Those of weights, activations and the cache.
    pub(super) fn each(self) -> [f64; 3] {
        [self.weights, self.activations, self.cache].map(|bytes| bytes as f64)
    }
}

/// Which terms are counted. The products of the blocks' matrices, and the keys and values that they read, always are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// The head.
    pub head: bool,
    /// The look-up of tokens and positions.
    pub embeddings: bool,
    /// The layer norms: two in a block, one behind the last.
    pub norms: bool,
    /// GELU and the additions to the residual stream, as passes of their own.
    pub elementwise: bool,
    /// Biases of the linear layers, if the model has them.
    pub biases: bool,
    /// Activations: what one operation writes and the next reads. Keys and values that attention reads are none.
    pub activations: bool,
    /// Scores, the mask and the softmax, as passes of their own. A fused kernel keeps them on the processor (Dao et al.,
    /// *FlashAttention*, 2022).
    pub scores: bool,
    /// Only pairs of a query and a key that the mask does not hide: half of them in a long prefill. Kernels skip the others,
    /// textbook code computes them and throws them away.
    pub causal: bool,
}

impl Counted {
    /// Everything that textbook code does.
    pub fn all() -> Self {
        Self {
            head: true,
            embeddings: true,
            norms: true,
            elementwise: true,
            biases: true,
            activations: true,
            scores: true,
            causal: false,
        }
    }

    /// The blocks' matrices, scores, mask and softmax, as the course assignment lists them. With the head:
    /// `Counted { head: true, ..Counted::assignment() }`.
    pub fn assignment() -> Self {
        Self { head: false, embeddings: false, norms: false, elementwise: false, biases: false, ..Self::all() }
    }

    /// What kernels leave of it that compute attention, GELU and residual additions within other operations and skip what the
    /// mask hides, as this library's do.
    pub fn kernels() -> Self {
        Self { elementwise: false, scores: false, causal: true, ..Self::all() }
    }
}

/// A part of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Part {
    /// Tokens and positions.
    Embeddings,
    /// Layer norms.
    Norms,
    /// Attention, with its two linear layers.
    Attention,
    /// The MLP.
    Mlp,
    /// The additions to the residual stream.
    Residual,
    /// The head.
    Head,
}

impl Part {
    /// All parts, in the order of a forward.
    pub const ALL: [Self; 6] = [Self::Embeddings, Self::Norms, Self::Attention, Self::Mlp, Self::Residual, Self::Head];

    /// Its name in a table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embeddings => "embeddings",
            Self::Norms => "norms",
            Self::Attention => "attention",
            Self::Mlp => "MLP",
            Self::Residual => "residual",
            Self::Head => "head",
        }
    }
}

/// A step of a forward.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Term {
    /// The part of the model that it belongs to.
    pub part: Part,
    /// What it is.
    pub name: &'static str,
    /// How often it occurs in a forward: once a layer, or once.
    pub times: usize,
    /// FLOPs of one occurrence.
    pub flops: f64,
    /// Bytes of weights that one occurrence reads.
    pub weights: f64,
    /// Bytes of activations, keys and values that it reads.
    pub read: f64,
    /// Bytes that it writes.
    pub written: f64,
}

impl Term {
    /// All occurrences.
    pub fn total(&self) -> Work {
        Work { flops: self.flops, bytes: self.weights + self.read + self.written } * self.times as f64
    }

    /// Whether it is a product over keys, and not with a matrix of weights.
    pub(super) fn is_over_keys(&self) -> bool {
        self.flops > 0.0 && self.weights == 0.0
    }
}

/// Elements that a term deals with; they become bytes in [`Cost::terms`].
#[derive(Clone, Copy, Default)]
struct Elements {
    flops: f64,
    weights: f64,
    biases: f64,
    read: f64,
    read_cached: f64,
    written: f64,
    written_cached: f64,
    /// Read and written scores, and the mask.
    scores: [f64; 2],
}

impl Cost {
    /// The terms of a pass that are counted, in the order of a forward.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyBatch`](crate::Error::EmptyBatch) without rows, [`Error::Mismatch`](crate::Error::Mismatch) without new tokens or with more logits than those,
    /// [`Error::ContextOverflow`](crate::Error::ContextOverflow) for more tokens than the model has positions.
    pub fn terms(&self, pass: Pass) -> Result<Vec<Term>> {
        pass.check(&self.shape)?;
        let counted = self.counted;
        let [d, inner, heads, vocab] =
            [self.shape.n_embd, self.shape.inner(), self.shape.n_head, self.shape.vocab_size].map(|size| size as f64);
        let [batch, new, keys, logits] = [pass.batch, pass.new, pass.keys(), pass.logits].map(|count| count as f64);
        let (tokens, keys) = (batch * new, batch * keys);
        let pairs = pass.pairs(counted.causal);
        let scores = batch * heads * pairs;
        let shifts = if self.shape.bias { d } else { 0.0 };

        let none = Elements::default();
        let linear = |from: f64, to: f64, rows: f64| Elements {
            flops: 2.0 * rows * from * to,
            weights: from * to,
            biases: to,
            read: rows * from,
            written: rows * to,
            ..none
        };
        let norm = Elements { weights: d + shifts, read: tokens * d, written: tokens * d, ..none };
        let add = Elements { read: 2.0 * tokens * d, written: tokens * d, ..none };
        let qkv = linear(d, 3.0 * d, tokens);
        let over_keys = Elements { flops: 2.0 * batch * pairs * d, read_cached: keys * d, ..none };

        let (layers, counted_if) = (self.shape.n_layer, |yes: bool, times: usize| if yes { times } else { 0 });
        let norms = counted_if(counted.norms, layers);
        let elementwise = counted_if(counted.elementwise, layers);
        // What is hidden from a single new token lies behind it, where nothing is.
        let masks = counted_if(counted.scores && pass.new > 1, layers);
        let softmaxes = counted_if(counted.scores, layers);
        use Part::{Attention, Embeddings, Head, Mlp, Norms, Residual};
        let rows = [
            (
                Embeddings,
                "tokens and positions",
                counted_if(counted.embeddings, 1),
                Elements { weights: 2.0 * tokens * d, written: tokens * d, ..none },
            ),
            (Norms, "ln_1", norms, norm),
            (Attention, "c_attn", layers, Elements { written: tokens * d, written_cached: 2.0 * tokens * d, ..qkv }),
            (Attention, "scores q k^T", layers, Elements { read: tokens * d, scores: [0.0, scores], ..over_keys }),
            (Attention, "mask", masks, Elements { scores: [scores + pairs, scores], ..none }),
            (Attention, "softmax", softmaxes, Elements { scores: [scores, scores], ..none }),
            (Attention, "values", layers, Elements { written: tokens * d, scores: [scores, 0.0], ..over_keys }),
            (Attention, "c_proj", layers, linear(d, d, tokens)),
            (Residual, "add attention", elementwise, add),
            (Norms, "ln_2", norms, norm),
            (Mlp, "c_fc", layers, linear(d, inner, tokens)),
            (Mlp, "GELU", elementwise, Elements { read: tokens * inner, written: tokens * inner, ..none }),
            (Mlp, "c_proj", layers, linear(inner, d, tokens)),
            (Residual, "add MLP", elementwise, add),
            (Norms, "ln_f", counted_if(counted.norms, 1), norm),
            (
                Head,
                "logits",
                counted_if(counted.head && pass.logits > 0, 1),
                Elements { biases: 0.0, ..linear(d, vocab, batch * logits) },
            ),
        ];
        let counted = rows.into_iter().filter(|(_, _, times, _)| *times > 0);
        Ok(counted.map(|(part, name, times, elements)| self.term(part, name, times, elements)).collect())
    }

    fn term(&self, part: Part, name: &'static str, times: usize, elements: Elements) -> Term {
        let [weight, activation, cached] = self.element_bytes.each();
        let of_scores = if self.counted.scores { activation } else { 0.0 };
        let (activation, written) = if self.counted.activations { (activation, cached) } else { (0.0, 0.0) };
        let [scores_read, scores_written] = elements.scores.map(|scores| of_scores * scores);
        let biases = if self.counted.biases && self.shape.bias { elements.biases } else { 0.0 };
        Term {
            part,
            name,
            times,
            flops: elements.flops,
            weights: weight * (elements.weights + biases),
            read: activation * elements.read + cached * elements.read_cached + scores_read,
            written: activation * elements.written + written * elements.written_cached + scores_written,
        }
    }
}
