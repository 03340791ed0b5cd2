//! Shared prefixes: what was computed for the beginning of a prompt is kept, and used again.

mod tree;

pub use tree::{Match, Payload, RadixTree, TreeStats};
