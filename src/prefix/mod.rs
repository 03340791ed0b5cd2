//! Shared prefixes: what was computed for the beginning of a prompt is kept, and used again.

mod fingerprint;
mod plan;
mod store;
mod tree;

pub use fingerprint::Fingerprint;
pub use plan::{Piece, Plan};
pub use store::{Pin, PrefixCache, Reuse};
pub use tree::{Entry, Match, Payload, RadixTree, TreeStats};
