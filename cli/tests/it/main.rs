//! The program `gpt2` as a user runs it.

mod bad_input;
mod bench_batch;
mod compare;
mod curves;
mod generate;
#[cfg(target_os = "linux")]
mod limits;
mod math;
mod perplexity;
mod program;
mod shared_prefix;
mod train;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde::Deserialize;
use serde_json::Value;

/// Runs a command with nothing on standard input.
fn run(command: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gpt2")).arg(command).args(args).stdin(Stdio::null()).output().unwrap()
}

/// What it prints.
#[track_caller]
fn text(command: &str, args: &[&str]) -> String {
    let output = run(command, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn json(command: &str, args: &[&str]) -> Value {
    serde_json::from_str(&text(command, &[args, &["--json"]].concat())).unwrap()
}

/// What it says when it fails.
#[track_caller]
fn failure(command: &str, args: &[&str]) -> String {
    let output = run(command, args);
    assert!(!output.status.success(), "{args:?} succeeded");
    String::from_utf8(output.stderr).unwrap()
}

/// A file or folder of the repository's `tests/fixtures`.
/// Positions that a cache of the small models has for so many tokens of a row: whole pages, where there are some.
fn positions(tokens: usize) -> usize {
    let has_pages = gpt2_burn::device("flex").is_ok_and(|device| gpt2_burn::backends::has_page_kernels(&device));
    if has_pages { tokens.next_multiple_of(16) } else { tokens }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

fn path(fixture_name: &str) -> String {
    fixture(fixture_name).to_str().unwrap().to_owned()
}

fn list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// What PyTorch computed.
#[derive(Deserialize)]
struct Expected {
    prompts: Vec<Vec<u32>>,
    loss: Vec<f64>,
    greedy: Vec<Vec<u32>>,
}

impl Expected {
    fn read(file: &str) -> Self {
        serde_json::from_str(&std::fs::read_to_string(fixture(file)).unwrap()).unwrap()
    }
}

/// The embedded target as a folder.
fn embedded_files() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let model = gpt2_burn_pair::TARGET;
    std::fs::write(folder.path().join("config.json"), model.config).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), model.weights).unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), model.tokenizer).unwrap();
    folder
}
