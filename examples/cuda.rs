//! The embedded pair on an NVIDIA GPU: naive, cached and speculative decoding give the same ids, in three times.
//!
//!     cargo run --release --features cuda --example cuda
//!     cargo run --release --features cuda --example cuda -- cuda:1
//!
//! Needs NVIDIA's driver, and `libdevice.10.bc` of the CUDA toolkit or of the Python package `nvidia-cuda-nvcc`, where
//! `CUDA_PATH` says (see `gpt2_burn::backends::device`). The first build downloads LLVM, and the first run compiles kernels, which is
//! not in the times. In f32 the ids are the CPU's: no product is rounded to tf32.
//!
//! How that is done is in `src/lib.rs` beside this file.

use std::process::ExitCode;

fn main() -> ExitCode {
    gpt2_burn_examples::main("cuda")
}
