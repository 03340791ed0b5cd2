//! `gpt2 train`: it repeats, and goes on where it was interrupted.

use std::fs;
use std::path::{Path, PathBuf};

use gpt2_burn::Checkpoint;
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::generate::{GenerateRequest, Generator, Stop};
use gpt2_burn::sampling::Sampling;
use serde_json::Value;

/// Text with something to learn in it.
fn text(folder: &Path) -> PathBuf {
    let lines = (0..400).map(|n| format!("ROMEO: number {n} is {} and not {}.\n", n % 7, n % 11));
    let path = folder.join("text.txt");
    fs::write(&path, lines.collect::<String>()).unwrap();
    path
}

fn train(text: &Path, out: &Path, more: &[&str]) {
    let small = "--n-layer 2 --n-head 2 --n-embd 16 --n-positions 16 --sequence-length 8 --long-interval 3 --long-from 40 --vocab-size 270 --batch-size 6 --steps 50 \
        --warmup 5 --attention-dropout 0.1 --learning-rate 0.01 --eval-interval 25 --checkpoint-interval 10";
    let files = ["--text", text.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let small: Vec<&str> = small.split_whitespace().collect();
    crate::text("train", &[&small[..], &files, more].concat());
}

fn log(out: &Path) -> Vec<Value> {
    let text = fs::read_to_string(out.join("log.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_run_repeats_and_an_interrupted_one_equals_one_that_was_not() {
    let folder = tempfile::tempdir().unwrap();
    let text = text(folder.path());
    let [whole, again, paused] = ["whole", "again", "paused"].map(|name| folder.path().join(name));
    train(&text, &whole, &[]);
    train(&text, &again, &[]);
    train(&text, &paused, &["--pause-at", "23"]);
    assert_eq!(log(&paused).len(), 23);
    // As if it had gone on and been killed: a step after the checkpoint, and killed again between two renames.
    let mut steps = fs::read_to_string(paused.join("log.jsonl")).unwrap();
    steps += "{\"step\":24,\"loss\":0.0}\n{\"ste";
    fs::write(paused.join("log.jsonl"), steps).unwrap();
    fs::rename(paused.join("checkpoint"), paused.join("checkpoint.old")).unwrap();
    train(&text, &paused, &[]);

    let expected = log(&whole);
    assert_eq!(expected.len(), 50);
    assert_eq!(log(&again), expected);
    assert_eq!(log(&paused), expected);
    for (step, line) in (1..).zip(&expected) {
        let shape = (line["sequences"].as_u64().unwrap(), line["sequence_length"].as_u64().unwrap());
        let long = step % 3 == 0 || step > 40;
        assert_eq!(shape, if long { (3, 16) } else { (6, 8) }, "step {step}");
    }
    let loss = |step: usize| expected[step]["loss"].as_f64().unwrap();
    assert!(loss(49) < 0.8 * loss(0), "{} became {}", loss(0), loss(49));
    assert!(expected[49]["validation_nats_per_byte"].as_f64().unwrap() > 0.0);
    for run in [&again, &paused] {
        assert_eq!(
            fs::read(run.join("model.safetensors")).unwrap(),
            fs::read(whole.join("model.safetensors")).unwrap()
        );
    }
}

#[test]
fn a_draft_learns_to_agree_with_its_target() {
    let folder = tempfile::tempdir().unwrap();
    let text = text(folder.path());
    let [target, draft] = ["target", "draft"].map(|name| folder.path().join(name));
    train(&text, &target, &[]);
    let distilled = ["--n-layer", "1", "--distill", target.to_str().unwrap()];
    train(&text, &draft, &distilled);
    let losses = log(&draft);
    let loss = |line: &Value| line["loss"].as_f64().unwrap();
    assert!(loss(&losses[49]) < loss(&losses[0]));
    // The loss is the mix that was asked for, of the text's and the target's.
    let first = |name: &str, weight: &str| {
        let out = folder.path().join(name);
        train(&text, &out, &[&distilled[..], &["--distill-weight", weight, "--pause-at", "1"]].concat());
        loss(&log(&out)[0])
    };
    let (of_text, of_target) = (first("text only", "0"), first("target only", "1"));
    assert!((of_text - of_target).abs() > 1e-3, "{of_text} and {of_target}");
    assert!((loss(&losses[0]) - 0.9 * of_target - 0.1 * of_text).abs() < 1e-5);
    let checkpoint = Checkpoint::open(&draft).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap().unwrap();
    assert_eq!(checkpoint.config.n_layer, 1);
    let device = gpt2_burn::device("flex").unwrap();
    let generator = Generator::new(checkpoint.load(&device, DType::F32).unwrap());
    let request = GenerateRequest {
        max_new_tokens: 5,
        sampling: Sampling::greedy(),
        stop: Stop { ignore_eos: true, ..Stop::default() },
        ..GenerateRequest::new([tokenizer.encode("ROMEO").unwrap()])
    };
    assert_eq!(generator.complete(&request).unwrap().completions[0].ids.len(), 5);
}
