//! `gpt2 curves`.

use serde_json::Value;

use crate::{failure, json, path, positions};

#[test]
fn latency_curves_measures_every_point_and_writes_a_report_that_needs_nothing_else() {
    let (tiny, out) = (path("hf-tiny"), tempfile::tempdir().unwrap());
    let folder = out.path().to_str().unwrap();
    let fixed =
        ["--model", &tiny, "--out", folder, "--num-samples", "2", "--prompt-length", "4", "--output-length", "3"];
    // The same device twice is one; naming a draft asks for the speculative decoder.
    let more = ["--device", "flex,flex", "--draft", "early-exit:1", "--draft-len", "2"];
    let along = ["--prompt-lengths", "16,4,8", "--output-lengths", "1,8,20", "--naive-steps", "5", "--batch-size", "2"];
    let sweeps = json("curves", &[&fixed[..], &more, &along].concat());
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
        // 2 x layers x rows x (prompt + new - 1) x width x 4 bytes, in pages
        let tokens = (figure("prompt_tokens") + figure("new_tokens") - 1.0) as usize;
        let kv = (2 * 2 * 2 * positions(tokens) * 32 * 4) as f64;
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
    let with = |args: &[&str]| failure("curves", &[&["--model", &tiny][..], args].concat());
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
    assert!(failure("curves", &["--config", "gpt3"]).contains("gpt2-xl"));
}
