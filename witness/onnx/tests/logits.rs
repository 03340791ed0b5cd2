//! The graph, the library and `transformers` say the same.

use std::path::{Path, PathBuf};

use gpt2_burn::burn::tensor::{DType, Device, Int, Tensor};
use gpt2_burn::{Checkpoint, Gpt2, Logits, TokenBatch};
use serde_json::Value;

/// The largest difference of two logits that are the same but for the order of sums.
const TOLERANCE: f32 = 1e-4;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/hf-tiny")
}

/// The first prompt, and the logits of its positions as they were recorded.
fn recorded() -> (Vec<u32>, Vec<f32>) {
    let text = std::fs::read_to_string(fixture().join("expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let logits: Vec<Vec<f32>> = serde_json::from_value(expected["logits"][0].clone()).unwrap();
    (serde_json::from_value(expected["prompts"][0].clone()).unwrap(), logits.concat())
}

fn device() -> Device {
    gpt2_burn::device("flex").unwrap()
}

fn of_graph(ids: &[u32]) -> Vec<f32> {
    let ids: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let ids = Tensor::<1, Int>::from_data(&ids[..], &device()).unsqueeze::<2>(); // [1, 5]
    values(gpt2_burn_onnx_witness::load(&device()).forward(ids))
}

fn of_library(ids: &[u32]) -> Vec<f32> {
    let model: Gpt2 = Checkpoint::open(fixture()).unwrap().load(&device(), DType::F32).unwrap();
    values(model.forward(&TokenBatch::new(&[ids], &model).unwrap(), None, Logits::All).unwrap())
}

fn values<const D: usize>(logits: Tensor<D>) -> Vec<f32> {
    logits.try_into_vec_as().unwrap()
}

#[track_caller]
fn difference(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max)
}

#[test]
fn the_logits_are_those_of_the_graph_and_of_transformers() {
    let (ids, recorded) = recorded();
    let (graph, library) = (of_graph(&ids), of_library(&ids));
    let found = [(&graph, &library), (&graph, &recorded), (&library, &recorded)].map(|(a, b)| difference(a, b));
    assert!(found.iter().all(|difference| *difference < TOLERANCE), "{found:?}");
}

#[test]
fn other_tokens_have_other_logits_and_the_graph_agrees_on_them_too() {
    let (ids, recorded) = recorded();
    let reversed: Vec<u32> = ids.iter().rev().copied().collect();
    let (graph, library) = (of_graph(&reversed), of_library(&reversed));
    assert!(difference(&graph, &library) < TOLERANCE);
    assert!(difference(&graph, &recorded) > 0.1, "the order of the tokens does not matter to the graph");
}
