//! Requests that no memory holds.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Programs that are asked for too much say so: within a gigabyte of addresses, where one that only tried would be ended.
#[test]
fn requests_that_no_memory_holds_end_in_an_error_within_a_gigabyte() {
    let tokenizer = tempfile::tempdir().unwrap();
    fs::write(tokenizer.path().join("vocab.json"), r#"{"a": 0, "b": 1}"#).unwrap();
    fs::write(tokenizer.path().join("merges.txt"), "a b").unwrap();
    let tokenizer = tokenizer.path().to_str().unwrap();
    for (args, message) in [
        (&["--num-samples", "1000000", "ROMEO:"][..], "bytes of memory"),
        (&["--num-samples", "100000", "ROMEO:"], "bytes of memory"),
        (&["--num-samples", "18446744073709551615", "ROMEO:"], "bytes of memory"),
        (&["--max-new-tokens", "18446744073709551615", "--on-context-end", "slide", "ROMEO:"], "bytes of memory"),
        (&["--num-samples", "1000000", "--draft", "embedded", "ROMEO:"], "bytes of memory"),
        (&["--num-samples", "1000000", "--decoder", "naive", "ROMEO:"], "bytes of memory"),
        (&["--memory-mb", "5", "ROMEO:"], "the limit is 5000000"),
        (&["--tokenizer", tokenizer, "--prompt-ids", "1"], "tokenizer"),
    ] {
        let started = Instant::now();
        let output = Command::new("sh")
            .args(["-c", "ulimit -v 1048576 && exec \"$0\" \"$@\""])
            .args([env!("CARGO_BIN_EXE_gpt2"), "generate"])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        // Most of it goes into loading the model; a machine that is busy with other tests is given ten times a second.
        assert!(started.elapsed().as_secs() < 10, "{args:?} took {:?}", started.elapsed());
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
        assert!(error.contains(message) && !error.contains("panicked"), "{args:?}: {error}");
    }
}
