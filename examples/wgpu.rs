//! The embedded pair on a GPU of any make: naive, cached and speculative decoding give the same ids, in three times.
//!
//!     cargo run --release --features wgpu --example wgpu
//!     cargo run --release --features vulkan --example wgpu -- vulkan
//!
//! `wgpu` writes its kernels in WGSL and runs them through Vulkan, Metal, DirectX 12 or OpenGL; the feature `vulkan`
//! compiles them to SPIR-V instead, `metal` to Metal's language. The first run compiles, which is not in the times.

mod common;

use std::process::ExitCode;

use clap::Parser;
use common::three_ways::three_ways;

/// Decodes one text naively, with a cache and speculatively on a GPU.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// The device: `wgpu`, `vulkan` or `metal`, each with the feature of that name
    #[arg(default_value = "wgpu")]
    device: String,
}

fn main() -> ExitCode {
    let args = Args::parse();
    common::run(|| {
        let device = gpt2_burn::device(&args.device)?;
        three_ways(&args.device, &device)
    })
}
