//! What the examples share: which model, on which device, and how prompts and flags are read.
#![allow(dead_code)] // no example uses all of it

pub mod draft;
pub mod model;
pub mod prefixes;
pub mod prompts;
pub mod three_ways;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use clap::builder::{RangedU64ValueParser, TypedValueParser};
use clap::parser::ValueSource;

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

/// Which flags the command line has, by their fields' names: a default is nobody's wish.
pub struct Given(Vec<(String, String)>);

/// Reads a command line; ends the program if it cannot be read, or asks for help.
pub fn parse<A: Parser>(words: impl IntoIterator<Item = OsString>) -> (A, Given) {
    let mut command = A::command();
    let matches = command.try_get_matches_from_mut(words).unwrap_or_else(|error| error.exit());
    let args = A::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut command).exit());
    let is_given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let given = command.get_arguments().filter(|arg| is_given(arg.get_id().as_str()));
    let flag = |arg: &clap::Arg| {
        let name = arg.get_long().map_or(arg.get_id().to_string(), |long| format!("--{long}"));
        (arg.get_id().to_string(), name)
    };
    (args, Given(given.map(flag).collect()))
}

impl Given {
    /// Whether a flag was given.
    pub fn has(&self, id: &str) -> bool {
        self.0.iter().any(|(given, _)| given == id)
    }

    /// Fails if one of these flags was given, which would be ignored.
    pub fn refuse(&self, ids: &[&str], why: &str) -> Result<(), Failure> {
        match self.0.iter().find(|(given, _)| ids.contains(&given.as_str())) {
            Some((_, flag)) => Err(format!("{flag} {why}").into()),
            None => Ok(()),
        }
    }
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
