//! nanoGPT's `ckpt.pt`: `{"model": weights, "model_args": shape, ...}`.

use std::path::Path;

use pytorch_reader::PytorchReader;
use serde::Deserialize;

use super::Checkpoint;
use super::names::Layout;
use super::pytorch::{PytorchSource, parsed};
use crate::{Activation, Gpt2Config, Result};

/// The constructor arguments of nanoGPT's `GPTConfig`.
#[derive(Deserialize)]
struct ModelArgs {
    n_layer: usize,
    n_head: usize,
    n_embd: usize,
    block_size: usize,
    #[serde(default = "yes")]
    bias: bool,
    vocab_size: usize,
    #[serde(default)]
    dropout: f64,
}

fn yes() -> bool {
    true
}

/// Opens a nanoGPT checkpoint.
pub fn open(path: &Path) -> Result<Checkpoint> {
    let args: ModelArgs = parsed(path, || PytorchReader::load_config(path, Some("model_args")))?;
    let config = Gpt2Config {
        vocab_size: args.vocab_size,
        n_positions: args.block_size,
        n_embd: args.n_embd,
        n_layer: args.n_layer,
        n_head: args.n_head,
        activation_function: Activation::GeluErf,
        bias: args.bias,
        embd_pdrop: args.dropout,
        attn_pdrop: args.dropout,
        resid_pdrop: args.dropout,
        ..Gpt2Config::default()
    };
    config.validate()?;
    Ok(Checkpoint {
        config,
        source: Box::new(PytorchSource::open(path, Some("model"))?),
        layout: Layout::NanoGpt,
        folder: path.parent().map(Path::to_owned),
    })
}
