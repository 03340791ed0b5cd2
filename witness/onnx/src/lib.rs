#![doc = include_str!("../README.md")]

use burn::tensor::Device;

/// The graph of `hf-tiny.onnx`, as burn-onnx writes it down.
#[allow(missing_docs, clippy::all)] // generated
pub mod hf_tiny {
    include!(concat!(env!("OUT_DIR"), "/model/hf-tiny.rs"));
}

/// The graph with its weights: `forward` takes ids `[1, 5]` and gives logits `[1, 5, 96]`.
pub fn load(device: &Device) -> hf_tiny::Model {
    hf_tiny::Model::from_file(concat!(env!("OUT_DIR"), "/model/hf-tiny.bpk"), device)
}
