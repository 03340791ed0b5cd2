//! The model is a burn module like any other: it trains, records and moves.

mod common;

use common::{device, fixture, load, logits_of, random_model, rows, small_config};
use gpt2_burn::burn::module::Module;
use gpt2_burn::burn::nn::loss::CrossEntropyLossConfig;
use gpt2_burn::burn::optim::{AdamWConfig, GradientsParams};
use gpt2_burn::burn::store::ModuleRecord;
use gpt2_burn::burn::tensor::Tensor;
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
    let mut cache = model.cache(CacheStorage::Growing, 1, inputs.len()).unwrap();
    let logits = model.forward(&TokenBatch::new(&[inputs], model).unwrap(), &mut cache, Logits::All).unwrap();
    let [_, time, vocab] = logits.dims();
    let targets = TokenBatch::new(&[targets], model).unwrap();
    let targets = targets.ids().clone().reshape([time]);
    CrossEntropyLossConfig::new().init(&model.device()).forward(logits.reshape([time, vocab]), targets)
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
    assert_eq!((all.len(), last.len(), two.len()), (12, 3, 6));
    for (row, ids) in new.iter().enumerate() {
        let end = 4 * row + ids.len();
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
    assert_eq!(hidden.dims(), [1, 3, 24]);
    assert!(matches!(model.head(hidden.clone().narrow(2, 0, 5)), Err(Error::Mismatch { .. })));
    assert_eq!(rows(model.head(hidden).unwrap()), logits_of(&model, &[1, 2, 3]));
}
