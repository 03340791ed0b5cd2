//! Curves of time and memory against the length of the prompt and of the output, naive, with a cache and with drafts, with
//! what `gpt2_burn::cost` predicts drawn as lines through the measured points.
//!
//!     cargo run --release --example latency_curves -- --preset small
//!     cargo run --release --example latency_curves -- --preset full
//!     cargo run --release --example latency_curves -- --config gpt2-medium --prompt-lengths 32,128,512 --out curves
//!
//! It writes `points.csv`, a chart of each curve as SVG, and `report.html`, which needs nothing else to be opened.

#[path = "../common/mod.rs"]
mod common;
#[path = "../compare/prompts.rs"]
mod prompts;

mod chart;
mod curves;
mod files;
mod memory;
mod options;
mod predict;
mod report;
mod runs;
mod setup;
mod sweep;

use std::io::Write;
use std::process::ExitCode;

use common::Failure;
use options::{Args, Plan};
use sweep::Sweep;

fn main() -> ExitCode {
    let (args, given) = common::parse::<Args>(std::env::args_os());
    common::run(|| {
        let plan = Plan::new(&args, &given)?;
        args.model.with_threads(|| latency_curves(&args, &plan))
    })
}

fn latency_curves(args: &Args, plan: &Plan) -> Result<(), Failure> {
    let names = options::unique(args.model.device.split(','));
    // All of them before anything is computed, which takes minutes.
    let devices = names.iter().map(|name| Ok(gpt2_burn::device(name)?)).collect::<Result<Vec<_>, Failure>>()?;
    if let Some(of) = &args.memory_of {
        return memory::print(args, plan, of.curve, &of.device);
    }
    std::fs::create_dir_all(&args.out).map_err(|error| format!("{}: {error}", args.out.display()))?;
    let sweeps = names.iter().zip(&devices).map(|(name, device)| Sweep::run(args, plan, name, device));
    let sweeps = sweeps.collect::<Result<Vec<_>, Failure>>()?;
    let written = files::write(args, &sweeps)?;

    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", files::as_json(&sweeps))?;
        return Ok(());
    }
    for sweep in &sweeps {
        writeln!(out, "{}\n", report::as_text(sweep))?;
    }
    for path in written {
        writeln!(out, "wrote {}", path.display())?;
    }
    Ok(())
}
