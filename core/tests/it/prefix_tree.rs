//! The radix tree against plain lists of all prefixes that it should hold.

use std::collections::{BTreeMap, BTreeSet};

use gpt2_burn_core::Error;
use gpt2_burn_core::prefix::{Payload, RadixTree};
use proptest::prelude::*;

/// For each token a value that depends on all before it, so that a payload at the wrong place is noticed.
#[derive(Clone, Debug, PartialEq)]
struct Values(Vec<u64>);

/// Bytes of a token, and of a node however short: splitting and evicting change the sum by more than the tokens'.
const TOKEN_BYTES: usize = 8;
const NODE_BYTES: usize = 5;

impl Payload for Values {
    fn tokens(&self) -> usize {
        self.0.len()
    }

    fn bytes(&self) -> usize {
        TOKEN_BYTES * self.0.len() + NODE_BYTES
    }

    fn split(mut self, at: usize) -> (Self, Self) {
        assert!((1..self.0.len()).contains(&at), "{at} of {}", self.0.len());
        let rest = self.0.split_off(at);
        (self, Self(rest))
    }
}

fn values(space: u8, ids: &[u32]) -> Vec<u64> {
    let next = |value: &mut u64, id: &u32| {
        *value = value.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(u64::from(*id) + 1);
        Some(*value)
    };
    ids.iter().scan(u64::from(space), next).collect()
}

type Sequence = (u8, Vec<u32>);

/// What the tree should be, as lists.
#[derive(Debug, Default)]
struct Model {
    /// Every prefix that is held, and when it was last asked for.
    held: BTreeMap<Sequence, u64>,
    /// The prefixes behind which a node ends.
    cuts: BTreeSet<Sequence>,
    /// The sequences that were marked.
    ends: BTreeSet<Sequence>,
    pins: Vec<Sequence>,
    clock: u64,
}

fn starts_with(longer: &Sequence, shorter: &Sequence) -> bool {
    longer.0 == shorter.0 && longer.1.starts_with(&shorter.1)
}

impl Model {
    fn found(&self, space: u8, ids: &[u32]) -> usize {
        (0..=ids.len()).rev().find(|&n| n == 0 || self.held.contains_key(&(space, ids[..n].to_vec()))).unwrap()
    }

    fn bytes(&self) -> usize {
        TOKEN_BYTES * self.held.len() + NODE_BYTES * self.cuts.len()
    }

    /// The end of the node that a held prefix lies in.
    fn cut_behind(&self, prefix: &Sequence) -> Sequence {
        let behind = self.cuts.iter().filter(|cut| starts_with(cut, prefix));
        behind.min_by_key(|cut| cut.1.len()).unwrap().clone()
    }

    /// Length of what is held before the node that ends at `cut`.
    fn node_start(&self, cut: &Sequence) -> usize {
        (1..cut.1.len()).rev().find(|&n| self.cuts.contains(&(cut.0, cut.1[..n].to_vec()))).unwrap_or(0)
    }

    fn touch(&mut self, space: u8, ids: &[u32]) {
        self.clock += 1;
        let found = self.found(space, ids);
        if found > 0 {
            let (_, ids) = self.cut_behind(&(space, ids[..found].to_vec()));
            for n in 1..=ids.len() {
                self.held.insert((space, ids[..n].to_vec()), self.clock);
            }
        }
    }

    fn insert(&mut self, space: u8, ids: &[u32], from: usize) -> usize {
        let found = self.found(space, ids);
        if found < from || ids.is_empty() {
            return 0;
        }
        if found > 0 && found < ids.len() {
            self.cuts.insert((space, ids[..found].to_vec()));
        }
        self.touch(space, ids);
        for n in found + 1..=ids.len() {
            self.held.insert((space, ids[..n].to_vec()), self.clock);
        }
        if found < ids.len() {
            self.cuts.insert((space, ids.to_vec()));
        }
        ids.len() - found
    }

    fn mark(&mut self, space: u8, ids: &[u32]) -> bool {
        let is_held = self.found(space, ids) == ids.len();
        if is_held && !ids.is_empty() {
            self.ends.insert((space, ids.to_vec()));
        }
        is_held
    }

    /// Leaves that can go, and how much of each stays because it is pinned.
    fn idle(&self) -> Vec<(Sequence, usize)> {
        let is_leaf = |cut: &&Sequence| !self.held.keys().any(|held| held != *cut && starts_with(held, cut));
        let kept = |cut: &Sequence| {
            let pins = self.pins.iter().filter(|pin| starts_with(cut, pin)).map(|pin| pin.1.len());
            pins.max().unwrap_or(0).max(self.node_start(cut))
        };
        let leaves = self.cuts.iter().filter(is_leaf).map(|cut| (cut.clone(), kept(cut)));
        leaves.filter(|(cut, kept)| *kept < cut.1.len()).collect()
    }

    fn evict_to(&mut self, bytes: usize) -> usize {
        let before = self.held.len();
        while self.bytes() > bytes
            && let Some((cut, kept)) = self.idle().into_iter().min_by_key(|(cut, _)| self.held[cut])
        {
            let start = self.node_start(&cut);
            for n in kept + 1..=cut.1.len() {
                let prefix = (cut.0, cut.1[..n].to_vec());
                self.held.remove(&prefix);
                self.ends.remove(&prefix);
            }
            self.cuts.remove(&cut);
            if kept > start {
                self.cuts.insert((cut.0, cut.1[..kept].to_vec()));
            }
        }
        before - self.held.len()
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Inserted with a payload from so many tokens on, then evicted down to the budget.
    Insert(Sequence, usize),
    Mark(Sequence),
    Find(Sequence),
    Pin(Sequence),
    /// One of the pins.
    Unpin(usize),
    Evict(usize),
    Clear,
}

fn sequence() -> impl Strategy<Value = Sequence> {
    (0_u8..2, proptest::collection::vec(0_u32..3, 0..9))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (sequence(), prop_oneof![Just(0), any::<usize>()]).prop_map(|(ids, from)| Step::Insert(ids, from)),
        4 => sequence().prop_map(Step::Mark),
        4 => sequence().prop_map(Step::Find),
        3 => sequence().prop_map(Step::Pin),
        3 => any::<usize>().prop_map(Step::Unpin),
        2 => (0_usize..400).prop_map(Step::Evict),
        1 => Just(Step::Clear),
    ]
}

/// The list of all nodes spells the same prefixes, payloads and ends.
#[track_caller]
fn assert_entries(tree: &RadixTree<u8, Values>, model: &Model) {
    let mut sequences: Vec<Sequence> = Vec::new();
    let mut ends = BTreeSet::new();
    for entry in tree.entries() {
        let before = entry.parent.map_or(&[][..], |parent| &sequences[parent].1);
        let ids = [before, entry.ids].concat();
        assert_eq!(entry.payload.0, values(entry.space, &ids)[before.len()..]);
        ends.extend(entry.ends.iter().map(|end| (entry.space, ids[..before.len() + end].to_vec())));
        sequences.push((entry.space, ids));
    }
    assert_eq!(sequences.into_iter().collect::<BTreeSet<_>>(), model.cuts);
    assert_eq!(ends, model.ends);
}

/// What is common to every step's end.
#[track_caller]
fn assert_same(tree: &RadixTree<u8, Values>, model: &Model) {
    assert_eq!(tree.bytes(), model.bytes());
    assert_eq!((tree.tokens(), tree.nodes()), (model.held.len(), model.cuts.len()));
    assert_eq!(tree.is_empty(), model.held.is_empty());
    let prefixes = model.held.keys().cloned().chain([(0, vec![]), (1, vec![])]);
    assert_entries(tree, model);
    for (space, prefix) in prefixes {
        // The prefix itself, and all that lies one token further.
        for next in [None, Some(0), Some(1), Some(2)] {
            let ids: Vec<u32> = prefix.iter().copied().chain(next).collect();
            let found = tree.peek(space, &ids);
            let expected = (space, ids[..model.found(space, &ids)].to_vec());
            assert_eq!(found.len(), expected.1.len(), "{space}: {ids:?}");
            assert_eq!(found.is_empty(), expected.1.is_empty());
            assert_eq!(found.is_end, model.ends.contains(&expected), "{space}: {ids:?}");
            let parts = found.parts.iter().flat_map(|(payload, tokens)| &payload.0[..*tokens]);
            assert!(parts.eq(&values(space, &expected.1)), "{space}: {ids:?}");
            let whole = found.parts.iter().rev().skip(1).all(|(payload, tokens)| payload.0.len() == *tokens);
            assert!(whole, "only of the last node a part is used");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_tree_holds_what_plain_lists_hold(
        steps in proptest::collection::vec(step(), 1..40),
        budget in prop_oneof![Just(usize::MAX), 50_usize..300],
    ) {
        let (mut tree, mut model) = (RadixTree::default(), Model::default());
        for step in steps {
            match step {
                Step::Insert((space, ids), from) => {
                    let from = from % (ids.len() + 1);
                    let payload = Values(values(space, &ids)[from..].to_vec());
                    prop_assert_eq!(tree.insert(space, &ids, from, payload).unwrap(), model.insert(space, &ids, from));
                    prop_assert_eq!(tree.evict_to(budget), model.evict_to(budget));
                }
                Step::Mark((space, ids)) => prop_assert_eq!(tree.mark(space, &ids), model.mark(space, &ids)),
                Step::Find((space, ids)) => {
                    let before = tree.stats();
                    let found = tree.find(space, &ids).len();
                    prop_assert_eq!(found, model.found(space, &ids));
                    let after = tree.stats();
                    prop_assert_eq!(after.found_tokens - before.found_tokens, found);
                    prop_assert_eq!(after.asked_tokens - before.asked_tokens, ids.len());
                    prop_assert_eq!((after.lookups, after.hits), (before.lookups + 1, before.hits + usize::from(found > 0)));
                    model.touch(space, &ids);
                }
                Step::Pin((space, ids)) => {
                    let found = model.found(space, &ids);
                    prop_assert_eq!(tree.pin(space, &ids), found);
                    if found > 0 {
                        model.pins.push((space, ids[..found].to_vec()));
                    }
                }
                Step::Unpin(at) if !model.pins.is_empty() => {
                    let (space, ids) = model.pins.swap_remove(at % model.pins.len());
                    prop_assert!(tree.unpin(space, &ids));
                }
                Step::Unpin(_) => prop_assert!(!tree.unpin(0, &[0, 0])),
                Step::Evict(bytes) => prop_assert_eq!(tree.evict_to(bytes), model.evict_to(bytes)),
                Step::Clear => prop_assert_eq!(tree.clear(), model.evict_to(0)),
            }
            assert_same(&tree, &model);
            // Over the budget only if nothing is left that could go.
            prop_assert!(tree.bytes() <= budget || model.idle().is_empty());
            for (space, ids) in &model.pins {
                prop_assert_eq!(tree.peek(*space, ids).len(), ids.len(), "a pinned prefix has gone");
            }
        }
        let stats = tree.stats();
        prop_assert_eq!(stats.inserted_tokens - stats.evicted_tokens, tree.tokens());
    }
}

fn tree_of(sequences: &[&[u32]]) -> RadixTree<u8, Values> {
    let mut tree = RadixTree::default();
    for ids in sequences {
        tree.insert(0, ids, 0, Values(values(0, ids))).unwrap();
    }
    tree
}

#[test]
fn the_example_prints_as_its_picture() {
    let mut tree = tree_of(&[&[1, 2, 3, 4], &[1, 2, 3, 5], &[1, 2, 6]]);
    let picture = "\
[1, 2]
├── [3]
│   ├── [4]
│   └── [5]
└── [6]
";
    assert_eq!(tree.to_string(), picture);
    assert_eq!((tree.tokens(), tree.nodes()), (6, 5));
    tree.insert(1, &(10..30).collect::<Vec<_>>(), 0, Values(vec![0; 20])).unwrap();
    tree.pin(0, &[1, 2, 6]);
    let more = "└── [6] pinned\n[10, 11, 12, 13, 14, 15, 16, 17, 12 more]\n";
    assert_eq!(tree.to_string(), picture.replace("└── [6]\n", more));
}

#[test]
fn the_least_recently_used_leaf_goes_first() {
    let mut tree = tree_of(&[&[1, 2, 3], &[1, 2, 4], &[5]]);
    tree.find(0, &[1, 2, 3]);
    tree.find(0, &[5, 6]);
    let bytes = tree.bytes();
    assert_eq!(tree.evict_to(bytes), 0, "nothing goes while there is room");
    assert_eq!(tree.evict_to(bytes - 1), 1);
    assert_eq!(tree.to_string(), "[1, 2]\n└── [3]\n[5]\n", "[1, 2, 4] was the oldest");
    tree.peek(0, &[1, 2, 3]);
    assert_eq!(tree.evict_to(tree.bytes() - 1), 1);
    assert_eq!(tree.to_string(), "[1, 2]\n[5]\n", "peeking makes nothing younger");
}

#[test]
fn what_is_pinned_stays_and_no_more_than_that() {
    let mut tree = tree_of(&[&[1, 2, 3, 4], &[1, 2, 3, 5]]);
    assert_eq!(tree.pin(0, &[1, 2, 9]), 2);
    assert_eq!(tree.clear(), 3);
    assert_eq!(tree.to_string(), "[1, 2] pinned\n");
    assert_eq!(tree.bytes(), 2 * TOKEN_BYTES + NODE_BYTES);
    assert!(!tree.unpin(0, &[1]) && !tree.unpin(1, &[1, 2]) && tree.unpin(0, &[1, 2]) && !tree.unpin(0, &[1, 2]));
    assert_eq!(tree.clear(), 2);
    assert!(tree.is_empty() && tree.bytes() == 0);
}

#[test]
fn a_payload_of_another_length_is_refused() {
    let mut tree = tree_of(&[&[1, 2]]);
    for (from, tokens) in [(0, 2), (1, 3), (4, 0)] {
        let error = tree.insert(0, &[1, 2, 3], from, Values(vec![0; tokens])).unwrap_err();
        assert!(matches!(error, Error::Mismatch { what: "tokens of the payload", .. }), "{error}");
    }
    assert_eq!(tree.to_string(), "[1, 2]\n");
}
