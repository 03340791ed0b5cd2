//! The loss of a text that is longer than the context.

use crate::common::{logits_of, random_model, small_config};
use gpt2_burn::burn::module::Param;
use gpt2_burn::sampling::{Sampling, log_softmax};
use gpt2_burn::{Error, Gpt2Config};

#[test]
fn every_token_is_scored_once_in_the_first_window_that_reaches_it() {
    let model = random_model(small_config());
    let n_positions = model.config().n_positions;
    for (length, stride) in [(2, 1), (24, 24), (25, 24), (26, 24), (26, 1), (100, 24), (100, 7), (97, 12)] {
        let ids: Vec<u32> = (0..length).map(|n| (n * n + 7 * n) % 61).collect();
        let mut told = Vec::new();
        let result = model.perplexity(&ids, stride, |tokens| told.push(tokens)).unwrap();

        // Token t is predicted by the earliest window that starts at a multiple of the stride and holds token t - 1.
        let mut total = 0.0;
        for target in 1..ids.len() {
            let start = (0..target).step_by(stride).find(|start| target <= start + n_positions).unwrap();
            let logits = logits_of(&model, &ids[start..target]).pop().unwrap();
            total -= log_softmax(&logits)[ids[target] as usize];
        }
        let expected = total / (ids.len() - 1) as f64;
        assert!((result.loss - expected).abs() < 1e-5, "{length}, {stride}: {} and {expected}", result.loss);
        assert_eq!(result.tokens, ids.len() - 1);
        assert!(told.is_sorted() && told.last() == Some(&(ids.len() - 1)));
    }
}

#[test]
fn agreement_is_what_the_two_distributions_say() {
    let target = random_model(small_config());
    let draft = random_model(Gpt2Config { n_layer: 1, n_positions: 16, ..small_config() });
    let ids: Vec<u32> = (0..70).map(|n| (n * n + 7 * n) % 61).collect();
    for stride in [16, 5] {
        let (mut greedy, mut sampled) = (0, 0.0);
        for position in 1..ids.len() {
            let start = (0..position).step_by(stride).find(|start| position <= start + 16).unwrap();
            let logits = [&target, &draft].map(|model| logits_of(model, &ids[start..position]).pop().unwrap());
            let argmax = |logits: &[f32]| (0..61).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
            greedy += usize::from(argmax(&logits[0]) == argmax(&logits[1]));
            let [p, q] = logits.map(|logits| log_softmax(&logits));
            sampled += p.iter().zip(&q).map(|(p, q)| p.exp().min(q.exp())).sum::<f64>();
        }
        let found = target.agreement(&draft, &ids, stride, |_| {}).unwrap();
        assert!((found.sampled - sampled / 69.0).abs() < 1e-5, "{} and {}", found.sampled, sampled / 69.0);
        assert_eq!((found.greedy, found.tokens), (greedy as f64 / 69.0, 69));
        assert!(greedy > 0 && greedy < 69, "nothing to tell apart");
    }
    // As drawing tokens from both distributions would have it, at any temperature.
    let temperatures = [0.0, 0.3, 1.0, 4.0];
    let mut expected = [0.0; 4];
    for position in 1..ids.len() {
        let start = (0..position).step_by(16).find(|start| position <= start + 16).unwrap();
        let logits = [&target, &draft].map(|model| logits_of(model, &ids[start..position]).pop().unwrap());
        for (expected, &temperature) in expected.iter_mut().zip(&temperatures) {
            let sampling = Sampling { temperature, ..Sampling::default() };
            let [p, q] = [0, 1].map(|model: usize| sampling.distribution(&logits[model], &[]).unwrap());
            *expected += gpt2_burn::cost::acceptance(&p, &q) / 69.0;
        }
    }
    let found = target.acceptance(&draft, &ids, 16, &temperatures, |_| {}).unwrap();
    assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{found:?} and {expected:?}");
    assert!(expected.iter().is_sorted_by(|a, b| a != b), "nothing to tell apart");
    for temperature in [-1.0, f64::NAN, 1e-4, f64::INFINITY] {
        let refused = target.acceptance(&draft, &ids, 16, &[temperature], |_| {});
        assert!(matches!(refused, Err(Error::Sampling { parameter: "temperature", .. })));
    }

    let itself = target.agreement(&target, &ids, 24, |_| {}).unwrap();
    assert!(itself.greedy == 1.0 && (itself.sampled - 1.0).abs() < 1e-5);

    for broken_is_draft in [false, true] {
        let mut broken = random_model(small_config());
        broken.ln_f.gamma = Param::from_tensor(broken.ln_f.gamma.val() * f32::NAN);
        let (target, draft) = if broken_is_draft { (&target, &broken) } else { (&broken, &target) };
        assert!(matches!(target.agreement(draft, &ids, 5, |_| {}), Err(Error::NotFinite { .. })));
    }

    let other = random_model(Gpt2Config { vocab_size: 60, ..small_config() });
    assert!(matches!(target.agreement(&other, &ids, 5, |_| {}), Err(Error::Mismatch { .. })));
    assert!(matches!(target.agreement(&draft, &ids, 17, |_| {}), Err(Error::Mismatch { .. })));
    assert!(matches!(target.agreement(&draft, &[1], 5, |_| {}), Err(Error::Mismatch { .. })));
}

#[test]
fn texts_and_strides_that_make_no_sense_are_errors() {
    let model = random_model(small_config());
    assert!(matches!(model.perplexity(&[], 1, |_| {}), Err(Error::Mismatch { .. })));
    assert!(matches!(model.perplexity(&[1], 1, |_| {}), Err(Error::Mismatch { .. })));
    assert!(matches!(model.perplexity(&[1, 2], 0, |_| {}), Err(Error::Mismatch { .. })));
    assert!(matches!(model.perplexity(&[1, 2], 25, |_| {}), Err(Error::Mismatch { .. })));
    assert!(matches!(model.perplexity(&[1, 99], 1, |_| {}), Err(Error::TokenOutOfRange { id: 99, position: 1, .. })));

    let mut broken = random_model(small_config());
    broken.ln_f.gamma = Param::from_tensor(broken.ln_f.gamma.val() * f32::NAN);
    assert!(matches!(broken.perplexity(&[1, 2], 1, |_| {}), Err(Error::NotFinite { .. })));
}
