//! What inference costs, on paper: floating-point operations, bytes, seconds, memory, and what speculation is worth.
//!
//! Pure arithmetic: no tensor, no device, no clock.
//!
//! ```
//! use gpt2_burn_core::ModelShape;
//! use gpt2_burn_core::cost::{Bound, Cost, Counted, Hardware, Pass};
//!
//! let xl = ModelShape { n_layer: 48, n_head: 25, n_embd: 1600, ..ModelShape::default() };
//! let cost = Cost::new(xl, 2)?.counting(Counted::assignment()); // 2 bytes an element
//! let t4 = Hardware::preset("t4").unwrap();
//!
//! let naive = t4.roofline(cost.work(Pass::naive(1, 1024))?);
//! let cached = t4.roofline(cost.work(Pass::decode(1, 1024))?);
//! assert_eq!((naive.bound(), cached.bound()), (Bound::Memory, Bound::Memory));
//! assert!(naive.seconds() / cached.seconds() > 5.0);
//! # Ok::<(), gpt2_burn_core::Error>(())
//! ```
//!
//! # The table of terms
//!
//! Everything comes from one table: what a [`Pass`] does in one layer, for B rows of T new tokens that see L keys each
//! (T = L = N for naive decoding of the N-th token, T = 1 and L = N with a cache). d is the width, i the hidden width of
//! the MLP (4 d), H the heads, V the vocabulary, K the positions that get logits (1 in decoding).
//!
//! | term | FLOPs | weights | reads | writes |
//! |---|---|---|---|---|
//! | `c_attn` | 6 B T d^2 | 3 d^2 | B T d | 3 B T d |
//! | scores `q k^T` | 2 B T L d | | B T d + B L d | B H T L |
//! | mask, if T > 1 | | | B H T L + T L | B H T L |
//! | softmax | | | B H T L | B H T L |
//! | values | 2 B T L d | | B H T L + B L d | B T d |
//! | attention's `c_proj` | 2 B T d^2 | d^2 | B T d | B T d |
//! | `c_fc` | 2 B T d i | d i | B T d | B T i |
//! | MLP's `c_proj` | 2 B T d i | i d | B T i | B T d |
//! | head, once | 2 B K d V | d V | B K d | B K V |
//!
//! FLOPs are those of the matrices, a multiplication and an addition each; what softmax, norms and GELU add is not counted,
//! as usual. Columns of elements become bytes by [`ElementBytes`]: weights, activations, and cached keys and values (the two
//! B L d, and two of the 3 B T d) may be of different sizes. [`Counted`] says which terms count, and has more of them:
//! embeddings, norms, biases, GELU and residual additions. Without [`whole_last_layer`](Counted::whole_last_layer), the last
//! layer has only `c_attn`'s keys and values of all T tokens, and everything else of the K that get logits: for gpt2 that is
//! 7% of a prefill.
//!
//! # Closed forms
//!
//! Summed over the table, naive decoding's step at length N is a polynomial in B and N, and so is the cached one's
//! ([`Polynomial`], [`Cost::naive`], [`Cost::cached`]). With [`Counted::assignment`], i = 4 d, and 16 bit for everything,
//! in one layer:
//!
//! | | FLOPs | bytes |
//! |---|---|---|
//! | naive | 24 d^2 B N + 4 d B N^2 | 24 d^2 + 40 d B N + 12 H B N^2 + 2 N^2 |
//! | cached | 24 d^2 B + 4 d B N | 24 d^2 + 36 d B + (4 d + 8 H) B N |
//!
//! So naive FLOPs are C1 B N + C2 B N^2 and its bytes C3 + C4 B N + C5 B N^2 + C6 N^2, with C1 = 24 d^2 (6 + 2 for
//! attention's matrices, 8 + 8 for the MLP's), C2 = 4 d (scores and values, each 2), C3 = 2 x 12 d^2 (the weights, read once
//! whatever B and N are), C4 = 2 x 20 d (4 for `c_attn`, 2 + 2 for scores and values, 2 for `c_proj`, 5 + 5 for the MLP),
//! C5 = 2 x 6 H (scores written, mask read and written, softmax read and written, values read), and C6 = 2 (the mask, which
//! is the same for all rows and heads).
//!
//! # A decode step's constant
//!
//! With a cache, C3 is all that is left at small B N, and it is read at the bandwidth. On a T4 (300 GB/s), in 16 bit:
//!
//! | | layers x 24 d^2 bytes | head, 2 d V bytes | without head | with head |
//! |---|---|---|---|---|
//! | GPT-2 | 12 x 24 x 768^2 = 169.9 MB | 77.2 MB | 566 us | 824 us |
//! | GPT2-XL | 48 x 24 x 1600^2 = 2.949 GB | 160.8 MB | 9.83 ms | 10.37 ms |
//!
//! Biases (13 d a layer) are not in it, nor norms; with them GPT-2 would take 567 us.
//!
//! # Keys and values
//!
//! A token leaves a key and a value of d elements in each layer: 2 x 2 B N d = 4 B N d bytes a layer in 16 bit. GPT2-XL with
//! 64 rows of 1,024 tokens: 48 x 4 x 64 x 1024 x 1600 = 20.13 GB (GB are 10^9 bytes here), which with 3.12 GB of parameters does
//! [not fit](Fit) a T4's 16 GB.
//!
//! # Speculation
//!
//! If each drafted token is accepted with probability a, independently, a round of m drafted tokens accepts the first k of
//! them with probability at least a^k. It yields 1 + a + ... + a^(m-1) tokens if a round ends with its first rejection or
//! its last drafted token (the assignment's algorithm, in which the target's token takes the place of a rejected one), and
//! a^m more if a target that accepts all gives its next token too (the bonus; Leviathan et al., 2023, equation 1). It costs
//! m c + 1 of the target's decode steps, with c the draft's step in units of the target's. GPT-2 as the draft of GPT2-XL on a
//! T4 has c = 0.824 ms / 9.83 ms = 0.0838 (the assignment counts the draft's head, and not the target's). At a = 0.75:
//!
//! | m | without bonus | | with bonus | |
//! |---|---|---|---|---|
//! | 4 | 2.734 / 1.335 | 2.05 x | 3.051 / 1.335 | 2.29 x |
//! | 5 | 3.051 / 1.419 | 2.15 x | 3.288 / 1.419 | **2.32 x** |
//! | 6 | 3.288 / 1.503 | **2.19 x** | 3.466 / 1.503 | 2.31 x |
//! | 7 | 3.466 / 1.586 | 2.18 x | 3.600 / 1.586 | 2.27 x |
//!
//! [`SpeculationCost`] computes them, also with a verification that costs more than one step, as measured.

mod closed;
mod format;
mod hardware;
mod memory;
mod pass;
mod speculation;
mod terms;

pub use crate::speculative::acceptance;
pub use closed::{ClosedForm, Polynomial};
pub use format::{bytes_from_text, format_bytes, format_seconds};
pub use hardware::{Bound, Hardware, Reached, Roofline};
pub use memory::{Fit, Memory};
pub use pass::Pass;
pub use speculation::{BestDraft, SpeculationCost};
pub use terms::{Counted, ElementBytes, Part, Term, Work};

use crate::{ModelShape, Result};

/// The costs of a model.
///
/// Counts are `f64`: exact up to 2^53, which is 9 x 10^15, and to 16 digits above.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    shape: ModelShape,
    element_bytes: ElementBytes,
    counted: Counted,
}

impl Cost {
    /// The costs of a model of this shape, every term [counted](Counted::all).
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::Error::Config) for a shape that no model can have.
    pub fn new(shape: impl Into<ModelShape>, element_bytes: impl Into<ElementBytes>) -> Result<Self> {
        let (shape, element_bytes) = (shape.into(), element_bytes.into());
        shape.validate()?;
        Ok(Self { shape, element_bytes, counted: Counted::all() })
    }

    /// The same, with other terms counted.
    pub fn counting(self, counted: Counted) -> Self {
        Self { counted, ..self }
    }

    /// The model's shape.
    pub fn shape(&self) -> ModelShape {
        self.shape
    }

    /// Bytes of an element.
    pub fn element_bytes(&self) -> ElementBytes {
        self.element_bytes
    }

    /// Which terms are counted.
    pub fn counted(&self) -> Counted {
        self.counted
    }

    /// What a pass costs: the sum of its [terms](Self::terms).
    ///
    /// # Errors
    ///
    /// As [`terms`](Self::terms).
    pub fn work(&self, pass: Pass) -> Result<Work> {
        Ok(self.terms(pass)?.iter().map(Term::total).sum())
    }

    /// What a part of the model costs in a pass.
    ///
    /// # Errors
    ///
    /// As [`terms`](Self::terms).
    pub fn work_of(&self, part: Part, pass: Pass) -> Result<Work> {
        Ok(self.terms(pass)?.iter().filter(|term| term.part == part).map(Term::total).sum())
    }

    /// Seconds that a pass takes if one term comes after the other, each at the rates that the hardware
    /// [reaches](Hardware::reached) in it: a term's operands are read while it is computed, and its result is written
    /// behind that. So it is the sum over terms of
    ///
    /// ```text
    /// max(FLOPs / linear or attention, weights / weights' rate + reads / bandwidth) + writes / results' rate
    /// ```
    ///
    /// That is what to expect of a machine whose rates were measured. [`Hardware::roofline`] of all the
    /// [`work`](Self::work) is what no machine of these rates can beat.
    ///
    /// # Errors
    ///
    /// As [`terms`](Self::terms).
    pub fn seconds(&self, hardware: &Hardware, pass: Pass) -> Result<f64> {
        let Reached { weights, results, linear, attention } = hardware.reached;
        let seconds = |term: &Term| {
            let computing = term.flops / if term.is_over_keys() { attention } else { linear };
            let reading = term.weights / weights + term.read / hardware.bandwidth;
            term.times as f64 * (computing.max(reading) + term.written / results)
        };
        Ok(self.terms(pass)?.iter().map(seconds).sum())
    }

    /// How much faster a step at length `length` is with a cache than naively, both at the hardware's roofline.
    ///
    /// # Errors
    ///
    /// As [`terms`](Self::terms).
    pub fn kv_speedup(&self, hardware: &Hardware, batch: usize, length: usize) -> Result<f64> {
        let seconds = |pass| Ok::<_, crate::Error>(hardware.roofline(self.work(pass)?).seconds());
        Ok(seconds(Pass::naive(batch, length))? / seconds(Pass::decode(batch, length))?)
    }
}
