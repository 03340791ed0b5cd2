//! The module against recorded outputs of `transformers` and nanoGPT, through every layout that weights come in.

use crate::common::{DECODERS, Expected, device, fixture, greedy, ids_of, load};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::checkpoint::SaveOptions;
use gpt2_burn::generate::Generator;
use gpt2_burn::{Activation, Checkpoint, Gpt2, Gpt2Config};

const EXACT: (f32, f64) = (1e-4, 1e-5);

#[track_caller]
fn assert_matches(model: &Gpt2, expected: &Expected, (logit, loss): (f32, f64)) {
    let (logits, losses) = expected.differences(model);
    assert!(logits < logit && losses < loss, "logits differ by {logits}, losses by {losses}");
}

#[test]
fn logits_and_losses_are_those_of_transformers() {
    for name in ["hf-tiny", "hf-tiny-untied"] {
        let expected = Expected::read(&format!("{name}/expected.json"));
        assert_matches(&load(fixture(name)), &expected, EXACT);
    }
}

#[test]
fn greedy_ids_are_those_of_transformers_with_every_decoder_in_a_batch_and_alone() {
    for name in ["hf-tiny", "hf-tiny-untied"] {
        let expected = Expected::read(&format!("{name}/expected.json"));
        let mut model = Some(load(fixture(name)));
        for decoder in DECODERS {
            let generator = Generator::new(model.take().unwrap()).with_decoder(decoder.clone());
            assert_eq!(ids_of(&generator, &greedy(&expected.prompts, 24)), expected.greedy, "{name} {decoder}");
            for (prompt, ids) in expected.prompts.iter().zip(&expected.greedy) {
                let request = greedy(std::slice::from_ref(prompt), 24);
                assert_eq!(ids_of(&generator, &request), [ids.as_slice()], "{name} {decoder} alone");
            }
            model = Some(generator.model().clone());
        }
    }
}

#[test]
fn every_layout_of_the_same_weights_is_the_same_function() {
    let tied = Expected::read("hf-tiny/expected.json");
    assert_matches(&load(fixture("hf-tiny-bin")), &tied, EXACT);
    assert_matches(&load(fixture("hf-tiny-sharded")), &tied, EXACT);
    assert_matches(&load(fixture("hf-tiny-f16")), &tied, (1e-2, 1e-3));
    assert_matches(&load(fixture("hf-tiny-bf16")), &tied, (7e-2, 6e-3));
    let untied = Expected::read("hf-tiny-untied/expected.json");
    assert_matches(&load(fixture("hf-tiny-untied-bin")), &untied, EXACT);
}

#[test]
fn nanogpt_checkpoints_load_with_the_gelu_they_were_trained_with() {
    let erf = Expected::read("nanogpt-tiny.expected.json");
    assert_matches(&load(fixture("nanogpt-tiny.pt")), &erf, EXACT);

    // The same weights, said to have been trained with the tanh form, are hf-tiny.
    let mut checkpoint = Checkpoint::open(fixture("nanogpt-tiny.pt")).unwrap();
    checkpoint.config.activation_function = Activation::GeluTanh;
    let model = checkpoint.load(&device(), DType::F32).unwrap();
    assert_matches(&model, &Expected::read("hf-tiny/expected.json"), EXACT);

    let no_bias = load(fixture("nanogpt-nobias")); // a folder with a ckpt.pt
    assert!(!no_bias.config().bias);
    assert_matches(&no_bias, &Expected::read("nanogpt-nobias/expected.json"), EXACT);
}

#[test]
fn a_saved_model_loads_to_the_same_function() {
    let folder = tempfile::tempdir().unwrap();
    let sharded = Some(20_000);
    for (source, expected) in [
        ("hf-tiny", "hf-tiny/expected.json"),
        ("hf-tiny-untied", "hf-tiny-untied/expected.json"),
        ("nanogpt-nobias", "nanogpt-nobias/expected.json"),
    ] {
        let (model, expected) = (load(fixture(source)), Expected::read(expected));
        for (index, (dtype, max_shard_bytes, tolerance)) in [
            (DType::F32, None, EXACT),
            (DType::F32, sharded, EXACT),
            (DType::F16, None, (2e-2, 2e-3)),
            (DType::BF16, sharded, (2e-1, 2e-2)),
        ]
        .into_iter()
        .enumerate()
        {
            let path = folder.path().join(format!("{source}-{index}"));
            model.save(&path, SaveOptions { dtype, max_shard_bytes }).unwrap();
            assert_eq!(path.join("model.safetensors").exists(), max_shard_bytes.is_none());
            let again = load(&path);
            assert_matches(&again, &expected, tolerance);
            assert_eq!(again.config().eos_token_id, model.config().eos_token_id);
            assert!(again.config().bias);
        }
    }
}

#[test]
fn saving_again_in_another_form_leaves_nothing_of_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (load(fixture("hf-tiny")), load(fixture("hf-tiny-untied")));
    let expected = Expected::read("hf-tiny-untied/expected.json");
    let sharded = SaveOptions { max_shard_bytes: Some(20_000), ..SaveOptions::default() };
    for (before, after) in [(SaveOptions::default(), sharded), (sharded, SaveOptions::default())] {
        first.save(folder.path(), before).unwrap();
        second.save(folder.path(), after).unwrap();
        assert_matches(&load(folder.path()), &expected, EXACT);
        assert!(!folder.path().join(".saving").exists());
    }
}

#[test]
fn a_save_that_fails_leaves_the_old_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let expected = Expected::read("hf-tiny/expected.json");
    load(fixture("hf-tiny")).save(folder.path(), SaveOptions::default()).unwrap();
    // A folder where the weights are to be put together: they cannot be written.
    std::fs::create_dir_all(folder.path().join(".saving").join("model.safetensors").join("x")).unwrap();
    let other = load(fixture("hf-tiny-untied"));
    assert!(other.save(folder.path(), SaveOptions::default()).is_err());
    assert_matches(&load(folder.path()), &expected, EXACT);
}

#[test]
fn what_a_config_says_besides_is_kept_when_saving() {
    let folder = tempfile::tempdir().unwrap();
    load(fixture("hf-tiny")).save(folder.path(), SaveOptions::default()).unwrap();
    let config = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    let config = Gpt2Config::from_json(&config).unwrap();
    assert_eq!(config.extra["summary_type"], "cls_index");
    assert_eq!(config.extra["model_type"], "gpt2");
    assert_eq!(config.extra["dtype"], "float32");
}

#[test]
fn a_checkpoint_in_memory_is_one_in_a_folder() {
    let config = include_str!("../fixtures/hf-tiny/config.json");
    let weights = include_bytes!("../fixtures/hf-tiny/model.safetensors");
    let checkpoint = Checkpoint::from_bytes(config, weights).unwrap();
    assert!(checkpoint.tokenizer().unwrap().is_none());
    let model = checkpoint.load(&device(), DType::F32).unwrap();
    assert_matches(&model, &Expected::read("hf-tiny/expected.json"), EXACT);
}

#[test]
fn half_precision_weights_compute_nearly_the_same() {
    let expected = Expected::read("hf-tiny/expected.json");
    for (dtype, tolerance) in [(DType::F16, (5e-2, 1e-2)), (DType::BF16, (3e-1, 5e-2))] {
        let model = Checkpoint::open(fixture("hf-tiny")).unwrap().load(&device(), dtype).unwrap();
        assert_eq!(model.dtype(), dtype);
        assert_matches(&model, &expected, tolerance);
    }
}

#[test]
fn the_stand_in_model_says_what_transformers_says() {
    #[derive(serde::Deserialize)]
    struct Recorded {
        texts: Vec<String>,
        prompts: Vec<Vec<u32>>,
        greedy: Vec<Vec<u32>>,
    }
    let text = std::fs::read_to_string(fixture("byte-shakespeare/expected.json")).unwrap();
    let recorded: Recorded = serde_json::from_str(&text).unwrap();
    let checkpoint = Checkpoint::open(fixture("byte-shakespeare")).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap().unwrap();
    let prompts: Vec<_> = recorded.texts.iter().map(|text| tokenizer.encode(text).unwrap()).collect();
    assert_eq!(prompts, recorded.prompts);
    let generator = Generator::new(checkpoint.load(&device(), DType::F32).unwrap());
    assert_eq!(ids_of(&generator, &greedy(&prompts, 40)), recorded.greedy);
}
