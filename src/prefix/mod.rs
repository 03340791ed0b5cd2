//! Shared prefixes: what was computed for the prefix of a prompt is kept, and used again.

#[cfg(feature = "files")]
mod file;
mod fingerprint;
mod of_model;
mod sharing;
mod store;

#[cfg(feature = "files")]
pub(crate) use file::Reader;
pub use fingerprint::Fingerprint;
pub(crate) use gpt2_burn_core::prefix::sources;
pub use gpt2_burn_core::prefix::{Entry, Match, Payload, Plan, PromptChunk, RadixTree, Reuse, TreeStats};
pub(crate) use of_model::Prefixes;
pub use sharing::Sharing;
pub use store::{Pin, PrefixCache};
