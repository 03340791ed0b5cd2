//! What inference costs, on paper: floating-point operations, bytes, seconds, memory, and what speculation is worth.
//!
//! Pure arithmetic: no tensor, no device, no clock. [`measure`](crate::measure) holds it against a machine. The formulas are in
//! [`gpt2_burn_core::cost`], whose page has the table of terms from which everything comes and the closed forms; here they take a
//! [`Gpt2Config`] and burn's element types.
//!
//! ```
//! use gpt2_burn::Gpt2Config;
//! use gpt2_burn::burn::tensor::DType;
//! use gpt2_burn::cost::{Bound, Cost, Counted, Hardware, Pass};
//!
//! let xl = Gpt2Config::published("gpt2-xl").unwrap();
//! let cost = Cost::new(&xl, DType::F16)?.counting(Counted::assignment());
//! let t4 = Hardware::preset("t4").unwrap();
//!
//! let naive = t4.roofline(cost.work(Pass::naive(1, 1024))?);
//! let cached = t4.roofline(cost.work(Pass::decode(1, 1024))?);
//! assert_eq!((naive.bound(), cached.bound()), (Bound::Memory, Bound::Memory));
//! assert!(naive.seconds() / cached.seconds() > 5.0);
//! # Ok::<(), gpt2_burn::Error>(())
//! ```

mod precision;

use gpt2_burn_core::cost;
pub use gpt2_burn_core::cost::{
    BestDraft, Bound, ClosedForm, Counted, ElementBytes, Fit, Hardware, Memory, Part, Pass, Polynomial, Reached,
    Roofline, SpeculationCost, Term, Work, acceptance, bytes_from_text, format_bytes, format_seconds,
};
pub use precision::Precision;

use crate::{Gpt2Config, Result};

/// The costs of a model.
///
/// Counts are `f64`: exact up to 2^53, which is 9 x 10^15, and to 16 digits above.
#[derive(Clone, Debug, PartialEq)]
pub struct Cost {
    config: Gpt2Config,
    precision: Precision,
    cost: cost::Cost,
}

impl Cost {
    /// The costs of a model of this shape, every term [counted](Counted::all).
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::Error::Config) for a shape that no model can have;
    /// [`Error::Mismatch`](crate::Error::Mismatch) for activations or keys and values that are not floating-point numbers.
    pub fn new(config: &Gpt2Config, precision: impl Into<Precision>) -> Result<Self> {
        config.validate()?;
        let precision = precision.into();
        let cost = cost::Cost::new(config, ElementBytes::try_from(precision)?)?;
        Ok(Self { config: config.clone(), precision, cost })
    }

    /// The same, with other terms counted.
    pub fn counting(self, counted: Counted) -> Self {
        Self { cost: self.cost.counting(counted), ..self }
    }

    /// The model's shape.
    pub fn config(&self) -> &Gpt2Config {
        &self.config
    }

    /// Element types.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Which terms are counted.
    pub fn counted(&self) -> Counted {
        self.cost.counted()
    }

    /// The terms of a pass that are counted, in the order of a forward.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyBatch`](crate::Error::EmptyBatch) without rows, [`Error::Mismatch`](crate::Error::Mismatch) without new
    /// tokens or with more logits than those, [`Error::ContextOverflow`](crate::Error::ContextOverflow) for more tokens than the
    /// model has positions.
    pub fn terms(&self, pass: Pass) -> Result<Vec<Term>> {
        Ok(self.cost.terms(pass)?)
    }

    /// What a pass costs: the sum of its [terms](Self::terms).
    ///
    /// # Errors
    ///
    /// As [`terms`](Self::terms).
    pub fn work(&self, pass: Pass) -> Result<Work> {
        Ok(self.cost.work(pass)?)
    }

    /// What a part of the model costs in a pass.
    ///
    /// # Errors
    ///
    /// As [`terms`](Self::terms).
    pub fn work_of(&self, part: Part, pass: Pass) -> Result<Work> {
        Ok(self.cost.work_of(part, pass)?)
    }

    /// Seconds that a pass takes if one term comes after the other, each at the rates that the hardware
    /// [reaches](Hardware::reached) in it: what to expect of a machine whose rates were
    /// [measured](crate::measure::peaks). [The formula](gpt2_burn_core::cost::Cost::seconds).
    ///
    /// # Errors
    ///
    /// As [`terms`](Self::terms).
    pub fn seconds(&self, hardware: &Hardware, pass: Pass) -> Result<f64> {
        Ok(self.cost.seconds(hardware, pass)?)
    }

    /// How much faster a step at length `length` is with a cache than naively, both at the hardware's roofline.
    ///
    /// # Errors
    ///
    /// As [`terms`](Self::terms).
    pub fn kv_speedup(&self, hardware: &Hardware, batch: usize, length: usize) -> Result<f64> {
        Ok(self.cost.kv_speedup(hardware, batch, length)?)
    }

    /// Naive decoding's step to the token behind N: what [`Pass::naive`] costs, for N > 1.
    pub fn naive(&self) -> ClosedForm {
        self.cost.naive()
    }

    /// The decode step with a cache at N tokens, the new one included: what [`Pass::decode`] costs.
    pub fn cached(&self) -> ClosedForm {
        self.cost.cached()
    }

    /// A part of [`naive`](Self::naive).
    pub fn naive_of(&self, part: Part) -> ClosedForm {
        self.cost.naive_of(part)
    }

    /// A part of [`cached`](Self::cached).
    pub fn cached_of(&self, part: Part) -> ClosedForm {
        self.cost.cached_of(part)
    }

    /// Bytes of all parameters, a tied head once.
    pub fn parameter_bytes(&self) -> f64 {
        self.cost.parameter_bytes()
    }

    /// Bytes of the keys and values of one layer, for `batch` rows of `length` tokens: 2 B N d elements.
    pub fn kv_bytes_per_layer(&self, batch: usize, length: usize) -> f64 {
        self.cost.kv_bytes_per_layer(batch, length)
    }

    /// The same of all layers.
    pub fn kv_bytes(&self, batch: usize, length: usize) -> f64 {
        self.cost.kv_bytes(batch, length)
    }

    /// What a pass [holds in memory](gpt2_burn_core::cost::Cost::memory).
    ///
    /// # Errors
    ///
    /// As [`terms`](Self::terms).
    pub fn memory(&self, pass: Pass) -> Result<Memory> {
        Ok(self.cost.memory(pass)?)
    }

    /// Whether a pass fits the hardware's memory.
    ///
    /// # Errors
    ///
    /// As [`terms`](Self::terms).
    pub fn fits(&self, hardware: &Hardware, pass: Pass) -> Result<Fit> {
        Ok(self.cost.fits(hardware, pass)?)
    }
}
