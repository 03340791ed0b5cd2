//! What can go wrong without a device.

/// A specialised `Result` of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong here, with the numbers that say why.
///
/// `gpt2-burn` has variants of the same names, into which these are converted. The enum is exhaustive so that the compiler finds
/// one that has no counterpart.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A size of a model that no model can have.
    #[error("config field `{field}`: {reason}")]
    Config {
        /// Name of the field, as in `config.json`.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },

    /// A batch without rows.
    #[error("there is nothing to do: no prompt was given")]
    EmptyBatch,

    /// More tokens than the model has positions for.
    #[error("row {row} would hold {tokens} tokens, the model has {n_positions} positions")]
    ContextOverflow {
        /// Row of the batch.
        row: usize,
        /// Tokens that the row would hold.
        tokens: usize,
        /// The model's context length.
        n_positions: usize,
    },

    /// Values that do not belong together, or one that does not belong where it is.
    #[error("{what}: expected {expected}, got {actual}")]
    Mismatch {
        /// What was compared.
        what: &'static str,
        /// What was needed.
        expected: String,
        /// What was there.
        actual: String,
    },

    /// A sampling parameter outside its range.
    #[error("{parameter} = {value}: must be {allowed}")]
    Sampling {
        /// Name of the parameter.
        parameter: &'static str,
        /// The value given.
        value: String,
        /// The values that are allowed.
        allowed: &'static str,
    },
}

impl Error {
    /// An [`Error::Config`] for `field`.
    pub(crate) fn config(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Config { field, reason: reason.into() }
    }

    /// An [`Error::Mismatch`] of two values.
    pub(crate) fn mismatch(what: &'static str, expected: impl ToString, actual: impl ToString) -> Self {
        Self::Mismatch { what, expected: expected.to_string(), actual: actual.to_string() }
    }
}
