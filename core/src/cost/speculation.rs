//! What speculative decoding is worth (Leviathan et al., *Fast Inference from Transformers via Speculative Decoding*, 2023).

use crate::speculative::expected_tokens;
use crate::{Error, Result};

/// A draft and its target, as far as speed goes.
///
/// ```
/// use gpt2_burn_core::cost::SpeculationCost;
///
/// let pair = SpeculationCost::new(0.75, 0.0838)?; // GPT-2 drafts for GPT2-XL on a T4
/// assert_eq!(pair.best(20).draft_len, 5);
/// assert_eq!(pair.without_bonus().best(20).draft_len, 6);
/// # Ok::<(), gpt2_burn_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SpeculationCost {
    acceptance: f64,
    draft_cost: f64,
    bonus: bool,
}

/// How many tokens to draft.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct BestDraft {
    /// Drafted tokens a round: m; 0 if speculation does not pay.
    pub draft_len: usize,
    /// How much faster that is than the target alone.
    pub speedup: f64,
}

impl SpeculationCost {
    /// A draft whose tokens are accepted with probability `acceptance` each, independently, and whose step costs
    /// `draft_cost` of the target's decode steps. A target that accepts all gives a bonus token.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] for an acceptance outside 0 to 1, or a cost that is negative or not a number.
    pub fn new(acceptance: f64, draft_cost: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&acceptance) {
            return Err(Error::mismatch("acceptance rate", "a number from 0 to 1", acceptance));
        }
        if !(draft_cost.is_finite() && draft_cost >= 0.0) {
            return Err(Error::mismatch("relative cost of the draft", "a number from 0 up", draft_cost));
        }
        Ok(Self { acceptance, draft_cost, bonus: true })
    }

    /// The assignment's algorithm: a round whose drafted tokens are all accepted ends with the last of them.
    pub fn without_bonus(self) -> Self {
        Self { bonus: false, ..self }
    }

    /// Tokens that a round of `draft_len` drafted ones yields on average: 1 + a + ... + a^(m-1), and a^m more with the
    /// bonus; its last term is the token that the target gives instead of a rejected one, or behind the last.
    ///
    /// Without drafted tokens a round is the target's own step: 1.
    pub fn expected_tokens(&self, draft_len: usize) -> f64 {
        let bonus = usize::from(self.bonus || draft_len == 0);
        expected_tokens(self.acceptance, draft_len + bonus - 1)
    }

    /// How much faster than the target alone, if verifying takes as long as a decode step: both read all weights once.
    pub fn speedup(&self, draft_len: usize) -> f64 {
        self.measured_speedup(draft_len, 1.0)
    }

    /// The same, with a verification of `draft_len` tokens that takes `verify_cost` of the target's decode steps.
    pub fn measured_speedup(&self, draft_len: usize, verify_cost: f64) -> f64 {
        self.expected_tokens(draft_len) / (draft_len as f64 * self.draft_cost + verify_cost)
    }

    /// The best draft length up to `max`, and to 65,536.
    pub fn best(&self, max: usize) -> BestDraft {
        self.best_measured(max, |_| 1.0)
    }

    /// The best draft length up to `max`, and to 65,536, if verifying m tokens takes `verify_cost(m)` of the target's decode steps.
    pub fn best_measured(&self, max: usize, verify_cost: impl Fn(usize) -> f64) -> BestDraft {
        let plain = BestDraft { draft_len: 0, speedup: 1.0 };
        (1..=max.min(1 << 16)).fold(plain, |best, draft_len| {
            let speedup = self.measured_speedup(draft_len, verify_cost(draft_len));
            if speedup > best.speedup { BestDraft { draft_len, speedup } } else { best }
        })
    }
}
