//! The one error type of the library.

use std::path::PathBuf;

/// A specialised `Result` of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, with the numbers that say why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of a model configuration has a value that this library cannot honour.
    #[error("config field `{field}`: {reason}")]
    Config {
        /// Name of the field, as in `config.json`.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },

    /// A configuration file is not valid JSON or a field has the wrong type.
    #[error("cannot read the configuration {origin}: {source}")]
    ConfigSyntax {
        /// Where the text came from.
        origin: String,
        /// The parser's complaint.
        source: serde_json::Error,
    },

    /// A model whose weights are packed for inference was to be changed or written.
    #[error("a packed model cannot be {what}: `pack` is the last thing that is done with a model")]
    Packed {
        /// What was to be done.
        what: &'static str,
    },

    /// A prompt holds no token.
    #[error("prompt {index} is empty: at least one token is needed")]
    EmptyPrompt {
        /// Position of the prompt in the request.
        index: usize,
    },

    /// A batch without rows, or a request without prompts.
    #[error("there is nothing to do: no prompt was given")]
    EmptyBatch,

    /// A token id that the model does not know.
    #[error("token id {id} (row {row}, position {position}) is outside the vocabulary 0..{vocab_size}")]
    TokenOutOfRange {
        /// The offending id.
        id: u32,
        /// Row of the batch.
        row: usize,
        /// Index within the row's new tokens.
        position: usize,
        /// Number of entries in the vocabulary.
        vocab_size: usize,
    },

    /// More tokens than the model has positions for.
    #[error("row {row} would hold {tokens} tokens, the model has {n_positions} positions")]
    ContextOverflow {
        /// Row of the batch (for a request: index of the prompt).
        row: usize,
        /// Tokens that the row would hold.
        tokens: usize,
        /// The model's context length.
        n_positions: usize,
    },

    /// A request that cannot fit the context, under the policy `error`.
    #[error(
        "prompt {prompt} has {prompt_tokens} tokens and {max_new_tokens} new ones are asked for: \
         {prompt_tokens} + {max_new_tokens} - 1 is more than the model's {n_positions} positions"
    )]
    RequestTooLong {
        /// Index of the prompt.
        prompt: usize,
        /// Its length in tokens.
        prompt_tokens: usize,
        /// New tokens asked for.
        max_new_tokens: usize,
        /// The model's context length.
        n_positions: usize,
    },

    /// A preallocated cache is full.
    #[error("row {row} of the cache would hold {tokens} tokens, its capacity is {capacity}")]
    CacheFull {
        /// Row of the cache.
        row: usize,
        /// Tokens that the row would hold.
        tokens: usize,
        /// Tokens that fit.
        capacity: usize,
    },

    /// More memory than may be taken: see [`MemoryLimit`](crate::MemoryLimit).
    #[error("{what} would take {bytes} bytes of memory, the limit is {limit}: fewer or shorter rows take less")]
    OutOfMemory {
        /// What it is for.
        what: &'static str,
        /// Bytes that it would take; `usize::MAX` if they cannot be counted.
        bytes: usize,
        /// Bytes that it may take.
        limit: usize,
    },

    /// A model that records gradients was to compute what only inference is for.
    #[error("{what} is for inference, and the model is on a device that records gradients: take `model.valid()`")]
    Training {
        /// What was to be computed.
        what: &'static str,
    },

    /// A cache, a batch or a selection that does not belong with the others.
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

    /// The model produced a logit that is not a number.
    #[error("the model's logits for prompt {prompt}, sample {sample}, position {position} are not finite")]
    NotFinite {
        /// Index of the prompt.
        prompt: usize,
        /// Index of the sample of that prompt.
        sample: usize,
        /// Position of the token that they were to give.
        position: usize,
    },

    /// A draft model produced a logit that is not a number.
    #[error("the draft's logits for prompt {prompt}, sample {sample}, position {position} are not finite")]
    DraftNotFinite {
        /// Index of the prompt.
        prompt: usize,
        /// Index of the sample of that prompt.
        sample: usize,
        /// Position of the token that they were to propose.
        position: usize,
    },

    /// Speculative decoding was asked for, and nothing makes drafts.
    #[error("speculative decoding needs a draft: see `Generator::with_draft`")]
    NoDraft,

    /// Text was given or asked for, and there is no tokenizer.
    #[error("{what} needs a tokenizer, and this model has none: give token ids instead")]
    NoTokenizer {
        /// What needs it.
        what: &'static str,
    },

    /// The tokenizer files are unusable, or refused a text.
    #[error("tokenizer {origin}: {reason}")]
    Tokenizer {
        /// The file or the operation.
        origin: String,
        /// The tokenizer's complaint.
        reason: String,
    },

    /// A file or folder is not where it should be, or holds nothing usable.
    #[error("{path}: {reason}", path = .path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// The tensors of a checkpoint do not fit the model; every problem is listed.
    #[error("the checkpoint does not fit the model: {}", .0.join("; "))]
    Tensors(Vec<String>),

    /// A batch has as many rows that wait as it may have.
    #[error("{waiting} rows wait already, of at most {max_waiting}")]
    BatchFull {
        /// Rows that wait.
        waiting: usize,
        /// Most that may.
        max_waiting: usize,
    },

    /// A model name that is neither a path, nor a published size, nor in the hub's cache.
    #[error("model `{name}`: {reason}")]
    ModelNotFound {
        /// The name as given.
        name: String,
        /// Where it was looked for, and what to do.
        reason: String,
    },

    /// Reading or writing failed.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's complaint.
        source: std::io::Error,
    },

    /// The device is unknown or cannot be used.
    #[error(transparent)]
    Device(#[from] gpt2_burn_backends::DeviceError),

    /// The device failed while computing or handing data over.
    #[error("the device failed: {0}")]
    Execution(String),
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

/// What the parts without burn found, under the same name.
impl From<gpt2_burn_core::Error> for Error {
    fn from(error: gpt2_burn_core::Error) -> Self {
        use gpt2_burn_core::Error as Core;
        match error {
            Core::Config { field, reason } => Self::Config { field, reason },
            Core::EmptyBatch => Self::EmptyBatch,
            Core::ContextOverflow { row, tokens, n_positions } => Self::ContextOverflow { row, tokens, n_positions },
            Core::Mismatch { what, expected, actual } => Self::Mismatch { what, expected, actual },
            Core::Sampling { parameter, value, allowed } => Self::Sampling { parameter, value, allowed },
        }
    }
}

#[cfg(test)]
mod tests {
    use gpt2_burn_core::Error as Core;

    use super::*;

    #[test]
    fn errors_of_the_core_keep_their_names_and_words() {
        let text = || "what is said".to_owned();
        let errors = [
            (Core::Config { field: "n_head", reason: text() }, "Config"),
            (Core::EmptyBatch, "EmptyBatch"),
            (Core::ContextOverflow { row: 1, tokens: 20, n_positions: 10 }, "ContextOverflow"),
            (Core::Mismatch { what: "tokens", expected: text(), actual: "another".to_owned() }, "Mismatch"),
            (Core::Sampling { parameter: "top_k", value: text(), allowed: "at least 1" }, "Sampling"),
        ];
        for (core, name) in errors {
            let (debug, words) = (format!("{core:?}"), core.to_string());
            let error = Error::from(core);
            assert!(debug.starts_with(name), "{debug}");
            assert_eq!((format!("{error:?}"), error.to_string()), (debug, words));
        }
    }
}
