//! `gpt2 perplexity`.

use crate::{Expected, failure, json, list, path};

#[test]
fn perplexity_is_the_recorded_loss() {
    let expected = Expected::read("hf-tiny/expected.json");
    for (prompt, loss) in expected.prompts.iter().zip(&expected.loss) {
        let output = json("perplexity", &["--model", &path("hf-tiny"), "--prompt-ids", &list(prompt)]);
        assert!((output["loss"].as_f64().unwrap() - loss).abs() < 1e-5);
        assert!((output["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-2);
        assert_eq!(output["tokens"].as_u64(), Some(prompt.len() as u64 - 1));
        assert!(output["bytes"].is_null());
    }
    let file = tempfile::tempdir().unwrap();
    let file = file.path().join("text.txt");
    std::fs::write(&file, "To be, or not to be: that is the question.\n".repeat(60)).unwrap();
    let args = ["--text", file.to_str().unwrap()];
    let half = json("perplexity", &args);
    let whole = json("perplexity", &[&args[..], &["--stride", "512"]].concat());
    assert_eq!(half["bytes"].as_u64(), Some(43 * 60));
    assert_eq!(half["tokens"], whole["tokens"]);
    assert_ne!(half["loss"], whole["loss"], "the windows are others");
}

#[test]
fn a_draft_is_compared_with_its_target() {
    let (target, draft) = (path("hf-tiny"), path("hf-tiny-f16"));
    let ids = ["--prompt-ids", "1,2,3,4,5,6,7,8,9"];
    let itself = json("perplexity", &[&["--model", &target, "--draft", &target], &ids[..]].concat());
    assert_eq!(itself["greedy_agreement"].as_f64(), Some(1.0));
    assert!((itself["sampled_agreement"].as_f64().unwrap() - 1.0).abs() < 1e-5);
    assert_eq!(itself["draft"]["loss"], itself["loss"]);
    let other = json("perplexity", &[&["--model", &target, "--draft", &draft], &ids[..]].concat());
    assert_ne!(other["draft"]["loss"], other["loss"]);
    let other = failure("perplexity", &[&["--model", &target, "--draft", "embedded"], &ids[..]].concat());
    assert!(other.contains("vocabulary of the draft"), "{other}");
}
