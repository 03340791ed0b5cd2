//! The program `gpt2`: what one does with a GPT-2 on the command line. Each command is a module: its `Args`, and `run`.

mod args;
mod bench_batch;
mod compare;
mod curves;
mod generate;
mod math;
mod perplexity;
mod sample_prompts;
mod shared_prefix;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// GPT-2 on burn: generates text, and measures, explains and trains what does it.
#[derive(Parser, Debug)]
#[command(name = "gpt2", version, propagate_version = true, after_help = EXIT_STATUS)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_STATUS: &str = "\
Exit status:
  0  it was done
  1  it failed: a model or a device that is not there, a request that cannot be met, outputs that should be equal and are not
  2  the command line is wrong: an option that there is not, a value that cannot be read, an option that would have no effect";

#[derive(Subcommand, Debug)]
enum Command {
    Generate(generate::Args),
    Perplexity(perplexity::Args),
    Compare(compare::Args),
    Curves(curves::Args),
    Math(math::Args),
    SharedPrefix(shared_prefix::Args),
    BenchBatch(bench_batch::Args),
    Train(train::Args),
}

fn main() -> ExitCode {
    let (cli, given) = args::parse::<Cli>(args::prefixes::with_bare_flag(std::env::args_os()));
    args::exit_code(match &cli.command {
        Command::Generate(args) => generate::run(args, &given),
        Command::Perplexity(args) => perplexity::run(args, &given),
        Command::Compare(args) => compare::run(args, &given),
        Command::Curves(args) => curves::run(args, &given),
        Command::Math(args) => math::run(args, &given),
        Command::SharedPrefix(args) => shared_prefix::run(args, &given),
        Command::BenchBatch(args) => bench_batch::run(args, &given),
        Command::Train(args) => train::run(args, &given),
    })
}
