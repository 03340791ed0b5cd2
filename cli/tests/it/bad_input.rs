//! What cannot be is one clear line, whatever the command.

use crate::{embedded_files, failure, json, list, path, run};

#[test]
fn a_draft_that_cannot_be_is_one_clear_line() {
    let tiny = path("hf-tiny");
    for (args, part) in [
        (&["--draft", "early-exit:8"][..], "layers before the exit: expected 1 to 7, got 8"),
        (&["--draft", "early-exit:x"], "early-exit:x"),
        (&["--draft", "no-such-model"], "no-such-model"),
        (&["--draft", &tiny], "vocabulary of the draft"),
        (&["--draft", "ngram", "--draft-len", "0"], "at least 1, or `auto`"),
        (&["--draft", "ngram", "--acceptance", "always"], "always"),
    ] {
        let message = failure("generate", &[&["ROMEO:"], args].concat());
        assert!(message.contains(part), "{args:?}: {message}");
    }
    let small = ["--prompt-length", "4", "--max-new-tokens", "4"];
    for (args, part) in [
        (&["--agreement", "1.5"][..], "agreement of the script"),
        (&["--agreement", "nan"], "agreement of the script"),
        (&["--draft-config", "gpt2"], "--agreement"),
        (&["--agreement", "0.5", "--draft", "ngram"], "a draft that is a model"),
        (&["--agreement", "0.5", "--draft-config", "gpt9"], "gpt2-xl"),
    ] {
        let message = failure("compare", &[&small[..], args].concat());
        assert!(message.contains(part), "{args:?}: {message}");
    }
}

#[test]
fn bad_input_is_one_clear_line() {
    let tiny = path("hf-tiny");
    let with = |args: &[&str]| failure("generate", &[&["--model", &tiny][..], args].concat());
    for (args, part) in [
        (&["--prompt-ids", ""][..], "prompt 0 is empty"),
        (&["--prompt-ids", "96"], "outside the vocabulary 0..96"),
        (&["--prompt-ids", "1", "--temperature", "nan"], "temperature"),
        (&["--prompt-ids", "1", "--temperature", "-1"], "temperature"),
        (&["--prompt-ids", "1", "--top-k", "0"], "top_k"),
        (&["--prompt-ids", "1", "--top-p", "0"], "top_p"),
        (&["--prompt-ids", "1", "--top-p", "1.5"], "top_p"),
        (&["--prompt-ids", "1", "--device", "abacus"], "abacus"),
        (&["--prompt-ids", "1", "--stop", "x"], "needs a tokenizer"),
        (&["--prompt-ids", "1", "--on-context-end", "error"], "more than the model's 64 positions"),
        (&["hello"], "needs a tokenizer"),
    ] {
        let message = with(args);
        assert!(message.contains(part) && message.trim_end().lines().count() == 1, "{args:?}: {message}");
    }
    let long = list(&[1; 65]);
    assert!(with(&["--prompt-ids", &long]).contains("65 tokens"));
    assert!(failure("generate", &["--model", &path("")]).contains("no config.json"));
    assert!(failure("generate", &["--prompt-file", &format!("{tiny}/model.safetensors")]).contains("not UTF-8"));
    assert!(failure("perplexity", &["--prompt-ids", "1"]).contains("at least 2"));
    assert!(failure("perplexity", &["--prompt-ids", "1,2", "--stride", "0"]).contains("stride"));
}

#[test]
fn a_merge_that_makes_no_entry_is_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("vocab.json"), r#"{"a":0,"b":1}"#).unwrap();
    std::fs::write(folder.path().join("merges.txt"), "a b").unwrap();
    let message = failure("generate", &["--tokenizer", folder.path().to_str().unwrap(), "--prompt-ids", "1"]);
    assert!(message.contains("`ab` is not in the vocabulary") && message.trim_end().lines().count() == 1, "{message}");
}

#[test]
fn a_flag_that_would_be_ignored_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    std::fs::write(&text, "To be, or not to be: that is the question.\n".repeat(60)).unwrap();
    let (text, out) = (text.to_str().unwrap(), folder.path().join("out"));
    let out = out.to_str().unwrap();
    let target = embedded_files();
    let target = target.path().to_str().unwrap();
    let off = "--temperatures=off";
    let cases: &[(&str, &str, &[&str])] = &[
        ("generate", "--cache-generated", &["--cache-generated"]),
        ("generate", "--cache-generated", &["--prefix-cache", "off", "--cache-generated"]),
        ("generate", "--prefix-cache-mb", &["--prefix-cache-mb", "10"]),
        ("generate", "--prefix-cache off", &["--prefix-cache", "off", "--prefix-cache-file", out]),
        ("generate", "--draft", &["--decoder", "kv", "--draft", "ngram"]),
        ("generate", "--draft", &["--decoder", "naive", "--draft", "ngram"]),
        ("generate", "--draft-len", &["--decoder", "kv", "--draft-len", "4"]),
        ("generate", "--draft-len", &["--draft-len", "auto"]),
        ("generate", "--acceptance", &["--decoder", "naive", "--acceptance", "match"]),
        ("generate", "--acceptance", &["--acceptance", "rejection"]),
        ("generate", "--cache", &["--decoder", "naive", "--cache", "growing"]),
        ("generate", "--cache-dtype", &["--decoder", "naive", "--cache-dtype", "f16"]),
        ("generate", "--out_dir", &["--out_dir=x"]),
        ("generate", "--out_dir", &["--init_from=embedded", "--out_dir=x"]),
        ("generate", "--fast-f32", &["--fast-f32"]),
        ("generate", "--fast-f32", &["--fast-f32", "--device", "wgpu", "--kernels", "off"]),
        ("compare", "--draft", &["--decoders", "naive,kv-growing", "--draft", "ngram"]),
        ("compare", "--draft-len", &["--draft-len", "2"]),
        ("compare", "--draft-len", &["--mode", "latency", "--config", "gpt2", "--draft-len", "2"]),
        ("compare", "--agreement", &["--decoders", "naive", "--agreement", "0.5"]),
        ("compare", "--acceptance", &["--mode", "latency", "--acceptance", "match"]),
        ("compare", "--naive-seconds", &["--decoders", "kv-growing", "--naive-seconds", "1"]),
        ("compare", "--cache-dtype", &["--decoders", "naive", "--cache-dtype", "f16"]),
        ("compare", "--fast-f32", &["--device", "flex,ndarray", "--fast-f32"]),
        ("compare", "--out_dir", &["--out_dir=x"]),
        ("curves", "--draft", &["--decoders", "naive,kv", "--draft", "ngram"]),
        ("curves", "--draft-len", &["--preset", "full", "--draft-len", "2"]),
        ("curves", "--acceptance", &["--acceptance", "match"]),
        ("curves", "--naive-steps", &["--decoders", "kv", "--naive-steps", "4"]),
        ("curves", "--cache-dtype", &["--decoders", "naive", "--cache-dtype", "f16"]),
        ("curves", "--tokenizer", &["--preset", "medium", "--tokenizer", "x"]),
        ("curves", "--fast-f32", &["--fast-f32"]),
        ("shared-prefix", "--out_dir", &["--out_dir=x"]),
        ("shared-prefix", "--fast-f32", &["--fast-f32"]),
        ("perplexity", "--tokenizer", &["--prompt-ids", "1,2", "--tokenizer", "x"]),
        ("perplexity", "--fast-f32", &["--prompt-ids", "1,2", "--fast-f32"]),
        ("math", "--terms", &["--terms", "--json"]),
        ("math", "--head", &["--count", "all", "--head"]),
        ("math", "--hardware", &["--hardware=t4", "--bandwidth=1", "--tflops=1", "--memory-limit=1GB"]),
        ("math", "--text", &[off, "--text", text]),
        ("math", "--text-tokens", &[off, "--text-tokens", "9"]),
        ("math", "--draft", &[off, "--draft", "embedded"]),
        ("math", "--model", &[off, "--model", "embedded"]),
        ("math", "--init_from", &[off, "--init_from=embedded"]),
        ("math", "--tokenizer", &[off, "--tokenizer", "x"]),
        ("math", "--device", &[off, "--device", "flex"]),
        ("math", "--dtype", &[off, "--dtype", "f16"]),
        ("math", "--kernels", &[off, "--kernels", "on"]),
        ("math", "--threads", &[off, "--threads", "1"]),
        ("train", "--distill-weight", &["--text", text, "--out", out, "--distill-weight", "1"]),
        ("train", "--vocab-size", &["--text", text, "--out", out, "--distill", target, "--vocab-size", "300"]),
    ];
    for (name, flag, args) in cases {
        let output = run(name, args);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{name} {args:?}: {message}");
        let first = message.lines().next().unwrap_or_default();
        let is_named = [" ", ":", "'"].iter().any(|end| first.contains(&format!("{flag}{end}")));
        assert!(first.starts_with("error: ") && is_named, "{name} {args:?}: {message}");
    }
    // A model that is named is not replaced by random weights: its context is too short for these lengths.
    for model in ["--model=embedded", "--init_from=embedded"] {
        let message = failure("curves", &["--preset", "full", model, "--out", out]);
        assert!(message.contains("the model has 512"), "{message}");
    }
    // What has an effect stays allowed.
    let draft = ["--decoder", "speculative", "--draft-len", "2", "--acceptance", "match", "--cache", "growing"];
    let output = json("generate", &[&draft[..], &["--max-new-tokens", "3", "ROMEO:"]].concat());
    assert_eq!(output["stats"]["speculation"]["draft"], "model");
    json("compare", &["--mode", "latency", "--draft-len", "2", "--prompt-length", "4", "--max-new-tokens", "4"]);
}
