//! What stays and what goes.

use std::collections::BTreeMap;

use super::{NodeId, Payload, RadixTree};

impl<N: Copy + Ord, P: Payload> RadixTree<N, P> {
    /// Pins the longest prefix of `ids` that is held, until [`unpin`](Self::unpin); returns its length.
    pub fn pin(&mut self, space: N, ids: &[u32]) -> usize {
        let path = self.walk(space, ids);
        if let Some(&(id, tokens)) = path.last() {
            self.unlist(id);
            *self.node_mut(id).pins.entry(tokens).or_default() += 1;
            self.list(id);
        }
        path.iter().map(|(_, tokens)| tokens).sum()
    }

    /// Takes back one pin of exactly this sequence; returns whether there was one.
    pub fn unpin(&mut self, space: N, ids: &[u32]) -> bool {
        let path = self.walk(space, ids);
        if path.iter().map(|(_, tokens)| tokens).sum::<usize>() < ids.len() {
            return false;
        }
        let Some(&(id, tokens)) = path.last() else { return false };
        let Some(times) = self.node_mut(id).pins.get(&tokens).copied() else { return false };
        self.unlist(id);
        let pins = &mut self.node_mut(id).pins;
        match times {
            1 => pins.remove(&tokens),
            _ => pins.insert(tokens, times - 1),
        };
        self.list(id);
        true
    }

    /// Lets leaves go, those first that were not asked for the longest, until no more than `bytes` are held or all that is
    /// left is pinned; returns how many tokens went. Of a leaf of which only the first tokens are pinned, the others go.
    pub fn evict_to(&mut self, bytes: usize) -> usize {
        self.evict_while(|tree| tree.bytes > bytes)
    }

    /// Lets everything go that is not pinned; returns how many tokens went.
    pub fn clear(&mut self) -> usize {
        self.evict_while(|_| true)
    }

    /// As [`evict_to`](Self::evict_to), for as long as `too_much` says so.
    pub fn evict_while(&mut self, mut too_much: impl FnMut(&Self) -> bool) -> usize {
        let before = self.tokens;
        while too_much(self)
            && let Some(&(_, id)) = self.idle.first()
        {
            self.evict(id);
        }
        self.stats.evicted_tokens += before - self.tokens;
        before - self.tokens
    }

    fn evict(&mut self, id: NodeId) {
        self.unlist(id);
        let node = self.nodes.remove(&id).expect("an idle leaf is there");
        self.bytes -= node.payload.bytes();
        self.tokens -= node.ids.len();
        if let Some((&pinned, _)) = node.pins.last_key_value() {
            let (payload, _) = node.payload.split(pinned);
            self.bytes += payload.bytes();
            self.tokens += pinned;
            let ids = node.ids[..pinned].to_vec();
            let ends = node.ends.into_iter().filter(|end| *end <= pinned).collect();
            self.nodes.insert(id, super::Node { ids, payload, ends, ..node });
            return;
        }
        match node.parent {
            Some(parent) => {
                self.node_mut(parent).children.remove(&node.ids[0]);
                self.list(parent);
            }
            None => {
                self.roots.remove(&(node.space, node.ids[0]));
            }
        }
    }

    /// Puts a node among those that can go, if it is one.
    pub(super) fn list(&mut self, id: NodeId) {
        let node = &self.nodes[&id];
        let is_pinned = |pins: &BTreeMap<usize, usize>| pins.contains_key(&node.ids.len());
        if node.children.is_empty() && !is_pinned(&node.pins) {
            self.idle.insert((node.used, id));
        }
    }

    /// Takes a node from among those that can go, before something about it changes.
    pub(super) fn unlist(&mut self, id: NodeId) {
        self.idle.remove(&(self.nodes[&id].used, id));
    }
}
