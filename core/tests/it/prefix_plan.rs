//! The planner: every prompt is covered, nothing is computed twice, and the forwards are few.

use std::collections::{BTreeMap, BTreeSet};

use gpt2_burn_core::ModelShape;
use gpt2_burn_core::prefix::{Plan, Reuse};
use proptest::prelude::*;

fn sequences() -> impl Strategy<Value = Vec<Vec<u32>>> {
    proptest::collection::vec(proptest::collection::vec(0_u32..3, 1..8), 1..8)
}

/// Tokens of `ids` that one of `known` begins with.
fn held(known: &[Vec<u32>], ids: &[u32]) -> usize {
    let common = |known: &Vec<u32>| known.iter().zip(ids).take_while(|(a, b)| a == b).count();
    known.iter().map(common).max().unwrap_or(0)
}

fn plan(prompts: &[Vec<u32>], known: &[Vec<u32>], reuse: Reuse) -> Plan {
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    Plan::new(&prompts, reuse, |ids| held(known, ids))
}

/// Every prompt is put together, from what is held and from the chunks, in the order of the forwards.
fn assert_covered(plan: &Plan, prompts: &[Vec<u32>]) -> Result<(), TestCaseError> {
    let forwards: Vec<&[usize]> = plan.forwards().collect();
    let forward_of: BTreeMap<usize, usize> =
        forwards.iter().enumerate().flat_map(|(at, uniques)| uniques.iter().map(move |&unique| (unique, at))).collect();
    prop_assert_eq!(forward_of.len(), plan.chunks().len());
    prop_assert_eq!(forwards.iter().map(|uniques| uniques.len()).sum::<usize>(), plan.chunks().len());
    for (index, ids) in prompts.iter().enumerate() {
        let mut unique = plan.unique_of_prompt()[index];
        prop_assert_eq!(&prompts[plan.unique_prompts()[unique]], ids);
        prop_assert_eq!(plan.chunks()[unique].end, ids.len());
        let (held, mut used) = (plan.held()[unique], ids.len());
        loop {
            let chunk = plan.chunks()[unique];
            prop_assert!(chunk.start < used && used <= chunk.end);
            prop_assert_eq!(&prompts[chunk.prompt][..used], &ids[..used]);
            used = chunk.start;
            let Some(before) = chunk.before else { break };
            prop_assert!(forward_of[&before] < forward_of[&unique], "a chunk needs one that is not computed yet");
            unique = before;
        }
        prop_assert!(used <= held, "{used} tokens that nobody computes, of which {held} are held");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn prompts_are_covered_and_nothing_is_computed_twice(prompts in sequences(), known in sequences()) {
        let plan = plan(&prompts, &known, Reuse::Radix);
        assert_covered(&plan, &prompts)?;
        // Prefixes behind what is held, each once, and one token more for a prompt that one before it begins with.
        let distinct: Vec<&Vec<u32>> = plan.unique_prompts().iter().map(|&prompt| &prompts[prompt]).collect();
        let held = |ids: &Vec<u32>| held(&known, ids).min(ids.len() - 1);
        let prefixes = distinct.iter().flat_map(|ids| (held(ids) + 1..=ids.len()).map(move |n| &ids[..n]));
        let prefixes: BTreeSet<&[u32]> = prefixes.collect();
        let begins = |at: usize| {
            let ids = distinct[at];
            distinct[..at].iter().any(|before| before.starts_with(ids) && held(before) < ids.len())
        };
        let again = (0..distinct.len()).filter(|&at| begins(at)).count();
        prop_assert_eq!(plan.computed_tokens(), prefixes.len() + again);
        prop_assert_eq!(plan.requested_tokens(), prompts.iter().map(Vec::len).sum::<usize>());
        prop_assert_eq!(plan.saved_tokens() + plan.computed_tokens(), plan.requested_tokens());
    }

    #[test]
    fn exact_plans_share_whole_prompts_only(prompts in sequences(), known in sequences()) {
        let plan = plan(&prompts, &known, Reuse::Exact);
        assert_covered(&plan, &prompts)?;
        let distinct: BTreeSet<&Vec<u32>> = prompts.iter().collect();
        let ends = distinct.iter().map(|ids| ids.len() - held(&known, ids).min(ids.len() - 1));
        prop_assert_eq!(plan.computed_tokens(), ends.sum::<usize>());
    }

    /// One behind the other only where one needs what the other computes.
    #[test]
    fn there_are_as_few_forwards_as_there_can_be(prompts in sequences(), known in sequences()) {
        let plan = plan(&prompts, &known, Reuse::Radix);
        let mut depths: Vec<usize> = Vec::new();
        for chunk in plan.chunks() {
            depths.push(chunk.before.map_or(0, |before| depths[before] + 1));
        }
        prop_assert_eq!(plan.forwards().count(), depths.iter().max().unwrap() + 1);
    }
}

#[test]
fn a_long_prefix_of_many_prompts_is_two_forwards() {
    let prompts: Vec<Vec<u32>> = (0..32).map(|row| [vec![7; 512], vec![row; 16]].concat()).collect();
    let plan = plan(&prompts, &[], Reuse::Radix);
    let tokens = |uniques: &[usize]| uniques.iter().map(|&unique| plan.chunks()[unique].tokens()).collect::<Vec<_>>();
    // One of the rows repeats the prefix's own token, which makes no difference but to its length.
    assert_eq!(plan.forwards().map(tokens).collect::<Vec<_>>(), [vec![528], vec![16; 31]]);
    assert_eq!(plan.computed_tokens(), 1024);
    assert_eq!(plan.to_string(), "32 prompts, 32 of them unique: 1024 of 16896 tokens (6.1%) in 2 forwards");
    let exact = self::plan(&prompts, &[], Reuse::Exact);
    assert_eq!((exact.computed_tokens(), exact.forwards().count()), (32 * 528, 1));
}

#[test]
fn operations_are_counted_token_by_token() {
    let shape =
        ModelShape { vocab_size: 50, n_embd: 8, n_layer: 3, n_head: 2, n_inner: Some(20), ..Default::default() };
    // Of a token at this position: what multiplies in one block, and the keys and values that it sees.
    let token = |position: usize| {
        let matrices = [[8, 24], [8, 8], [8, 20], [20, 8]].iter().map(|[rows, columns]| rows * columns).sum::<usize>();
        3 * (2 * matrices + 2 * (2 * 8 * (position + 1)))
    };
    let tokens = |range: std::ops::Range<usize>| range.map(token).sum::<usize>();
    let head = 2 * 8 * 50;
    let prompts = [vec![1, 2, 3, 4], vec![1, 2, 3, 5, 6], vec![1, 2, 3, 4]];
    let plan = plan(&prompts, &[vec![1]], Reuse::Radix);
    assert_eq!(plan.flops(shape), (tokens(1..3) + tokens(3..4) + tokens(3..5) + 2 * head) as f64);
    assert_eq!(plan.flops_without(shape), (2 * tokens(0..4) + tokens(0..5) + 3 * head) as f64);
}
