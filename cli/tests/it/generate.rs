//! `gpt2 generate`.

use serde_json::Value;

use crate::{Expected, embedded_files, failure, json, list, path, positions, text};

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
    // 2 x layers x rows x (prompt + new - 1) x width x 4 bytes, in pages
    assert_eq!(stats["kv_bytes"].as_u64(), Some((2 * 2 * 4 * positions(7) * 32 * 4) as u64));
    let naive = json("generate", &["--model", &model, "--prompt-ids", "1", "--decoder", "naive"]);
    assert_eq!(naive["stats"]["kv_bytes"].as_u64(), Some(0));
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
    assert_eq!(all, 5 + 4, "equal ones are one in any case");
    for (flags, computed) in [
        (&["--prefix-cache", "off"][..], 5 + 4),
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
    assert_eq!(with(&["--prefix-cache-file", file, "--prefix-cache", "exact", "--cache-generated"]).0, 5 + 4);
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
