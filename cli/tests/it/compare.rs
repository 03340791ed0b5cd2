//! `gpt2 compare`.

use serde_json::Value;

use crate::{failure, json, path, positions, text};

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
            // 2 x layers x rows x (prompt + new - 1) x width x 4 bytes, in pages; a growing cache has those that it
            // copies from, too.
            let times = match row["decoder"].as_str() {
                Some("naive") => 0,
                Some("kv-growing") if positions(12) > 12 => 2,
                _ => 1,
            };
            assert_eq!(figure("kv_bytes"), (times * 2 * 2 * 3 * positions(12) * 32 * 4) as f64);
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
fn compare_takes_prompts_of_unequal_length() {
    let fixed =
        ["--batch-size", "4", "--prompt-length", "40", "--max-new-tokens", "4", "--num-samples", "1", "--ragged"];
    let rows = json("compare", &fixed);
    for row in rows.as_array().unwrap() {
        assert_eq!((row["equal"].as_bool(), row["ties"].as_u64()), (Some(true), Some(0)), "{row}");
        assert_eq!(
            (row["prompt_tokens"].as_u64(), row["all_prompt_tokens"].as_u64()),
            (Some(40), Some(16 + 24 + 32 + 40))
        );
        assert!(row["alone_seconds"].as_f64().unwrap() > 0.0);
    }
    let printed = text("compare", &fixed);
    assert!(printed.contains("prompt up to 40") && printed.contains("prompts of 112 tokens in all"), "{printed}");
    assert!(failure("compare", &["--mode", "latency", "--ragged"]).contains("--ragged has no effect"));
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
    for (agreement, least, max) in [("1", 1.0, 1.0), ("0.5", 0.2, 0.8), ("0", 0.0, 0.0)] {
        for more in [&[][..], &["--draft", "embedded", "--draft-len", "2"]] {
            let rows = json("compare", &[&two[..], &["--agreement", agreement], more].concat());
            let found = rows[1]["speculation"]["acceptance"].as_f64().unwrap();
            assert!((least..=max).contains(&found) && rows[1]["equal"] == true, "{agreement}: {found}");
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
fn compare_takes_prompts_that_begin_alike() {
    let fixed = ["--batch-size", "4", "--prompt-length", "40", "--max-new-tokens", "4", "--num-samples", "1"];
    let shared = [&fixed[..], &["--shared-tokens", "32", "--decoders", "naive,kv-preallocated,kv-paged"]].concat();
    let rows = json("compare", &[&shared[..], &["--model", &path("hf-tiny")]].concat());
    for row in rows.as_array().unwrap() {
        assert_eq!((row["equal"].as_bool(), row["shared_tokens"].as_u64()), (Some(true), Some(32)), "{row}");
        let pages = ["pages_used", "pages_shared", "pages_copied"].map(|name| row[name].as_u64().unwrap());
        let expected = match row["decoder"].as_str() {
            _ if positions(1) == 1 => [0; 3],
            // Two pages of 16 tokens for all, and another of each row.
            Some("kv-paged") => [2 + 4, 2, 0],
            Some("kv-preallocated") => [4 * 3, 0, 0],
            _ => [0; 3],
        };
        assert_eq!(pages, expected, "{row}");
    }
    assert_eq!(text("compare", &shared).contains("pages in use at most, of which rows share"), positions(1) > 1);
    let error = failure("compare", &[&fixed[..], &["--shared-tokens", "41"]].concat());
    assert!(error.contains("41 shared tokens of prompts of 40"), "{error}");
    let alone = ["--mode", "latency", "--shared-tokens", "3"];
    assert!(failure("compare", &alone).contains("--shared-tokens has no effect"));
}
