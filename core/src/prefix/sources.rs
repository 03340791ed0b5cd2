//! [`sources`]: which sequence takes the tokens that it begins with from which other one.

use std::collections::HashMap;

use super::{Payload, RadixTree, Reuse};

/// Where a sequence takes its first tokens from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The sequence that has them, or will have computed them: one that stands before it in the list.
    pub from: usize,
    /// How many.
    pub tokens: usize,
}

/// Which tokens a node of the tree stands for.
struct SequenceRange {
    sequence: usize,
    start: usize,
    end: usize,
}

impl Payload for SequenceRange {
    fn tokens(&self) -> usize {
        self.end - self.start
    }

    fn bytes(&self) -> usize {
        0
    }

    fn split(self, at: usize) -> (Self, Self) {
        let Self { sequence, start, end } = self;
        (Self { sequence, start, end: start + at }, Self { sequence, start: start + at, end })
    }
}

/// For each sequence the one before it in the list that shares the longest prefix with it, if that is longer than the
/// `held[i]` tokens that are known of it anyway. The last `spare` tokens of a sequence are never taken: logits behind them are
/// wanted.
///
/// Each token of what several begin with is computed by one of them: whoever has a source waits until the source is there. With
/// [`Reuse::Exact`] only equal sequences share something. Linear in the number of all tokens.
pub fn sources(sequences: &[&[u32]], held: &[usize], reuse: Reuse, spare: usize) -> Vec<Option<Source>> {
    let taken = |shared: usize, index: usize| {
        let tokens = shared.min(sequences[index].len().saturating_sub(spare));
        Some(tokens).filter(|tokens| *tokens > held[index])
    };
    match reuse {
        Reuse::Radix => {
            let mut tree: RadixTree<(), SequenceRange> = RadixTree::default();
            let of_sequence = |(index, ids): (usize, &&[u32])| {
                let found = tree.peek((), ids);
                // Who computes the last of them, which may be another than who computes what comes then.
                let source = taken(found.len(), index).and_then(|tokens| {
                    let last = found.parts.iter().find(|(range, of_node)| range.start + of_node >= tokens);
                    last.map(|(range, _)| Source { from: range.sequence, tokens })
                });
                let range = SequenceRange { sequence: index, start: 0, end: ids.len() };
                tree.insert((), ids, 0, range).expect("a range is as long as its sequence");
                source
            };
            sequences.iter().enumerate().map(of_sequence).collect()
        }
        Reuse::Exact => {
            let mut first: HashMap<&[u32], usize> = HashMap::new();
            let firsts: Vec<usize> =
                sequences.iter().enumerate().map(|(index, ids)| *first.entry(*ids).or_insert(index)).collect();
            let of_sequence = |(index, from): (usize, usize)| {
                let tokens = if from == index { None } else { taken(sequences[index].len(), index) };
                tokens.map(|tokens| Source { from, tokens })
            };
            firsts.into_iter().enumerate().map(of_sequence).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn common(one: &[u32], other: &[u32]) -> usize {
        one.iter().zip(other).take_while(|(one, other)| one == other).count()
    }

    proptest! {
        #[test]
        fn the_longest_beginning_is_taken_from_one_before(
            sequences in proptest::collection::vec(proptest::collection::vec(0_u32..3, 1..7), 1..9),
            held in 0_usize..4,
            spare in 0_usize..2,
        ) {
            let all: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
            let held: Vec<usize> = all.iter().map(|ids| held.min(ids.len())).collect();
            for (index, found) in sources(&all, &held, Reuse::Radix, spare).into_iter().enumerate() {
                let max_len = all[..index].iter().map(|other| common(other, all[index])).max().unwrap_or(0);
                let max_len = max_len.min(all[index].len() - spare);
                prop_assert_eq!(found.map_or(held[index], |source| source.tokens), max_len.max(held[index]));
                if let Some(Source { from, tokens }) = found {
                    prop_assert!(from < index && common(all[from], all[index]) >= tokens && tokens > held[index]);
                }
            }
            for (index, found) in sources(&all, &held, Reuse::Exact, spare).into_iter().enumerate() {
                let twin = all[..index].iter().position(|other| *other == all[index]);
                let tokens = all[index].len() - spare;
                let expected = twin.filter(|_| tokens > held[index]).map(|from| Source { from, tokens });
                prop_assert_eq!(found, expected);
            }
        }
    }

    /// Compared each with each other, these take minutes.
    #[test]
    fn equal_sequences_are_found_in_linear_time() {
        let tokens: Vec<u32> = (0..200_000).map(|at| u32::from(at >= 199_000)).collect();
        let texts: Vec<&[u32]> = (0..150_000).map(|at| &tokens[at..at + 500 + at % 3]).collect();
        let found = sources(&texts, &vec![0; texts.len()], Reuse::Exact, 0);
        assert_eq!(found.iter().filter(|source| source.is_none()).count(), 3);
        let numbers: Vec<u32> = (0..300_000).collect();
        let texts: Vec<&[u32]> = numbers.chunks(1).collect();
        assert!(sources(&texts, &vec![0; texts.len()], Reuse::Radix, 0).iter().all(Option::is_none));
    }
}
