//! Asking for memory before it is needed.
#![allow(unsafe_code)] // a hint, which the standard library only offers as an intrinsic

/// Elements of a cache line are on their way once this was called; nothing happens where there is no such instruction.
#[inline(always)]
pub fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction is a hint: it reads nothing and does not fail, wherever the pointer points to.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
