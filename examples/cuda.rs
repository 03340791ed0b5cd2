//! The embedded pair on an NVIDIA GPU: naive, cached and speculative decoding give the same ids, in three times.
//!
//!     cargo run --release --features cuda --example cuda
//!     cargo run --release --features cuda --example cuda -- cuda:1
//!
//! Needs NVIDIA's driver, and `libdevice.10.bc` of the CUDA toolkit or of the Python package `nvidia-cuda-nvcc`, where
//! `CUDA_PATH` says (see `gpt2_burn::backends::device`). The first build downloads LLVM, and the first run compiles kernels, which is
//! not in the times. In f32 the ids are the CPU's: no product is rounded to tf32.

mod common;

use std::process::ExitCode;

use clap::Parser;
use common::three_ways::three_ways;

/// Decodes one text naively, with a cache and speculatively on an NVIDIA GPU.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// The device: `cuda`, or `cuda:1` for the second one
    #[arg(default_value = "cuda")]
    device: String,
}

fn main() -> ExitCode {
    let args = Args::parse();
    common::run(|| {
        let device = gpt2_burn::device(&args.device)?;
        three_ways(&args.device, &device)
    })
}
