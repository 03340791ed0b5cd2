//! Really trained models and recorded intermediate values, where the data is present.

mod common;

use std::collections::HashMap;

use common::{DECODERS, device, greedy, ids_of, load, rows, shared_data};
use gpt2_burn::burn::tensor::{DType, Tensor, activation};
use gpt2_burn::generate::Generator;
use gpt2_burn::model::attention::{Segment, attend, scores};
use gpt2_burn::model::gelu;
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{Activation, CacheStorage, Checkpoint, Logits, TokenBatch};
use safetensors::SafeTensors;

#[test]
fn nano_sort_sorts_729_of_729() {
    let Some(path) = shared_data("nano-sort") else { return };
    let inputs: Vec<Vec<u32>> = (0..729).map(|n| (0..6).map(|digit| n / 3_u32.pow(digit) % 3).collect()).collect();
    let model = load(path);
    for decoder in DECODERS {
        let generator = Generator::new(model.clone()).with_decoder(decoder);
        let outputs = ids_of(&generator, &greedy(&inputs, 6));
        for (input, output) in inputs.iter().zip(&outputs) {
            let mut sorted = input.clone();
            sorted.sort_unstable();
            assert_eq!(output, &sorted, "{decoder}: {input:?}");
        }
    }
}

#[test]
fn adder_adds_10_000_of_10_000() {
    let Some(path) = shared_data("adder") else { return };
    let generator = Generator::new(load(path));
    let digits = |n: u32| [n / 10, n % 10];
    let prompts: Vec<Vec<u32>> = (0..10_000).map(|n| [digits(n / 100), digits(n % 100)].concat()).collect();
    for (chunk, prompts) in prompts.chunks(2500).enumerate() {
        for (index, sum) in ids_of(&generator, &greedy(prompts, 3)).into_iter().enumerate() {
            let n = (chunk * 2500 + index) as u32;
            let expected = n / 100 + n % 100;
            assert_eq!(sum, [expected % 10, expected / 10 % 10, expected / 100], "{} + {}", n / 100, n % 100);
        }
    }
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
    let Some(path) = shared_data("nano-sort") else { return };
    let bytes = std::fs::read(path.join("partials.safetensors")).unwrap();
    let mut recorded = Recorded::read(&bytes);
    let model = load(path);
    let (shape, ids) = recorded.tensors["idx"].clone();
    let [batch, time] = shape.try_into().unwrap();
    let ids: Vec<Vec<u32>> = ids.chunks(time).map(|row| row.iter().map(|&id| id as u32).collect()).collect();
    let tokens = TokenBatch::new(&ids, &model).unwrap();
    recorded.check("idx", &tokens.ids().clone().float());
    let width = model.config().n_embd;

    let token = model.wte.forward(tokens.ids().clone());
    recorded.check("tok_emb", &token);
    let positions = Tensor::arange(0..time as i64, &device()).reshape([1, time]);
    let position = model.wpe.forward(positions);
    recorded.check("pos_emb", &position);
    let mut x = (token + position).reshape([batch * time, width]);
    recorded.check("x", &x);

    let hidden = Tensor::<2>::ones([time, time], &device()).triu(1).greater_elem(0.5).reshape([1, 1, time, time]);
    let no_dropout = gpt2_burn::burn::nn::DropoutConfig::new(0.0).init();
    for (layer, block) in model.h.iter().enumerate() {
        let norm = block.ln_1.forward(x.clone());
        let [q, k, v] = block.attn.project(norm.clone(), batch);
        let scores = scores(q.clone(), k.clone(), Some(hidden.clone()));
        let weights = activation::softmax(scores.clone(), 3);
        let segment = Segment { keys: k.clone(), values: v.clone() };
        let y = attend(q.clone(), None, segment, Some(hidden.clone()), &no_dropout);
        let y = y.swap_dims(1, 2).reshape([batch * time, width]);
        let projected = block.attn.c_proj.forward(y.clone());
        let after_attention = x.clone() + projected.clone();
        let norm_2 = block.ln_2.forward(after_attention.clone());
        let up = block.mlp.c_fc.forward(norm_2.clone());
        let active = gelu(up.clone(), Activation::GeluTanh);
        let mlp = block.mlp.forward(norm_2.clone());
        x = after_attention.clone() + mlp.clone();
        recorded.check(&format!("block{layer}"), &x);
        if layer == 0 {
            recorded.check("ln1", &norm);
            recorded.check("qkv", &block.attn.c_attn.forward(norm));
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
    let mut cache = model.cache(CacheStorage::Preallocated, batch, time).unwrap();
    let logits = model.forward(&tokens, &mut cache, Logits::All).unwrap();
    recorded.check("lm_head", &logits);
    recorded.check("probs", &activation::softmax(logits, 2));

    let mut left: Vec<_> = recorded.tensors.keys().filter(|name| !recorded.checked.contains(name)).collect();
    left.sort_unstable();
    assert!(left.is_empty(), "recorded, and not checked: {left:?}");
}

#[test]
fn the_gpt2_tokenizer_gives_the_known_ids_and_survives_any_text() {
    let Some(path) = shared_data("gpt2-tokenizer") else { return };
    let tokenizer = Tokenizer::find(path).unwrap().unwrap();
    assert_eq!(tokenizer.vocab_size(), 50_257);
    let ids = tokenizer.encode("Hello, I'm a language model,").unwrap();
    assert_eq!(ids, [15496, 11, 314, 1101, 257, 3303, 2746, 11]);
    assert_eq!(tokenizer.encode("<|endoftext|>").unwrap(), [50_256]);

    let mut texts: Vec<String> = [
        "",
        " ",
        "\n\n\t ",
        "naïve café",
        "Привет, мир",
        "你好，世界",
        "こんにちは",
        "안녕하세요",
        "שלום",
        "مرحبا بالعالم",
        "नमस्ते",
        "👩‍👩‍👧‍👦🇨🇭🦀 é e\u{301}",
        "\u{0}\u{1}\u{7f}\u{85}\u{a0}\u{200b}\u{feff}\u{fffd}\u{10ffff}",
        "a\r\nb",
    ]
    .map(str::to_owned)
    .to_vec();
    texts.push((0..0x3000).filter_map(char::from_u32).collect());
    for text in texts {
        assert_round_trip(&tokenizer, &text);
    }
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    runner
        .run(&"[\\s\\S]{0,60}", |text| {
            assert_round_trip(&tokenizer, &text);
            Ok(())
        })
        .unwrap();
}

#[track_caller]
fn assert_round_trip(tokenizer: &Tokenizer, text: &str) {
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    let mut stream = tokenizer.stream();
    let pieces: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces + &stream.finish().unwrap(), text);
}

/// For a user who has the weights: `GPT2_BURN_GPT2=path/to/gpt2 cargo test --release --test shared_data`.
#[test]
fn the_real_gpt2_says_what_was_recorded() {
    let (Some(data), Some(folder)) = (shared_data("gpt2-124m-reference"), std::env::var_os("GPT2_BURN_GPT2")) else {
        return;
    };
    let checkpoint = Checkpoint::open(folder).unwrap();
    let model = checkpoint.load(&device(), DType::F32).unwrap();

    let bytes = std::fs::read(data.join("transformer_explainer_gpt2.safetensors")).unwrap();
    let recorded = Recorded::read(&bytes);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for example in 0..5 {
        let ids = file.tensor(&format!("ex{example}.token_ids")).unwrap();
        let ids: Vec<u32> = ids.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect();
        let logits = common::logits_of(&model, &ids).pop().unwrap();
        let (_, expected) = &recorded.tensors[&format!("ex{example}.last_logits")];
        let difference = logits.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 2e-2, "example {example}: logits differ by {difference}");
    }

    let text = std::fs::read_to_string(data.join("hf_and_rust_expected.json")).unwrap();
    let greedy_ids = serde_json::from_str::<serde_json::Value>(&text).unwrap()["greedy_ids"].clone();
    let ids = |key: &str| -> Vec<u32> { serde_json::from_value(greedy_ids[key].clone()).unwrap() };
    let (prompt, expected) = (ids("prompt_ids"), ids("expected"));
    let generator = Generator::new(model);
    let made = ids_of(&generator, &greedy(std::slice::from_ref(&prompt), expected.len() - prompt.len()));
    assert_eq!(made, [&expected[prompt.len()..]]);

    let text = std::fs::read_to_string(data.join("llmc_gpt2_124M_loss.json")).unwrap();
    let recorded: serde_json::Value = serde_json::from_str(&text).unwrap();
    let tokens: Vec<u32> = serde_json::from_value(recorded["tokens_257"].clone()).unwrap();
    let inputs: Vec<&[u32]> = tokens[..256].chunks(64).collect();
    let mut cache = generator.model().cache(CacheStorage::Growing, 4, 64).unwrap();
    let tokens_in = TokenBatch::new(&inputs, generator.model()).unwrap();
    let logits = rows(generator.model().forward(&tokens_in, &mut cache, Logits::All).unwrap());
    let loss = logits.iter().zip(&tokens[1..]).map(|(row, &id)| -gpt2_burn::sampling::log_softmax(row)[id as usize]);
    let loss = loss.sum::<f64>() / 256.0;
    let expected = recorded["expected_loss_step0"].as_f64().unwrap();
    assert!((loss - expected).abs() < 1e-2, "loss {loss}, recorded {expected}");
}
