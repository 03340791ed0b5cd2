//! Curves of time and memory against the length of the prompt and of the output, naive, with a cache and with drafts, with
//! what `gpt2_burn::cost` predicts drawn as lines through the measured points.
//!
//!     gpt2 curves --preset small
//!     gpt2 curves --preset full
//!     gpt2 curves --config gpt2-medium --prompt-lengths 32,128,512 --out curves
//!
//! It writes `points.csv`, a chart of each curve as SVG, and `report.html`, which needs nothing else to be opened.

mod chart;
mod figures;
mod files;
mod memory;
mod options;
mod predict;
mod report;
mod runs;
mod setup;
mod sweep;

use std::io::Write;

pub use options::Args;
use options::Plan;
use sweep::Sweep;

use crate::args::{Failure, Given};

/// Runs the command.
pub fn run(args: &Args, given: &Given) -> Result<(), Failure> {
    let plan = Plan::new(args, given)?;
    args.model.with_threads(|| curves(args, &plan))
}

fn curves(args: &Args, plan: &Plan) -> Result<(), Failure> {
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
