//! Speculative decoding, as far as no model is needed: which draft tokens are accepted, and how many pay.

mod acceptance;
mod policy;

pub use acceptance::{Acceptance, VerifiedToken, acceptance};
pub use policy::{DraftLen, Policy, best_len, expected_tokens, speedup};
