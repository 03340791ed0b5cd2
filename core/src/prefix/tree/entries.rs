//! All nodes of a tree, to be written down.

use super::{NodeId, Payload, RadixTree};

/// A node as it stands in a list of all.
#[derive(Clone, Debug)]
pub struct Entry<'a, N, P> {
    /// Its namespace.
    pub space: N,
    /// Place in the list of the node before it; none: its tokens are a sequence's first.
    pub parent: Option<usize>,
    /// Its tokens.
    pub ids: &'a [u32],
    /// What it holds for them.
    pub payload: &'a P,
    /// Behind how many of its tokens marked sequences end.
    pub ends: Vec<usize>,
}

impl<N: Copy + Ord, P: Payload> RadixTree<N, P> {
    /// All nodes, each behind the one before it.
    pub fn entries(&self) -> Vec<Entry<'_, N, P>> {
        let mut entries = Vec::with_capacity(self.nodes.len());
        let mut waiting: Vec<(NodeId, Option<usize>)> = self.roots.values().rev().map(|&id| (id, None)).collect();
        while let Some((id, parent)) = waiting.pop() {
            let node = &self.nodes[&id];
            let here = entries.len();
            let ends = node.ends.iter().copied().collect();
            entries.push(Entry { space: node.space, parent, ids: &node.ids, payload: &node.payload, ends });
            waiting.extend(node.children.values().rev().map(|&child| (child, Some(here))));
        }
        entries
    }
}
