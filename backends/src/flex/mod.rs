//! Kernels for the CPU, on plain slices.

use pulp::{Arch, Simd, WithSimd};

mod append;
pub mod attend;
pub mod element;
mod epilogue;
mod gelu;
mod int8;
mod lanes;
pub mod linear;
mod ops;
mod output;
mod paged;
mod prefetch;
mod schedule;
mod tensors;
#[cfg(test)]
mod tests;

/// Whether this machine has vectors and a fused multiply-add: without, a multiply-add is a call into a library, and the
/// kernels would be far slower than burn's operations.
pub fn is_fast() -> bool {
    struct Lanes;

    impl WithSimd for Lanes {
        type Output = usize;

        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }

    !cfg!(target_family = "wasm") && Arch::new().dispatch(Lanes) >= 4
}
