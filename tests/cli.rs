//! The examples as a user runs them. `cargo test` builds them first; a run of this file alone uses what is built.

mod common;

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use common::{Expected, fixture};
use serde_json::Value;

fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let examples = test.parent().unwrap().parent().unwrap().join("examples");
    let path = examples.join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(path.exists(), "{} is not built: run `cargo test --release --workspace`", path.display());
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
fn json(name: &str, args: &[&str]) -> Value {
    serde_json::from_str(&text(name, &[args, &["--json"]].concat())).unwrap()
}

#[track_caller]
fn failure(name: &str, args: &[&str]) -> String {
    let output = run(name, args);
    assert!(!output.status.success(), "{args:?} succeeded");
    String::from_utf8(output.stderr).unwrap()
}

fn path(fixture_name: &str) -> String {
    fixture(fixture_name).to_str().unwrap().to_owned()
}

fn list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

#[test]
fn generate_gives_the_recorded_greedy_ids_with_every_decoder() {
    for name in ["hf-tiny", "hf-tiny-untied"] {
        let expected = Expected::read(&format!("{name}/expected.json"));
        let model = path(name);
        for decoder in [&["--decoder", "naive"][..], &["--cache", "growing"], &["--cache", "preallocated"]] {
            let prompts: Vec<String> = expected.prompts.iter().map(|prompt| list(prompt)).collect();
            let fixed = ["--model", &model, "--temperature", "0", "--max-new-tokens", "24"];
            let ids = |prompts: &[String]| -> Vec<Vec<u32>> {
                let prompts: Vec<&str> = prompts.iter().flat_map(|ids| ["--prompt-ids", ids]).collect();
                let output = json("generate", &[&fixed[..], decoder, &prompts].concat());
                let completions = output["completions"].as_array().unwrap();
                completions.iter().map(|c| serde_json::from_value(c["ids"].clone()).unwrap()).collect()
            };
            assert_eq!(ids(&prompts), expected.greedy);
            for (prompt, greedy) in prompts.chunks(1).zip(&expected.greedy) {
                assert_eq!(ids(prompt), [greedy.as_slice()]);
            }
        }
    }
}

#[test]
fn generate_json_has_every_field() {
    let model = path("hf-tiny");
    let args = ["--model", &model, "--prompt-ids", "1,2,3", "--prompt-ids", "4", "--num-samples", "2"];
    let output = json("generate", &[&args[..], &["--max-new-tokens", "5", "--ignore-eos"]].concat());
    let completions = output["completions"].as_array().unwrap();
    let order: Vec<_> = completions.iter().map(|c| (c["prompt_index"].as_u64(), c["sample"].as_u64())).collect();
    assert_eq!(order, [(Some(0), Some(0)), (Some(0), Some(1)), (Some(1), Some(0)), (Some(1), Some(1))]);
    assert_eq!(completions[0]["prompt_ids"], serde_json::json!([1, 2, 3]));
    assert_eq!(completions[0]["ids"].as_array().unwrap().len(), 5);
    assert!(completions[0]["text"].is_null());
    assert_eq!(completions[0]["finish"], "length");
    let stats = &output["stats"];
    assert_eq!((stats["prompt_tokens"].as_u64(), stats["new_tokens"].as_u64()), (Some(4), Some(20)));
    assert!(stats["prefill_seconds"].as_f64().unwrap() > 0.0 && stats["decode_seconds"].as_f64().unwrap() > 0.0);
    // 2 x layers x rows x (prompt + new - 1) x width x 4 bytes
    assert_eq!(stats["kv_bytes"].as_u64(), Some(2 * 2 * 4 * 7 * 32 * 4));
    let naive = json("generate", &["--model", &model, "--prompt-ids", "1", "--decoder", "naive"]);
    assert_eq!(naive["stats"]["kv_bytes"].as_u64(), Some(0));
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

#[test]
fn generate_prints_text_and_nanogpt_spellings_mean_the_same() {
    let fixed = ["--temperature", "0", "--max-new-tokens", "20"];
    let plain = text("generate", &[&fixed[..], &["ROMEO:"]].concat());
    assert!(plain.starts_with("ROMEO:") && plain.len() > 20, "{plain}");
    let files = embedded_files();
    let folder = files.path().display();
    let from = format!("--init_from={folder}");
    let spelled = ["--temperature=0", "--max_new_tokens=20", &from, "--start=ROMEO:", "--num_samples=1", "--top_k=200"];
    assert_eq!(text("generate", &spelled), plain);

    let file = files.path().join("prompt.txt");
    std::fs::write(&file, "ROMEO:").unwrap();
    let start = format!("--start=FILE:{}", file.display());
    assert_eq!(text("generate", &[&fixed[..], &[&start]].concat()), plain);
    let file = file.to_str().unwrap();
    assert_eq!(text("generate", &[&fixed[..], &["--prompt-file", file]].concat()), plain);
    assert_eq!(text("generate", &[&fixed[..], &["--threads", "1", "ROMEO:"]].concat()), plain);

    let lines = files.path().join("prompts.jsonl");
    std::fs::write(&lines, "{\"prompt\": \"ROMEO:\"}\n\n{\"prompt\": \"JULIET:\\n\", \"other\": 1}\n").unwrap();
    let two = text("generate", &[&fixed[..], &["--prompt-file", lines.to_str().unwrap()]].concat());
    let (first, second) = two.split_once("---------------\n").unwrap();
    assert_eq!(first, plain);
    assert!(second.starts_with("JULIET:\n"));
    // Nothing piped in: a line break.
    assert_eq!(text("generate", &fixed), text("generate", &[&fixed[..], &["\n"]].concat()));
}

#[test]
fn generate_resumes_a_nanogpt_folder_and_prints_ids_without_a_tokenizer() {
    let out = format!("--out_dir={}", path("nanogpt-nobias"));
    let printed = text("generate", &["--init_from=resume", &out, "--prompt-ids", "1,2", "--max_new_tokens=3"]);
    let ids: Vec<&str> = printed.split_whitespace().collect();
    assert_eq!(ids[..3], ["1", "2", "|"]);
    assert_eq!(ids.len(), 6);
}

#[test]
fn a_tokenizer_can_lie_elsewhere() {
    let (tiny, tokenizer) = (path("nanogpt-nobias"), path("byte-shakespeare"));
    // Ids up to 95 are all that this model knows: printable characters in the byte-level vocabulary.
    let output = json("generate", &["--model", &tiny, "--tokenizer", &tokenizer, "AB", "--max-new-tokens", "4"]);
    assert_eq!(output["completions"][0]["prompt_ids"], serde_json::json!([32, 33]));
    assert_eq!(output["completions"][0]["text"].as_str().unwrap().chars().count(), 4);
    assert!(failure("generate", &["--tokenizer", &tiny, "A"]).contains("neither tokenizer.json"));
}

#[test]
fn generate_stops_at_a_text() {
    let fixed = ["ROMEO:\n", "--max-new-tokens", "80"];
    let free = json("generate", &fixed);
    let whole = free["completions"][0]["text"].as_str().unwrap().to_owned();
    let stop: String = whole.chars().skip(20).take(4).collect();
    let stopped = json("generate", &[&fixed[..], &["--stop", &stop]].concat());
    assert_eq!(stopped["completions"][0]["text"].as_str().unwrap(), whole.split(&stop).next().unwrap());
    assert_eq!(stopped["completions"][0]["finish"], "stop");
}

#[test]
fn a_narrower_cache_takes_less_and_the_deterministic_mode_gives_the_same_text() {
    let fixed = ["ROMEO:\n", "--max-new-tokens", "20", "--temperature", "0"];
    let usual = json("generate", &fixed);
    let half = json("generate", &[&fixed[..], &["--cache-dtype", "f16"]].concat());
    let bytes = |output: &Value| output["stats"]["kv_bytes"].as_u64().unwrap();
    assert_eq!(bytes(&usual), 2 * bytes(&half));
    let exact = json("generate", &[&fixed[..], &["--deterministic"]].concat());
    let without_kernels = json("generate", &[&fixed[..], &["--kernels", "off"]].concat());
    assert_eq!(without_kernels["completions"], usual["completions"]);
    assert_eq!(exact["completions"], usual["completions"]);
    let refused =
        failure("generate", &[&fixed[..], &["--deterministic", "--dtype", "f16", "--kernels", "off"]].concat());
    assert!(refused.contains("deterministic"), "{refused}");
}

#[test]
fn weights_of_eight_bits_write_text_and_need_kernels() {
    let fixed = ["ROMEO:\n", "--max-new-tokens", "20", "--dtype", "int8"];
    let output = json("generate", &fixed);
    assert_eq!(output["completions"][0]["ids"].as_array().unwrap().len(), 20);
    let refused = failure("generate", &[&fixed[..], &["--kernels", "off"]].concat());
    assert!(refused.contains("int8") && refused.contains("kernels"), "{refused}");
}

#[test]
fn compare_times_every_decoder_and_finds_them_equal() {
    let tiny = path("hf-tiny");
    let fixed = ["--model", &tiny, "--batch-size", "3", "--prompt-length", "5", "--num-samples", "2"];
    let fixed = [&fixed[..], &["--max-new-tokens", "8"]].concat();
    for (more, sampled) in [(&[][..], None), (&["--naive-seconds", "0"], Some(5)), (&["--deterministic"], None)] {
        let rows = json("compare", &[&fixed[..], more].concat());
        let rows = rows.as_array().unwrap();
        let decoders: Vec<_> = rows.iter().map(|row| row["decoder"].as_str().unwrap()).collect();
        assert_eq!(decoders, ["naive", "kv-growing", "kv-preallocated"]);
        for row in rows {
            assert_eq!((row["equal"].as_bool(), row["ties"].as_u64()), (Some(true), Some(0)));
            assert!(row["first_divergence"].is_null());
            let figure = |name: &str| row[name].as_f64().unwrap();
            let names = ["ttft_seconds", "tpot_seconds", "tpot_p95_seconds", "speedup_over_naive", "tokens_per_second"];
            assert!(names.iter().all(|name| figure(name) > 0.0), "{row}");
            assert!((figure("tokens_per_second") * figure("seconds") - 24.0).abs() < 1e-6);
            assert_eq!((figure("batch"), figure("prompt_tokens"), figure("new_tokens")), (3.0, 5.0, 8.0));
            let naive = row["decoder"] == "naive";
            // 2 x layers x rows x (prompt + new - 1) x width x 4 bytes
            assert_eq!(figure("kv_bytes"), if naive { 0.0 } else { (2 * 2 * 3 * 12 * 32 * 4) as f64 });
            assert_eq!(row["sampled_steps"].as_u64(), sampled.filter(|_| naive));
        }
    }
    let printed = text("compare", &fixed);
    for part in
        ["[NAIVE] Generated 24 tokens in ", "[KV] Generated 24 tokens in ", "all 3 rows equal", "| over naive |"]
    {
        assert!(printed.contains(part), "{part}: {printed}");
    }
}

#[test]
fn drafts_change_how_long_it_takes_and_not_what_is_said() {
    let fixed = ["ROMEO:\n", "JULIET:\nO", "--max-new-tokens", "30", "--temperature", "0"];
    let plain = json("generate", &fixed);
    assert_eq!((plain["stats"]["rounds"].as_u64(), plain["stats"]["drafted"].as_u64()), (Some(0), Some(0)));
    assert!(plain["stats"]["acceptance_rate"].is_null() && plain["stats"]["speculation"].is_null());
    let folder = embedded_files();
    let files = folder.path().to_str().unwrap();
    for (more, draft) in [
        (&["--decoder", "speculative"][..], "model"),
        (&["--draft", "embedded", "--cache", "growing"], "model"),
        (&["--draft", files, "--draft-len", "7"], "model"),
        (&["--draft", "ngram", "--draft-len", "auto"], "ngram"),
        (&["--draft", "early-exit:5", "--draft-len", "2"], "early-exit:5"),
        (&["--draft", "embedded", "--draft-len", "auto", "--acceptance", "match"], "model"),
        (&["--draft", "embedded", "--kernels", "off", "--deterministic"], "model"),
    ] {
        let output = json("generate", &[&fixed[..], more].concat());
        assert_eq!(output["completions"], plain["completions"], "{more:?}");
        let stats = &output["stats"];
        let count = |name: &str| stats[name].as_u64().unwrap();
        assert_eq!(stats["speculation"]["draft"], draft);
        assert!(count("rounds") > 0 && count("rounds") <= 58 && count("accepted") <= count("drafted"), "{stats}");
        if draft == "model" {
            let rate = count("accepted") as f64 / count("drafted") as f64;
            assert!((stats["acceptance_rate"].as_f64().unwrap() - rate).abs() < 1e-12);
            assert!(count("rounds") < 58 && rate > 0.2, "{stats}");
        }
    }
    let sampled = ["ROMEO:\n", "--max-new-tokens", "30", "--num-samples", "3"];
    let plain = json("generate", &sampled);
    let matched = json("generate", &[&sampled[..], &["--draft", "embedded", "--acceptance", "match"]].concat());
    assert_eq!(matched["completions"], plain["completions"]);
    let rejected = json("generate", &[&sampled[..], &["--draft", "embedded"]].concat());
    assert_ne!(rejected["completions"], plain["completions"]);
    assert_eq!(
        rejected["completions"],
        json("generate", &[&sampled[..], &["--draft", "embedded"]].concat())["completions"]
    );
}

#[test]
fn compare_says_what_drafts_are_worth() {
    let fixed = ["--prompt-length", "16", "--max-new-tokens", "24", "--num-samples", "2", "--mode", "latency"];
    let decoders = |rows: &Value| -> Vec<String> {
        let rows = rows.as_array().unwrap().iter();
        rows.map(|row| row["decoder"].as_str().unwrap().to_owned()).collect()
    };
    let rows = json("compare", &fixed);
    assert_eq!(decoders(&rows), ["naive", "kv-growing", "kv-preallocated", "speculative"]);
    let spec = &rows[3];
    assert_eq!((spec["equal"].as_bool(), spec["ties"].as_u64()), (Some(true), Some(0)));
    assert!(rows[2]["speculation"].is_null());
    let figure = |name: &str| spec["speculation"][name].as_f64().unwrap();
    let names = ["predicted_speedup", "measured_speedup", "speedup_over_kv", "verification_cost", "draft_cost"];
    assert!(names.iter().all(|name| figure(name) > 0.0), "{spec}");
    assert!((figure("tokens_per_round") * figure("rounds") - 23.0).abs() < 1e-9);
    let step = figure("plain_step_seconds");
    assert_eq!(Some(step), rows[2]["tpot_seconds"].as_f64());
    assert!((figure("verification_cost") - figure("verification_seconds") / step).abs() < 1e-9);
    let seconds: f64 = ["draft_seconds", "verify_seconds", "rest_seconds"].iter().map(|name| figure(name)).sum();
    let measured = step * 23.0 / seconds;
    assert!((figure("measured_speedup") - measured).abs() < 1e-9 * measured);

    let two = [&fixed[..], &["--decoders", "kv-preallocated,speculative", "--batch-size", "3"]].concat();
    for (agreement, least, most) in [("1", 1.0, 1.0), ("0.5", 0.2, 0.8), ("0", 0.0, 0.0)] {
        for more in [&[][..], &["--draft", "embedded", "--draft-len", "2"]] {
            let rows = json("compare", &[&two[..], &["--agreement", agreement], more].concat());
            let found = rows[1]["speculation"]["acceptance"].as_f64().unwrap();
            assert!((least..=most).contains(&found) && rows[1]["equal"] == true, "{agreement}: {found}");
        }
    }
    let tiny = path("hf-tiny");
    let rows = json("compare", &[&fixed[..], &["--model", &tiny, "--draft", "ngram"]].concat());
    assert_eq!(rows[3]["speculation"]["draft"], "ngram");
    let rows = json("compare", &[&fixed[..], &["--model", &tiny]].concat());
    assert_eq!(decoders(&rows).len(), 3, "no draft of its own");
    let printed = text("compare", &fixed);
    for part in ["[SPEC] Generated 24 tokens in ", "drafted tokens accepted", "x plain decoding", "tokens costs"] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
}

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
fn compare_reads_the_held_out_text_and_refuses_what_cannot_be() {
    let small = ["--batch-size", "2", "--prompt-length", "16", "--max-new-tokens", "4", "--num-samples", "1"];
    let rows = json("compare", &[&small[..], &["--dtype", "f16", "--decoders", "kv-growing,naive"]].concat());
    assert_eq!((rows[0]["dtype"].as_str(), rows[1]["decoder"].as_str()), (Some("f16"), Some("naive")));
    assert!(failure("compare", &["--config", "gpt3"]).contains("gpt2-xl"));
    assert!(failure("compare", &["--prompt-length", "500"]).contains("need 627 positions"));
    assert!(failure("compare", &["--batch-size", "0"]).contains("1.."));
    assert!(failure("compare", &["--device", "flex,abacus"]).contains("abacus"));
    assert!(failure("compare", &["--max-new-tokens", "18446744073709551615"]).contains("positions"));
    assert!(failure("compare", &["--config", "gpt2", "--tokenizer", "x"]).contains("cannot be used with"));
    let half = [&small[..], &["--deterministic", "--cache-dtype", "f16"]].concat();
    assert!(failure("compare", &half).contains("deterministic"));
    let rows = json("compare", &[&small[..], &["--cache-dtype", "f16", "--num-warmup", "0"]].concat());
    assert_eq!((rows[0]["cache_dtype"].as_str(), rows[2]["cache_dtype"].as_str()), (Some("f32"), Some("f16")));
    assert_eq!(rows[0]["equal"].as_bool(), Some(true));
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

#[test]
fn inference_math_answers_the_assignment() {
    let output = json("inference_math", &["--temperatures", "off"]);
    let cases = output["cases"].as_array().unwrap();
    let seen: Vec<_> = cases.iter().map(|case| (case["batch"].as_u64(), case["length"].as_u64())).collect();
    assert_eq!(seen, [(1, 32), (1, 1024), (64, 32), (64, 1024)].map(|(b, n)| (Some(b), Some(n))));
    for case in cases {
        let figure = |of: &str, name: &str| case[of][name].as_f64().unwrap();
        for step in ["naive", "cached"] {
            let seconds = (figure(step, "flops") / 65e12).max(figure(step, "bytes") / 300e9);
            assert!((figure(step, "seconds") / seconds - 1.0).abs() < 1e-12);
        }
        let speedup = figure("naive", "seconds") / figure("cached", "seconds");
        assert!((case["speedup"].as_f64().unwrap() / speedup - 1.0).abs() < 1e-12);
    }
    let fits = |of: &str| cases.iter().map(|case| case[of]["fits"].as_bool().unwrap()).collect::<Vec<_>>();
    assert_eq!((fits("naive"), fits("cached")), (vec![true; 4], vec![true, true, true, false]));
    assert_eq!(cases[3]["kv_bytes"], 20_132_659_200.0);
    let best = |of: &str| output["speculation"][of]["drafted"].as_u64();
    assert_eq!((best("best_without_bonus"), best("best_with_bonus")), (Some(6), Some(5)));

    let printed = text("inference_math", &["--text-tokens", "300", "--terms"]);
    let parts = [
        // The assignment asks for microseconds.
        "0.566 ms = 566 us |    0.824 ms = 824 us |",
        "9.830 ms = 9830 us | 10.366 ms = 10366 us |",
        "m = 6 (2.19 x) without the bonus token, m = 5 (2.32 x) with it",
        "(64, 1024) with a cache does not fit: 3.12 GB of parameters + 20.1 GB of keys and values",
        "Terms of (64, 32) with a cache",
        "| 0 (greedy)  |",
    ];
    parts.iter().for_each(|part| assert!(printed.contains(part), "{part}: {printed}"));
}

#[test]
fn inference_math_takes_any_model_machine_and_case() {
    let off = ["--temperatures", "off"];
    let tiny = path("hf-tiny");
    let shape = ["--config", &tiny, "--draft-config", "embedded", "--hardware", "h100", "--bandwidth", "1000"];
    let more = ["--case", "3,7", "--precision", "f32", "--weights", "int8", "--count", "all", "--memory-limit", "1kB"];
    let output = json("inference_math", &[&off[..], &shape, &more].concat());
    assert_eq!(
        (output["cases"].as_array().unwrap().len(), output["hardware"]["bytes_per_second"].as_f64()),
        (1, Some(1e12))
    );
    assert_eq!(output["parameter_bytes"], output["parameters"].as_f64().unwrap());
    // 2 x rows x length x width x 4 bytes
    assert_eq!(output["cases"][0]["kv_bytes_per_layer"], (2 * 3 * 7 * 32 * 4) as f64);
    assert_eq!(output["cases"][0]["cached"]["fits"], false);
    for (args, part) in [
        (&["--config", "gpt3"][..], "gpt2-xl"),
        (&["--hardware", "abacus"], "t4"),
        (&["--case", "0,5"], "B,N"),
        (&["--case", "1,1025"], "1025 tokens"),
        (&["--bandwidth", "0"], "positive"),
        (&["--memory-limit", "much"], "16GB"),
        (&["--acceptance", "1.5"], "acceptance"),
        (&["--temperatures", "0,cold"], "cold"),
        (&["--precision", "int8"], "floating-point"),
        (&["--most-drafted", "18446744073709551615"], "10000"),
        (&["--tflops", "nan"], "positive"),
    ] {
        let message = failure("inference_math", args);
        assert!(message.contains(part), "{args:?}: {message}");
    }
    assert!(failure("inference_math", &["--temperatures=-1"]).contains("temperature = -1"));
    assert!(failure("inference_math", &["--text-tokens", "1"]).contains("at least 2"));
}

#[test]
fn latency_curves_measures_every_point_and_writes_a_report_that_needs_nothing_else() {
    let (tiny, out) = (path("hf-tiny"), tempfile::tempdir().unwrap());
    let folder = out.path().to_str().unwrap();
    let fixed =
        ["--model", &tiny, "--out", folder, "--num-samples", "2", "--prompt-length", "4", "--output-length", "3"];
    // The same device twice is one; naming a draft asks for the speculative decoder.
    let more = ["--device", "flex,flex", "--draft", "early-exit:1", "--draft-len", "2"];
    let along = ["--prompt-lengths", "16,4,8", "--output-lengths", "1,8,20", "--naive-steps", "5", "--batch-size", "2"];
    let sweeps = json("latency_curves", &[&fixed[..], &more, &along].concat());
    assert_eq!(sweeps.as_array().unwrap().len(), 1);
    assert_eq!(sweeps[0]["draft"], "early-exit:1");
    let points = sweeps[0]["points"].as_array().unwrap();
    let seen: Vec<_> =
        points.iter().map(|point| (point["prompt_tokens"].as_u64(), point["new_tokens"].as_u64())).collect();
    let wanted = [(4, 3), (8, 3), (16, 3), (4, 1), (4, 8), (4, 20)];
    assert_eq!(seen, wanted.map(|(prompt, new)| [(Some(prompt), Some(new)); 3]).concat());
    for (at, point) in points.iter().enumerate() {
        let figure = |name: &str| point[name].as_f64().unwrap();
        assert_eq!(figure("runs"), 2.0);
        for name in ["total_seconds", "first_token_seconds", "predicted_total_seconds", "predicted_memory_bytes"] {
            assert!(figure(name) > 0.0, "{name}: {point}");
        }
        assert!(figure("roofline_total_seconds") <= figure("predicted_total_seconds"));
        assert_eq!(point["seconds_per_token"].is_null(), figure("new_tokens") == 1.0);
        let naive = point["decoder"] == "naive";
        let drafts = point["decoder"] == "speculative" && figure("new_tokens") > 1.0;
        assert_eq!([&point["acceptance"], &point["drafted_per_round"]].map(|figure| figure.is_null()), [!drafts; 2]);
        if drafts {
            // No round is cheaper than a decode step, none yields more tokens than it drafts and one.
            let plain = &points[at - 1];
            assert_eq!((&plain["decoder"], &plain["new_tokens"]), (&"KV cache".into(), &point["new_tokens"]));
            let (a, drafted) = (figure("acceptance"), figure("drafted_per_round"));
            assert!((0.0..=1.0).contains(&a) && drafted > 0.0 && drafted <= 2.0, "{point}");
            let of = |point: &Value| point["predicted_seconds_per_token"].as_f64().unwrap();
            assert!(of(point) * (1.0 + a + a * a) > of(plain), "{point} {plain}");
            assert!(of(point) < 4.0 * of(plain), "a verification of 3 tokens and two steps of half the layers");
        }
        assert_eq!(point["timed_steps"].as_u64(), (naive && figure("new_tokens") > 5.0).then_some(5));
        // 2 x layers x rows x (prompt + new - 1) x width x 4 bytes
        let kv = 2.0 * 2.0 * 2.0 * (figure("prompt_tokens") + figure("new_tokens") - 1.0) * 32.0 * 4.0;
        let weights = sweeps[0]["points"][0]["accounted_bytes"].as_f64().unwrap();
        assert_eq!(figure("accounted_bytes") - weights, if naive { 0.0 } else { kv });
        assert!(point["memory_bytes"].is_u64() || !cfg!(target_os = "linux"), "{point}");
    }

    let read = |name: &str| std::fs::read_to_string(out.path().join(name)).unwrap();
    let csv = read("points.csv");
    assert_eq!(csv.lines().count(), 1 + points.len());
    let columns = csv.lines().next().unwrap().split(',').count();
    assert!(csv.lines().all(|line| line.split(',').count() == columns));
    let report = read("report.html");
    for figure in ["total", "per-token", "memory"] {
        for axis in ["prompt", "output"] {
            let svg = read(&format!("{figure}-{axis}.svg"));
            assert!(svg.starts_with("<svg") && svg.matches("<circle").count() >= 6, "{figure} against {axis}");
            assert!(report.contains(&svg));
        }
    }
    assert_eq!(report.matches("<figure>").count(), 6);
    assert!(
        report.contains("The cache ") && report.contains("constant") && report.contains("Drafts</b>: early-exit:1")
    );
    for outside in ["src=", "href=", "url(", "@import"] {
        assert!(!report.contains(outside), "{outside}");
    }
}

#[test]
fn latency_curves_refuses_what_cannot_be() {
    let tiny = path("hf-tiny");
    let with = |args: &[&str]| failure("latency_curves", &[&["--model", &tiny][..], args].concat());
    assert!(with(&["--prompt-lengths", "60", "--output-length", "6"]).contains("positions, the model has 64"));
    assert!(with(&["--prompt-lengths", "0"]).contains("1.."));
    assert!(
        with(&["--naive-steps", "1"]).contains("2.."),
        "between the first and the last step the others are interpolated"
    );
    assert!(with(&["--device", "flex,abacus"]).contains("abacus"));
    let short = ["--prompt-lengths", "8", "--output-lengths", "8", "--prompt-length", "4", "--output-length", "4"];
    assert!(with(&[&short[..], &["--draft", "early-exit:9"]].concat()).contains("1 to 2"));
    assert!(with(&[&short[..], &["--draft", "embedded"]].concat()).contains("vocabulary"));
    assert!(with(&["--draft-len", "0"]).contains("at least 1"));
    assert!(failure("latency_curves", &["--config", "gpt3"]).contains("gpt2-xl"));
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
        ("generate", "--keep-generated", &["--keep-generated"]),
        ("generate", "--keep-generated", &["--prefix-cache", "off", "--keep-generated"]),
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
        ("latency_curves", "--draft", &["--decoders", "naive,kv", "--draft", "ngram"]),
        ("latency_curves", "--draft-len", &["--preset", "full", "--draft-len", "2"]),
        ("latency_curves", "--acceptance", &["--acceptance", "match"]),
        ("latency_curves", "--naive-steps", &["--decoders", "kv", "--naive-steps", "4"]),
        ("latency_curves", "--cache-dtype", &["--decoders", "naive", "--cache-dtype", "f16"]),
        ("latency_curves", "--tokenizer", &["--preset", "medium", "--tokenizer", "x"]),
        ("latency_curves", "--fast-f32", &["--fast-f32"]),
        ("shared_prefix", "--out_dir", &["--out_dir=x"]),
        ("shared_prefix", "--fast-f32", &["--fast-f32"]),
        ("perplexity", "--tokenizer", &["--prompt-ids", "1,2", "--tokenizer", "x"]),
        ("perplexity", "--fast-f32", &["--prompt-ids", "1,2", "--fast-f32"]),
        ("inference_math", "--terms", &["--terms", "--json"]),
        ("inference_math", "--head", &["--count", "all", "--head"]),
        ("inference_math", "--hardware", &["--hardware=t4", "--bandwidth=1", "--tflops=1", "--memory-limit=1GB"]),
        ("inference_math", "--text", &[off, "--text", text]),
        ("inference_math", "--text-tokens", &[off, "--text-tokens", "9"]),
        ("inference_math", "--draft", &[off, "--draft", "embedded"]),
        ("inference_math", "--model", &[off, "--model", "embedded"]),
        ("inference_math", "--init_from", &[off, "--init_from=embedded"]),
        ("inference_math", "--tokenizer", &[off, "--tokenizer", "x"]),
        ("inference_math", "--device", &[off, "--device", "flex"]),
        ("inference_math", "--dtype", &[off, "--dtype", "f16"]),
        ("inference_math", "--kernels", &[off, "--kernels", "on"]),
        ("inference_math", "--threads", &[off, "--threads", "1"]),
        ("train", "--distill-weight", &["--text", text, "--out", out, "--distill-weight", "1"]),
        ("train", "--vocab-size", &["--text", text, "--out", out, "--distill", target, "--vocab-size", "300"]),
    ];
    for (name, flag, args) in cases {
        let message = failure(name, args);
        let first = message.lines().next().unwrap_or_default();
        let is_named = [" ", ":", "'"].iter().any(|end| first.contains(&format!("{flag}{end}")));
        assert!(first.starts_with("error: ") && is_named, "{name} {args:?}: {message}");
    }
    // A model that is named is not replaced by random weights: its context is too short for these lengths.
    for model in ["--model=embedded", "--init_from=embedded"] {
        let message = failure("latency_curves", &["--preset", "full", model, "--out", out]);
        assert!(message.contains("the model has 512"), "{message}");
    }
    // What has an effect stays allowed.
    let draft = ["--decoder", "speculative", "--draft-len", "2", "--acceptance", "match", "--cache", "growing"];
    let output = json("generate", &[&draft[..], &["--max-new-tokens", "3", "ROMEO:"]].concat());
    assert_eq!(output["stats"]["speculation"]["draft"], "model");
    json("compare", &["--mode", "latency", "--draft-len", "2", "--prompt-length", "4", "--max-new-tokens", "4"]);
}

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
fn prompts_that_begin_alike_are_computed_once() {
    let model = path("hf-tiny");
    let fixed = ["--model", &model, "--temperature", "0", "--max-new-tokens", "4"];
    let prompts = ["--prompt-ids", "1,2,3,4,5", "--prompt-ids", "1,2,3,9", "--prompt-ids", "1,2,3,9"];
    let with = |flags: &[&str]| {
        let output = json("generate", &[&fixed[..], &prompts, flags].concat());
        let stats = &output["stats"];
        let [computed, reused, all] =
            ["computed_prompt_tokens", "reused_prompt_tokens", "prompt_tokens"].map(|key| stats[key].as_u64().unwrap());
        assert_eq!(computed + reused, all);
        let ids = |completion: &Value| completion["ids"].clone();
        (computed, output["completions"].as_array().unwrap().iter().map(ids).collect::<Vec<_>>())
    };
    let (all, expected) = with(&[]);
    assert_eq!(all, 13);
    for (flags, computed) in [
        (&["--prefix-cache", "off"][..], 13),
        (&["--prefix-cache", "exact"], 5 + 4),
        (&["--prefix-cache", "radix"], 5 + 1),
        (&["--prefix-cache"], 5 + 1),
        (&["--prefix-cache", "--cache", "growing", "--kernels", "off"], 5 + 1),
        (&["--prefix-cache", "--decoder", "speculative", "--draft", "ngram"], 5 + 1),
    ] {
        assert_eq!(with(flags), (computed, expected.clone()), "{flags:?}");
    }

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prefixes");
    let file = file.to_str().unwrap();
    assert_eq!(with(&["--prefix-cache-file", file]), (5 + 1, expected.clone()));
    assert_eq!(with(&["--prefix-cache-file", file]), (2, expected.clone()), "the last token of each");
    assert_eq!(with(&["--prefix-cache-file", file, "--prefix-cache-mb", "0"]).0, 5 + 1);
    // That run saved what it had, which was nothing.
    assert_eq!(with(&["--prefix-cache-file", file, "--prefix-cache", "exact", "--keep-generated"]).0, 5 + 4);
    let next: Vec<u32> = serde_json::from_value(expected[0].clone()).unwrap();
    let next = list(&[&[1, 2, 3, 4, 5], &next[..], &[7]].concat());
    let args = [&fixed[..], &["--prompt-ids", &next, "--prefix-cache-file", file]].concat();
    assert_eq!(json("generate", &args)["stats"]["computed_prompt_tokens"].as_u64(), Some(2));

    let refused = |flags: &[&str]| failure("generate", &[&fixed[..], &prompts, flags].concat());
    assert!(refused(&["--prefix-cache", "off", "--prefix-cache-file", file]).contains("leaves nothing"));
    assert!(refused(&["--prefix-cache", "--decoder", "naive"]).contains("got naive"));
    let before = std::fs::read(file).unwrap();
    let other =
        failure("generate", &["--model", &path("hf-tiny-untied"), "--prompt-ids", "1", "--prefix-cache-file", file]);
    assert!(other.contains("another model") && other.trim_end().lines().count() == 1, "{other}");
    assert!(std::fs::read(file).unwrap() == before, "a file of another model is not written over");
    // The bare flag may stand before a prompt.
    let text = text("generate", &["--temperature", "0", "--max-new-tokens", "3", "--prefix-cache", "ROMEO:"]);
    assert!(text.starts_with("ROMEO:"));
}

#[test]
fn shared_prefix_reports_every_case_and_draws_it() {
    let folder = tempfile::tempdir().unwrap();
    let chart = folder.path().join("chart.svg");
    let sweep = ["--prompts", "1,3", "--shared-tokens", "0,20", "--own-tokens", "4", "--max-new-tokens", "3"];
    let sweep = [&sweep[..], &["--num-samples", "1", "--chart", chart.to_str().unwrap()]].concat();
    let rows = json("shared_prefix", &sweep);
    let rows = rows.as_array().unwrap();
    let cases: Vec<[u64; 4]> = rows
        .iter()
        .map(|row| {
            ["prompts", "shared_tokens", "requested_prompt_tokens", "computed_prompt_tokens"]
                .map(|key| row[key].as_u64().unwrap())
        })
        .collect();
    assert_eq!(cases[..2], [[1, 0, 4, 4], [1, 20, 24, 24]]);
    // What the prompts share by chance is computed once as well.
    assert!(cases[2][..3] == [3, 0, 12] && cases[2][3] <= 12 && cases[3][..3] == [3, 20, 72] && cases[3][3] <= 32);
    for row in rows {
        assert_eq!(row["equal"].as_bool(), Some(true));
        assert!(
            row["ttft_seconds_without"].as_f64().unwrap() > 0.0 && row["ttft_seconds_with"].as_f64().unwrap() > 0.0
        );
        assert_eq!(row.as_object().unwrap().len(), 7);
    }
    let svg = std::fs::read_to_string(chart).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("3 prompts") && svg.contains("dashed: ideal"));

    let printed =
        text("shared_prefix", &["--prompts", "2", "--shared-tokens", "8", "--own-tokens", "2", "--num-samples", "1"]);
    assert!(printed.contains("The outputs are equal") && printed.contains("| prompts |"), "{printed}");
    assert!(failure("shared_prefix", &["--shared-tokens", "600"]).contains("the model has 512"));
    assert!(failure("shared_prefix", &["--prompts", "0"]).contains("1.."));
    assert!(failure("shared_prefix", &["--config", "gpt3"]).contains("gpt2-xl"));
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
    let printed = text("embed", &short);
    let [before, after] = accuracies(&printed);
    assert!((35.0..65.0).contains(&before) && after > before + 15.0, "{printed}");
    assert!(printed.contains("the text that it was before"), "{printed}");
    assert_eq!(text("embed", &short), printed, "a seed repeats");

    let thawed = text("embed", &["--thaw", "--steps", "15"]);
    let [before, after] = accuracies(&thawed);
    assert!(after > before + 10.0 && thawed.contains("another text than before"), "{thawed}");

    let untrained = text("embed", &["--steps", "0"]);
    let [before, after] = accuracies(&untrained);
    assert!((before - after).abs() < 0.2, "{untrained}");
    assert!(failure("embed", &["--batch-size", "0"]).contains("1.."));
    assert!(failure("embed", &["--batch-size", "99999999999999999"]).contains("lines is more than the 1916 that"));
    assert!(failure("embed", &["--device", "abacus"]).contains("abacus"));
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
            let output = run(name, &[device]);
            assert_eq!(output.status.code(), Some(1), "{name} {device}");
            assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("error: {error}\n"));
        }
    }
}
