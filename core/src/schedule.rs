//! [`Schedule`]: which tokens of prompts go through the model in the next step.
//!
//! Agrawal et al., *Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve* (2024), section 4: a step computes a token
//! of every row that decodes, and with what is left of its budget chunks of the prompts that wait.

/// How many tokens a step computes, and whose.
///
/// Rows that decode come first: their next token is never put off. What they leave of the budget goes to the prompts in the order
/// of their arrival; so that a long prompt does not keep the short ones behind it waiting, at first no prompt gets more than its
/// share, which is what there is divided by the prompts that wait, and at least [`MIN_SHARE`](Self::MIN_SHARE). A prompt that had no
/// turn for [`max_wait`](Self::max_wait) steps gets one, whatever the budget.
///
/// ```
/// use gpt2_burn_core::schedule::{Pending, Schedule};
///
/// let schedule = Schedule { budget: 400, max_wait: 8 };
/// let prompt = |tokens| Pending { tokens, waited: 0 };
/// // Four rows decode. The first prompt is long, the others are served in the same step, and it gets the rest.
/// assert_eq!(schedule.chunks(4, &[prompt(900), prompt(20), prompt(76)]), [300, 20, 76]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Tokens that a step computes, those of rows that decode included, if there are so many; they alone can be more.
    pub budget: usize,
    /// Steps after which a prompt gets a turn although rows that decode leave nothing of the budget.
    pub max_wait: usize,
}

/// A prompt that is not computed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Tokens that it lacks, at least one.
    pub tokens: usize,
    /// Steps since it had a turn, or since it came.
    pub waited: usize,
}

impl Schedule {
    /// Least share of a prompt: so few tokens do not make a step much longer, and fewer are not worth reading the weights for.
    pub const MIN_SHARE: usize = 64;

    /// How many of its tokens each prompt, in the order of their arrival, gets in a step in which `taken` others are computed.
    pub fn chunks(&self, taken: usize, prompts: &[Pending]) -> Vec<usize> {
        let mut left = self.budget.saturating_sub(taken);
        let share = left.div_ceil(prompts.len().max(1)).max(Self::MIN_SHARE);
        let mut chunks = vec![0; prompts.len()];
        for limit in [share, usize::MAX] {
            for (chunk, prompt) in chunks.iter_mut().zip(prompts) {
                let more = prompt.tokens.min(limit).saturating_sub(*chunk).min(left);
                *chunk += more;
                left -= more;
            }
        }
        let overdue = |(chunk, prompt): &(&mut usize, &Pending)| **chunk == 0 && prompt.waited >= self.max_wait;
        if let Some((chunk, prompt)) = chunks.iter_mut().zip(prompts).find(overdue) {
            *chunk = prompt.tokens.min(Self::MIN_SHARE);
        }
        chunks
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prompts() -> impl Strategy<Value = Vec<Pending>> {
        let prompt = (1_usize..900, 0_usize..20).prop_map(|(tokens, waited)| Pending { tokens, waited });
        proptest::collection::vec(prompt, 0..40)
    }

    proptest! {
        #[test]
        fn a_budget_is_used_up_and_kept_to(prompts in prompts(), budget in 0_usize..2000, taken in 0_usize..100) {
            let chunks = Schedule { budget, max_wait: usize::MAX }.chunks(taken, &prompts);
            let wanted: usize = prompts.iter().map(|prompt| prompt.tokens).sum();
            prop_assert_eq!(chunks.iter().sum::<usize>(), wanted.min(budget.saturating_sub(taken)));
            prop_assert!(chunks.iter().zip(&prompts).all(|(chunk, prompt)| *chunk <= prompt.tokens));
        }

        /// Whoever came first gets a share before others get more than theirs.
        #[test]
        fn the_first_of_the_prompts_always_gets_on(prompts in prompts(), budget in 1_usize..2000) {
            let chunks = Schedule { budget, max_wait: 8 }.chunks(0, &prompts);
            if let Some(first) = prompts.first() {
                prop_assert!(chunks[0] >= first.tokens.min(budget).min(Schedule::MIN_SHARE));
            }
        }

        #[test]
        fn who_waits_too_long_gets_a_turn(prompts in prompts(), taken in 100_usize..200) {
            let chunks = Schedule { budget: 100, max_wait: 8 }.chunks(taken, &prompts);
            let first = prompts.iter().position(|prompt| prompt.waited >= 8);
            for (at, chunk) in chunks.iter().enumerate() {
                let expected = if Some(at) == first { prompts[at].tokens.min(Schedule::MIN_SHARE) } else { 0 };
                prop_assert_eq!(*chunk, expected);
            }
        }
    }

    #[test]
    fn without_a_bound_all_goes_at_once() {
        let prompts = [3, 1000, 70].map(|tokens| Pending { tokens, waited: 0 });
        assert_eq!(Schedule { budget: usize::MAX, max_wait: 8 }.chunks(5, &prompts), [3, 1000, 70]);
    }
}
