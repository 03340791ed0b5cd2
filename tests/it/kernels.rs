//! A packed model computes the same, with the same bits whatever it is computed with.

use crate::common::{
    self, DECODERS, Expected, STORAGES, device, greedy, ids_of, load, logits_of, random_model, rows, small_config,
};
use gpt2_burn::burn::module::Module;
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::checkpoint::SaveOptions;
use gpt2_burn::generate::Generator;
use gpt2_burn::{
    Activation, CacheStorage, Checkpoint, Error, Gpt2, Gpt2Config, Logits, Threads, TokenBatch, WeightFormat,
};
use proptest::prelude::*;

fn packed(model: &Gpt2, format: WeightFormat) -> Gpt2 {
    let model = model.clone().pack(format).unwrap();
    assert!(model.is_packed());
    model
}

fn largest_difference(left: &[Vec<f32>], right: &[Vec<f32>]) -> f32 {
    assert_eq!(left.len(), right.len());
    let pairs = left.iter().flatten().zip(right.iter().flatten());
    pairs.map(|(left, right)| (left - right).abs()).fold(0.0, f32::max)
}

#[test]
fn recorded_logits_losses_and_greedy_ids_are_met() {
    for name in ["hf-tiny", "hf-tiny-untied"] {
        let expected = Expected::read(&format!("{name}/expected.json"));
        let model = packed(&load(common::fixture(name)), WeightFormat::F32);
        let (logit, loss) = expected.differences(&model);
        assert!(logit < 1e-4 && loss < 1e-5, "{name}: {logit}, {loss}");
        for decoder in DECODERS {
            let generator = Generator::new(model.clone()).with_decoder(decoder.clone());
            assert_eq!(ids_of(&generator, &greedy(&expected.prompts, 24)), expected.greedy, "{name}, {decoder}");
        }
    }
}

#[test]
fn halves_are_met_within_their_precision() {
    let expected = Expected::read("hf-tiny/expected.json");
    let model = load(common::fixture("hf-tiny"));
    for (format, within) in [(WeightFormat::F16, 6e-3), (WeightFormat::Bf16, 5e-2)] {
        let (logit, _) = expected.differences(&packed(&model, format));
        assert!(logit > 0.0 && logit < within, "{format:?}: {logit}");
    }
    // A file in half precision, computed in f32.
    let half = packed(&load(common::fixture("hf-tiny-f16")), WeightFormat::F32);
    assert!(expected.differences(&half).0 < 6e-3);
}

#[test]
fn eight_bits_are_near_and_the_same_bits_from_every_decoder() {
    for tie_word_embeddings in [true, false] {
        // Wide enough for several groups of weights, the last of them short.
        let model = random_model(Gpt2Config { n_embd: 144, n_positions: 64, tie_word_embeddings, ..small_config() });
        let fast = packed(&model, WeightFormat::Int8);
        let text: Vec<u32> = (0..30).map(|n| (n * 7 + n * n) % 61).collect();
        let (logits, expected) = (logits_of(&fast, &text), logits_of(&model, &text));
        let spread = expected.iter().flatten().fold(0.0_f32, |max, x| max.max(x.abs()));
        let difference = largest_difference(&logits, &expected);
        assert!(difference > 0.0 && difference < 0.05 * spread, "{difference} of {spread}");

        let request = greedy(&[text[..20].to_vec(), text[..3].to_vec(), text[..9].to_vec()], 30);
        let outputs = DECODERS.map(|decoder| {
            let request = gpt2_burn::generate::GenerateRequest { logprobs: Some(2), ..request.clone() };
            Generator::new(fast.clone()).with_decoder(decoder).complete(&request).unwrap().completions
        });
        assert!(outputs[1] == outputs[0] && outputs[2] == outputs[0]);
    }
}

#[test]
fn a_model_packed_as_it_is_read_is_the_model_packed_afterwards() {
    let formats = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16, WeightFormat::Int8];
    let files = ["hf-tiny", "hf-tiny-untied", "hf-tiny-f16", "hf-tiny-sharded", "hf-tiny-bin", "nanogpt-tiny.pt"];
    for (file, format) in files.into_iter().flat_map(|file| formats.map(|format| (file, format))) {
        let checkpoint = Checkpoint::open(common::fixture(file)).unwrap();
        let as_read = checkpoint.load_packed(&device(), format).unwrap();
        assert!(as_read.is_packed());
        let afterwards = packed(&load(common::fixture(file)), format);
        let bits = |model: &Gpt2| -> Vec<u32> {
            logits_of(model, &[1, 2, 3, 4, 5]).iter().flatten().map(|x| x.to_bits()).collect()
        };
        assert_eq!(bits(&as_read), bits(&afterwards), "{file}, {format:?}");
    }
}

#[test]
fn eight_bits_without_kernels_are_an_error() {
    let device = device().autodiff();
    let error = small_config().init(&device).unwrap().pack(WeightFormat::Int8).unwrap_err();
    assert!(matches!(&error, Error::Device(_)) && error.to_string().contains("Int8"), "{error}");
    let checkpoint = Checkpoint::open(common::fixture("hf-tiny")).unwrap();
    let error = checkpoint.load_packed(&device, WeightFormat::Int8).unwrap_err();
    assert!(matches!(error, Error::Device(_)), "{error}");
    assert!(!checkpoint.load_packed(&device, WeightFormat::F32).unwrap().is_packed());
}

fn config() -> impl Strategy<Value = Gpt2Config> {
    let sizes = (1_usize..4, 1_usize..5, 1_usize..40, 1_usize..100);
    let switches = (any::<bool>(), any::<bool>(), any::<bool>());
    (sizes, switches).prop_map(|((n_layer, n_head, head_dim, vocab_size), (bias, tie_word_embeddings, erf))| {
        let activation_function = if erf { Activation::GeluErf } else { Activation::GeluTanh };
        let n_embd = n_head * head_dim;
        Gpt2Config {
            n_layer,
            n_head,
            n_embd,
            vocab_size,
            bias,
            tie_word_embeddings,
            activation_function,
            ..small_config()
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn kernels_compute_what_burns_operations_do(
        config in config(),
        texts in proptest::collection::vec(proptest::collection::vec(any::<u32>(), 2..24), 1..4),
        cut in any::<usize>(),
    ) {
        let model = random_model(config.clone());
        let fast = packed(&model, WeightFormat::F32);
        let id = |id: &u32| id % config.vocab_size as u32;
        let texts: Vec<Vec<u32>> = texts.iter().map(|text| text.iter().map(id).collect()).collect();
        let expected: Vec<_> = texts.iter().map(|text| logits_of(&model, text)).collect();
        for (storage, dtype) in STORAGES.map(|storage| (storage, DType::F32)).into_iter().chain([(STORAGES[2], DType::F16)]) {
            let cache = gpt2_burn::KvCacheConfig::new(texts.len(), 24).with_storage(storage).with_dtype(dtype);
            let mut cache = cache.init(&config, &device()).unwrap();
            // Rows of unequal length, in two forwards.
            let cuts: Vec<usize> = texts.iter().map(|text| 1 + cut % (text.len() - 1)).collect();
            for (from, to) in [(vec![0; texts.len()], cuts.clone()), (cuts, texts.iter().map(Vec::len).collect())] {
                let new: Vec<&[u32]> = (0..texts.len()).map(|row| &texts[row][from[row]..to[row]]).collect();
                let tokens = TokenBatch::new(&new, &fast).unwrap();
                let logits = rows(fast.forward(&tokens, &mut cache, Logits::Last).unwrap());
                let expected: Vec<_> = (0..texts.len()).map(|row| expected[row][to[row] - 1].clone()).collect();
                let within = if dtype == DType::F32 { 2e-4 } else { 5e-1 };
                let difference = largest_difference(&logits, &expected);
                prop_assert!(difference < within, "{storage:?}, {dtype:?}: {difference}");
                if dtype == DType::F32 {
                    // Alone and at once, to the last bit.
                    for (row, text) in texts.iter().enumerate() {
                        let alone = logits_of(&fast, &text[..to[row]]).pop().unwrap();
                        let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                        prop_assert_eq!(bits(&alone), bits(&logits[row]), "row {}", row);
                    }
                }
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let config = Gpt2Config { vocab_size: 3_000, n_positions: 80, n_embd: 256, n_head: 4, ..small_config() };
    let model = packed(&random_model(config), WeightFormat::F32);
    let text: Vec<u32> = (0..70).map(|n| (n * n * 31 + n * 7) % 3_000).collect();
    let bits = || -> Vec<u32> { logits_of(&model, &text).iter().flatten().map(|x| x.to_bits()).collect() };
    let expected = bits();
    for threads in [1, 2, 3, 8] {
        assert!(Threads::new(threads).unwrap().install(bits) == expected, "{threads} threads");
    }
    let request = greedy(&[text[..30].to_vec(), text[..7].to_vec()], 40);
    let outputs = DECODERS.map(|decoder| {
        let request = gpt2_burn::generate::GenerateRequest { logprobs: Some(2), ..request.clone() };
        Generator::new(model.clone()).with_decoder(decoder).complete(&request).unwrap().completions
    });
    assert!(outputs[1] == outputs[0] && outputs[2] == outputs[0]);
}

#[test]
fn a_packed_model_is_not_changed_any_more() {
    let model = random_model(small_config());
    let fast = packed(&model, WeightFormat::F16);
    assert_eq!(fast.dtype(), DType::F32, "of what is computed");
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(fast.save(folder.path(), SaveOptions::default()), Err(Error::Packed { .. })));
    assert!(matches!(fast.clone().cast(DType::F16), Err(Error::Packed { .. })));
    assert!(matches!(fast.clone().pack(WeightFormat::F32), Err(Error::Packed { .. })));
    assert!(fast.with_determinism(true).is_ok());
    assert!(!model.is_packed() && model.num_params() == model.config().num_params(), "a clone is as it was");
}

#[test]
fn a_packed_model_that_is_moved_to_train_is_an_error() {
    for tie_word_embeddings in [true, false] {
        let model = random_model(Gpt2Config { tie_word_embeddings, ..small_config() });
        let moved = packed(&model, WeightFormat::F32).train();
        let tokens = TokenBatch::new(&[[1_u32, 2]], &moved).unwrap();
        let mut cache = moved.cache(CacheStorage::Growing, 1, 8).unwrap();
        let error = moved.forward(&tokens, &mut cache, Logits::All).unwrap_err();
        assert!(matches!(error, Error::Packed { .. }), "{error}");
    }
    let model = packed(&random_model(small_config()), WeightFormat::F32);
    let hidden = gpt2_burn::burn::tensor::Tensor::<2>::zeros([1, 24], (&device(), DType::F16));
    assert!(matches!(model.head(hidden), Err(Error::Mismatch { .. })));
}

#[test]
fn a_model_that_trains_is_only_cast() {
    let config = small_config();
    let model = config.init(&device().autodiff()).unwrap().pack(WeightFormat::F32).unwrap();
    assert!(!model.is_packed());
    assert_eq!(logits_of(&model, &[1, 2, 3])[0].len(), config.vocab_size);
    let mut cache = model.cache(CacheStorage::Growing, 1, 8).unwrap();
    let tokens = TokenBatch::new(&[[1_u32, 2]], &model).unwrap();
    let grads = model.forward(&tokens, &mut cache, Logits::All).unwrap().sum().backward();
    assert!(model.wte.weight.grad(&grads).is_some());
}

/// More rows than go through all layers at once, of unequal length: chunk after chunk, to the same bits as each row by itself.
#[test]
fn prompts_that_are_computed_in_chunks_are_the_same() {
    let model = packed(&random_model(small_config()), WeightFormat::F32);
    let prompts: Vec<Vec<u32>> =
        (0..60).map(|row| (0..14 + row % 11).map(|n| (row * 7 + n * 5) % 61).collect()).collect();
    let max = gpt2_burn::backends::max_rows(&device(), 72).unwrap();
    assert!(prompts.len() * 14 > max, "they would fit at once");
    let mut cache = model.cache(CacheStorage::Preallocated, prompts.len(), 24).unwrap();
    let logits = model.forward(&TokenBatch::new(&prompts, &model).unwrap(), &mut cache, Logits::All).unwrap();
    let logits = rows(logits);
    let mut first = 0;
    for (row, ids) in prompts.iter().enumerate() {
        assert_eq!(cache.len(row), ids.len());
        assert_eq!(logits[first..first + ids.len()], logits_of(&model, ids), "row {row}");
        first += ids.len();
    }
}

/// The last layer computes no more of a token that nobody reads than its keys and values.
#[test]
fn logits_that_are_not_wanted_change_no_bit_of_those_that_are() {
    // Queries end in the midst of a tile of the packed matrix, or where one does.
    for (n_embd, format) in [(24, WeightFormat::F32), (64, WeightFormat::F32), (64, WeightFormat::Int8)] {
        let config = Gpt2Config { n_positions: 700, n_embd, n_head: 4, ..small_config() };
        check_wanted(&packed(&random_model(config), format));
    }
}

fn check_wanted(model: &Gpt2) {
    // More tokens than a chunk has: what is wanted of a row may begin in one and end in another.
    let prompts: Vec<Vec<u32>> = [600, 1, 37, 2, 5].map(|len| (0..len).map(|n| (n * n + len) % 61).collect()).to_vec();
    let tokens = TokenBatch::new(&prompts, model).unwrap();
    let forward = |logits: Logits<'_>| {
        let mut cache = model.cache(CacheStorage::Preallocated, prompts.len(), 700).unwrap();
        let first = rows(model.forward(&tokens, &mut cache, logits).unwrap());
        // What later tokens see is the same too.
        let next = TokenBatch::new(&vec![[7_u32]; prompts.len()], model).unwrap();
        (first, rows(model.forward(&next, &mut cache, Logits::Last).unwrap()))
    };
    let (all, next) = forward(Logits::All);
    for counts in [[1, 1, 1, 1, 1], [300, 0, 37, 0, 2], [0, 0, 0, 0, 5], [600, 1, 0, 2, 5]] {
        let (some, then) = forward(Logits::Counts(&counts));
        let mut end = 0;
        let wanted = prompts.iter().zip(counts).flat_map(|(prompt, count)| {
            end += prompt.len();
            end - count..end
        });
        let wanted: Vec<Vec<f32>> = wanted.map(|token| all[token].clone()).collect();
        assert!(some == wanted && then == next, "{counts:?}");
    }
}
