//! [`Precision`]: the element types of a model at work.

use burn::tensor::DType;
use gpt2_burn_core::cost::ElementBytes;

use crate::{Error, Result};

/// Element types of what is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Precision {
    /// Matrices, biases, norms and embeddings. An integer type of a byte stands for int8 weights, their scales aside.
    pub weights: DType,
    /// What passes from one operation to the next.
    pub activations: DType,
    /// Keys and values in the cache.
    pub cache: DType,
}

impl From<DType> for Precision {
    /// The same for everything.
    fn from(dtype: DType) -> Self {
        Self { weights: dtype, activations: dtype, cache: dtype }
    }
}

impl TryFrom<Precision> for ElementBytes {
    type Error = Error;

    /// Bytes of an element, if such types can be computed with.
    fn try_from(precision: Precision) -> Result<Self> {
        let Precision { weights, activations, cache } = precision;
        for (what, dtype) in [("activations", activations), ("keys and values", cache)] {
            if !dtype.is_float() {
                return Err(Error::mismatch(what, "a floating-point type", format!("{dtype:?}")));
            }
        }
        if !(weights.is_float() || weights.is_int()) {
            return Err(Error::mismatch("weights", "a type of whole bytes", format!("{weights:?}")));
        }
        Ok(Self { weights: weights.size(), activations: activations.size(), cache: cache.size() })
    }
}
