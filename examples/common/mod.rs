//! What the examples share: which model, on which device, and how prompts and flags are read.
#![allow(dead_code)] // no example uses all of it

pub mod draft;
pub mod model;
pub mod prefixes;
pub mod prompts;
pub mod three_ways;

use std::process::ExitCode;

use clap::builder::{RangedU64ValueParser, TypedValueParser};

/// The error of an example: its message is all that is shown.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Runs an example: an error becomes one line on standard error and the exit status 1.
pub fn run(main: impl FnOnce() -> Result<(), Failure>) -> ExitCode {
    match main() {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has seen enough, as `head` does.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &Failure) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// A flag's value that is at least 1.
pub fn at_least_one() -> impl TypedValueParser<Value = usize> {
    RangedU64ValueParser::<usize>::new().range(1..)
}

/// A flag's value, or `off`.
pub fn number_or_off<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<Switch<T>, String> {
    if text == "off" {
        return Ok(Switch(None));
    }
    text.parse().map(|value| Switch(Some(value))).map_err(|error| format!("{error}, and not `off`"))
}

/// A number, or none where the flag says `off`.
#[derive(Clone, Copy, Debug)]
pub struct Switch<T>(pub Option<T>);
