//! Really trained models and recorded intermediate values, where the data is present.

use crate::common::{self, DECODERS, device, greedy, ids_of, load, rows, shared_data, skipped};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::generate::Generator;
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{CacheStorage, Checkpoint, Logits, TokenBatch};
use safetensors::SafeTensors;

#[test]
fn nano_sort_sorts_729_of_729() {
    let Some(path) = shared_data("nano-sort") else { return };
    let inputs: Vec<Vec<u32>> = (0..729).map(|n| (0..6).map(|digit| n / 3_u32.pow(digit) % 3).collect()).collect();
    let model = load(path);
    for decoder in DECODERS {
        let generator = Generator::new(model.clone()).with_decoder(decoder.clone());
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

/// For a user who has the weights, beside the other data:
/// `GPT2_BURN_SHARED_DATA=path/to/data GPT2_BURN_GPT2=path/to/gpt2 cargo test --release -p gpt2-burn --test it shared_data`.
#[test]
fn the_real_gpt2_says_what_was_recorded() {
    let Some(data) = shared_data("gpt2-124m-reference") else { return };
    let Some(folder) = std::env::var_os("GPT2_BURN_GPT2") else { return skipped("GPT2_BURN_GPT2 is not set") };
    let checkpoint = Checkpoint::open(folder).unwrap();
    let model = checkpoint.load(&device(), DType::F32).unwrap();

    let bytes = std::fs::read(data.join("transformer_explainer_gpt2.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for example in 0..5 {
        let ids = file.tensor(&format!("ex{example}.token_ids")).unwrap();
        let ids: Vec<u32> = ids.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect();
        let logits = common::logits_of(&model, &ids).pop().unwrap();
        let expected = file.tensor(&format!("ex{example}.last_logits")).unwrap();
        let expected = expected.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
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
