//! What holds for the program as a whole.

use std::process::{Command, Stdio};

use crate::{path, run, text};

const COMMANDS: [&str; 7] = ["generate", "perplexity", "compare", "curves", "math", "shared-prefix", "train"];

#[test]
fn help_lists_every_command_and_every_exit_status() {
    let help = text("--help", &[]);
    for command in COMMANDS {
        let line = help.lines().find(|line| line.trim_start().starts_with(&format!("{command} ")));
        assert!(line.is_some_and(|line| line.trim().len() > command.len() + 10), "{command}: {help}");
        let own = text(command, &["--help"]);
        assert!(own.contains(&format!("Usage: gpt2 {command}")), "{own}");
        assert_eq!(text(command, &["--version"]), format!("gpt2-{command} {}\n", env!("CARGO_PKG_VERSION")));
    }
    for status in ["Exit status:", "  0  ", "  1  ", "  2  "] {
        assert!(help.contains(status), "{status}: {help}");
    }
    assert_eq!(text("--version", &[]), format!("gpt2 {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_exit_status_tells_a_failed_request_from_a_wrong_command_line() {
    let tiny = path("hf-tiny");
    let ids = ["--model", &tiny, "--prompt-ids", "1,2", "--max-new-tokens", "2"];
    let generate = |more: &[&str]| run("generate", &[&ids[..], more].concat()).status.code();
    assert_eq!(generate(&[]), Some(0));
    for failed in [&["--device", "abacus"][..], &["--top-k", "0"], &["--prompt-ids", "96"], &["--stop", "x"]] {
        assert_eq!(generate(failed), Some(1), "{failed:?}");
    }
    // Unknown, unreadable, and without an effect.
    for wrong in [
        &["--colour"][..],
        &["--max-new-tokens", "many"],
        &["--draft-len", "2"],
        &["--prefix-cache", "off", "--prefix-cache-file", "x"],
    ] {
        assert_eq!(generate(wrong), Some(2), "{wrong:?}");
    }
    for wrong in ["", "no-such-command"] {
        assert_eq!(run(wrong, &[]).status.code(), Some(2), "{wrong:?}");
    }
    let none = Command::new(env!("CARGO_BIN_EXE_gpt2")).stdin(Stdio::null()).output().unwrap();
    assert_eq!(none.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&none.stderr).contains("Usage: gpt2 <COMMAND>"), "{none:?}");
}

#[test]
fn nothing_is_drawn_or_coloured_where_nobody_looks() {
    let small = ["--prompt-length", "4", "--max-new-tokens", "4", "--num-samples", "1"];
    for (command, args) in [
        ("generate", &["ROMEO:", "--max-new-tokens", "4"][..]),
        ("compare", &small),
        ("perplexity", &["--model", &path("hf-tiny"), "--prompt-ids", "1,2,3"]),
        ("shared-prefix", &["--prompts", "2", "--shared-tokens", "8", "--num-samples", "1"]),
    ] {
        let output = run(command, args);
        assert!(output.status.success() && output.stderr.is_empty(), "{command}: {output:?}");
        assert!(!output.stdout.contains(&0x1b), "{command}: {output:?}");
    }
    for args in [&["--help"][..], &["--no-such-flag"]] {
        let output = run("generate", args);
        assert!(![output.stdout, output.stderr].concat().contains(&0x1b), "{args:?}");
    }
}
