//! [`DraftLen`] and [`Policy`]: how many tokens to draft, and the arithmetic that says so.
//!
//! Leviathan et al. (2023), section 3. Costs are in units of a plain decode step of the target.

use std::collections::VecDeque;

use crate::summary::median;

/// Most tokens that an adaptive draft has.
const MAX_LEN: usize = 16;

/// Length of the drafts from which an adaptive policy learns what things cost.
const TRIAL: usize = 4;

/// Rounds of each kind, with a draft and without, by which it learns that.
const TRIALS: usize = 2;

/// Rounds without a draft after which a policy that stopped drafting tries again, at first and at most.
const PAUSE: (usize, usize) = (16, 512);

/// Measurements of each kind that are remembered.
const REMEMBERED: usize = 9;

/// What a verified token's weight is worth one token later: about the last hundred count.
const DECAY: f64 = 0.99;

/// How many tokens are drafted in a round. No more are than the row has room for, and use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DraftLen {
    /// Always as many.
    Fixed(usize),
    /// As many as pay, up to 16, by what is measured on the way: how often tokens are accepted, what a draft token costs and
    /// what a verification of each length. None where drafting would lose; that is tried again at growing intervals.
    ///
    /// It depends on the clock. That changes no greedy text, and none under [`Acceptance::Match`](super::Acceptance::Match), where
    /// a token's logits do not depend on how many are computed beside it; under [`Acceptance::Rejection`](super::Acceptance::Rejection) a seed does not give the same text again.
    Auto,
}

impl DraftLen {
    /// Most tokens of a draft.
    pub fn max(self) -> usize {
        match self {
            Self::Fixed(len) => len,
            Self::Auto => MAX_LEN,
        }
    }
}

impl Default for DraftLen {
    fn default() -> Self {
        Self::Fixed(4)
    }
}

/// Expected tokens of a round with drafts of `m` tokens that are accepted with probability `a` each: `1 + a + ... + a^m`,
/// which is `(1 - a^(m+1)) / (1 - a)` (equation 1); the token that the target adds itself is counted.
pub fn expected_tokens(a: f64, m: usize) -> f64 {
    // Of very many terms, without adding up all of them; so that nothing is lost where `a` is near 1.
    if m > 4096 {
        let terms = m as f64 + 1.0;
        return match a {
            1.0 => terms,
            _ if a > 0.0 => (terms * a.ln()).exp_m1() / (a - 1.0),
            _ => (1.0 - a.powf(terms)) / (1.0 - a),
        };
    }
    (0..=m).scan(1.0, |power, _| Some(std::mem::replace(power, *power * a))).sum()
}

/// How many times as fast as plain decoding it is to draft `m` tokens at a cost of `c` each and verify them at a cost of `v`
/// (theorem 3.8, where `v` is 1).
pub fn speedup(a: f64, m: usize, c: f64, v: f64) -> f64 {
    expected_tokens(a, m) / (m as f64 * c + v)
}

/// The length among `lens` with the best speed-up, and that speed-up; the shortest of equally good ones.
pub fn best_len(
    a: f64,
    c: f64,
    v: impl Fn(usize) -> f64,
    lens: impl IntoIterator<Item = usize>,
) -> Option<(usize, f64)> {
    let all = lens.into_iter().map(|m| (m, speedup(a, m, c, v(m))));
    all.reduce(|best, next| if next.1 > best.1 { next } else { best })
}

/// The last measurements of a quantity.
#[derive(Clone, Debug, Default)]
struct Recent(VecDeque<f64>);

impl Recent {
    fn note(&mut self, seconds: f64) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(seconds);
    }

    /// One of them that lasted long for other reasons does not matter.
    fn median(&self) -> Option<f64> {
        median(&self.0.iter().copied().collect::<Vec<_>>())
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

/// Decides how long drafts are.
#[derive(Clone, Debug)]
pub struct Policy {
    wanted: DraftLen,
    /// Of a draft token.
    draft: Recent,
    /// Of a forward over drafts of each length; none is a plain step.
    verify: Vec<Recent>,
    accepted: f64,
    rejected: f64,
    /// Rounds that are still to be done without a draft.
    pause: usize,
    next_pause: usize,
    /// Whether drafting was found to lose.
    lost: bool,
}

impl Policy {
    /// A policy that knows nothing yet.
    pub fn new(wanted: DraftLen) -> Self {
        Self {
            wanted,
            draft: Recent::default(),
            verify: vec![Recent::default(); MAX_LEN + 1],
            accepted: 0.0,
            rejected: 0.0,
            pause: 0,
            next_pause: PAUSE.0,
            lost: false,
        }
    }

    /// How many tokens to draft in the next round.
    pub fn next_len(&mut self) -> usize {
        if let DraftLen::Fixed(len) = self.wanted {
            return len;
        }
        let (plain, trials) = (self.verify[0].len(), self.draft.len());
        if plain < TRIALS || trials < TRIALS {
            return if plain <= trials { 0 } else { TRIAL };
        }
        if self.pause > 1 {
            self.pause -= 1;
            return 0;
        }
        let tries_again = std::mem::take(&mut self.pause) == 1;
        let plain = self.verify_seconds(0);
        let (c, v) = (self.draft.median().unwrap_or(0.0) / plain, |m| self.verify_seconds(m) / plain);
        let Some((len, speedup)) = best_len(self.acceptance(), c, v, 1..=MAX_LEN) else { return 0 };
        self.lost = speedup <= 1.0;
        match self.lost {
            false => self.next_pause = PAUSE.0,
            true if tries_again => {}
            true => {
                self.pause = self.next_pause;
                self.next_pause = (2 * self.next_pause).min(PAUSE.1);
                return 0;
            }
        }
        len
    }

    /// Whether drafting would lose, as far as is known.
    pub fn lost(&self) -> bool {
        self.lost
    }

    /// Learns whether a draft token was accepted.
    pub fn note_outcome(&mut self, accepted: bool) {
        let verified = if accepted { 1.0 } else { 0.0 };
        self.accepted = DECAY * self.accepted + verified;
        self.rejected = DECAY * self.rejected + 1.0 - verified;
    }

    /// Learns what drafts of up to `len` tokens took, apart from what the source had to catch up with first.
    pub fn note_draft(&mut self, len: usize, seconds: f64) {
        if len > 0 {
            self.draft.note(seconds / len as f64);
        }
    }

    /// Learns what the target's forward over drafts of up to `len` tokens took.
    pub fn note_verified(&mut self, len: usize, seconds: f64) {
        if let Some(verify) = self.verify.get_mut(len) {
            verify.note(seconds);
        }
    }

    /// `accepted / (accepted + rejected)` of late, with one more of each so that it is never 0 or 1.
    fn acceptance(&self) -> f64 {
        (self.accepted + 1.0) / (self.accepted + self.rejected + 2.0)
    }

    /// Seconds to verify drafts of this length: as measured, or on the line through the measured ones beside it.
    fn verify_seconds(&self, len: usize) -> f64 {
        let known = |len: usize| self.verify[len].median().map(|seconds| (len as f64, seconds));
        if let Some((_, seconds)) = known(len) {
            return seconds;
        }
        let below = (0..len).rev().find_map(known);
        let above = (len + 1..=MAX_LEN).find_map(known);
        // The last two where none is longer.
        let below_that = below.and_then(|(below, _)| (0..below as usize).find_map(known));
        let line = |(x0, y0): (f64, f64), (x1, y1): (f64, f64)| y0 + (len as f64 - x0) * ((y1 - y0) / (x1 - x0));
        match (below_that, below, above) {
            (_, Some(below), Some(above)) => line(below, above),
            (Some(first), Some(below), None) => line(first, below).max(below.1),
            (_, Some(only), None) | (_, None, Some(only)) => only.1,
            (_, None, None) => f64::NAN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn very_many_tokens_are_added_up_at_once() {
        for a in [0.0, 0.3, 0.999, 1.0 - 1e-9] {
            let one_by_one: f64 = (0..=5000).scan(1.0, |power, _| Some(std::mem::replace(power, *power * a))).sum();
            assert!((expected_tokens(a, 5000) / one_by_one - 1.0).abs() < 1e-9, "{a}");
        }
        assert_eq!(expected_tokens(1.0, 9999), 10_000.0);
        for a in [f64::NAN, f64::INFINITY, 1.5, -0.5, 0.5] {
            let _ = expected_tokens(a, usize::MAX);
        }
        assert_eq!(expected_tokens(0.5, usize::MAX), 2.0);
        assert!(expected_tokens(f64::NAN, usize::MAX).is_nan());
    }

    #[test]
    fn tokens_are_the_geometric_sum() {
        for (a, m) in [(0.75, 4), (0.3, 1), (0.99, 16), (0.5, 0)] {
            let closed = (1.0 - f64::powi(a, m as i32 + 1)) / (1.0 - a);
            assert!((expected_tokens(a, m) - closed).abs() < 1e-12);
        }
        assert_eq!(expected_tokens(1.0, 4), 5.0);
        assert_eq!(expected_tokens(0.0, 4), 1.0);
    }

    #[test]
    fn the_assignments_optimum_is_found() {
        // 75% agreement, GPT-2 for GPT2-XL on a T4: 0.824 ms to 9.83 ms a token.
        let best = best_len(0.75, 0.824 / 9.83, |_| 1.0, 0..=MAX_LEN).unwrap();
        assert_eq!(best.0, 5);
        assert!((best.1 - 2.32).abs() < 0.005, "{best:?}");
    }

    #[test]
    fn a_draft_that_is_never_right_or_too_dear_is_not_made() {
        assert_eq!(best_len(0.0, 0.1, |_| 1.0, 0..=MAX_LEN).unwrap().0, 0);
        assert_eq!(best_len(0.9, 2.0, |_| 1.0, 0..=MAX_LEN).unwrap().0, 0);
        // Verification that costs as much as the steps that it saves.
        assert_eq!(best_len(0.9, 0.1, |m| 1.0 + m as f64, 0..=MAX_LEN).unwrap().0, 0);
        assert_eq!(best_len(0.9, 0.1, |_| 1.0, []), None);
    }

    /// Lets a policy work where a draft token costs `c`, verification `1 + slope m`, and tokens are accepted with probability
    /// `a`; returns the lengths that it chose.
    fn lens(a: f64, c: f64, slope: f64, rounds: usize) -> (Vec<usize>, Policy) {
        let mut policy = Policy::new(DraftLen::Auto);
        let mut lens = Vec::new();
        for round in 0..rounds {
            let len = policy.next_len();
            let accepted = (0..len).take_while(|at| {
                use crate::sampling::{Purpose, uniform};
                uniform(3, *at as u64, round as u64, Purpose::Accept) < a
            });
            let accepted = accepted.count();
            (0..accepted).for_each(|_| policy.note_outcome(true));
            if accepted < len {
                policy.note_outcome(false);
            }
            policy.note_draft(len, len as f64 * c);
            policy.note_verified(len, 1.0 + slope * len as f64);
            lens.push(len);
        }
        (lens, policy)
    }

    #[test]
    fn lengths_settle_at_the_optimum() {
        for (a, c, slope) in [(0.75, 0.0838, 0.0), (0.9, 0.05, 0.02), (0.5, 0.2, 0.01)] {
            let (lens, policy) = lens(a, c, slope, 600);
            let (best, max) = best_len(a, c, |m| 1.0 + slope * m as f64, 1..=MAX_LEN).unwrap();
            assert!(!policy.lost());
            // What the chosen lengths are worth, on average, once it has learned.
            let worth = |m: &usize| speedup(a, *m, c, 1.0 + slope * *m as f64);
            let mean = lens[50..].iter().map(worth).sum::<f64>() / (lens.len() - 50) as f64;
            assert!(mean > 0.97 * max, "{mean} of {max} at {best}");
        }
    }

    #[test]
    fn drafting_stops_where_it_loses_and_is_tried_again_ever_more_rarely() {
        let (lens, policy) = lens(0.2, 0.5, 0.0, 2_000);
        assert!(policy.lost());
        let drafted: Vec<usize> = (0..lens.len()).filter(|&round| lens[round] > 0).collect();
        assert!((3..20).contains(&drafted.len()), "{drafted:?}");
        assert!(drafted.windows(3).skip(2).all(|at| at[2] - at[1] >= at[1] - at[0]), "{drafted:?}");
    }

    #[test]
    fn a_fixed_length_is_kept() {
        let mut policy = Policy::new(DraftLen::Fixed(7));
        for _ in 0..5 {
            assert_eq!(policy.next_len(), 7);
            policy.note_draft(7, 100.0);
            policy.note_verified(7, 1.0);
            policy.note_outcome(false);
        }
    }

    proptest! {
        #[test]
        fn costs_between_measured_ones_are_between_them(one in 0.1..10.0_f64, other in 0.1..10.0_f64, at in 1_usize..MAX_LEN) {
            let mut policy = Policy::new(DraftLen::Auto);
            policy.note_verified(0, one);
            policy.note_verified(MAX_LEN, other);
            let (low, high) = (one.min(other), one.max(other));
            prop_assert!((low - 1e-9..=high + 1e-9).contains(&policy.verify_seconds(at)));
        }
    }
}
