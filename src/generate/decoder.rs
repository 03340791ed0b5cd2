//! [`Decoder`]: how the logits of the next positions are obtained.

use std::fmt;

use crate::CacheStorage;
use crate::speculative::Speculation;

/// How tokens are computed.
///
/// Where the order of sums is one, which tokens does not depend on it: on CPUs, in f32, of [packed](crate::Gpt2::pack)
/// models and in the [deterministic mode](crate::Gpt2::with_determinism). With burn's operations and on GPUs the last digits of
/// logits differ, so greedy tokens are the same where no two logits are nearly equal, and sampled ones mostly. Where drafts are
/// [accepted by rejection](crate::speculative::Acceptance::Rejection) and tokens are sampled, their distribution does not depend on
/// it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Decoder {
    /// The whole sequence again at each step.
    Naive,
    /// Only the new token, with the keys and values of the others from a cache.
    Kv(CacheStorage),
    /// As that, but several tokens at once, which a [draft](super::Generator::with_draft) proposes.
    Speculative(Speculation),
}

impl Decoder {
    /// How its cache is stored; none if it has no cache.
    pub fn storage(&self) -> Option<CacheStorage> {
        match self {
            Self::Naive => None,
            Self::Kv(storage) => Some(*storage),
            Self::Speculative(speculation) => Some(speculation.storage),
        }
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::Kv(CacheStorage::default())
    }
}

impl fmt::Display for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Naive => "naive",
            Self::Kv(CacheStorage::Paged) => "kv-paged",
            Self::Kv(CacheStorage::Growing) => "kv-growing",
            Self::Kv(CacheStorage::Preallocated) => "kv-preallocated",
            Self::Speculative(_) => "speculative",
        })
    }
}
