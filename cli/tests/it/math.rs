//! `gpt2 math`.

use crate::{failure, json, path, text};

#[test]
fn inference_math_answers_the_assignment() {
    let output = json("math", &["--temperatures", "off"]);
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

    let printed = text("math", &["--text-tokens", "300", "--terms"]);
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
    let output = json("math", &[&off[..], &shape, &more].concat());
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
        (&["--max-drafted", "18446744073709551615"], "10000"),
        (&["--tflops", "nan"], "positive"),
    ] {
        let message = failure("math", args);
        assert!(message.contains(part), "{args:?}: {message}");
    }
    assert!(failure("math", &["--temperatures=-1"]).contains("temperature = -1"));
    assert!(failure("math", &["--text-tokens", "1"]).contains("at least 2"));
}
