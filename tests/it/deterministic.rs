//! The deterministic mode: the same bits, whatever a token is computed with.

use crate::common::{DECODERS, STORAGES, device, fixture, greedy, random_model, rows, small_config};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::generate::Generator;
use gpt2_burn::{CacheStorage, Checkpoint, Error, Gpt2, Gpt2Config, Logits, Threads, TokenBatch};

/// Large enough that burn computes its products on several threads and in blocks.
fn model() -> Gpt2 {
    let config =
        Gpt2Config { vocab_size: 16_000, n_positions: 80, n_embd: 512, n_layer: 2, n_head: 4, ..small_config() };
    random_model(config).with_determinism(true).unwrap()
}

fn text(length: usize, seed: usize) -> Vec<u32> {
    (0..length).map(|n| ((n * n * 31 + n * 7 + seed * 101) % 16_000) as u32).collect()
}

/// The bits of the last logits of each text, its tokens given to the model in chunks of `chunk`.
fn bits(model: &Gpt2, texts: &[&[u32]], chunk: usize, storage: CacheStorage) -> Vec<Vec<u32>> {
    let mut cache = model.cache(storage, texts.len(), model.config().n_positions).unwrap();
    let mut last = vec![Vec::new(); texts.len()];
    let max_len = texts.iter().map(|text| text.len()).max().unwrap();
    let mut live: Vec<usize> = (0..texts.len()).collect();
    for start in (0..max_len).step_by(chunk) {
        let kept: Vec<usize> = (0..live.len()).filter(|&at| texts[live[at]].len() > start).collect();
        cache.gather(&kept).unwrap();
        live = kept.iter().map(|&at| live[at]).collect();
        let new: Vec<&[u32]> =
            live.iter().map(|&row| &texts[row][start..texts[row].len().min(start + chunk)]).collect();
        let logits = model.forward(&TokenBatch::new(&new, model).unwrap(), &mut cache, Logits::Last).unwrap();
        for (&row, logits) in live.iter().zip(rows(logits)) {
            last[row] = logits.into_iter().map(f32::to_bits).collect();
        }
    }
    last
}

#[test]
fn logits_are_the_same_bits_for_any_threads_batch_chunks_and_storage() {
    let model = model();
    let texts = [text(37, 0), text(5, 1), text(60, 2)];
    let alone = |text: &[u32]| bits(&model, &[text], 80, CacheStorage::Growing).pop().unwrap();
    let expected: Vec<_> = texts.iter().map(|text| alone(text)).collect();
    let all: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    for storage in STORAGES {
        for chunk in [80, 16, 7, 1] {
            assert_eq!(bits(&model, &all, chunk, storage), expected, "{storage:?}, chunks of {chunk}");
        }
    }
    for threads in [1, 2, 3, 8] {
        let threads_pool = Threads::new(threads).unwrap();
        let found = threads_pool.install(|| bits(&model, &all, 16, CacheStorage::Preallocated));
        assert_eq!(found, expected, "{threads} threads");
    }
    // What makes the mode worth having: without it they differ.
    let usual = model.with_determinism(false).unwrap();
    assert_ne!(bits(&usual, &all, 16, CacheStorage::Preallocated), bits(&usual, &all, 1, CacheStorage::Preallocated));
}

#[test]
fn decoders_give_the_same_log_probabilities_to_the_last_bit() {
    let config = Gpt2Config { vocab_size: 3_000, n_embd: 256, n_head: 4, ..small_config() };
    let model = random_model(config).with_determinism(true).unwrap();
    assert!(model.is_deterministic());
    let prompts = [vec![1, 2, 3, 4, 5, 6, 7], vec![8, 9]];
    let mut request = greedy(&prompts, 9);
    request.logprobs = Some(3);
    let outputs = DECODERS.map(|decoder| {
        let generator = Generator::new(model.clone()).with_decoder(decoder);
        generator.complete(&request).unwrap().completions
    });
    assert_eq!(outputs[1], outputs[0]);
    assert_eq!(outputs[2], outputs[0]);
}

#[test]
fn half_precision_is_refused() {
    let half = Checkpoint::open(fixture("hf-tiny-f16")).unwrap().load(&device(), DType::F16).unwrap();
    assert!(matches!(half.with_determinism(true), Err(Error::Mismatch { .. })));
}
