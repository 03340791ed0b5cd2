//! The embedded pair on the CPU: naive, cached and speculative decoding give the same ids, in three times.
//!
//!     cargo run --release --example cpu
//!     cargo run --release --features ndarray --example cpu -- ndarray
//!
//! How that is done is in `src/lib.rs` beside this file.

use std::process::ExitCode;

fn main() -> ExitCode {
    gpt2_burn_examples::main("flex")
}
