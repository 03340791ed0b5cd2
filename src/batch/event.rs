//! What comes out of a batch.

use std::fmt;

use super::RowId;
use crate::Error;

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// It has `max_new_tokens` tokens.
    Length,
    /// The model ended the text, or a stop text occurred.
    Stop,
    /// The context is full.
    Context,
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Length => "length",
            Self::Stop => "stop",
            Self::Context => "context",
        })
    }
}

/// Natural logarithms of probabilities under the model's own distribution, before any filter.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TokenLogprobs {
    /// That of the chosen token.
    pub chosen: f64,
    /// The most likely tokens, most likely first.
    pub top: Vec<(u32, f64)>,
}

/// What became of a row in a step.
#[derive(Debug)]
#[non_exhaustive]
pub enum RowEvent {
    /// It has a new token.
    Token(RowToken),
    /// It has ended without one, since it asked for none.
    Finished {
        /// The row.
        row: RowId,
        /// Why.
        finish: FinishReason,
    },
    /// It cannot go on: logits of it are no numbers, or its draft or its text could not be made. Others are not touched.
    Failed {
        /// The row.
        row: RowId,
        /// Why.
        error: Error,
    },
}

impl RowEvent {
    /// Whose event it is.
    pub fn row(&self) -> RowId {
        match self {
            Self::Token(RowToken { row, .. }) | Self::Finished { row, .. } | Self::Failed { row, .. } => *row,
        }
    }
}

/// A row's next token.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RowToken {
    /// The row.
    pub row: RowId,
    /// The token.
    pub id: u32,
    /// The text that has become certain with it, possibly none: characters are never split, and what may be the start of a stop
    /// text is held back. Empty without a tokenizer.
    pub text: String,
    /// Its log-probabilities, if asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// Why the row ends with it, if it does.
    pub finish: Option<FinishReason>,
}
