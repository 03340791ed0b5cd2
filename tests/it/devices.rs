//! The same decoders on every device of this build: the CPU's tokens, and logits that differ by rounding only.
//!
//! Which devices: see `common::devices`.

use std::collections::BTreeMap;

use crate::common::{self, Expected, devices, fixture, greedy, logits_of, random_model, skipped, small_config};
use gpt2_burn::batch::{BatchOptions, RowEvent, RowId, RowRequest};
use gpt2_burn::burn::tensor::{DType, Device};
use gpt2_burn::generate::{Decoder, FinishReason, GenerateRequest, Generator, Output, Stop};
use gpt2_burn::prefix::PrefixCache;
use gpt2_burn::sampling::Sampling;
use gpt2_burn::speculative::{Draft, DraftLen, Speculation};
use gpt2_burn::{CacheStorage, Checkpoint, Gpt2, Gpt2Config, Logits, TokenBatch, WeightFormat, backends};

/// The CPU with burn's own operations, which everything else is held against.
fn cpu() -> Device {
    gpt2_burn::device("flex").unwrap()
}

/// With this device's kernels, and without.
fn models(checkpoint: &Checkpoint, device: &Device) -> [Gpt2; 2] {
    [checkpoint.load_packed(device, WeightFormat::F32).unwrap(), checkpoint.load(device, DType::F32).unwrap()]
}

fn embedded(model: gpt2_burn_pair::Model) -> Checkpoint {
    Checkpoint::from_bytes(model.config, model.weights).unwrap()
}

/// Prompts of unequal length, two of which begin alike.
fn prompts() -> Vec<Vec<u32>> {
    let long: Vec<u32> = (0..40).map(|n| (n * 37 + 11) % 250).collect();
    vec![long.clone(), vec![5], [&long[..25], &[3, 4]].concat(), vec![90, 20, 7, 7, 7]]
}

fn ids(output: &Output) -> Vec<Vec<u32>> {
    output.completions.iter().map(|completion| completion.ids.clone()).collect()
}

fn decoders() -> [Decoder; 4] {
    let speculation = Speculation { draft_len: DraftLen::Fixed(3), ..Speculation::default() };
    [
        Decoder::Naive,
        Decoder::Kv(CacheStorage::Growing),
        Decoder::Kv(CacheStorage::Preallocated),
        Decoder::Speculative(speculation),
    ]
}

#[test]
fn logits_are_those_that_pytorch_computed() {
    for name in ["hf-tiny", "hf-tiny-untied"] {
        let expected = Expected::read(&format!("{name}/expected.json"));
        let checkpoint = Checkpoint::open(fixture(name)).unwrap();
        for (device_name, device) in devices() {
            for model in models(&checkpoint, &device) {
                for (prompt, expected) in expected.prompts.iter().zip(&expected.logits) {
                    let found = logits_of(&model, prompt);
                    let pairs = found.iter().flatten().zip(expected.iter().flatten());
                    let worst = common::largest(pairs.map(|(found, expected)| (found - expected).abs()));
                    assert!(found.len() == expected.len() && worst < 1e-3, "{name} on {device_name}: {worst}");
                }
            }
        }
    }
}

#[test]
fn every_decoder_gives_the_tokens_of_the_cpu_on_every_device() {
    let (target, draft) = (embedded(gpt2_burn_pair::TARGET), embedded(gpt2_burn_pair::DRAFT));
    let request = greedy(&prompts(), 20);
    let reference = Generator::new(target.load(&cpu(), DType::F32).unwrap()).with_decoder(Decoder::Naive);
    let expected = ids(&reference.complete(&request).unwrap());
    for (name, device) in devices() {
        let draft = draft.load_packed(&device, WeightFormat::F32).unwrap();
        let model = target.load_packed(&device, WeightFormat::F32).unwrap();
        for decoder in decoders() {
            let generator = Generator::new(model.clone()).with_decoder(decoder.clone());
            let generator = generator.with_draft(Draft::Model(draft.clone())).unwrap();
            let output = generator.complete(&request).unwrap();
            assert_eq!(ids(&output), expected, "{decoder} on {name}");
            match (&decoder, &output.report.speculation) {
                (Decoder::Speculative(_), Some(report)) => assert!(report.accepted > 10, "{name}"),
                (Decoder::Speculative(_), None) => panic!("nothing was drafted on {name}"),
                _ => {}
            }
            if decoder != Decoder::Naive {
                let prompt_tokens: usize = prompts().iter().map(Vec::len).sum();
                assert!(
                    output.report.computed_tokens < 2 * prompt_tokens + 40 * 4,
                    "{decoder} on {name} reuses nothing"
                );
            }
            // Alone as in a batch.
            let alone = generator.complete(&greedy(&prompts()[..1], 20)).unwrap();
            assert_eq!(ids(&alone)[0], expected[0], "{decoder} on {name}");
        }
    }
}

#[test]
fn burns_own_operations_give_the_same_tokens_on_every_device() {
    let checkpoint = Checkpoint::open(fixture("hf-tiny")).unwrap();
    let prompts = [vec![1, 2, 3, 4, 5, 6, 7], vec![9], vec![8, 7, 6]];
    let request = greedy(&prompts, 8);
    let reference = Generator::new(checkpoint.load(&cpu(), DType::F32).unwrap()).with_decoder(Decoder::Naive);
    let expected = ids(&reference.complete(&request).unwrap());
    for (name, device) in devices() {
        let model = checkpoint.load(&device, DType::F32).unwrap();
        for decoder in &decoders()[..3] {
            let generator = Generator::new(model.clone()).with_decoder(decoder.clone());
            assert_eq!(ids(&generator.complete(&request).unwrap()), expected, "{decoder} on {name}");
        }
    }
}

#[test]
fn rows_that_join_and_leave_get_the_same_tokens_on_every_device() {
    let target = embedded(gpt2_burn_pair::TARGET);
    let reference = Generator::new(target.load(&cpu(), DType::F32).unwrap()).with_decoder(Decoder::Naive);
    let expected = ids(&reference.complete(&greedy(&prompts(), 20)).unwrap());
    for (name, device) in devices() {
        let model = target.load_packed(&device, WeightFormat::F32).unwrap();
        for (storage, has_prefixes) in [(CacheStorage::Growing, false), (CacheStorage::Preallocated, true)] {
            let generator = Generator::new(model.clone()).with_decoder(Decoder::Kv(storage));
            let generator = match has_prefixes {
                true => generator.with_prefix_cache(&PrefixCache::new(1 << 30)).unwrap(),
                false => generator,
            };
            let options = BatchOptions::default().with_max_rows(3).with_step_tokens(16).with_max_row_tokens(64);
            let mut batch = generator.batch(options).unwrap();
            let mut made: BTreeMap<RowId, (usize, Vec<u32>)> = BTreeMap::new();
            // Each prompt twice, at different times, and of different lengths.
            let mut coming = (0..8).map(|at| (at % 4, 5 + (at * 7) % 16));
            loop {
                if let Some((prompt, max_new_tokens)) = coming.next() {
                    let row = RowRequest {
                        max_new_tokens,
                        sampling: Sampling::greedy(),
                        stop: Stop { ignore_eos: true, ..Stop::default() },
                        ..RowRequest::new(prompts()[prompt].clone())
                    };
                    made.insert(batch.add(&row).unwrap(), (prompt, Vec::new()));
                }
                if batch.is_empty() {
                    break;
                }
                for event in batch.step().unwrap() {
                    let RowEvent::Token(token) = event else { panic!("{event:?} on {name}") };
                    made.get_mut(&token.row).unwrap().1.push(token.id);
                }
            }
            for (at, (row, (prompt, found))) in made.into_iter().enumerate() {
                let tokens = 5 + (at * 7) % 16;
                assert_eq!(found, expected[prompt][..tokens], "{row} of {storage:?} on {name}");
            }
            assert!(batch.report().joins > 2 && batch.report().leaves > 2, "{:?} on {name}", batch.report());
        }
    }
}

#[test]
fn a_prefix_hit_gives_the_same_tokens_on_every_device() {
    let target = embedded(gpt2_burn_pair::TARGET);
    let request = greedy(&prompts(), 12);
    let reference = Generator::new(target.load(&cpu(), DType::F32).unwrap()).with_decoder(Decoder::Naive);
    let expected = ids(&reference.complete(&request).unwrap());
    for (name, device) in devices() {
        let model = target.load_packed(&device, WeightFormat::F32).unwrap();
        for storage in common::STORAGES {
            let prefixes = PrefixCache::new(1 << 30);
            let generator = Generator::new(model.clone()).with_decoder(Decoder::Kv(storage));
            let generator = generator.with_prefix_cache(&prefixes).unwrap();
            for (call, least) in [(1, 25), (2, 60)] {
                let output = generator.complete(&request).unwrap();
                assert_eq!(ids(&output), expected, "call {call} on {name}");
                assert!(output.report.reused_prompt_tokens >= least, "call {call} on {name}");
                // The second time, the last token of each, in a step of its own.
                let (computed, steps) = (output.report.computed_prompt_tokens, output.report.step_seconds.len());
                assert!(call == 1 || computed == 4, "{computed} on {name}");
                assert_eq!(steps, 11, "call {call} on {name}");
            }
        }
    }
}

#[test]
fn multi_step_decoding_changes_nothing_and_ends_where_a_text_does() {
    let model = random_model_on(small_config(), &cpu());
    let config = model.config().clone();
    let prompts = vec![vec![1, 2, 3, 4, 5], vec![7], vec![9, 10, 11]];
    let request = greedy(&prompts, 60);
    let reference = Generator::new(model).with_decoder(Decoder::Naive);
    let free = reference.complete(&request).unwrap();
    // One that occurs in the midst of a text ends it.
    let stop = free.completions[0].ids[2];
    let stopping = GenerateRequest { stop: Stop::default(), ..request.clone() };
    for (name, device) in devices() {
        for packed in [true, false] {
            let mut config = config.clone();
            config.eos_token_id = vec![stop];
            let load = |config: Gpt2Config| {
                let model = random_model_on(config, &device);
                if packed { model.pack(WeightFormat::F32).unwrap() } else { model }
            };
            let with_stop = Generator::new(load(config.clone()));
            let output = with_stop.complete(&stopping).unwrap();
            for (found, expected) in output.completions.iter().zip(&free.completions) {
                let end = expected.ids.iter().position(|id| *id == stop).map_or(expected.ids.len(), |at| at + 1);
                assert_eq!(found.ids, expected.ids[..end], "{name}");
                assert_eq!(found.finish == FinishReason::Stop, expected.ids.contains(&stop), "{name}");
            }
            let generator = Generator::new(load(config.clone()));
            let output = generator.complete(&request).unwrap();
            assert_eq!(ids(&output), ids(&free), "{name}");
            assert_eq!(output.report.multi_steps > 8, packed && backends::is_asynchronous(&device), "{name}");
            assert!(output.completions.iter().all(|completion| completion.finish == FinishReason::Context));
            // What has to be looked at each step gives the same.
            let looked_at = GenerateRequest { logprobs: Some(1), ..request.clone() };
            let looked_at = generator.complete(&looked_at).unwrap();
            assert_eq!((ids(&looked_at), looked_at.report.multi_steps), (ids(&free), 0), "{name}");
            let sampled =
                GenerateRequest { sampling: Sampling { temperature: 0.9, ..Sampling::default() }, ..request.clone() };
            assert_eq!(
                ids(&generator.complete(&sampled).unwrap()),
                ids(&reference.complete(&sampled).unwrap()),
                "{name}"
            );
        }
    }
}

/// [`random_model`] on another device.
fn random_model_on(config: Gpt2Config, device: &Device) -> Gpt2 {
    use gpt2_burn::burn::module::Module;
    random_model(config).to_device(device)
}

#[test]
fn a_packed_model_stays_where_it_was_packed() {
    use gpt2_burn::burn::module::Module;
    let model = random_model_on(small_config(), &cpu()).pack(WeightFormat::F32).unwrap();
    for (name, device) in devices().into_iter().filter(|(_, device)| *device != cpu()) {
        let moved = model.clone().to_device(&device);
        let found = moved
            .cache(CacheStorage::Preallocated, 1, 8)
            .and_then(|mut cache| moved.forward(&TokenBatch::new(&[[1, 2]], &moved)?, &mut cache, Logits::Last));
        assert!(matches!(found, Err(gpt2_burn::Error::Packed { .. })), "{name}");
    }
}

#[test]
fn a_cache_that_is_too_large_for_a_buffer_is_refused() {
    use gpt2_burn::{Error, KvCacheConfig};
    let config = Gpt2Config::published("gpt2-xl").unwrap();
    for (name, device) in devices() {
        let Some(limit) = backends::largest_buffer(&device).filter(|limit| *limit < 1 << 33) else { continue };
        let rows = limit / (config.n_embd * config.n_positions * size_of::<f32>()) + 1;
        let cache = KvCacheConfig::new(rows, config.n_positions).init(&config, &device);
        assert!(matches!(cache, Err(Error::Mismatch { .. })), "{rows} rows on {name}");
    }
}

/// Where the type exists: half the bytes, or a quarter, for logits that differ a little.
#[test]
fn other_formats_are_near_f32() {
    let target = embedded(gpt2_burn_pair::TARGET);
    let prompt: Vec<u32> = prompts()[0].clone();
    let reference = logits_of(&target.load(&cpu(), DType::F32).unwrap(), &prompt);
    let spread = reference.iter().flatten().fold(0.0_f32, |max, logit| max.max(logit.abs()));
    for (name, device) in devices() {
        for (format, max) in [(WeightFormat::F16, 0.01), (WeightFormat::Bf16, 0.05), (WeightFormat::Int8, 0.05)] {
            let model = match target.load_packed(&device, format) {
                Ok(model) => model,
                Err(error) => {
                    skipped(&format!("{format:?} on {name}: {error}"));
                    continue;
                }
            };
            // A row at a time, a few, and all at once take kernels of their own.
            let all = logits_of(&model, &prompt);
            let mut cache = model.cache(CacheStorage::Preallocated, 1, prompt.len()).unwrap();
            let mut stepped = Vec::new();
            for part in [&prompt[..20], &prompt[20..27], &prompt[27..28], &prompt[28..]] {
                let tokens = TokenBatch::new(&[part], &model).unwrap();
                stepped.extend(common::rows(model.forward(&tokens, &mut cache, Logits::All).unwrap()));
            }
            for found in [all, stepped] {
                let pairs = found.iter().flatten().zip(reference.iter().flatten());
                let worst = common::largest(pairs.map(|(found, expected)| (found - expected).abs()));
                assert!(
                    found.len() == reference.len() && worst < max * spread,
                    "{format:?} on {name}: {worst} of {spread}"
                );
            }
        }
    }
}
