//! Other crates' parsers, kept from panicking through ours.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `work` on a file that may be damaged; none if it panicked, which `tokenizers` does on some files.
///
/// What the work borrows is dropped after a failure, or is not changed by it.
pub fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}
