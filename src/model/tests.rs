//! The parts of the module one by one.
#![cfg(all(feature = "flex", feature = "files"))]

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use burn::nn::DropoutConfig;
use burn::tensor::Device;
use safetensors::SafeTensors;

use super::attention::{attend, scores};
use super::gelu::gelu;
use super::*;
use crate::cache::States;
use crate::{Activation, Checkpoint};
use burn::tensor::activation;

fn device() -> Device {
    crate::device("flex").unwrap()
}

/// Recorded tensors by name.
struct Recorded {
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
    checked: Vec<String>,
}

impl Recorded {
    fn read(bytes: &[u8]) -> Self {
        let file = SafeTensors::deserialize(bytes).unwrap();
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            let values = view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            (name, (view.shape().to_vec(), values))
        });
        Self { tensors: tensors.collect(), checked: Vec::new() }
    }

    #[track_caller]
    fn check<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>) {
        let (shape, expected) = &self.tensors[name];
        let values = tensor.clone().try_into_vec_as::<f32>().unwrap();
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name} is {shape:?}, not {:?}", tensor.dims());
        for (index, (value, expected)) in values.iter().zip(expected).enumerate() {
            // What is hidden is minus infinity in both.
            let close = value == expected || (value - expected).abs() < 1e-5;
            assert!(close, "{name}[{index}] is {value}, recorded {expected}");
        }
        self.checked.push(name.to_owned());
    }
}

#[test]
fn nano_sort_computes_every_recorded_intermediate_tensor() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/nano-sort");
    if !path.exists() {
        // Not eprintln, which the test harness captures.
        let _ = writeln!(std::io::stderr(), "SKIPPED: nano-sort is not in ../shared/data");
        return;
    }
    let bytes = std::fs::read(path.join("partials.safetensors")).unwrap();
    let mut recorded = Recorded::read(&bytes);
    let model = Checkpoint::open(path).unwrap().load(&device(), DType::F32).unwrap();
    let (shape, ids) = recorded.tensors["idx"].clone();
    let [batch, time] = shape.try_into().unwrap();
    let ids: Vec<Vec<u32>> = ids.chunks(time).map(|row| row.iter().map(|&id| id as u32).collect()).collect();
    let tokens = TokenBatch::new(&ids, &model).unwrap();
    recorded.check("idx", &tokens.ids().clone().reshape([batch, time]).float());
    let width = model.config().n_embd;

    let token = model.wte.forward(tokens.ids().clone().reshape([batch, time]));
    recorded.check("tok_emb", &token);
    let positions = Tensor::arange(0..time as i64, &device()).reshape([1, time]);
    let position = model.wpe.forward(positions);
    recorded.check("pos_emb", &position);
    let mut x = (token + position).reshape([batch * time, width]);
    recorded.check("x", &x);

    let mask = Tensor::<2>::ones([time, time], &device()).triu(1).greater_elem(0.5).reshape([1, 1, time, time]);
    let no_dropout = DropoutConfig::new(0.0).init();
    for (layer, block) in model.h.iter().enumerate() {
        let norm = block.ln_1.forward(x.clone());
        let [q, k, v] = block.attn.project(norm.clone(), false).map(|packed| {
            let [_, heads, head_dim] = packed.dims();
            packed.reshape([batch, time, heads, head_dim]).swap_dims(1, 2)
        });
        let scores = scores(q.clone(), k.clone(), Some(mask.clone()));
        let weights = activation::softmax(scores.clone(), 3);
        let states = States { keys: k.clone(), values: v.clone() };
        let y = attend(q.clone(), states, Some(mask.clone()), &no_dropout);
        let y = y.swap_dims(1, 2).reshape([batch * time, width]);
        let projected = block.attn.c_proj.forward(y.clone(), false);
        let after_attention = x.clone() + projected.clone();
        let norm_2 = block.ln_2.forward(after_attention.clone());
        let up = block.mlp.c_fc.forward(norm_2.clone(), false);
        let active = gelu(up.clone(), Activation::GeluTanh);
        x = block.mlp.forward(norm_2.clone(), after_attention.clone(), false);
        let mlp = x.clone() - after_attention.clone();
        recorded.check(&format!("block{layer}"), &x);
        if layer == 0 {
            recorded.check("ln1", &norm);
            recorded.check("qkv", &block.attn.c_attn.forward(norm, false));
            recorded.check("q", &q);
            recorded.check("k", &k);
            recorded.check("v", &v);
            recorded.check("att", &scores);
            recorded.check("attSm", &weights);
            recorded.check("y", &y);
            recorded.check("yProj", &projected);
            recorded.check("attnResid", &after_attention);
            recorded.check("ln2", &norm_2);
            recorded.check("fc", &up);
            recorded.check("gelu", &active);
            recorded.check("mlp", &mlp);
            recorded.check("mlpResid", &x);
        }
    }
    recorded.check("ln_f", &model.ln_f.forward(x));
    let logits = model.forward(&tokens, None, Logits::All).unwrap();
    recorded.check("lm_head", &logits);
    recorded.check("probs", &activation::softmax(logits, 1));

    let mut left: Vec<_> = recorded.tensors.keys().filter(|name| !recorded.checked.contains(name)).collect();
    left.sort_unstable();
    assert!(left.is_empty(), "recorded, and not checked: {left:?}");
}
