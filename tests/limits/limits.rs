//! Sizes of requests: whatever is asked for, an error or a result, within the limit, and never a panic, an abort or a hang.
//!
//! Each in a process of its own: they count every allocation there is.

use std::sync::Arc;

use crate::ALLOCATED;
use crate::common::{STORAGES, alone, device, devices, greedy, random_model, small_config};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::generate::{ContextEnd, Decoder, GenerateRequest, Generator, Prompt, Stop};
use gpt2_burn::prefix::PrefixCache;
use gpt2_burn::sampling::Sampling;
use gpt2_burn::speculative::{Acceptance, Draft, DraftLen, Ngram, Scripted, Speculation};
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{
    CacheStorage, Error, Gpt2, Gpt2Config, KvCache, KvCacheConfig, Logits, MemoryLimit, TokenBatch, WeightFormat,
};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseResult, TestRunner, contextualize_config};

/// What `work` gives, and most bytes that were allocated while it was at work, beside those that were before.
fn peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
    ALLOCATED.reset_peak_usage();
    let before = ALLOCATED.current_usage();
    let result = work();
    (result, ALLOCATED.peak_usage().saturating_sub(before))
}

/// Sizes that somebody means, that a slip of the keyboard makes, and that nothing can count.
fn sizes() -> impl Strategy<Value = usize> {
    prop_oneof![
        9 => 0_usize..6,
        3 => 6_usize..40,
        1 => prop_oneof![Just(1000_usize), Just(1_000_000), Just(1 << 40), Just(usize::MAX / 2), Just(usize::MAX)],
    ]
}

fn prompts() -> impl Strategy<Value = Vec<Prompt>> {
    let ids = |ids: std::ops::Range<u32>, lens| proptest::collection::vec(ids, lens).prop_map(Prompt::Ids);
    let text = "[a-c]{1,12}".prop_map(Prompt::Text);
    // Mostly what a model takes; else ids that it does not know, or none, or more than its context.
    let one = prop_oneof![60 => ids(0..61, 1..25), 2 => ids(55..65, 0..3), 2 => ids(0..61, 0..40), 3 => text];
    prop_oneof![
        1 => Just(Vec::new()),
        30 => proptest::collection::vec(one, 1..5),
        1 => (1_u32..60, 1_usize..400).prop_map(|(id, count)| vec![Prompt::Ids(vec![id; 3]); count]),
    ]
}

fn samplings() -> impl Strategy<Value = Sampling> {
    let absurd = || {
        let numbers = [f64::NAN, f64::INFINITY, -1.0, 0.0, 1.0, f64::MAX, f64::MIN_POSITIVE];
        proptest::sample::select(numbers.to_vec())
    };
    let number = |allowed: std::ops::Range<f64>| prop_oneof![40 => allowed, 1 => absurd()];
    let temperature = prop_oneof![1 => Just(0.0), 2 => number(0.0..2.0)];
    let top_k = proptest::option::of(prop_oneof![10 => 1_usize..70, 1 => sizes()]);
    (temperature, top_k, number(0.01..1.0), number(0.0..1.0), number(0.5..2.0)).prop_map(
        |(temperature, top_k, top_p, min_p, repetition_penalty)| {
            // What filters anything makes every step another one; multi-step decoding is only without.
            let (top_p, repetition_penalty) = if top_p < 0.5 { (1.0, 1.0) } else { (top_p, repetition_penalty) };
            Sampling { temperature, top_k, top_p, min_p, repetition_penalty }
        },
    )
}

fn requests() -> impl Strategy<Value = GenerateRequest> {
    let end = prop_oneof![
        4 => Just(ContextEnd::Stop),
        1 => Just(ContextEnd::Error),
        2 => proptest::option::of(sizes()).prop_map(|keep| ContextEnd::Slide { keep }),
    ];
    let stop =
        (proptest::collection::vec(prop_oneof![9 => "[a-c]{1,3}", 1 => Just(String::new())], 0..3), any::<bool>())
            .prop_map(|(texts, ignore_eos)| Stop { texts, ignore_eos });
    let rest = (any::<u64>(), any::<u64>(), any::<bool>(), proptest::option::of(sizes()));
    (prompts(), sizes(), samplings(), sizes(), rest, prop_oneof![5 => Just(Stop::default()), 1 => stop], end).prop_map(
        |(prompts, max_new_tokens, sampling, num_samples, rest, stop, on_context_end)| {
            let (seed, first_rng_stream, cache_generated, logprobs) = rest;
            let num_samples = num_samples.max(usize::from(seed % 16 > 0));
            let max_new_tokens = max_new_tokens.max(usize::from(seed % 32 < 28));
            let mut request = GenerateRequest::new(prompts);
            request.max_new_tokens = max_new_tokens;
            request.sampling = sampling;
            request.num_samples = num_samples;
            (request.seed, request.first_rng_stream, request.cache_generated) =
                (seed, first_rng_stream, cache_generated);
            (request.logprobs, request.stop, request.on_context_end) = (logprobs, stop, on_context_end);
            request
        },
    )
}

/// How a generator decodes, and with what besides.
#[derive(Clone, Copy, Debug)]
struct Setup {
    decoder: usize,
    draft: usize,
    draft_len: Option<usize>,
    is_packed: bool,
    is_growing: bool,
    is_half: bool,
    /// Bytes of a cache of prefixes, if there is one.
    prefixes: Option<usize>,
    has_tokenizer: bool,
    limit: usize,
}

/// The simplest, with this decoder.
fn setup(decoder: usize, is_packed: bool, limit: usize) -> Setup {
    let (is_growing, is_half, prefixes, has_tokenizer) = (false, false, None, false);
    Setup { decoder, draft: 1, draft_len: None, is_packed, is_growing, is_half, prefixes, has_tokenizer, limit }
}

fn setups() -> impl Strategy<Value = Setup> {
    let limit = prop_oneof![1 => 0_usize..1 << 16, 4 => 4_usize << 20..48 << 20];
    let yes = any::<bool>;
    let prefixes = prop_oneof![Just(None), Just(Some(0)), Just(Some(1 << 20))];
    let draft = (0_usize..5, proptest::option::of(sizes()));
    (0_usize..4, draft, yes(), yes(), yes(), prefixes, yes(), limit).prop_map(
        |(decoder, (draft, draft_len), is_packed, is_growing, is_half, prefixes, has_tokenizer, limit)| {
            let prefixes = prefixes.filter(|_| decoder > 0);
            Setup { decoder, draft, draft_len, is_packed, is_growing, is_half, prefixes, has_tokenizer, limit }
        },
    )
}

/// A letter a token: "a" is 0, and so on.
fn letters() -> Tokenizer {
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..61_u32).map(|id| (char::from_u32('a' as u32 + id).unwrap().to_string(), id.into())).collect();
    Tokenizer::from_vocab_and_merges(&serde_json::Value::from(vocab).to_string(), "").unwrap()
}

fn generator(model: &Gpt2, setup: Setup) -> Generator {
    let model = match setup.is_packed {
        true => model.clone().pack(WeightFormat::F32).unwrap(),
        false => model.clone(),
    };
    let draft_len = setup.draft_len.map_or(DraftLen::Auto, DraftLen::Fixed);
    let acceptance = if setup.limit.is_multiple_of(2) { Acceptance::Match } else { Acceptance::Rejection };
    let decoder = match setup.decoder {
        0 => Decoder::Naive,
        1 => Decoder::Kv(CacheStorage::Growing),
        2 => Decoder::Kv(CacheStorage::Preallocated),
        _ => {
            let storage = if setup.is_growing { CacheStorage::Growing } else { CacheStorage::Preallocated };
            Decoder::Speculative(Speculation { storage, draft_len, acceptance })
        }
    };
    let draft = match setup.draft {
        0 => Draft::Ngram(Ngram { max_len: usize::MAX, min_len: 1 }),
        1 => Draft::Model(model.clone()),
        2 => Draft::EarlyExit { layers: 1 },
        3 => Draft::Scripted(Scripted::new([vec![3; 20], vec![4; 5]], 0.5).with_model(model.clone())),
        _ => Draft::Function(Arc::new(|_, len| vec![3; len.min(9)])),
    };
    let tokenizer = setup.has_tokenizer.then(letters);
    let generator = Generator::new(model).with_tokenizer(tokenizer).with_decoder(decoder).with_draft(draft).unwrap();
    let generator = generator.with_memory_limit(MemoryLimit::bytes(setup.limit));
    let generator = if setup.is_half { generator.with_cache_dtype(DType::F16).unwrap() } else { generator };
    match setup.prefixes {
        Some(budget) => generator.with_prefix_cache(&PrefixCache::new(budget)).unwrap(),
        None => generator,
    }
}

/// Events of a request that are waited for.
const STEP_BUDGET: usize = 3000;

fn run(generator: &Generator, request: &GenerateRequest) -> Result<usize, Error> {
    let mut events = 0;
    for event in generator.generate(request)?.take(STEP_BUDGET) {
        event?;
        events += 1;
    }
    Ok(events)
}

#[test]
fn random_requests_give_a_result_or_an_error_within_their_limit() {
    alone(|| {
        let model = random_model(Gpt2Config { eos_token_id: vec![5], ..small_config() });
        // What is made once.
        for (decoder, is_packed) in (0..4).flat_map(|decoder| [(decoder, false), (decoder, true)]) {
            run(&generator(&model, setup(decoder, is_packed, 1 << 30)), &greedy(&[vec![1, 2, 3]], 5)).unwrap();
        }
        let (mut done, mut refused) = (0, 0);
        let config = contextualize_config(ProptestConfig::with_cases(400));
        let cases = config.cases;
        let property = |(setup, request): (Setup, GenerateRequest)| -> TestCaseResult {
            let generator = generator(&model, setup);
            let (first, peak_of_first) = peak(|| run(&generator, &request));
            // What was kept of the first is found by the second.
            let (second, peak_of_second) = peak(|| run(&generator, &request));
            prop_assert_eq!(first.is_ok(), second.is_ok());
            // A cache of prefixes has a budget of its own.
            let peak = peak_of_first.max(peak_of_second).saturating_sub(setup.prefixes.unwrap_or(0));
            match first {
                Ok(events) => {
                    done += usize::from(events > 0);
                    prop_assert!(peak <= setup.limit, "{peak} bytes, the limit is {}", setup.limit);
                }
                Err(error) => {
                    refused += usize::from(matches!(error, Error::OutOfMemory { .. }));
                    // An error may come from the midst of a text; one of memory comes before everything.
                    let max =
                        if matches!(error, Error::OutOfMemory { .. }) { 1 << 20 } else { setup.limit.max(1 << 20) };
                    prop_assert!(peak <= max, "{error}: {peak} bytes, the limit is {}", setup.limit);
                }
            }
            Ok(())
        };
        let cell = std::cell::RefCell::new(property);
        let mut runner = TestRunner::new(config);
        runner.run(&(setups(), requests()), |case| (cell.borrow_mut())(case)).unwrap();
        assert!(
            done > cases as usize / 4 && refused > cases as usize / 20,
            "{done} requests gave tokens, {refused} were refused for their memory"
        );
    });
}

/// What is reckoned is a bound, but no absurd one.
#[test]
fn a_request_is_not_refused_for_much_more_than_it_takes() {
    alone(|| {
        let model = random_model(Gpt2Config { n_positions: 256, n_embd: 96, n_layer: 4, ..small_config() });
        for is_packed in [true, false] {
            for (decoder, samples) in [(1, 40), (2, 40), (2, 1)] {
                let prompts: Vec<Vec<u32>> = (0..if samples > 1 { 2 } else { 60 }).map(|row| vec![row; 100]).collect();
                let request = GenerateRequest { num_samples: samples, ..greedy(&prompts, 100) };
                let generator = generator(&model, setup(decoder, is_packed, 1 << 20));
                let Err(Error::OutOfMemory { bytes, .. }) = generator.complete(&request) else {
                    panic!("it needs some")
                };
                let generator = generator.with_memory_limit(MemoryLimit::bytes(bytes));
                let (output, peak) = peak(|| generator.complete(&request));
                assert_eq!(output.unwrap().completions.len(), prompts.len() * samples);
                let ratio = bytes as f64 / peak as f64;
                println!(
                    "decoder {decoder}, packed: {is_packed}, {samples} samples: {bytes} bytes for {peak}, {ratio:.2} x"
                );
                assert!((1.0..3.0).contains(&ratio), "{bytes} bytes were reckoned, {peak} taken: {ratio:.2} x");
            }
        }
    });
}

/// A call to a cache, with sizes that may be absurd.
#[derive(Clone, Debug)]
enum Call {
    /// As many tokens to each row, and to the first of them some more.
    Append(usize, usize),
    Truncate(usize, usize),
    Gather(Vec<usize>),
    Remove(usize),
    Fork(usize, usize),
    Reserve(usize),
    Clear,
    Push,
    CopyPrefix(usize, usize, usize),
    CopyRow(usize, usize),
    Segment(usize, usize, usize),
    AppendSegments(usize, usize),
}

fn calls() -> impl Strategy<Value = Call> {
    prop_oneof![
        6 => (0_usize..7, prop_oneof![2 => Just(0), 1 => 0_usize..20]).prop_map(|(len, more)| Call::Append(len, more)),
        1 => (sizes(), sizes()).prop_map(|(row, len)| Call::Truncate(row, len)),
        1 => proptest::collection::vec(0_usize..5, 0..300).prop_map(Call::Gather),
        1 => sizes().prop_map(Call::Remove),
        2 => (0_usize..4, sizes()).prop_map(|(row, times)| Call::Fork(row, times)),
        1 => sizes().prop_map(Call::Reserve),
        1 => Just(Call::Clear),
        1 => Just(Call::Push),
        1 => (sizes(), sizes(), sizes()).prop_map(|(from, to, len)| Call::CopyPrefix(from, to, len)),
        1 => (sizes(), sizes()).prop_map(|(row, from)| Call::CopyRow(row, from)),
        1 => (sizes(), sizes(), sizes()).prop_map(|(row, start, end)| Call::Segment(row, start, end)),
        1 => (sizes(), sizes()).prop_map(|(rows, tokens)| Call::AppendSegments(rows, tokens)),
    ]
}

fn apply(model: &Gpt2, cache: &mut KvCache, call: &Call) -> Result<(), Error> {
    match call {
        Call::Append(len, more) => {
            let len_of = |row| if row == 0 { len + more } else { *len };
            let rows: Vec<Vec<u32>> = (0..cache.batch()).map(|row| vec![7; len_of(row)]).collect();
            model.forward(&TokenBatch::new(&rows, model)?, cache, Logits::Last).map(|_| ())
        }
        Call::Truncate(row, len) => cache.truncate(*row, *len),
        Call::Gather(rows) => cache.gather(rows),
        Call::Remove(row) => cache.remove(*row),
        Call::Fork(row, times) => cache.fork(*row, *times),
        Call::Reserve(capacity) => cache.reserve(*capacity),
        Call::Push => cache.push(),
        Call::CopyPrefix(from, to, len) => cache.copy_prefix(*from, &[*to], *len),
        Call::Clear => {
            cache.clear();
            Ok(())
        }
        Call::CopyRow(row, from) => {
            let mut other = model.cache(CacheStorage::Growing, 2, 9)?;
            model.hidden_states(&TokenBatch::new(&[vec![1, 2, 3], vec![4]], model)?, &mut other)?;
            cache.copy_row(*row, &other, *from)
        }
        Call::Segment(row, start, end) => cache.segment(*row, *start..*end).map(|_| ()),
        Call::AppendSegments(rows, tokens) => {
            let mut other = model.cache(CacheStorage::Growing, 1, 9)?;
            model.hidden_states(&TokenBatch::new(&[vec![1, 2, 3]], model)?, &mut other)?;
            let segment = other.segment(0, 0..3)?;
            cache.append_segments(&vec![vec![(segment, *tokens)]; (*rows).min(50)])
        }
    }
}

#[test]
fn random_calls_to_a_cache_give_a_result_or_an_error_within_its_limit() {
    alone(|| {
        let model = random_model(small_config());
        let calls = proptest::collection::vec(calls(), 1..12);
        let given = (proptest::sample::select(&STORAGES[..]), sizes(), sizes(), 1_usize << 12..4 << 20, calls);
        let mut runner = TestRunner::new(contextualize_config(ProptestConfig::with_cases(200)));
        let property = |(storage, batch, capacity, limit, calls): (CacheStorage, usize, usize, usize, Vec<Call>)| {
            let limit = MemoryLimit::bytes(limit);
            let config = KvCacheConfig::new(batch, capacity).with_storage(storage).with_limit(limit);
            let (made, taken) = peak(|| config.init(model.config(), &device()));
            prop_assert!(taken <= limit.get().unwrap() + (1 << 16), "{taken} bytes for {batch} rows");
            let Ok(mut cache) = made else { return Ok(()) };
            for call in &calls {
                let before = cache.lens().to_vec();
                let (result, taken) = peak(|| apply(&model, &mut cache, call));
                let max = limit.get().unwrap();
                prop_assert!(cache.bytes().reserved <= max, "{call:?}: {:?}", cache.bytes());
                // The cache anew, and what a forward takes, or copies of some layers, besides.
                prop_assert!(taken <= 2 * max + (1 << 20), "{call:?}: {taken} bytes, the limit is {max}");
                if result.is_err() {
                    prop_assert_eq!(cache.lens(), &before[..], "{:?}: an error leaves it as it was", call);
                }
            }
            Ok(())
        };
        runner.run(&given, property).unwrap();
    });
}

#[test]
fn more_rows_than_memory_are_refused_by_the_systems_limit() {
    alone(|| {
        let config = Gpt2Config { n_positions: 1024, n_embd: 768, n_layer: 12, n_head: 12, ..Gpt2Config::default() };
        for batch in [1_000_000, 1 << 40, usize::MAX] {
            let preallocated = KvCacheConfig::new(batch, 1024).with_storage(CacheStorage::Preallocated);
            let (made, taken) = peak(|| preallocated.init(&config, &device()));
            assert!(matches!(made, Err(Error::OutOfMemory { .. })), "{batch} rows");
            assert!(taken < 1 << 20, "{taken} bytes");
        }
        // One that holds nothing takes nothing; but its rows are counted.
        let growing = |batch| {
            let growing = KvCacheConfig::new(batch, 1024).with_storage(CacheStorage::Growing);
            growing.init(&config, &device())
        };
        assert!(growing(1000).is_ok());
        assert!(matches!(growing(usize::MAX), Err(Error::OutOfMemory { .. })));
        let one = KvCacheConfig::new(1, 64).with_storage(CacheStorage::Preallocated);
        let mut one = one.init(&config, &device()).unwrap();
        for times in [100_000_000, usize::MAX] {
            let (made, taken) = peak(|| one.fork(0, times));
            assert!(matches!(made, Err(Error::OutOfMemory { .. })) && one.batch() == 1, "{times} copies");
            assert!(taken < 1 << 20, "{taken} bytes");
        }
    });
}

/// Rows as long as the longest would be nine million million tokens.
#[test]
fn a_batch_with_one_long_row_takes_what_its_tokens_take() {
    alone(|| {
        let model = random_model(small_config());
        let mut rows = vec![vec![1_u32]; 3_000_000];
        rows[7] = vec![1; 3_000_000];
        let (batch, taken) = peak(|| TokenBatch::new(&rows, &model).unwrap());
        assert_eq!(batch.tokens(), 5_999_999);
        assert!(taken < 200 << 20, "{taken} bytes");
    });
}

/// Rows that come one after the other make a cache longer, which has the old memory and the new one for a while.
#[test]
fn a_cache_that_outgrows_its_room_keeps_to_its_limit() {
    alone(|| {
        let model = random_model(Gpt2Config { n_positions: 256, n_embd: 96, n_layer: 4, ..small_config() });
        let mut other = model.cache(CacheStorage::Growing, 1, 256).unwrap();
        model.hidden_states(&TokenBatch::new(&[[7_u32; 256]], &model).unwrap(), &mut other).unwrap();
        let segment = other.segment(0, 0..256).unwrap();
        let mut most = 0;
        for percent in [40, 60, 80, 100, 120, 140] {
            let limit = segment.bytes() * 9 * percent / 100;
            let config = KvCacheConfig::new(1, 256).with_storage(CacheStorage::Paged);
            let config = config.with_limit(MemoryLimit::bytes(limit));
            let (rows, taken) = peak(|| {
                let mut cache = config.init(model.config(), &device()).unwrap();
                for row in 0..9 {
                    let mut segments = vec![vec![]; row];
                    segments.push(vec![(segment.clone(), 256)]);
                    let is_there = row == 0 || cache.push().is_ok();
                    if !is_there || cache.append_segments(&segments).is_err() {
                        return row;
                    }
                }
                9
            });
            // A layer of a row besides, while it is written.
            assert!(
                taken <= limit + segment.bytes() / 2 + (1 << 18),
                "{percent}%: {taken} bytes, the limit is {limit}"
            );
            most = most.max(rows);
        }
        assert_eq!(most, 9);
    });
}

#[test]
fn a_growing_cache_that_was_emptied_counts_the_room_that_it_still_has() {
    alone(|| {
        let model = random_model(small_config());
        let limit = MemoryLimit::bytes(1 << 20);
        for keep in [0, 1] {
            let growing = KvCacheConfig::new(1, 24).with_storage(CacheStorage::Growing).with_limit(limit);
            let mut cache = growing.init(model.config(), &device()).unwrap();
            model.hidden_states(&TokenBatch::new(&[[7_u32; 24]], &model).unwrap(), &mut cache).unwrap();
            cache.truncate(0, keep).unwrap();
            let mut other = model.cache(CacheStorage::Growing, 1, 1).unwrap();
            model.hidden_states(&TokenBatch::new(&[[7_u32]], &model).unwrap(), &mut other).unwrap();
            let one = vec![(other.segment(0, 0..1).unwrap(), 1)];
            // Pages are shared until the rows go on.
            let (result, taken) = peak(|| {
                cache.fork(0, 2000)?;
                let result = cache.append_segments(&vec![one; 2001]);
                (0..2000).try_for_each(|_| cache.remove(1))?;
                result
            });
            assert!(
                matches!(result, Err(Error::OutOfMemory { .. })),
                "{keep} of 24 positions: {result:?}, {taken} bytes"
            );
            assert!(taken < 1 << 20 && cache.batch() == 1, "{taken} bytes");
        }
    });
}

#[test]
fn prompts_are_held_against_the_limit_before_they_are_copied() {
    alone(|| {
        let model = random_model(small_config());
        let generator = Generator::new(model).with_tokenizer(letters()).with_memory_limit(MemoryLimit::bytes(1 << 20));
        let long = GenerateRequest::new([vec![1_u32; 10_000_000]]);
        let (result, taken) = peak(|| generator.complete(&long).map(|_| ()));
        assert!(matches!(result, Err(Error::ContextOverflow { .. })) && taken < 1 << 16, "{result:?}, {taken} bytes");
        let slides = GenerateRequest { on_context_end: ContextEnd::Slide { keep: None }, ..long };
        let (result, taken) = peak(|| generator.complete(&slides).map(|_| ()));
        assert!(matches!(result, Err(Error::OutOfMemory { .. })) && taken < 1 << 16, "{result:?}, {taken} bytes");
        let text = GenerateRequest::new(["a".repeat(1 << 20)]);
        let (result, taken) = peak(|| generator.complete(&text).map(|_| ()));
        assert!(matches!(result, Err(Error::OutOfMemory { .. })) && taken < 1 << 16, "{result:?}, {taken} bytes");
    });
}

#[test]
fn drafts_longer_than_the_text_are_not_reckoned() {
    alone(|| {
        let model = random_model(Gpt2Config { n_positions: 20_000, ..small_config() });
        let generator = |len| {
            let speculation = Speculation { draft_len: DraftLen::Fixed(len), ..Speculation::default() };
            let generator = Generator::new(model.clone()).with_decoder(Decoder::Speculative(speculation));
            generator
                .with_draft(Draft::Ngram(Ngram::default()))
                .unwrap()
                .with_memory_limit(MemoryLimit::bytes(16 << 20))
        };
        assert!(generator(usize::MAX).complete(&greedy(&[vec![1, 2, 3]], 8)).is_ok());
    });
}

#[test]
fn layers_that_no_memory_holds_are_refused() {
    alone(|| {
        let config = Gpt2Config {
            vocab_size: 1,
            n_positions: 1,
            n_embd: 1,
            n_head: 1,
            n_layer: i32::MAX as usize,
            ..small_config()
        };
        let (model, taken) = peak(|| config.init(&device()).map(|_| ()));
        assert!(
            matches!(model, Err(Error::OutOfMemory { .. } | Error::Config { .. })) && taken < 1 << 20,
            "{taken} bytes"
        );
    });
}

/// What a device reads as one buffer is checked wherever a buffer is made or grows, and not only where a cache is made.
#[test]
fn a_buffer_that_grows_beyond_what_the_device_reads_is_refused() {
    alone(|| {
        for (name, device) in devices() {
            let largest = gpt2_burn::backends::largest_buffer(&device).filter(|largest| *largest < 1 << 33);
            let Some(largest) = largest else { continue };
            let config = Gpt2Config {
                n_positions: 1024,
                n_embd: 512,
                n_head: 8,
                n_layer: 1,
                vocab_size: 50_000,
                ..small_config()
            };
            let row = config.n_embd * size_of::<f32>();
            let rows = largest / (row * 64) + 1;
            let new = |batch, capacity| KvCacheConfig::new(batch, capacity).init(&config, &device);
            let refused = |result: Result<(), Error>, what: &str| {
                assert!(matches!(result, Err(Error::Mismatch { .. })), "{what} on {name}: {result:?}");
            };
            let mut cache = new(1, 64).unwrap();
            refused(cache.gather(&vec![0; rows]), "gather");
            refused(cache.fork(0, rows), "fork");
            assert_eq!(cache.batch(), 1);
            let mut cache = new(largest / (row * 1024) + 1, 64).unwrap();
            refused(cache.reserve(1024), "reserve");
            refused(new(largest / (row * 1024) + 1, 1024).map(|_| ()), "new");
            // Logits of every position.
            let model = config.init(&device).unwrap();
            let ids = vec![vec![1_u32; 512]; largest / (config.vocab_size * 512 * size_of::<f32>()) + 1];
            let growing = KvCacheConfig::new(ids.len(), 512).with_storage(CacheStorage::Growing);
            let mut cache = growing.init(&config, &device).unwrap();
            let tokens = TokenBatch::new(&ids, &model).unwrap();
            refused(model.forward(&tokens, &mut cache, Logits::All).map(|_| ()), "logits");
            assert!(cache.is_empty());
            // Samples of a prompt, each as one row.
            let generator = Generator::new(model);
            let request = GenerateRequest { num_samples: rows, ..greedy(&[vec![1]], 64) };
            let result = generator.complete(&request).map(|_| ());
            assert!(
                matches!(result, Err(Error::Mismatch { .. } | Error::OutOfMemory { .. })),
                "samples on {name}: {result:?}"
            );
        }
    });
}
