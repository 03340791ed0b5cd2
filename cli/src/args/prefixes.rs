//! `--prefix-cache`, `--prefix-cache-file`: what was computed for the prefixes of prompts is used again.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use gpt2_burn::generate::Generator;
use gpt2_burn::prefix::{PrefixCache, Reuse};

use super::{Failure, Given, misuse};

const FLAG: &str = "--prefix-cache";

/// Whether prompts share what was computed.
#[derive(Args, Clone, Debug)]
pub struct PrefixArgs {
    /// Compute once what prompts begin with: `radix` whatever prefix they share, `exact` only whole prompts that are the
    /// same; without a value: radix
    #[arg(long, value_enum, value_name = "WHAT")]
    prefix_cache: Option<PrefixCacheName>,
    /// Keep what was computed in this file from one run to the next; implies --prefix-cache radix
    #[arg(long, value_name = "FILE")]
    prefix_cache_file: Option<PathBuf>,
    /// Most megabytes of keys and values to keep
    #[arg(long, value_name = "MB", default_value_t = 1000)]
    prefix_cache_mb: usize,
    /// Keep those of new tokens too, for prompts that go on where a text ended
    #[arg(long)]
    pub cache_generated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PrefixCacheName {
    Off,
    Exact,
    Radix,
}

/// The command line with `--prefix-cache=radix` where the flag has no value: a prompt may follow it.
pub fn with_bare_flag(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let (mut args, mut is_over) = (args.peekable(), false);
    let mut all = Vec::new();
    while let Some(arg) = args.next() {
        is_over |= arg == "--";
        let is_value =
            |next: &OsString| next.to_str().is_some_and(|next| PrefixCacheName::from_str(next, false).is_ok());
        let is_bare = !is_over && arg == FLAG && !args.peek().is_some_and(is_value);
        all.push(if is_bare { format!("{FLAG}=radix").into() } else { arg });
    }
    all
}

impl PrefixArgs {
    /// Refuses flags that would be ignored.
    pub fn check(&self, given: &Given) -> Result<(), Failure> {
        match (self.prefix_cache, &self.prefix_cache_file) {
            (Some(PrefixCacheName::Off), Some(_)) => Err(misuse("--prefix-cache off leaves nothing for a file")),
            (Some(PrefixCacheName::Off), None) | (None, None) => {
                given.refuse(&["prefix_cache_mb", "cache_generated"], "has no effect without --prefix-cache")
            }
            _ => Ok(()),
        }
    }

    /// The generator with the cache asked for, which holds what is in the file.
    pub fn attach(&self, generator: Generator) -> Result<(Generator, Option<PrefixCache>), Failure> {
        let reuse = match (self.prefix_cache, &self.prefix_cache_file) {
            (Some(PrefixCacheName::Off), _) | (None, None) => return Ok((generator, None)),
            (Some(PrefixCacheName::Exact), _) => Reuse::Exact,
            (Some(PrefixCacheName::Radix), _) | (None, Some(_)) => Reuse::Radix,
        };
        let prefixes = PrefixCache::new(self.prefix_cache_mb.saturating_mul(1_000_000)).with_reuse(reuse);
        let generator = generator.with_prefix_cache(&prefixes)?;
        if let Some(path) = self.prefix_cache_file.as_ref().filter(|path| path.exists()) {
            generator.restore_prefixes(path)?;
        }
        Ok((generator, Some(prefixes)))
    }

    /// Writes the file, if there is to be one.
    pub fn save(&self, prefixes: Option<&PrefixCache>) -> Result<(), Failure> {
        match (prefixes, &self.prefix_cache_file) {
            (Some(prefixes), Some(path)) => Ok(prefixes.save(path)?),
            _ => Ok(()),
        }
    }
}
