//! Memory for weights, in large pages.
#![allow(unsafe_code)] // a call to the operating system

use bytemuck::Zeroable;

/// Bytes from which on a buffer has a large page of 2 MB in it, wherever it lies.
#[cfg_attr(not(target_os = "linux"), allow(dead_code))]
const WORTH_ADVICE: usize = 4 << 20;

/// Zeros, in large pages where the system gives them to those who ask: reading weights from end to end, a processor
/// finds its way through few large pages faster than through many small ones.
pub fn zeroed<T: Zeroable>(len: usize) -> Vec<T> {
    let mut buffer = bytemuck::zeroed_vec(len);
    ask_for_large_pages(&mut buffer);
    buffer
}

/// To be asked before the memory is written: until then, it is only promised.
#[cfg(target_os = "linux")]
fn ask_for_large_pages<T>(buffer: &mut [T]) {
    const PAGE: usize = 4096;
    let bytes = size_of_val(buffer);
    if bytes < WORTH_ADVICE {
        return;
    }
    let start = buffer.as_mut_ptr().cast::<u8>();
    let skipped = start.align_offset(PAGE);
    let whole = (bytes - skipped) / PAGE * PAGE;
    // SAFETY: the pages lie in the buffer, which is borrowed for as long as this takes, and the advice changes neither what
    // they hold nor what may be done with them. Where pages are larger than 4 KB and the start is not that of a page, the
    // call fails and does nothing; so a failure is of no consequence.
    unsafe { libc::madvise(start.add(skipped).cast(), whole, libc::MADV_HUGEPAGE) };
}

/// Other systems decide by themselves.
#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages<T>(_: &mut [T]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_all_sizes_are_zeros() {
        for len in [0, 1, 4096, WORTH_ADVICE / 4 - 1, WORTH_ADVICE / 4, WORTH_ADVICE + 5] {
            let buffer: Vec<u32> = zeroed(len);
            assert!(buffer.len() == len && buffer.iter().all(|x| *x == 0));
        }
    }
}
