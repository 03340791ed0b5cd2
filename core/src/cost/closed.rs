//! Closed forms of the table of terms, written down by hand: polynomials in the rows B and the length N.

use std::fmt;
use std::iter::Sum;
use std::ops::Add;

use super::{Cost, Part, Work};

/// `constant + batch B + length N + batch_length B N + batch_length_squared B N^2 + length_squared N^2`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Polynomial {
    /// What is done once, whatever B and N are: C3 of naive decoding's bytes.
    pub constant: f64,
    /// For each row.
    pub batch: f64,
    /// For each position, whatever B is: half the diagonal of a causal mask.
    pub length: f64,
    /// For each token: C1 of naive decoding's FLOPs, C4 of its bytes.
    pub batch_length: f64,
    /// For each pair of tokens of a row: C2 of naive decoding's FLOPs, C5 of its bytes.
    pub batch_length_squared: f64,
    /// For each pair of positions, whatever B is: C6 of naive decoding's bytes.
    pub length_squared: f64,
}

impl Polynomial {
    /// Its value for `batch` rows at `length`.
    pub fn at(&self, batch: usize, length: usize) -> f64 {
        let (b, n) = (batch as f64, length as f64);
        let of_rows = self.batch * b + self.batch_length * b * n + self.batch_length_squared * b * n * n;
        self.constant + self.length * n + self.length_squared * n * n + of_rows
    }
}

impl Add for Polynomial {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            constant: self.constant + other.constant,
            batch: self.batch + other.batch,
            length: self.length + other.length,
            batch_length: self.batch_length + other.batch_length,
            batch_length_squared: self.batch_length_squared + other.batch_length_squared,
            length_squared: self.length_squared + other.length_squared,
        }
    }
}

impl fmt::Display for Polynomial {
    /// `24 B N + 4 B N^2`, without what is 0.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let terms = [
            (self.constant, ""),
            (self.batch, " B"),
            (self.length, " N"),
            (self.batch_length, " B N"),
            (self.batch_length_squared, " B N^2"),
            (self.length_squared, " N^2"),
        ];
        let terms: Vec<String> =
            terms.iter().filter(|(factor, _)| *factor != 0.0).map(|(factor, of)| format!("{factor}{of}")).collect();
        f.write_str(if terms.is_empty() { "0".to_owned() } else { terms.join(" + ") }.as_str())
    }
}

/// FLOPs and bytes of a step at length N for B rows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ClosedForm {
    /// Floating-point operations.
    pub flops: Polynomial,
    /// Bytes moved.
    pub bytes: Polynomial,
}

impl ClosedForm {
    /// Its value for `batch` rows at `length`.
    pub fn at(&self, batch: usize, length: usize) -> Work {
        Work { flops: self.flops.at(batch, length), bytes: self.bytes.at(batch, length) }
    }
}

impl ClosedForm {
    fn times(self, factor: f64) -> Self {
        Self { flops: self.flops.times(factor), bytes: self.bytes.times(factor) }
    }
}

impl Sum for ClosedForm {
    fn sum<I: Iterator<Item = Self>>(forms: I) -> Self {
        forms.fold(Self::default(), |a, b| Self { flops: a.flops + b.flops, bytes: a.bytes + b.bytes })
    }
}

/// What a step computes for each row at length N.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// All N tokens.
    Naive,
    /// The last token, with keys and values of N.
    Cached,
}

impl Step {
    /// `factor` for each token that is computed.
    fn each_token(self, factor: f64) -> Polynomial {
        match self {
            Self::Naive => Polynomial { batch_length: factor, ..Polynomial::default() },
            Self::Cached => Polynomial { batch: factor, ..Polynomial::default() },
        }
    }

    /// `factor` for each pair of a query and a key of each row, and `masked` for each pair of positions.
    fn each_pair(self, factor: f64, masked: f64, causal: bool) -> Polynomial {
        let none = Polynomial::default();
        match (self, causal) {
            (Self::Cached, _) => Polynomial { batch_length: factor, ..none },
            (Self::Naive, false) => Polynomial { batch_length_squared: factor, length_squared: masked, ..none },
            // N (N + 1) / 2 of them
            (Self::Naive, true) => Polynomial {
                length: masked / 2.0,
                batch_length: factor / 2.0,
                batch_length_squared: factor / 2.0,
                length_squared: masked / 2.0,
                ..none
            },
        }
    }
}

fn constant(value: f64) -> Polynomial {
    Polynomial { constant: value, ..Polynomial::default() }
}

impl Cost {
    /// Naive decoding's step to the token behind N: what [`Pass::naive`](super::Pass::naive) costs, for N > 1.
    ///
    /// With [`Counted::assignment`](super::Counted::assignment), `flops` is C1 B N + C2 B N^2 and `bytes` is
    /// C3 + C4 B N + C5 B N^2 + C6 N^2.
    pub fn naive(&self) -> ClosedForm {
        Part::ALL.iter().map(|part| self.naive_of(*part)).sum()
    }

    /// The decode step with a cache at N tokens, the new one included: what [`Pass::decode`](super::Pass::decode) costs.
    pub fn cached(&self) -> ClosedForm {
        Part::ALL.iter().map(|part| self.cached_of(*part)).sum()
    }

    /// A part of [`naive`](Self::naive).
    pub fn naive_of(&self, part: Part) -> ClosedForm {
        self.form(part, Step::Naive)
    }

    /// A part of [`cached`](Self::cached).
    pub fn cached_of(&self, part: Part) -> ClosedForm {
        self.form(part, Step::Cached)
    }

    /// Layers of which each token of `step` has a query; and the last one, with one a row, if no more is wanted of it.
    fn form(&self, part: Part, step: Step) -> ClosedForm {
        let last = if self.counted.whole_last_layer { step } else { Step::Cached };
        let others = self.layer(part, step, step).times((self.shape.n_layer - 1) as f64);
        [others, self.layer(part, step, last), self.ends(part, step, last)].into_iter().sum()
    }

    /// A part of a layer, with keys and values of these tokens, and queries of those.
    fn layer(&self, part: Part, tokens: Step, queries: Step) -> ClosedForm {
        let (shape, counted) = (&self.shape, self.counted);
        let [d, i, heads] = [shape.n_embd, shape.inner(), shape.n_head].map(|size| size as f64);
        let [w, e, k] = self.element_bytes.each();
        // Written keys and values are activations; those that attention reads always count.
        let e_scores = if counted.scores { e } else { 0.0 };
        let (e, k_written) = if counted.activations { (e, k) } else { (0.0, 0.0) };
        let bias = f64::from(u8::from(counted.biases && shape.bias));
        let shifts = f64::from(u8::from(shape.bias));
        let (flops, bytes) = match part {
            Part::Attention => {
                // A single token has no mask.
                let of_scores = if queries == Step::Naive { 6.0 } else { 4.0 };
                let keys = Polynomial { batch_length: 2.0 * k * d, ..Polynomial::default() };
                let matrices = constant(w * (4.0 * d * d + bias * 4.0 * d));
                let moved = tokens.each_token(e * d + 2.0 * k_written * d) + queries.each_token(5.0 * e * d);
                let scores = queries.each_pair(of_scores * heads * e_scores, e_scores, counted.causal);
                let products = tokens.each_token(4.0 * d * d) + queries.each_token(4.0 * d * d);
                (products + queries.each_pair(4.0 * d, 0.0, counted.causal), matrices + moved + keys + scores)
            }
            Part::Mlp => {
                let gelu = if counted.elementwise { 2.0 * i } else { 0.0 };
                let matrices = constant(w * (2.0 * d * i + bias * (i + d)));
                (queries.each_token(4.0 * d * i), matrices + queries.each_token(e * (2.0 * d + 2.0 * i + gelu)))
            }
            Part::Norms if counted.norms => {
                let weights = constant(2.0 * w * d * (1.0 + shifts));
                let moved = tokens.each_token(2.0 * e * d) + queries.each_token(2.0 * e * d);
                (Polynomial::default(), weights + moved)
            }
            Part::Residual if counted.elementwise => (Polynomial::default(), queries.each_token(6.0 * e * d)),
            Part::Norms | Part::Residual | Part::Embeddings | Part::Head => Default::default(),
        };
        ClosedForm { flops, bytes }
    }

    /// A part of what stands before the layers, of these tokens, and behind them, of those queries.
    fn ends(&self, part: Part, tokens: Step, queries: Step) -> ClosedForm {
        let (shape, counted) = (&self.shape, self.counted);
        let [d, vocab] = [shape.n_embd, shape.vocab_size].map(|size| size as f64);
        let [w, e, _] = self.element_bytes.each();
        let e = if counted.activations { e } else { 0.0 };
        let shifts = f64::from(u8::from(shape.bias));
        let (flops, bytes) = match part {
            Part::Embeddings if counted.embeddings => (Polynomial::default(), tokens.each_token(2.0 * w * d + e * d)),
            Part::Norms if counted.norms => {
                (Polynomial::default(), constant(w * d * (1.0 + shifts)) + queries.each_token(2.0 * e * d))
            }
            Part::Head if counted.head => (
                Step::Cached.each_token(2.0 * d * vocab),
                constant(w * d * vocab) + Step::Cached.each_token(e * (d + vocab)),
            ),
            _ => Default::default(),
        };
        ClosedForm { flops, bytes }
    }
}

impl Polynomial {
    fn times(self, factor: f64) -> Self {
        Self {
            constant: factor * self.constant,
            batch: factor * self.batch,
            length: factor * self.length,
            batch_length: factor * self.batch_length,
            batch_length_squared: factor * self.batch_length_squared,
            length_squared: factor * self.length_squared,
        }
    }
}
