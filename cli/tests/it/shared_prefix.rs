//! `gpt2 shared-prefix`.

use crate::{failure, json, text};

#[test]
fn shared_prefix_reports_every_case_and_draws_it() {
    let folder = tempfile::tempdir().unwrap();
    let chart = folder.path().join("chart.svg");
    let sweep = ["--prompts", "1,3", "--shared-tokens", "0,20", "--own-tokens", "4", "--max-new-tokens", "3"];
    let sweep = [&sweep[..], &["--num-samples", "1", "--chart", chart.to_str().unwrap()]].concat();
    let rows = json("shared-prefix", &sweep);
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
        text("shared-prefix", &["--prompts", "2", "--shared-tokens", "8", "--own-tokens", "2", "--num-samples", "1"]);
    assert!(printed.contains("The outputs are equal") && printed.contains("| prompts |"), "{printed}");
    assert!(failure("shared-prefix", &["--shared-tokens", "600"]).contains("the model has 512"));
    assert!(failure("shared-prefix", &["--prompts", "0"]).contains("1.."));
    assert!(failure("shared-prefix", &["--config", "gpt3"]).contains("gpt2-xl"));
}
