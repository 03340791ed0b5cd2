//! [`RadixTree`]: sequences of token ids that share their prefixes, with a payload for each token.

mod entries;
mod evict;
mod show;

use std::collections::{BTreeMap, BTreeSet, HashMap};

pub use entries::Entry;

use crate::{Error, Result};

/// What a node holds for its tokens: something that can be cut where two sequences part.
pub trait Payload: Sized {
    /// Tokens that it is for.
    fn tokens(&self) -> usize;

    /// Bytes that it takes, and shares with no other.
    fn bytes(&self) -> usize;

    /// Cuts it in front of token `at`, which is at least 1 and less than [`tokens`](Self::tokens). What either part counts of its
    /// [`bytes`](Self::bytes) must not hold the memory of the other.
    fn split(self, at: usize) -> (Self, Self);
}

/// A compressed prefix tree (Morrison, *PATRICIA*, 1968) over token ids, as Zheng et al. use it for keys and values
/// (*SGLang*, 2024, section 3).
///
/// Each node stands for a run of tokens and holds their payload; a path from the root spells a sequence. The tree grows
/// by [`insert`](Self::insert), which splits a node where a new sequence leaves it, and shrinks by
/// [`evict_to`](Self::evict_to), which takes the leaves that were not asked for the longest. What is pinned stays. There is a
/// tree for each namespace `N`, and one order of age for all of them.
///
/// ```
/// use gpt2_burn_core::prefix::{Payload, RadixTree};
///
/// struct Ids(Vec<u32>);
///
/// impl Payload for Ids {
///     fn tokens(&self) -> usize {
///         self.0.len()
///     }
///     fn bytes(&self) -> usize {
///         4 * self.0.len()
///     }
///     fn split(mut self, at: usize) -> (Self, Self) {
///         let rest = self.0.split_off(at);
///         (self, Self(rest))
///     }
/// }
///
/// let mut tree = RadixTree::default();
/// for ids in [vec![1, 2, 3, 4], vec![1, 2, 3, 5], vec![1, 2, 6]] {
///     tree.insert((), &ids, 0, Ids(ids.clone()))?;
/// }
/// assert_eq!(tree.bytes(), 4 * 6);
/// assert_eq!(tree.find((), &[1, 2, 3, 9]).len(), 3);
/// println!("{tree}");
/// // [1, 2]
/// // ├── [3]
/// // │   ├── [4]
/// // │   └── [5]
/// // └── [6]
/// # Ok::<(), gpt2_burn_core::Error>(())
/// ```
#[derive(Debug)]
pub struct RadixTree<N, P> {
    nodes: HashMap<NodeId, Node<N, P>>,
    /// The first nodes of each namespace, by their first token.
    roots: BTreeMap<(N, u32), NodeId>,
    /// Leaves that can go, at least in part, by the time at which they were last asked for.
    idle: BTreeSet<(u64, NodeId)>,
    clock: u64,
    last_id: NodeId,
    bytes: usize,
    tokens: usize,
    stats: TreeStats,
}

/// Never used twice.
type NodeId = u64;

#[derive(Debug)]
struct Node<N, P> {
    space: N,
    parent: Option<NodeId>,
    children: BTreeMap<u32, NodeId>,
    ids: Vec<u32>,
    payload: P,
    /// Where marked sequences end: behind so many of the tokens.
    ends: BTreeSet<usize>,
    /// How often the first so many of the tokens are pinned.
    pins: BTreeMap<usize, usize>,
    /// When it was last asked for.
    used: u64,
}

/// What a tree has been asked for, and what came and went, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TreeStats {
    /// Sequences that were looked for.
    pub lookups: usize,
    /// Of those, sequences of which at least one token was there.
    pub hits: usize,
    /// Tokens of all sequences that were looked for.
    pub asked_tokens: usize,
    /// Of those, tokens that were there.
    pub found_tokens: usize,
    /// Tokens that were inserted.
    pub inserted_tokens: usize,
    /// Tokens that had to go.
    pub evicted_tokens: usize,
}

impl TreeStats {
    /// Share of the tokens asked for that were there; 0 if none were asked for.
    pub fn hit_rate(&self) -> f64 {
        match self.asked_tokens {
            0 => 0.0,
            asked => self.found_tokens as f64 / asked as f64,
        }
    }
}

/// The prefix of a sequence that a tree holds.
#[derive(Clone, Debug)]
pub struct Match<'a, P> {
    /// Payloads along the path, and how many of the tokens of each belong to the sequence: all, but for the last.
    pub parts: Vec<(&'a P, usize)>,
    /// Whether a sequence that was [marked](RadixTree::mark) ends where the match does.
    pub is_end: bool,
}

impl<P> Match<'_, P> {
    /// Tokens of the prefix.
    pub fn len(&self) -> usize {
        self.parts.iter().map(|(_, tokens)| tokens).sum()
    }

    /// Whether not even the first token is there.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }
}

impl<N, P> Default for RadixTree<N, P> {
    fn default() -> Self {
        Self {
            nodes: HashMap::new(),
            roots: BTreeMap::new(),
            idle: BTreeSet::new(),
            clock: 0,
            last_id: 0,
            bytes: 0,
            tokens: 0,
            stats: TreeStats::default(),
        }
    }
}

impl<N: Copy + Ord, P: Payload> RadixTree<N, P> {
    /// Bytes of all payloads.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Tokens of all nodes; a prefix of several sequences counts once.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// What was asked for since the tree was made.
    pub fn stats(&self) -> TreeStats {
        self.stats
    }

    /// The longest prefix of `ids` that is held. Makes it the youngest, and counts.
    pub fn find(&mut self, space: N, ids: &[u32]) -> Match<'_, P> {
        let path = self.walk(space, ids);
        self.touch(&path);
        let found = path.iter().map(|(_, tokens)| tokens).sum::<usize>();
        self.stats.lookups += 1;
        self.stats.hits += usize::from(found > 0);
        self.stats.asked_tokens += ids.len();
        self.stats.found_tokens += found;
        self.match_of(&path)
    }

    /// Counts a sequence of so many tokens that was looked for and not found, by another rule than [`find`](Self::find)'s.
    pub fn count_miss(&mut self, tokens: usize) {
        self.stats.lookups += 1;
        self.stats.asked_tokens += tokens;
    }

    /// As [`find`](Self::find), without a trace.
    pub fn peek(&self, space: N, ids: &[u32]) -> Match<'_, P> {
        self.match_of(&self.walk(space, ids))
    }

    fn match_of(&self, path: &[(NodeId, usize)]) -> Match<'_, P> {
        let is_end = path.last().is_some_and(|&(id, tokens)| self.nodes[&id].ends.contains(&tokens));
        Match { parts: path.iter().map(|&(id, tokens)| (&self.nodes[&id].payload, tokens)).collect(), is_end }
    }

    /// Puts a sequence in: `payload` is that of `ids[from..]`, of which what is there already is not replaced. Makes the
    /// sequence the youngest; returns how many tokens are new.
    ///
    /// If not all of `ids[..from]` is there, nothing is inserted, since a payload without those before it is of no use.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if the payload is for another number of tokens.
    pub fn insert(&mut self, space: N, ids: &[u32], from: usize, payload: P) -> Result<usize> {
        if from > ids.len() || payload.tokens() != ids.len() - from {
            return Err(Error::mismatch("tokens of the payload", ids.len() as i128 - from as i128, payload.tokens()));
        }
        let path = self.walk(space, ids);
        let held = path.iter().map(|(_, tokens)| tokens).sum::<usize>();
        if held < from || ids.is_empty() {
            return Ok(0);
        }
        let new = ids.len() - held;
        if new > 0 {
            let parent = path.last().map(|&(id, tokens)| self.split(id, tokens));
            let payload = if held > from { payload.split(held - from).1 } else { payload };
            self.attach(space, parent, ids[held..].to_vec(), payload);
        }
        // Only now, so that what the sequence leaves behind in a node that was split stays as old as it was.
        let path = self.walk(space, ids);
        self.touch(&path);
        self.stats.inserted_tokens += new;
        Ok(new)
    }

    /// Remembers that a sequence ends here, and not only in the middle of others; returns whether all of it is held.
    pub fn mark(&mut self, space: N, ids: &[u32]) -> bool {
        let path = self.walk(space, ids);
        let is_held = path.iter().map(|(_, tokens)| tokens).sum::<usize>() == ids.len();
        if let (Some(&(id, tokens)), true) = (path.last(), is_held) {
            self.node_mut(id).ends.insert(tokens);
        }
        is_held
    }

    /// Nodes from the root down that `ids` leads through, and how many of the tokens of each it has.
    fn walk(&self, space: N, ids: &[u32]) -> Vec<(NodeId, usize)> {
        let (mut path, mut rest) = (Vec::new(), ids);
        let mut next = rest.first().and_then(|first| self.roots.get(&(space, *first)));
        while let Some(&id) = next {
            let node = &self.nodes[&id];
            let tokens = node.ids.iter().zip(rest).take_while(|(held, wanted)| held == wanted).count();
            path.push((id, tokens));
            rest = &rest[tokens..];
            next = match tokens == node.ids.len() {
                true => rest.first().and_then(|first| node.children.get(first)),
                false => None,
            };
        }
        path
    }

    fn touch(&mut self, path: &[(NodeId, usize)]) {
        self.clock += 1;
        for &(id, _) in path {
            self.unlist(id);
            self.node_mut(id).used = self.clock;
            self.list(id);
        }
    }

    /// A new leaf.
    fn attach(&mut self, space: N, parent: Option<NodeId>, ids: Vec<u32>, payload: P) {
        let id = self.new_id();
        self.bytes += payload.bytes();
        self.tokens += ids.len();
        if let Some(parent) = parent {
            self.unlist(parent);
        }
        self.link(space, parent, ids[0], id);
        let (children, ends, pins) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        self.nodes.insert(id, Node { space, parent, children, ids, payload, ends, pins, used: self.clock });
        self.list(id);
    }

    /// Makes the first `at` tokens of a node a node of their own, above the rest of it; returns that.
    fn split(&mut self, id: NodeId, at: usize) -> NodeId {
        if at == self.nodes[&id].ids.len() {
            return id;
        }
        self.unlist(id);
        let mut lower = self.nodes.remove(&id).expect("a node of a path is there");
        let lower_ids = lower.ids.split_off(at);
        let bytes = lower.payload.bytes();
        let (first, rest) = lower.payload.split(at);
        self.bytes = self.bytes + first.bytes() + rest.bytes() - bytes;

        let upper_id = self.new_id();
        let (space, parent, used) = (lower.space, lower.parent, lower.used);
        let behind = |ends: &usize| *ends > at;
        let (lower_ends, ends) = lower.ends.iter().partition(|ends| behind(ends));
        let (lower_pins, pins): (BTreeMap<_, _>, _) = lower.pins.iter().partition(|(ends, _)| behind(ends));
        let children = BTreeMap::from([(lower_ids[0], id)]);
        self.link(space, parent, lower.ids[0], upper_id);
        let upper = Node { space, parent, children, ids: lower.ids, payload: first, ends, pins, used };
        self.nodes.insert(upper_id, upper);

        let ends: BTreeSet<usize> = lower_ends;
        let lower = Node {
            parent: Some(upper_id),
            ids: lower_ids,
            payload: rest,
            ends: ends.into_iter().map(|end| end - at).collect(),
            pins: lower_pins.into_iter().map(|(end, times)| (end - at, times)).collect(),
            ..lower
        };
        self.nodes.insert(id, lower);
        self.list(id);
        upper_id
    }

    fn link(&mut self, space: N, parent: Option<NodeId>, first: u32, id: NodeId) {
        match parent {
            Some(parent) => self.node_mut(parent).children.insert(first, id),
            None => self.roots.insert((space, first), id),
        };
    }

    fn new_id(&mut self) -> NodeId {
        self.last_id += 1;
        self.last_id
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node<N, P> {
        self.nodes.get_mut(&id).expect("nodes are only named while they are there")
    }
}
