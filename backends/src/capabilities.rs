//! What a device has and how it likes to be used.

#![allow(unreachable_patterns, unused_imports)] // a build may have one kind of device only, or none

use std::collections::BTreeSet;

use std::sync::atomic::{AtomicBool, Ordering};

use burn::backend::DispatchDevice;
use burn::tensor::Device;

static FAST_F32: AtomicBool = AtomicBool::new(false);

/// Allows the kernels of this process to compute products of many rows in f32 on a GPU's matrix units, which round their
/// factors to 11 significant bits (NVIDIA's TF32). It is not allowed until somebody does: then prompts are computed faster, and
/// decoders agree no more than in f16.
pub fn allow_fast_f32(is_allowed: bool) {
    FAST_F32.store(is_allowed, Ordering::Relaxed);
}

/// See [`allow_fast_f32`].
pub fn is_fast_f32_allowed() -> bool {
    FAST_F32.load(Ordering::Relaxed)
}

/// Whether there are kernels for a device; without them, matrices had better not be packed. The CPU has them if it has
/// AVX2 with FMA, AVX-512 or NEON, and every GPU; a device that records gradients has none.
pub fn has_kernels(device: &Device) -> bool {
    match device.as_dispatch() {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => crate::flex::is_fast(),
        #[cfg(feature = "cube")]
        DispatchDevice::Cube(_) => true,
        _ => false,
    }
}

/// Whether there are kernels for keys and values in [pages](crate::attend_pages). Without them burn's operations
/// do it, page after page, and buffers had better be in one piece.
pub fn has_page_kernels(device: &Device) -> bool {
    has_kernels(device) && !is_asynchronous(device)
}

/// Whether what a device computes is waited for where its results are read, and not before.
pub fn is_asynchronous(device: &Device) -> bool {
    match device.as_dispatch() {
        #[cfg(feature = "cube")]
        DispatchDevice::Cube(_) => true,
        _ => false,
    }
}

/// Most rows that had better go through all layers at once, on a device with kernels, where the widest of them have `width`
/// numbers; none: any number.
pub fn max_rows(device: &Device, width: usize) -> Option<usize> {
    match is_asynchronous(device) {
        true => largest_buffer(device).map(|bytes| (bytes / size_of::<f32>() / width.max(1)).max(1)),
        // A row of GPT-2's widest activations takes 12 KB: these are as large as a core's share of the last cache.
        false => Some(512),
    }
}

/// Bytes that a kernel can read as one buffer, if there is a limit.
pub fn largest_buffer(device: &Device) -> Option<usize> {
    match device.as_dispatch() {
        #[cfg(feature = "cube")]
        DispatchDevice::Cube(device) => usize::try_from(device.client().properties().memory.max_page_size).ok(),
        _ => None,
    }
}

/// The different kernels that are launched on GPUs while `work` is done, by whomever: each is compiled at its first launch. What
/// they are called means nothing but that two are the same.
pub fn kernels_launched<T>(work: impl FnOnce() -> T) -> (T, BTreeSet<String>) {
    #[cfg(feature = "cube")]
    {
        let launched = cubecl_runtime::launched::LaunchedKernels::new();
        let result = work();
        (result, launched.finish().iter().map(|kernel| format!("{kernel:?}")).collect())
    }
    #[cfg(not(feature = "cube"))]
    (work(), BTreeSet::new())
}
