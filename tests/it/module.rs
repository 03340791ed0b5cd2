//! The model is a burn module like any other: it trains, records and moves.

use crate::common::{device, fixture, greedy, ids_of, load, logits_of, random_model, rows, small_config};
use gpt2_burn::burn::module::Module;
use gpt2_burn::burn::nn::loss::CrossEntropyLossConfig;
use gpt2_burn::burn::optim::{AdamWConfig, GradientsParams};
use gpt2_burn::burn::store::ModuleRecord;
use gpt2_burn::burn::tensor::{Int, Tensor};
use gpt2_burn::generate::{Decoder, Generator};
use gpt2_burn::measure::logit_drift;
use gpt2_burn::speculative::{Draft, DraftLen, Scripted, Speculation};
use gpt2_burn::{CacheStorage, Error, Gpt2, Gpt2Config, Logits, TokenBatch};

fn is_send_and_sync<T: Send + Sync>(_: &T) {}

#[test]
fn parameters_are_counted_in_closed_form() {
    for config in
        [small_config(), Gpt2Config { tie_word_embeddings: false, bias: false, n_inner: Some(17), ..small_config() }]
    {
        let model = random_model(config.clone());
        is_send_and_sync(&model);
        assert_eq!(model.num_params(), config.num_params());
    }
    assert_eq!(load(fixture("hf-tiny")).num_params(), 30_592);
}

/// Loss of predicting each id from those before it.
fn loss(model: &Gpt2, ids: &[u32]) -> Tensor<1> {
    let (inputs, targets) = (&ids[..ids.len() - 1], &ids[1..]);
    let logits = model.forward(&TokenBatch::new(&[inputs], model).unwrap(), None, Logits::All).unwrap(); // [T, V]
    let targets = TokenBatch::new(&[targets], model).unwrap();
    CrossEntropyLossConfig::new().init(&model.device()).forward(logits, targets.ids().clone())
}

#[test]
fn a_few_steps_of_training_lower_the_loss() {
    let device = device().autodiff();
    let config = Gpt2Config { embd_pdrop: 0.0, attn_pdrop: 0.0, resid_pdrop: 0.0, ..small_config() };
    let mut model = config.init(&device).unwrap();
    let mut optimizer = AdamWConfig::new().init();
    let ids: Vec<u32> = (0..20).map(|n| n * n % 23).collect();
    let value = |model: &Gpt2| loss(model, &ids).into_scalar::<f32>();
    let before = value(&model);
    for _ in 0..30 {
        let grads = GradientsParams::from_grads(loss(&model, &ids).backward(), &model);
        model = optimizer.step(1e-2, model, grads);
    }
    let after = value(&model);
    assert!(after < 0.5 * before, "{before} became {after}");
}

#[test]
fn every_parameter_gets_a_gradient() {
    let model = Gpt2Config { tie_word_embeddings: false, ..small_config() }.init(&device().autodiff()).unwrap();
    let ids: Vec<u32> = (0..20).collect();
    let grads = GradientsParams::from_grads(loss(&model, &ids).backward(), &model);
    let parameters = 2 + 12 * 2 + 2 + 1;
    assert_eq!(grads.len(), parameters);
}

#[test]
fn dropout_is_for_training_only() {
    let config = Gpt2Config { embd_pdrop: 0.3, ..small_config() };
    let ids = [1, 2, 3, 4, 5, 6, 7, 8];
    let training = config.init(&device().autodiff()).unwrap();
    assert_ne!(logits_of(&training, &ids), logits_of(&training, &ids));
    let inference = training.valid();
    assert_eq!(logits_of(&inference, &ids), logits_of(&inference, &ids));
}

/// A model whose dropout would be seen in every text.
fn in_training() -> Gpt2 {
    let rate = 0.5;
    let config = Gpt2Config { embd_pdrop: rate, attn_pdrop: rate, resid_pdrop: rate, ..small_config() };
    config.init(&device().autodiff()).unwrap()
}

#[test]
fn a_model_in_training_generates_and_is_measured_without_dropout() {
    let training = in_training();
    let valid = training.valid();
    let request = greedy(&[vec![1, 2, 3], vec![4]], 12);
    let generator = Generator::new(training.clone());
    assert!(!generator.model().device().is_autodiff());
    let expected = ids_of(&Generator::new(valid.clone()), &request);
    (0..3).for_each(|_| assert_eq!(ids_of(&generator, &request), expected));

    // A draft that is the same model, and sees no dropout either, is always right.
    let speculation = Speculation { draft_len: DraftLen::Fixed(3), ..Speculation::default() };
    for draft in [Draft::Model(training.clone()), Draft::Scripted(Scripted::new([], 1.0).with_model(training.clone()))]
    {
        let is_model = matches!(draft, Draft::Model(_));
        let generator = Generator::new(valid.clone()).with_decoder(Decoder::Speculative(speculation));
        let output = generator.with_draft(draft).unwrap().complete(&request).unwrap();
        assert!(output.completions.iter().map(|completion| &completion.ids).eq(&expected));
        let report = output.report.speculation.unwrap();
        assert!(!is_model || (report.accepted == report.drafted && report.drafted > 0), "{report:?}");
    }

    let ids: Vec<u32> = (0..40).map(|n| n * n % 61).collect();
    let loss = |model: &Gpt2| model.perplexity(&ids, 12, |_| {}).unwrap().loss;
    assert_eq!(loss(&training), loss(&valid));
    let agreement = training.agreement(&valid, &ids, 12, |_| {}).unwrap();
    assert_eq!(agreement.greedy, 1.0);
    assert_eq!(logit_drift(&training, &valid, &ids[..20]).unwrap(), 0.0);
}

#[test]
fn the_deterministic_mode_refuses_a_model_in_training() {
    let error = in_training().with_determinism(true).unwrap_err();
    assert!(matches!(error, Error::Training { .. }) && error.to_string().contains(".valid()"), "{error}");
    assert!(in_training().with_determinism(false).is_ok());
    // Nor does it compute once it is trained again.
    let again = in_training().valid().with_determinism(true).unwrap().train();
    let tokens = TokenBatch::new(&[[1_u32]], &again).unwrap();
    let mut cache = again.cache(CacheStorage::Growing, 1, 10).unwrap();
    assert!(matches!(again.forward(&tokens, &mut cache, Logits::Last), Err(Error::Training { .. })));
}

#[test]
fn caches_tokens_and_states_of_training_and_inference_do_not_mix() {
    let training = in_training();
    let inference = training.valid();
    for (one, other) in [(&training, &inference), (&inference, &training)] {
        let tokens = TokenBatch::new(&[[1_u32, 2, 3]], one).unwrap();
        let mut cache = one.cache(CacheStorage::Growing, 1, 10).unwrap();
        let of_other = other.forward(&TokenBatch::new(&[[1_u32]], other).unwrap(), &mut cache, Logits::Last);
        assert!(matches!(of_other, Err(Error::Mismatch { what: "device of the cache", .. })));
        let mut others_cache = other.cache(CacheStorage::Growing, 1, 10).unwrap();
        let of_other = other.forward(&tokens, &mut others_cache, Logits::Last);
        assert!(matches!(of_other, Err(Error::Mismatch { what: "device of the tokens", .. })));
        let hidden = one.hidden_states(&tokens, &mut cache).unwrap();
        assert!(matches!(other.head(hidden), Err(Error::Mismatch { .. })));
        assert!(matches!(others_cache.copy_row(0, &cache, 0), Err(Error::Mismatch { .. })));
        let segment = cache.segment(0, 0..2).unwrap();
        assert!(matches!(others_cache.append_segments(&[vec![(segment, 2)]]), Err(Error::Mismatch { .. })));
    }
}

#[test]
fn a_record_restores_the_model() {
    let (model, ids) = (random_model(small_config()), [5, 4, 3, 2, 1]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.bpk");
    model.clone().into_record().save(&path).unwrap();
    let fresh = small_config().init(&device()).unwrap();
    let restored = fresh.load_record(ModuleRecord::load(&path).unwrap());
    assert_eq!(logits_of(&restored, &ids), logits_of(&model, &ids));
}

#[test]
fn logits_are_given_where_they_are_asked_for() {
    let model = random_model(small_config());
    let new = [vec![1_u32, 2, 3, 4], vec![5, 6], vec![7, 8, 9]];
    let tokens = TokenBatch::new(&new, &model).unwrap();
    let forward = |logits| {
        let mut cache = model.cache(CacheStorage::Growing, 3, 10).unwrap();
        rows(model.forward(&tokens, &mut cache, logits).unwrap())
    };
    let (all, last, two) = (forward(Logits::All), forward(Logits::Last), forward(Logits::LastK(2)));
    assert_eq!((all.len(), last.len(), two.len()), (9, 3, 6));
    let mut end = 0;
    for (row, ids) in new.iter().enumerate() {
        end += ids.len();
        let close = |left: &[f32], right: &[f32]| left.iter().zip(right).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(close(&last[row], &all[end - 1]));
        assert!(close(&two[2 * row], &all[end - 2]) && close(&two[2 * row + 1], &all[end - 1]));
        assert!(close(&last[row], logits_of(&model, ids).last().unwrap()), "row {row} alone");
    }
}

#[test]
fn hidden_states_are_what_the_head_reads() {
    let model = random_model(small_config());
    let tokens = TokenBatch::new(&[[1_u32, 2, 3]], &model).unwrap();
    let mut cache = model.cache(CacheStorage::Growing, 1, 10).unwrap();
    let hidden = model.hidden_states(&tokens, &mut cache).unwrap();
    assert_eq!(hidden.dims(), [3, 24]);
    assert!(matches!(model.head(hidden.clone().narrow(1, 0, 5)), Err(Error::Mismatch { .. })));
    let mut cache = model.cache(CacheStorage::Growing, 1, 10).unwrap();
    let logits = model.forward(&tokens, &mut cache, Logits::All).unwrap();
    assert_eq!(rows(model.head(hidden).unwrap()), rows(logits));
}

/// What a data loader gives, with and without lengths; the same as rows of ids.
#[test]
fn ids_can_come_as_a_tensor() {
    let model = random_model(small_config());
    let ids = Tensor::<2, Int>::from_data([[1, 2, 3, 4], [5, 6, 60, 60]], &device());
    let logits = |tokens: TokenBatch| rows(model.forward(&tokens, None, Logits::All).unwrap());
    let of_rows = |rows: &[Vec<u32>]| logits(TokenBatch::new(rows, &model).unwrap());
    let whole = TokenBatch::from_tensor(ids.clone(), None, &model).unwrap();
    assert_eq!(logits(whole), of_rows(&[vec![1, 2, 3, 4], vec![5, 6, 60, 60]]));
    let ragged = TokenBatch::from_tensor(ids.clone(), Some(&[4, 2]), &model).unwrap();
    assert_eq!(ragged.query_lens(), [4, 2]);
    assert_eq!(logits(ragged), of_rows(&[vec![1, 2, 3, 4], vec![5, 6]]));

    let refused = |ids: Tensor<2, Int>, lens: Option<&[usize]>| TokenBatch::from_tensor(ids, lens, &model).unwrap_err();
    assert!(matches!(refused(ids.clone(), Some(&[4])), Error::Mismatch { .. }));
    assert!(matches!(refused(ids.clone(), Some(&[5, 1])), Error::Mismatch { .. }));
    assert!(matches!(refused(ids.clone(), Some(&[4, 0])), Error::EmptyPrompt { index: 1 }));
    for bad in [61, -1] {
        let ids = ids.clone().slice_assign([1..2, 2..3], Tensor::from_data([[bad]], &device()));
        assert!(matches!(refused(ids.clone(), None), Error::TokenOutOfRange { row: 1, position: 2, .. }), "{bad}");
        assert!(TokenBatch::from_tensor(ids, Some(&[4, 2]), &model).is_ok(), "what counts for nothing may be anything");
    }
    let elsewhere = Tensor::<2, Int>::from_data([[1]], &device().autodiff());
    assert!(matches!(refused(elsewhere, None), Error::Mismatch { .. }));
}

/// The same as with a cache of its own, and gradients flow.
#[test]
fn a_forward_without_a_cache_is_that_with_an_empty_one() {
    let texts = [vec![1_u32, 2, 3, 4, 5], vec![6, 7], vec![8, 9]];
    for config in [small_config(), Gpt2Config { tie_word_embeddings: false, ..small_config() }] {
        let plain = random_model(config);
        let deterministic = plain.clone().with_determinism(true).unwrap();
        let packed = plain.clone().pack(gpt2_burn::WeightFormat::F32).unwrap();
        for model in [plain, deterministic, packed] {
            let tokens = TokenBatch::new(&texts, &model).unwrap();
            let mut cache = model.cache(CacheStorage::Preallocated, 3, 10).unwrap();
            let with = rows(model.forward(&tokens, &mut cache, Logits::All).unwrap());
            let without = rows(model.forward(&tokens, None, Logits::All).unwrap());
            for (with, without) in with.iter().flatten().zip(without.iter().flatten()) {
                assert!((with - without).abs() < 1e-5, "{with} and {without}");
            }
            let long = TokenBatch::new(&[vec![1; 25]], &model).unwrap();
            assert!(matches!(model.forward(&long, None, Logits::Last), Err(Error::ContextOverflow { tokens: 25, .. })));
        }
    }
}
