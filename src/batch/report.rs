//! [`BatchReport`] and [`StepReport`]: what was done.

use crate::cache::PageCounts;

/// What a batch has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BatchReport {
    /// Steps that were taken.
    pub steps: usize,
    /// Tokens that went through the model.
    pub computed_tokens: usize,
    /// Of those, tokens of prompts that were computed for the first time.
    pub computed_prompt_tokens: usize,
    /// Tokens of prompts that did not have to be computed: they were in the cache of prefixes, or another row has computed them.
    pub reused_prompt_tokens: usize,
    /// Of the prompts, those that had such tokens.
    pub prefix_hits: usize,
    /// New tokens of all rows.
    pub new_tokens: usize,
    /// Rows that came while others were decoded.
    pub joins: usize,
    /// Rows that left while others went on.
    pub leaves: usize,
    /// Times that a row was taken out for a while, so that older ones had room.
    pub preemptions: usize,
    /// Most bytes that caches had reserved.
    pub kv_bytes: usize,
    /// Most pages of the model's cache that were in use, and that several rows shared; and those that were copied.
    pub pages: PageCounts,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct StepReport {
    /// Seconds that it took.
    pub seconds: f64,
    /// Rows that got a token.
    pub rows: usize,
    /// New tokens of all of them.
    pub new_tokens: usize,
    /// Tokens that went through the model.
    pub computed_tokens: usize,
    /// Forwards that computed them.
    pub forwards: usize,
    /// Steps that a device took while nobody looked at their tokens; 0 if they were looked at.
    pub multi_steps: usize,
}
