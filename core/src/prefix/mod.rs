//! Shared prefixes, as far as they are bookkeeping.

mod plan;
mod reuse;
mod sources;
mod tree;

pub use plan::{Plan, PromptChunk};
pub use reuse::Reuse;
pub use sources::{Source, sources};
pub use tree::{Entry, Match, Payload, RadixTree, TreeStats};
