//! Asking for memory before it is needed.
#![allow(unsafe_code)] // a hint, which the standard library only offers as an intrinsic

/// Bytes that are fetched from memory together.
const CACHE_LINE: usize = 64;

/// Bytes of weights that are asked for before they are needed: with many rows at a time, a processor does not look far
/// enough ahead by itself.
const AHEAD: usize = 4096;

/// As many bytes as `x` has, a little further on, are on their way once this was called; nothing happens where there is
/// no such instruction.
#[inline(always)]
pub fn prefetch_behind<T>(x: &T) {
    for line in 0..size_of::<T>().div_ceil(CACHE_LINE) {
        prefetch(std::ptr::from_ref(x).cast::<u8>().wrapping_add(AHEAD + line * CACHE_LINE));
    }
}

/// The line of memory that this address is in is on its way to the nearest cache once this was called, whoever may own it.
#[inline(always)]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction is a hint: it reads nothing and does not fail, wherever the pointer points to.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The same, to the second cache: for what is needed so much later that the nearest one would have to hold two of it. Nor does what
/// computes meanwhile wait for the few places from which that one is filled.
#[inline(always)]
pub fn prefetch_far(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
