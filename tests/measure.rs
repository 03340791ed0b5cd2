//! Whether decoders agree is found out, and not only asserted.

mod common;

use common::{DECODERS, greedy, ids_of, logits_of, random_model, small_config};
use gpt2_burn::burn::module::Param;
use gpt2_burn::burn::tensor::Tensor;
use gpt2_burn::generate::{Decoder, Generator};
use gpt2_burn::measure::{TIE, check_greedy};
use gpt2_burn::{Error, Gpt2};

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

/// A model for which ids `2 n` and `2 n + 1` are so nearly the same that either can come out likelier.
fn model_with_twins() -> Gpt2 {
    let mut model = random_model(small_config());
    let weight = model.wte.weight.val();
    let [vocab_size, width] = weight.dims();
    let rows: Vec<Tensor<2>> = (0..vocab_size).map(|id| weight.clone().narrow(0, id - id % 2, 1)).collect();
    let twins = Tensor::cat(rows, 0);
    let nearly = Tensor::ones([vocab_size, width], &model.device());
    model.wte.weight = Param::from_tensor(twins + nearly * 1e-8);
    model
}

#[test]
fn a_tie_is_counted_and_the_rest_is_compared_behind_naive_decodings_token() {
    let generator = generator(model_with_twins(), Decoder::default());
    let right = ids_of(&generator, &greedy(&prompts(), 15));
    let mut other = right.clone();
    other[1][4] ^= 1; // its twin; behind it the decoder is asked to go on from naive decoding's token
    let verdict = check_greedy(&generator, &prompts(), &other).unwrap();
    assert!(verdict.is_equal(), "{:?}", verdict.first_divergence);
    assert_eq!(verdict.ties, 1);
    const { assert!(TIE == 1e-4) };
}

#[test]
fn what_cannot_be_compared_is_an_error() {
    let generator = generator(random_model(small_config()), Decoder::default());
    let check = |prompts: &[Vec<u32>], outputs: &[Vec<u32>]| check_greedy(&generator, prompts, outputs).unwrap_err();
    assert!(matches!(check(&prompts(), &[vec![1]]), Error::Mismatch { .. }));
    assert!(matches!(check(&[vec![]], &[vec![1]]), Error::EmptyPrompt { index: 0 }));
    assert!(matches!(check(&[vec![1]], &[vec![2, 99]]), Error::TokenOutOfRange { id: 99, position: 1, .. }));
    assert!(matches!(check(&[vec![99]], &[vec![2]]), Error::TokenOutOfRange { id: 99, .. }));
    assert!(matches!(check(&[vec![1; 20]], &[vec![2; 6]]), Error::ContextOverflow { tokens: 25, .. }));
}
