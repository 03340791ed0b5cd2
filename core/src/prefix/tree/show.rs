//! A tree as a picture.

use std::fmt::{self, Display};

use super::{NodeId, Payload, RadixTree};

/// Ids of a node that are shown, at most.
const SHOWN: usize = 8;

/// Each node's ids, below its parent; a node that is pinned says so. The trees of all namespaces stand one below the other.
impl<N: Copy + Ord, P: Payload> Display for RadixTree<N, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.roots.values().try_for_each(|&id| self.show(f, id, "", ""))
    }
}

impl<N: Copy + Ord, P: Payload> RadixTree<N, P> {
    /// One node: `branch` leads to it, `indent` stands before those below it.
    fn show(&self, f: &mut fmt::Formatter<'_>, id: NodeId, branch: &str, indent: &str) -> fmt::Result {
        let node = &self.nodes[&id];
        let ids: Vec<String> = node.ids.iter().take(SHOWN).map(u32::to_string).collect();
        let more = match node.ids.len().saturating_sub(SHOWN) {
            0 => String::new(),
            more => format!(", {more} more"),
        };
        let pinned = if node.pins.is_empty() { "" } else { " pinned" };
        writeln!(f, "{branch}[{}{more}]{pinned}", ids.join(", "))?;
        let last = node.children.len().saturating_sub(1);
        node.children.values().enumerate().try_for_each(|(at, &child)| {
            let (branch, below) = if at == last { ("└── ", "    ") } else { ("├── ", "│   ") };
            self.show(f, child, &format!("{indent}{branch}"), &format!("{indent}{below}"))
        })
    }
}
