//! [`BatchOptions`]: how much a batch takes on at once.

use crate::schedule::Schedule;

/// How many rows a batch computes together, and how many tokens in a step.
///
/// ```
/// use gpt2_burn::batch::BatchOptions;
///
/// let options = BatchOptions::default().with_max_rows(8).with_step_tokens(128);
/// assert_eq!((options.max_rows, options.step_tokens), (8, 128));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BatchOptions {
    /// Most rows that are computed together; the others wait. The cache has room for so many from the start.
    pub max_rows: usize,
    /// Most rows that wait.
    pub max_waiting: usize,
    /// Most tokens of a row, its prompt included; none: the model's context.
    pub max_row_tokens: Option<usize>,
    /// Tokens that a step computes, if there are so many: first one of each row that decodes, then chunks of prompts. Fewer make rows
    /// that decode wait less for prompts that come, and prompts wait more.
    pub step_tokens: usize,
    /// Steps after which a prompt gets a turn although rows that decode leave nothing of those tokens.
    pub max_wait: usize,
}

impl Default for BatchOptions {
    /// 32 rows, 256 tokens a step, and 1,024 rows that wait.
    fn default() -> Self {
        Self { max_rows: 32, max_waiting: 1024, max_row_tokens: None, step_tokens: 256, max_wait: 8 }
    }
}

impl BatchOptions {
    /// Most rows that are computed together.
    pub fn with_max_rows(self, max_rows: usize) -> Self {
        Self { max_rows, ..self }
    }

    /// Most rows that wait.
    pub fn with_max_waiting(self, max_waiting: usize) -> Self {
        Self { max_waiting, ..self }
    }

    /// Most tokens of a row.
    pub fn with_max_row_tokens(self, max_row_tokens: impl Into<Option<usize>>) -> Self {
        Self { max_row_tokens: max_row_tokens.into(), ..self }
    }

    /// Tokens that a step computes.
    pub fn with_step_tokens(self, step_tokens: usize) -> Self {
        Self { step_tokens, ..self }
    }

    /// Steps after which a prompt gets a turn.
    pub fn with_max_wait(self, max_wait: usize) -> Self {
        Self { max_wait, ..self }
    }

    pub(super) fn schedule(&self) -> Schedule {
        Schedule { budget: self.step_tokens, max_wait: self.max_wait }
    }
}
