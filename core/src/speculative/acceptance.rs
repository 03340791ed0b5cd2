//! [`Acceptance`]: which tokens of a draft stand, and what stands for those that do not.

use crate::sampling::{Distribution, Purpose};

/// The rule by which draft tokens are accepted.
///
/// With a temperature of 0 both rules are the same: a token is accepted if it is the target's most likely.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Acceptance {
    /// Speculative sampling (Leviathan et al., 2023, algorithm 1; Chen et al., 2023, algorithm 2): a token that the draft
    /// drew with probability q and the target would with p is accepted with probability `min(1, p / q)`; one that is not
    /// is replaced by a draw from `max(0, p - q)`, normalised. The text has exactly the target's filtered distribution, and
    /// no rule accepts more; which text of that distribution comes depends on the draft and its lengths.
    #[default]
    Rejection,
    /// Sample and match: the target draws as it would without a draft, and what the draft proposed is accepted if it is the
    /// same. The ids are those of plain sampling with the same seed, whatever the draft.
    Match,
}

/// What stands at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifiedToken {
    /// The token.
    pub id: u32,
    /// Whether it is the one that was proposed.
    pub accepted: bool,
}

impl Acceptance {
    /// What the random number is for by which a draft model draws a token.
    pub fn draft_purpose(self) -> Purpose {
        match self {
            Self::Rejection => Purpose::Draft,
            // The number that the target will draw with: the same number in two similar distributions mostly is the same
            // token.
            Self::Match => Purpose::Token,
        }
    }

    /// Verifies `proposed`, which was drawn from the distribution `draft`, where `target` is wanted; `random` gives a number in
    /// [0, 1) for each purpose.
    pub fn verify(
        self,
        target: &Distribution,
        draft: &Distribution,
        proposed: u32,
        random: impl Fn(Purpose) -> f64,
    ) -> VerifiedToken {
        match self {
            Self::Rejection => {
                let (p, q) = (target.prob(proposed), draft.prob(proposed));
                match random(Purpose::Accept) * q < p {
                    true => VerifiedToken { id: proposed, accepted: true },
                    false => {
                        let id = target.residual(draft).sample(random(Purpose::Residual));
                        VerifiedToken { id, accepted: false }
                    }
                }
            }
            Self::Match => {
                let id = target.sample(random(Purpose::Token));
                VerifiedToken { id, accepted: id == proposed }
            }
        }
    }
}

/// The probability with which a token drawn from the draft's distribution is accepted by rejection sampling: the sum over
/// tokens of the smaller of both probabilities (Leviathan et al., corollary 3.6). Of greedy distributions it is 1 if both
/// take the same token, and 0 if not.
pub fn acceptance(target: &Distribution, draft: &Distribution) -> f64 {
    let probs = draft.ids().iter().zip(draft.probs());
    probs.map(|(&id, &prob)| prob.min(target.prob(id))).sum()
}
