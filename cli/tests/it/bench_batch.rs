//! `gpt2 bench-batch`.

use crate::{failure, text};

const SMALL: [&str; 8] = ["--requests", "5", "--prompt", "3:20", "--new", "1:6", "--step-tokens", "16"];

#[test]
fn bench_batch_serves_the_same_requests_in_both_ways() {
    for arrivals in [&[][..], &["--rate", "200"], &["--shared", "12", "--max-rows", "2"]] {
        let printed = text("bench-batch", &[&SMALL[..], arrivals, &["--json"]].concat());
        let lines: Vec<serde_json::Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let engines: Vec<&str> = lines.iter().map(|line| line["engine"].as_str().unwrap()).collect();
        assert_eq!(engines, ["gpt2-burn running", "gpt2-burn waiting"]);
        assert_eq!(lines[0]["new_tokens"], lines[1]["new_tokens"]);
        for line in &lines {
            assert_eq!((line["requests"].as_u64(), line.as_object().unwrap().len()), (Some(5), 16));
            for key in ["seconds", "tok_s", "ttft_p50", "ttft_p95", "tpot_p50", "tpot_p95"] {
                assert!(line[key].as_f64().unwrap() > 0.0, "{key}: {line}");
            }
            assert!(line["ttft_p50"].as_f64() <= line["ttft_p95"].as_f64());
        }
    }
    let printed = text("bench-batch", &SMALL);
    assert!(printed.contains("The outputs are equal") && printed.contains("TTFT p95"), "{printed}");
}

#[test]
fn bench_batch_refuses_what_makes_no_sense() {
    assert!(failure("bench-batch", &["--prompt", "600"]).contains("the model has 512"));
    assert!(failure("bench-batch", &["--prompt", "9:3"]).contains("9 is more than 3"));
    assert!(failure("bench-batch", &["--new", "0"]).contains("at least 1"));
    assert!(failure("bench-batch", &["--rate", "-1"]).contains("from 0 up"));
    assert!(failure("bench-batch", &["--requests", "0"]).contains("1.."));
}
