//! The embedded pair on the CPU: naive, cached and speculative decoding give the same ids, in three times.
//!
//!     cargo run --release --example cpu
//!     cargo run --release --features ndarray --example cpu -- ndarray

mod common;

use std::process::ExitCode;

use clap::Parser;
use common::three_ways::three_ways;

/// Decodes one text naively, with a cache and speculatively on the CPU.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// The device: `flex`, or `ndarray` with the feature of that name
    #[arg(default_value = "flex")]
    device: String,
}

fn main() -> ExitCode {
    let args = Args::parse();
    common::run(|| {
        let device = gpt2_burn::device(&args.device)?;
        three_ways(&args.device, &device)
    })
}
