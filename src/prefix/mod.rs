//! Shared prefixes: what was computed for the beginning of a prompt is kept, and used again.

#[cfg(feature = "files")]
mod file;
mod fill;
mod fingerprint;
mod store;

#[cfg(feature = "files")]
pub(crate) use file::Reader;
pub use fill::Sharing;
pub(crate) use fill::{NewCache, Prefixes};
pub use fingerprint::Fingerprint;
pub use gpt2_burn_core::prefix::{Entry, Match, Payload, Piece, Plan, RadixTree, Reuse, TreeStats};
pub use store::{Pin, PrefixCache};
