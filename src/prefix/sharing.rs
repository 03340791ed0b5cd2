//! [`Sharing`]: what sharing prefixes took and saved.

/// What it took to compute the prompts of a request that shared their prefixes with each other and with those before.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Sharing {
    /// Tokens of all prompts.
    pub requested_tokens: usize,
    /// Tokens that were computed.
    pub computed_tokens: usize,
    /// Tokens that did not have to be.
    pub saved_tokens: usize,
    /// Forwards that computed them.
    pub forwards: usize,
    /// Floating-point operations of what was computed.
    pub flops: f64,
    /// Floating-point operations if each prompt had been computed by itself.
    pub flops_without: f64,
    /// Seconds that this was expected to take, at the rate of the last prompts; none for the first.
    pub estimated_seconds: Option<f64>,
    /// Seconds that it took.
    pub seconds: f64,
}
