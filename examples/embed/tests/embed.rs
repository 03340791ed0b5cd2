//! The application as a user runs it.

use std::process::{Command, Output, Stdio};

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gpt2-burn-embed")).args(args).stdin(Stdio::null()).output().unwrap()
}

#[track_caller]
fn text(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn failure(args: &[&str]) -> String {
    let output = run(args);
    assert!(!output.status.success(), "{args:?} succeeded");
    String::from_utf8(output.stderr).unwrap()
}

/// The accuracy on held-out lines before and after training, in percent.
fn accuracies(printed: &str) -> [f64; 2] {
    let (_, figures) = printed.split_once("accuracy ").expect("a line with accuracies");
    let figures: Vec<f64> =
        figures.lines().next().unwrap().split(" -> ").map(|part| part.trim_end_matches('%').parse().unwrap()).collect();
    figures.try_into().unwrap()
}

#[test]
fn a_head_on_hidden_states_learns_while_the_text_stays() {
    let short = ["--steps", "40", "--seed", "7"];
    let printed = text(&short);
    let [before, after] = accuracies(&printed);
    assert!((35.0..65.0).contains(&before) && after > before + 15.0, "{printed}");
    assert!(printed.contains("the text that it was before"), "{printed}");
    assert_eq!(text(&short), printed, "a seed repeats");

    let thawed = text(&["--thaw", "--steps", "15"]);
    let [before, after] = accuracies(&thawed);
    assert!(after > before + 10.0 && thawed.contains("another text than before"), "{thawed}");

    let untrained = text(&["--steps", "0"]);
    let [before, after] = accuracies(&untrained);
    assert!((before - after).abs() < 0.2, "{untrained}");
    assert!(failure(&["--batch-size", "0"]).contains("1.."));
    assert!(failure(&["--batch-size", "99999999999999999"]).contains("lines is more than the 1916 that"));
    assert!(failure(&["--device", "abacus"]).contains("abacus"));
}
