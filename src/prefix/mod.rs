//! Shared prefixes: what was computed for the beginning of a prompt is kept, and used again.

#[cfg(feature = "files")]
mod file;
mod fill;
mod fingerprint;
mod plan;
mod store;
mod tree;

#[cfg(feature = "files")]
pub(crate) use file::Reader;
pub use fill::Sharing;
pub(crate) use fill::{NewCache, Prefixes};
pub use fingerprint::Fingerprint;
pub use plan::{Piece, Plan};
pub use store::{Pin, PrefixCache, Reuse};
pub use tree::{Entry, Match, Payload, RadixTree, TreeStats};
