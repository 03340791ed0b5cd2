//! The loss of a text that is longer than the context.

mod common;

use common::{logits_of, random_model, small_config};
use gpt2_burn::Error;
use gpt2_burn::burn::module::Param;
use gpt2_burn::sampling::log_softmax;

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
