//! [`Reuse`]: what of a prompt need not be computed.

use std::fmt;

/// What of a prompt is taken from what was computed before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reuse {
    /// The longest prefix that any sequence shares with it.
    #[default]
    Radix,
    /// All of it, if it is a whole prompt that was seen before, else nothing.
    Exact,
}

impl fmt::Display for Reuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Radix => "radix",
            Self::Exact => "exact",
        })
    }
}
