//! The examples as a user runs them. `cargo test` builds them first; a run of this file alone uses what is built.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let examples = test.parent().unwrap().parent().unwrap().join("examples");
    let path = examples.join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(path.exists(), "{} is not built: run `cargo test --release -p gpt2-burn-examples`", path.display());
    path
}

fn run(name: &str, args: &[&str]) -> Output {
    Command::new(example(name)).args(args).stdin(Stdio::null()).output().unwrap()
}

#[track_caller]
fn text(name: &str, args: &[&str]) -> String {
    let output = run(name, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn failure(name: &str, args: &[&str]) -> (Option<i32>, String) {
    let output = run(name, args);
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn each_device_has_an_example_that_runs_or_says_what_is_missing() {
    let printed = text("cpu", &[]);
    let lines: Vec<&str> = printed.lines().filter(|line| line.starts_with('|')).skip(2).collect();
    let cells: Vec<Vec<&str>> = lines.iter().map(|line| line.split('|').map(str::trim).collect()).collect();
    let decoders: Vec<[&str; 2]> = cells.iter().map(|cells| [cells[1], cells[5]]).collect();
    assert_eq!(
        decoders,
        [["naive", "the reference"], ["kv-preallocated", "equal"], ["speculative", "equal"]],
        "{printed}"
    );
    for cells in &cells {
        let figures = [cells[2], cells[3], cells[4].trim_end_matches(" x")];
        assert!(figures.iter().all(|figure| figure.parse::<f64>().unwrap() > 0.0), "{printed}");
    }
    let devices = [("cpu", "ndarray"), ("wgpu", "wgpu"), ("wgpu", "vulkan"), ("cuda", "cuda"), ("cuda", "cuda:1")];
    for (name, device) in devices {
        if let Err(error) = gpt2_burn::device(device) {
            assert_eq!(failure(name, &[device]), (Some(1), format!("error: {error}\n")), "{name} {device}");
        }
    }
}

#[test]
fn generate_continues_texts_and_says_where_the_rest_is() {
    let one = text("generate", &["ROMEO:"]);
    assert!(one.starts_with("ROMEO:") && one.len() > 60, "{one}");
    let two = text("generate", &["ROMEO:", "JULIET:\n"]);
    let (first, second) = two.split_once("---------------\n").unwrap();
    assert_eq!(first, one, "a text does not depend on what it is in a batch with");
    assert!(second.starts_with("JULIET:\n") && second.len() > 60, "{two}");

    // The embedded model as a folder.
    let folder = std::env::temp_dir().join(format!("gpt2-burn-examples-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let model = gpt2_burn_pair::TARGET;
    std::fs::write(folder.join("config.json"), model.config).unwrap();
    std::fs::write(folder.join("model.safetensors"), model.weights).unwrap();
    std::fs::write(folder.join("tokenizer.json"), model.tokenizer).unwrap();
    let from_folder = run("generate", &["--model", folder.to_str().unwrap(), "ROMEO:"]);
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(String::from_utf8(from_folder.stdout).unwrap(), one);

    assert!(text("generate", &["--help"]).contains("gpt2-burn-cli -- generate --help"));
    let (code, message) = failure("generate", &["--seed", "1", "ROMEO:"]);
    assert!(code == Some(2) && message.starts_with("error: ") && message.contains("gpt2 generate"), "{message}");
    let (code, message) = failure("generate", &["--model", "no such model", "ROMEO:"]);
    assert!(code == Some(1) && message.starts_with("error: ") && message.lines().count() == 1, "{message}");
}
