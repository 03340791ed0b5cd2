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
    /// Queries, attention's result and the MLP of the last layer for all tokens, as in textbook code. Only those whose logits
    /// are wanted need them; keys and values are needed of all.
    pub whole_last_layer: bool,
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
            whole_last_layer: true,
        }
    }

    /// The blocks' matrices, scores, mask and softmax, as the course assignment lists them. With the head:
    /// `Counted { head: true, ..Counted::assignment() }`.
    pub fn assignment() -> Self {
        Self { head: false, embeddings: false, norms: false, elementwise: false, biases: false, ..Self::all() }
    }

    /// What kernels leave of it that compute attention, GELU and residual additions within other operations, and skip what the
    /// mask hides and what nobody wants of the last layer, as this library's do.
    pub fn kernels() -> Self {
        Self { elementwise: false, scores: false, causal: true, whole_last_layer: false, ..Self::all() }
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
    /// How often it occurs in a forward: once a layer, or once. The last layer has terms of its own where it does
    /// [less](Counted::whole_last_layer) than others.
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

/// What becomes a [`Term`]: its part, its name, how often it occurs, and what it deals with.
type Row = (Part, &'static str, usize, Elements);

fn count_if(yes: bool, times: usize) -> usize {
    if yes { times } else { 0 }
}

/// A product of so many rows with a matrix.
fn linear(from: f64, to: f64, rows: f64) -> Elements {
    Elements {
        flops: 2.0 * rows * from * to,
        weights: from * to,
        biases: to,
        read: rows * from,
        written: rows * to,
        ..Elements::default()
    }
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
        let layers = self.shape.n_layer;
        // Of how many tokens of a row the last layer has queries.
        let last = if self.counted.whole_last_layer { pass.new } else { pass.logits };
        let mut rows = vec![self.embeddings(pass)];
        match last == pass.new {
            true => rows.extend(self.layers(pass, layers, pass.new)),
            false => {
                rows.extend(self.layers(pass, layers - 1, pass.new));
                rows.extend(self.layers(pass, 1, last));
            }
        }
        rows.extend(self.head(pass, last));
        let counted = rows.into_iter().filter(|(_, _, times, _)| *times > 0);
        Ok(counted.map(|(part, name, times, elements)| self.term(part, name, times, elements)).collect())
    }

    fn embeddings(&self, pass: Pass) -> Row {
        let elements = pass.batch as f64 * pass.new as f64 * self.shape.n_embd as f64;
        let elements = Elements { weights: 2.0 * elements, written: elements, ..Elements::default() };
        (Part::Embeddings, "tokens and positions", count_if(self.counted.embeddings, 1), elements)
    }

    /// The rows of so many layers, with keys and values of all new tokens and queries of the last `queries` of each row.
    fn layers(&self, pass: Pass, layers: usize, queries: usize) -> [Row; 13] {
        use Part::{Attention, Mlp, Norms, Residual};
        let counted = self.counted;
        let [d, inner, heads] = [self.shape.n_embd, self.shape.inner(), self.shape.n_head].map(|size| size as f64);
        let batch = pass.batch as f64;
        let (tokens, asking, keys) = (batch * pass.new as f64, batch * queries as f64, batch * pass.keys() as f64);
        let pairs = pass.pairs(queries, counted.causal);
        let scores = batch * heads * pairs;
        let none = Elements::default();
        let (norm, linear) = (|rows| self.norm(rows), |from, to| linear(from, to, asking));
        let add = Elements { read: 2.0 * asking * d, written: asking * d, ..none };
        let over_keys = Elements { flops: 2.0 * batch * pairs * d, read_cached: keys * d, ..none };
        // Thirds of the matrix: keys and values, and queries if there are any.
        let thirds = if queries > 0 { 3.0 } else { 2.0 };
        let qkv = Elements {
            flops: 2.0 * d * d * (2.0 * tokens + asking),
            weights: thirds * d * d,
            biases: thirds * d,
            read: tokens * d,
            written: asking * d,
            written_cached: 2.0 * tokens * d,
            ..none
        };
        let asked = count_if(queries > 0, layers);
        let elementwise = count_if(counted.elementwise, asked);
        // A single new token has no mask: nothing follows it.
        let masks = count_if(counted.scores && queries > 1, layers);
        [
            (Norms, "ln_1", count_if(counted.norms, layers), norm(tokens)),
            (Attention, "c_attn", layers, qkv),
            (Attention, "scores q k^T", asked, Elements { read: asking * d, scores: [0.0, scores], ..over_keys }),
            (Attention, "mask", masks, Elements { scores: [scores + pairs, scores], ..none }),
            (Attention, "softmax", count_if(counted.scores, asked), Elements { scores: [scores, scores], ..none }),
            (Attention, "values", asked, Elements { written: asking * d, scores: [scores, 0.0], ..over_keys }),
            (Attention, "c_proj", asked, linear(d, d)),
            (Residual, "add attention", elementwise, add),
            (Norms, "ln_2", count_if(counted.norms, asked), norm(asking)),
            (Mlp, "c_fc", asked, linear(d, inner)),
            (Mlp, "GELU", elementwise, Elements { read: asking * inner, written: asking * inner, ..none }),
            (Mlp, "c_proj", asked, linear(inner, d)),
            (Residual, "add MLP", elementwise, add),
        ]
    }

    /// What follows the layers, the norm of `queries` tokens of each row.
    fn head(&self, pass: Pass, queries: usize) -> [Row; 2] {
        let [d, vocab] = [self.shape.n_embd, self.shape.vocab_size].map(|size| size as f64);
        let [norms, logits] = [queries, pass.logits].map(|tokens| pass.batch as f64 * tokens as f64);
        [
            (Part::Norms, "ln_f", count_if(self.counted.norms && queries > 0, 1), self.norm(norms)),
            (
                Part::Head,
                "logits",
                count_if(self.counted.head && pass.logits > 0, 1),
                Elements { biases: 0.0, ..linear(d, vocab, logits) },
            ),
        ]
    }

    /// A norm of so many rows.
    fn norm(&self, rows: f64) -> Elements {
        let d = self.shape.n_embd as f64;
        let shifts = if self.shape.bias { d } else { 0.0 };
        Elements { weights: d + shifts, read: rows * d, written: rows * d, ..Elements::default() }
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
