//! The embedded pair on a GPU of any make: naive, cached and speculative decoding give the same ids, in three times.
//!
//!     cargo run --release --features wgpu --example wgpu
//!     cargo run --release --features vulkan --example wgpu -- vulkan
//!
//! `wgpu` writes its kernels in WGSL and runs them through Vulkan, Metal, DirectX 12 or OpenGL; the feature `vulkan`
//! compiles them to SPIR-V instead, `metal` to Metal's language. The first run compiles, which is not in the times.
//!
//! How that is done is in `src/lib.rs` beside this file.

use std::process::ExitCode;

fn main() -> ExitCode {
    gpt2_burn_examples::main("wgpu")
}
