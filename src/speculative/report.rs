//! [`SpeculationReport`]: what drafts were worth.

use super::{Draft, expected_tokens};
use crate::summary::median;

/// What speculation did, summed over rows.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct SpeculationReport {
    /// Where drafts came from.
    pub draft: String,
    /// Turns of rows after the first token: a forward of the target over m rows is m rounds.
    pub rounds: usize,
    /// Tokens that were proposed.
    pub drafted: usize,
    /// Tokens that were proposed and stand.
    pub accepted: usize,
    /// Tokens that were proposed and replaced. What was proposed behind one of those, or past the end of a text, is neither
    /// accepted nor rejected.
    pub rejected: usize,
    /// Tokens of the rounds: accepted ones and those that the target added.
    pub tokens: usize,
    /// For each position in a draft, from the first on, how often a token there was verified, and how often accepted.
    pub by_position: Vec<PositionReport>,
    /// How many rounds had drafts of 0, 1, 2... tokens.
    pub rounds_by_len: Vec<usize>,
    /// Tokens that went through a draft model.
    pub draft_computed_tokens: usize,
    /// Whether an adaptive length found in the end that drafting would lose.
    pub drafting_loses: bool,
    /// What each step took; a step is a round of every row that goes on.
    pub steps: Vec<SpeculativeStep>,
}

/// The fate of tokens at one position in a draft.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PositionReport {
    /// How many were compared with what the target says.
    pub verified: usize,
    /// How many of those stand.
    pub accepted: usize,
}

/// What a step took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct SpeculativeStep {
    /// Length of the longest draft.
    pub max_draft_len: usize,
    /// Seconds until drafts were there.
    pub draft_seconds: f64,
    /// Seconds of the target's forward.
    pub verify_seconds: f64,
    /// Seconds of all else: verifying, text, and moving rows.
    pub rest_seconds: f64,
}

impl SpeculativeStep {
    /// Seconds of all of it.
    pub fn seconds(&self) -> f64 {
        self.draft_seconds + self.verify_seconds + self.rest_seconds
    }
}

impl SpeculationReport {
    pub(crate) fn new(draft: &Draft) -> Self {
        Self { draft: draft.to_string(), ..Self::default() }
    }

    /// Share of the proposed tokens that stand; none if there were none.
    pub fn acceptance_rate(&self) -> Option<f64> {
        share(self.accepted, self.drafted)
    }

    /// `a`, the probability that a token is accepted if all before it were: `accepted / (accepted + rejected)`.
    pub fn acceptance(&self) -> Option<f64> {
        share(self.accepted, self.accepted + self.rejected)
    }

    /// Mean tokens that a row got in a round.
    pub fn tokens_per_round(&self) -> Option<f64> {
        share(self.tokens, self.rounds)
    }

    /// Seconds of all drafts.
    pub fn draft_seconds(&self) -> f64 {
        self.steps.iter().map(|step| step.draft_seconds).sum()
    }

    /// Seconds of all forwards of the target.
    pub fn verify_seconds(&self) -> f64 {
        self.steps.iter().map(|step| step.verify_seconds).sum()
    }

    /// Seconds of all else.
    pub fn rest_seconds(&self) -> f64 {
        self.steps.iter().map(|step| step.rest_seconds).sum()
    }

    /// Median seconds of a step without a draft, which is a plain decode step; none if each had one.
    pub fn plain_step_seconds(&self) -> Option<f64> {
        self.median_of(|step| (step.max_draft_len == 0).then(|| step.seconds()))
    }

    /// Median seconds of a draft token.
    pub fn draft_token_seconds(&self) -> Option<f64> {
        self.median_of(|step| (step.max_draft_len > 0).then(|| step.draft_seconds / step.max_draft_len as f64))
    }

    /// Median seconds of the target's forward over drafts of up to `len` tokens.
    pub fn verification_seconds(&self, len: usize) -> Option<f64> {
        self.median_of(|step| (step.max_draft_len == len).then_some(step.verify_seconds))
    }

    /// How many times as fast as plain decoding, with steps of `plain` seconds, it should have been by the cost model:
    /// [`expected_tokens`] of each round at the [`acceptance`](Self::acceptance) found, over m draft tokens and a
    /// verification, at their median cost. None without drafts.
    pub fn predicted_speedup(&self, plain: f64) -> Option<f64> {
        let a = self.acceptance()?;
        let rounds = self.rounds_by_len.iter().enumerate();
        let tokens: f64 = rounds.map(|(len, rounds)| *rounds as f64 * expected_tokens(a, len)).sum();
        let of_draft = self.draft_token_seconds().unwrap_or(0.0);
        let max_len = self.steps.iter().map(|step| step.max_draft_len).max()?;
        let verification: Vec<f64> =
            (0..=max_len).map(|len| self.verification_seconds(len).unwrap_or(f64::NAN)).collect();
        let cost = |step: &SpeculativeStep| step.max_draft_len as f64 * of_draft + verification[step.max_draft_len];
        let seconds: f64 = self.steps.iter().map(cost).sum();
        Some(plain * (tokens / self.rounds as f64) / (seconds / self.steps.len() as f64))
    }

    /// How many times as fast as plain decoding, with steps of `plain` seconds, it was.
    pub fn measured_speedup(&self, plain: f64) -> Option<f64> {
        let seconds: f64 = self.steps.iter().map(SpeculativeStep::seconds).sum();
        Some(plain * self.tokens_per_round()? * self.steps.len() as f64 / seconds)
    }

    fn median_of(&self, of: impl Fn(&SpeculativeStep) -> Option<f64>) -> Option<f64> {
        median(&self.steps.iter().filter_map(of).collect::<Vec<_>>())
    }

    pub(super) fn note_draft(&mut self, len: usize) {
        self.rounds += 1;
        self.drafted += len;
        if self.rounds_by_len.len() <= len {
            self.rounds_by_len.resize(len + 1, 0);
        }
        self.rounds_by_len[len] += 1;
    }

    pub(super) fn note_outcome(&mut self, position: usize, accepted: bool) {
        if self.by_position.len() <= position {
            self.by_position.resize(position + 1, PositionReport::default());
        }
        let position = &mut self.by_position[position];
        position.verified += 1;
        match accepted {
            true => {
                position.accepted += 1;
                self.accepted += 1;
            }
            false => self.rejected += 1,
        }
    }
}

fn share(part: usize, of: usize) -> Option<f64> {
    (of > 0).then(|| part as f64 / of as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_formulas() {
        let mut report = SpeculationReport::default();
        assert_eq!((report.acceptance_rate(), report.acceptance(), report.tokens_per_round()), (None, None, None));
        assert_eq!((report.predicted_speedup(1.0), report.measured_speedup(1.0)), (None, None));
        // Two rows, two steps: drafts of 3 with 2 accepted, of 3 with all; of 1 that is rejected, of none.
        for len in [3, 3, 1, 0] {
            report.note_draft(len);
        }
        for (position, accepted) in [(0, true), (1, true), (2, false), (0, true), (1, true), (2, true), (0, false)] {
            report.note_outcome(position, accepted);
        }
        report.tokens = 3 + 4 + 1 + 1;
        assert_eq!((report.rounds, report.drafted, report.accepted, report.rejected), (4, 7, 5, 2));
        assert_eq!(report.rounds_by_len, [1, 1, 0, 2]);
        let accepted: Vec<_> =
            report.by_position.iter().map(|position| (position.verified, position.accepted)).collect();
        assert_eq!(accepted, [(3, 2), (2, 2), (2, 1)]);
        assert_eq!(report.acceptance_rate(), Some(5.0 / 7.0));
        assert_eq!(report.acceptance(), Some(5.0 / 7.0));
        assert_eq!(report.tokens_per_round(), Some(9.0 / 4.0));

        let step = |max_draft_len, draft_seconds, verify_seconds| SpeculativeStep {
            max_draft_len,
            draft_seconds,
            verify_seconds,
            rest_seconds: 0.5,
        };
        report.steps = vec![step(3, 3.0, 10.0), step(1, 1.0, 8.0), step(0, 0.0, 7.5)];
        assert_eq!((report.draft_seconds(), report.verify_seconds(), report.rest_seconds()), (4.0, 25.5, 1.5));
        assert_eq!((report.plain_step_seconds(), report.draft_token_seconds()), (Some(8.0), Some(1.0)));
        assert_eq!((report.verification_seconds(3), report.verification_seconds(2)), (Some(10.0), None));
        let a: f64 = 5.0 / 7.0;
        let tokens = (2.0 * (1.0 + a + a * a + a * a * a) + (1.0 + a) + 1.0) / 4.0;
        let predicted = 8.0 * tokens / ((13.0 + 9.0 + 7.5) / 3.0);
        assert!((report.predicted_speedup(8.0).unwrap() - predicted).abs() < 1e-12);
        let measured = 8.0 * 2.25 / (31.0 / 3.0);
        assert!((report.measured_speedup(8.0).unwrap() - measured).abs() < 1e-12);
    }
}
