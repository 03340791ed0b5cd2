//! Whether decoders agree is found out, and not only asserted.

use crate::common::{self, DECODERS, greedy, ids_of, logits_of, random_model, small_config};
use gpt2_burn::burn::module::Param;
use gpt2_burn::burn::tensor::Tensor;
use gpt2_burn::generate::{Decoder, Generator};
use gpt2_burn::measure::{TIE, check_greedy, check_greedy_against, logit_drift};
use gpt2_burn::{Error, Gpt2, Gpt2Config, WeightFormat};

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![1, 2, 3, 4, 5], vec![7], vec![9, 10, 11]]
}

fn generator(model: Gpt2, decoder: Decoder) -> Generator {
    Generator::new(model).with_decoder(decoder)
}

#[test]
fn what_naive_decoding_gives_is_equal_for_every_decoder() {
    for decoder in DECODERS {
        let generator = generator(random_model(small_config()), decoder);
        let outputs = ids_of(&generator, &greedy(&prompts(), 15));
        let verdict = check_greedy(&generator, &prompts(), &outputs).unwrap();
        assert!(verdict.is_equal() && verdict.first_divergence.is_none());
        assert_eq!((verdict.tokens, verdict.ties, verdict.diverged_rows), (45, 0, 0));
    }
}

#[test]
fn a_wrong_token_is_found_where_it_is() {
    let generator = generator(random_model(small_config()), Decoder::default());
    let right = ids_of(&generator, &greedy(&prompts(), 15));
    for (row, step) in [(0, 0), (1, 14), (2, 7)] {
        let mut wrong = right.clone();
        wrong[row][step] = (wrong[row][step] + 1) % 61;
        let verdict = check_greedy(&generator, &prompts(), &wrong).unwrap();
        let found = verdict.first_divergence.unwrap();
        assert_eq!((found.row, found.step, verdict.diverged_rows), (row, step, 1));
        let before = [&prompts()[row][..], &right[row][..step]].concat();
        let logits = logits_of(generator.model(), &before).pop().unwrap();
        let margin = f64::from(logits[right[row][step] as usize] - logits[wrong[row][step] as usize]);
        assert!((found.margin - margin).abs() < 1e-5, "{} and {margin}", found.margin);
        assert!(found.max_logit_diff < 1e-4, "the decoder itself is right");
        assert!(!verdict.is_equal());
    }
}

#[test]
fn the_same_weights_in_another_type_drift_and_other_weights_are_found() {
    let (model, text) = (random_model(small_config()), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(logit_drift(&model, &model, &text).unwrap(), 0.0);
    let rounded = random_model(small_config()).pack(WeightFormat::F16).unwrap();
    let drift = logit_drift(&model, &rounded, &text).unwrap();
    let worst = |a: Vec<Vec<f32>>, b: Vec<Vec<f32>>| {
        let pairs = a.concat().into_iter().zip(b.concat());
        pairs.map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
    };
    // The last token of a text is not fed.
    let expected = worst(logits_of(&model, &text[..6]), logits_of(&rounded, &text[..6]));
    assert!((drift - expected).abs() < 1e-4 && (1e-5..0.1).contains(&drift), "{drift} and {expected}");

    let generator = generator(rounded, Decoder::default());
    let outputs = ids_of(&generator, &greedy(&prompts(), 4));
    assert_eq!(check_greedy_against(&model, &generator, &prompts(), &outputs).unwrap().tokens, 12);
    let mut other = random_model(small_config());
    other.wpe.weight = other.wpe.weight.map(|weight| weight.flip([0]));
    let verdict = check_greedy_against(&other, &generator, &prompts(), &outputs).unwrap();
    assert!(!verdict.is_equal() && verdict.first_divergence.unwrap().max_logit_diff > 0.1);

    let larger = random_model(Gpt2Config { vocab_size: 62, ..small_config() });
    assert!(matches!(logit_drift(&larger, &model, &text), Err(Error::Mismatch { .. })));
    assert!(matches!(logit_drift(&model, &model, &text[..1]), Err(Error::Mismatch { .. })));
    assert!(matches!(logit_drift(&model, &model, &[1, 61, 2]), Err(Error::TokenOutOfRange { .. })));
    let checked = check_greedy_against(&larger, &generator, &prompts(), &outputs);
    assert!(matches!(checked, Err(Error::Mismatch { .. })));
}

/// A model for which ids `2 n` and `2 n + 1` are nearly equally likely, and mean something else when they are read.
fn model_with_twins() -> Gpt2 {
    let mut model = random_model(Gpt2Config { tie_word_embeddings: false, vocab_size: 60, ..small_config() });
    let head = model.lm_head.as_mut().unwrap();
    let weight = head.weight.val();
    let row = |id: usize| weight.clone().narrow(0, id - id % 2, 1) + 1e-6 * (id % 2) as f64;
    head.weight = Param::from_tensor(Tensor::cat((0..60).map(row).collect(), 0));
    model
}

#[test]
fn a_tie_is_counted_and_the_rest_is_compared_behind_naive_decodings_token() {
    let generator = generator(model_with_twins(), Decoder::default());
    let right = ids_of(&generator, &greedy(&prompts(), 15));
    let ties = check_greedy(&generator, &prompts(), &right).unwrap().ties;
    let mut other = right.clone();
    // The twin, and what would follow nothing: behind a tie the decoder is asked again.
    other[1][4] ^= 1;
    other[1][5..].fill(0);
    let verdict = check_greedy(&generator, &prompts(), &other).unwrap();
    assert!(verdict.is_equal(), "{:?}", verdict.first_divergence);
    assert_eq!(verdict.ties, ties + 1);
    const { assert!(TIE == 1e-4) };
    // Not a twin: a difference.
    other[1][4] = (right[1][4] + 2) % 60;
    assert!(!check_greedy(&generator, &prompts(), &other).unwrap().is_equal());
}

#[test]
fn a_tie_at_the_last_position_of_the_context_is_a_tie() {
    let config = Gpt2Config { initializer_range: 0.0, n_positions: 16, ..small_config() };
    // All logits are equal: every difference is a tie, and naive decoding takes token 0.
    let generator = generator(config.init(&common::device()).unwrap(), Decoder::default());
    for prompt in [15, 16] {
        let verdict = check_greedy(&generator, &[vec![1; prompt]], &[vec![5]]).unwrap();
        assert_eq!((verdict.ties, verdict.diverged_rows), (1, 0), "behind {prompt} tokens");
    }
}

#[test]
fn logits_that_are_no_numbers_are_not_called_equal() {
    let mut model = random_model(small_config());
    model.ln_f.gamma = Param::from_tensor(model.ln_f.gamma.val() * f32::NAN);
    let found = check_greedy(&generator(model, Decoder::Naive), &prompts(), &[vec![1, 2], vec![3], vec![]]);
    assert!(matches!(found, Err(Error::NotFinite { prompt: 0, .. })), "{found:?}");
}

#[test]
fn what_cannot_be_compared_is_an_error() {
    let generator = generator(random_model(small_config()), Decoder::default());
    let check = |prompts: &[Vec<u32>], outputs: &[Vec<u32>]| check_greedy(&generator, prompts, outputs).unwrap_err();
    assert!(matches!(check(&prompts(), &[vec![1]]), Error::Mismatch { .. }));
    assert!(matches!(check(&[vec![]], &[vec![1]]), Error::EmptyPrompt { index: 0 }));
    assert!(matches!(check(&[vec![1]], &[vec![2, 99]]), Error::TokenOutOfRange { id: 99, position: 2, .. }));
    let two = |second: Vec<u32>| [vec![1], second];
    let error = check(&two(vec![99]), &two(vec![2]));
    assert!(matches!(error, Error::TokenOutOfRange { id: 99, row: 1, position: 0, .. }), "{error}");
    let error = check(&two(vec![1; 20]), &two(vec![2; 6]));
    assert!(matches!(error, Error::ContextOverflow { row: 1, tokens: 25, .. }), "{error}");
}

#[test]
fn a_models_bytes_are_those_of_its_weights_as_they_are_held() {
    let config = Gpt2Config { vocab_size: 64, n_embd: 32, n_head: 2, ..small_config() };
    for tie_word_embeddings in [true, false] {
        let config = Gpt2Config { tie_word_embeddings, ..config.clone() };
        let params = config.num_params();
        // Those of the blocks' matrices and the head, which kernels pack.
        let packed = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 64 * 32;
        let model = || random_model(config.clone());
        assert_eq!(model().bytes(), 4 * params);
        assert_eq!(model().pack(WeightFormat::F32).unwrap().bytes(), 4 * params);
        let half = model().pack(WeightFormat::F16).unwrap();
        // A token embedding that is not the head is halved too.
        let halved = if tie_word_embeddings { packed } else { packed + 64 * 32 };
        assert_eq!(half.bytes(), if half.is_packed() { 4 * params - 2 * halved } else { 2 * params });
    }
}
