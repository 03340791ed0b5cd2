//! What the commands have in common: how a command line is read and how it ends, and the flags that several of them have.

pub mod draft;
pub mod model;
pub mod prefixes;
pub mod progress;
pub mod prompts;
pub mod shape;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use clap::builder::{RangedU64ValueParser, TypedValueParser};
use clap::parser::ValueSource;

/// Why a command failed: the message is all that is shown.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A command line that can be read and makes no sense.
#[derive(Debug)]
struct Misuse(String);

impl std::fmt::Display for Misuse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Misuse {}

/// The failure of a command line that makes no sense: its exit status is that of one that cannot be read.
pub fn misuse(message: impl Into<String>) -> Failure {
    Box::new(Misuse(message.into()))
}

/// How the program ends: a failure becomes one line on standard error, and the exit status that `gpt2 --help` lists.
pub fn exit_code(result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has seen enough, as `head` does.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(if error.is::<Misuse>() { 2 } else { 1 })
        }
    }
}

fn is_broken_pipe(error: &Failure) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Which flags of its command the command line has, by their fields' names: a default is nobody's wish.
pub struct Given(Vec<(String, String)>);

/// Reads a command line; ends the program if it cannot be read, or asks for help.
pub fn parse<A: Parser>(words: impl IntoIterator<Item = OsString>) -> (A, Given) {
    let mut program = A::command();
    let matches = program.try_get_matches_from_mut(words).unwrap_or_else(|error| error.exit());
    let args = A::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut program).exit());
    let chosen = matches.subcommand().and_then(|(name, matches)| Some((program.find_subcommand(name)?, matches)));
    let (command, matches) = chosen.unwrap_or((&program, &matches));
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
            Some((_, flag)) => Err(misuse(format!("{flag} {why}"))),
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
