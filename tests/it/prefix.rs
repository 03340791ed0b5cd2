//! Shared prefixes: the same tokens as without, from fewer that are computed.

use crate::common::{STORAGES, fixture, greedy, ids_of, load, random_model, small_config};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::burn::tensor::s;
use gpt2_burn::generate::{ContextEnd, Decoder, GenerateRequest, Generator, Output};
use gpt2_burn::prefix::{Fingerprint, PrefixCache, Reuse};
use gpt2_burn::sampling::Sampling;
use gpt2_burn::speculative::{Acceptance, Draft, DraftLen, Speculation};
use gpt2_burn::{CacheStorage, Error, Gpt2, Gpt2Config, WeightFormat};
use proptest::prelude::*;

const ROOM: usize = 1 << 30;

fn model() -> Gpt2 {
    random_model(small_config()).pack(WeightFormat::F32).unwrap()
}

fn with_prefixes(model: &Gpt2, storage: CacheStorage, prefixes: &PrefixCache) -> Generator {
    let generator = Generator::new(model.clone()).with_decoder(Decoder::Kv(storage));
    generator.with_prefix_cache(prefixes).unwrap()
}

/// Drafts are those of a smaller model, and verified so that ids are those of plain sampling.
fn speculating(model: &Gpt2, storage: CacheStorage) -> Generator {
    let draft = random_model(Gpt2Config { n_layer: 1, n_embd: 12, ..small_config() });
    let draft = draft.pack(WeightFormat::F32).unwrap();
    let speculation = Speculation { storage, draft_len: DraftLen::Fixed(3), acceptance: Acceptance::Match };
    let generator = Generator::new(model.clone()).with_decoder(Decoder::Speculative(speculation));
    generator.with_draft(Draft::Model(draft)).unwrap()
}

fn generator(prefixes: &PrefixCache) -> Generator {
    with_prefixes(&model(), CacheStorage::Preallocated, prefixes)
}

/// Computed and reused tokens of the prompts.
fn counts(output: &Output) -> (usize, usize) {
    let report = &output.report;
    assert_eq!(report.computed_prompt_tokens + report.reused_prompt_tokens, report.prompt_tokens);
    let sharing = report.sharing.as_ref().unwrap();
    assert_eq!(
        (sharing.computed_tokens, sharing.saved_tokens),
        (report.computed_prompt_tokens, report.reused_prompt_tokens)
    );
    (report.computed_prompt_tokens, report.reused_prompt_tokens)
}

fn run(generator: &Generator, prompts: &[Vec<u32>]) -> (usize, usize) {
    counts(&generator.complete(&greedy(prompts, 3)).unwrap())
}

/// Batches of prompts that begin with parts of earlier ones: nested, identical, disjoint, and parting anywhere.
fn batches() -> impl Strategy<Value = Vec<Vec<Vec<u32>>>> {
    let prompt = (any::<usize>(), 0_usize..20, proptest::collection::vec(0_u32..61, 0..8));
    let batch = proptest::collection::vec(prompt, 1..7);
    proptest::collection::vec(batch, 1..5).prop_map(|batches| {
        let mut known: Vec<Vec<u32>> = vec![vec![]];
        let mut prompt = |(from, cut, more): (usize, usize, Vec<u32>)| {
            let from = &known[from % known.len()];
            let mut ids = [&from[..cut.min(from.len())], &more].concat();
            ids.truncate(20);
            if ids.is_empty() {
                ids.push(7);
            }
            known.push(ids.clone());
            ids
        };
        batches.into_iter().map(|batch| batch.into_iter().map(&mut prompt).collect()).collect()
    })
}

fn ends() -> impl Strategy<Value = ContextEnd> {
    prop_oneof![
        Just(ContextEnd::Stop),
        Just(ContextEnd::Slide { keep: None }),
        Just(ContextEnd::Slide { keep: Some(5) }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn any_batches_give_the_same_bits_with_and_without(
        batches in batches(),
        on_context_end in ends(),
        storage in proptest::sample::select(STORAGES.to_vec()),
        reuse in prop_oneof![3 => Just(Reuse::Radix), 1 => Just(Reuse::Exact)],
        budget in prop_oneof![3 => Just(ROOM), 1 => 0_usize..40_000],
        num_samples in 1_usize..3,
        cache_generated in any::<bool>(),
        deterministic in any::<bool>(),
        speculative in any::<bool>(),
    ) {
        // The kernels' sums have one order, and so have those of the deterministic mode.
        let model = match deterministic {
            false => model(),
            true => random_model(small_config()).with_determinism(true).unwrap(),
        };
        let prefixes = PrefixCache::new(budget).with_reuse(reuse);
        let shared = match speculative {
            false => with_prefixes(&model, storage, &prefixes),
            true => speculating(&model, storage).with_prefix_cache(&prefixes).unwrap(),
        };
        let plain = Generator::new(model).with_decoder(Decoder::Kv(storage));
        for batch in &batches {
            let request = GenerateRequest {
                sampling: Sampling { top_k: Some(9), ..Sampling::default() },
                on_context_end,
                num_samples,
                cache_generated,
                logprobs: Some(2),
                ..greedy(batch, 8)
            };
            let plan = shared.plan(&request).unwrap().unwrap();
            let output = shared.complete(&request).unwrap();
            prop_assert_eq!(counts(&output), (plan.computed_tokens(), plan.saved_tokens()));
            prop_assert_eq!(&output.completions, &plain.complete(&request).unwrap().completions);
            prop_assert!(prefixes.bytes() <= budget);
            // Once more: if there is room for it, only the last token of each prompt is not known.
            let again = shared.complete(&request).unwrap();
            prop_assert_eq!(&again.completions, &output.completions);
            if budget == ROOM {
                let unique = plan.unique_prompts().len();
                prop_assert_eq!(counts(&again).0, unique);
                prop_assert!(counts(&again).1 > 0 || batch.iter().all(|ids| ids.len() == 1));
            }
        }
    }
}

#[test]
fn what_prompts_share_is_computed_once() {
    let long: Vec<u32> = (1..15).collect();
    let nested = [long[..9].to_vec(), long[..12].to_vec(), long.clone()];
    let identical = vec![long[..8].to_vec(); 3];
    let parting = [[&long[..10], &[40, 41]].concat(), [&long[..6], &[50]].concat(), [&long[..10], &[42]].concat()];
    let disjoint = [vec![1, 2, 3], vec![4, 5], vec![6]];
    for storage in STORAGES {
        // Of what begins with another one, only what comes then; of one that a longer one begins with, the last token once more.
        let mut turned = nested.clone();
        turned.reverse();
        for (prompts, computed) in
            [(&nested[..], 14), (&turned, 14 + 2), (&identical, 8), (&parting, 10 + 2 + 1 + 1), (&disjoint, 6)]
        {
            let prefixes = PrefixCache::new(ROOM);
            let shared = with_prefixes(&model(), storage, &prefixes);
            let total: usize = prompts.iter().map(Vec::len).sum();
            assert_eq!(run(&shared, prompts), (computed, total - computed));
            assert_eq!(total - computed > 0, prompts != disjoint, "and the twin of what hits is a miss");
            let plain = Generator::new(model()).with_decoder(Decoder::Kv(storage));
            assert_eq!(ids_of(&shared, &greedy(prompts, 9)), ids_of(&plain, &greedy(prompts, 9)));
            assert!(prefixes.stats().found_tokens > 0, "the second time there is something of each");
        }
    }
}

#[test]
fn a_prompt_is_known_up_to_its_last_token_the_second_time() {
    for (storage, samples) in STORAGES.into_iter().flat_map(|storage| [(storage, 1), (storage, 3)]) {
        let prefixes = PrefixCache::new(ROOM);
        let shared = with_prefixes(&model(), storage, &prefixes);
        let request = |ids: &[u32]| GenerateRequest { num_samples: samples, ..greedy(&[ids.to_vec()], 4) };
        let count = |ids: &[u32]| counts(&shared.complete(&request(ids)).unwrap());
        assert_eq!(count(&[1, 2, 3, 4, 5, 6]), (6, 0));
        assert_eq!(count(&[1, 2, 3, 4, 5, 6]), (1, 5));
        assert_eq!(count(&[1, 2, 3, 4]), (1, 3), "a prefix of it, too");
        assert_eq!(count(&[1, 2, 3, 9, 8]), (2, 3), "it parts in the middle of a node");
        assert_eq!(count(&[1, 2, 3, 4, 5, 6, 7]), (1, 6));
        assert_eq!(count(&[1]), (1, 0));
        assert_eq!(count(&[9, 1, 2]), (3, 0), "another first token is another prompt");
        assert_eq!(prefixes.to_string(), "[1, 2, 3]\n├── [4, 5, 6]\n│   └── [7]\n└── [9, 8]\n[9, 1, 2]\n");
        // 5 + 3 + 3 + 6 of what was asked for but for the last tokens was there.
        let stats = prefixes.stats();
        assert_eq!((stats.lookups, stats.hits, stats.asked_tokens, stats.found_tokens), (7, 4, 25, 17));
        assert_eq!(stats.hit_rate(), 17.0 / 25.0);
        // 2 x layers x width x 4 bytes a token. In pages of 16 positions, where two that part in one have one each.
        let positions = if storage == CacheStorage::Paged { 4 * 16 } else { 12 };
        assert_eq!((prefixes.tokens(), prefixes.bytes()), (12, positions * 2 * 2 * 24 * 4));
    }
}

#[test]
fn a_draft_has_prefixes_of_its_own_in_the_same_cache() {
    let prompts = [(1..15).collect::<Vec<u32>>(), (1..12).chain([40, 41]).collect()];
    for (storage, cache_generated) in STORAGES.into_iter().flat_map(|storage| [(storage, false), (storage, true)]) {
        let prefixes = PrefixCache::new(ROOM);
        let shared = speculating(&model(), storage).with_prefix_cache(&prefixes).unwrap();
        let plain = speculating(&model(), storage);
        let request = GenerateRequest { cache_generated, ..greedy(&prompts, 8) };
        let drafted = |generator: &Generator| {
            let output = generator.complete(&request).unwrap();
            let ids: Vec<Vec<u32>> = output.completions.into_iter().map(|completion| completion.ids).collect();
            (ids, output.report.speculation.unwrap().draft_computed_tokens, output.report.reused_prompt_tokens)
        };
        let (ids, without, none) = drafted(&plain);
        let (first_ids, first, reused) = drafted(&shared);
        let (second_ids, second, again) = drafted(&shared);
        assert_eq!((&first_ids, &second_ids), (&ids, &ids));
        assert_eq!((none, reused, again), (0, 11, 13 + 12), "of the target");
        // 11 tokens are shared; the draft's first call has each prompt and its first new token.
        assert_eq!((without - first, without - second), (11, 14 + 13), "of the draft");
        let target = with_prefixes(&model(), storage, &prefixes);
        assert_eq!(run(&target, &prompts), (2, 25), "without speculation, the target's are the same");
        let tokens = prefixes.held(target.fingerprint().unwrap(), &[&prompts[0][..], &ids[0]].concat());
        assert_eq!(tokens, if cache_generated { 14 + 7 } else { 14 });
    }
}

#[test]
fn without_kernels_ids_are_the_same_but_for_ties() {
    let model = load(fixture("hf-tiny"));
    let prefix: Vec<u32> = (0..30).map(|n| n * 7 % 96).collect();
    let prompts: Vec<Vec<u32>> = (0..6).map(|row| [&prefix[..25 + row], &[row as u32 + 50][..]].concat()).collect();
    for storage in STORAGES {
        let shared = with_prefixes(&model, storage, &PrefixCache::new(ROOM));
        for _ in 0..2 {
            let output = shared.complete(&greedy(&prompts, 20)).unwrap();
            assert!(counts(&output).1 > 0);
            let ids: Vec<Vec<u32>> = output.completions.into_iter().map(|completion| completion.ids).collect();
            let verdict = gpt2_burn::measure::check_greedy(&shared, &prompts, &ids).unwrap();
            assert!(verdict.is_equal(), "{verdict:?}");
            assert_eq!(verdict.tokens, 120);
        }
    }
}

#[test]
fn only_whole_prompts_count_in_the_exact_way() {
    let prefixes = PrefixCache::new(ROOM);
    let exact = generator(&prefixes.with_reuse(Reuse::Exact));
    let prompts = [vec![1, 2, 3, 4], vec![1, 2, 3, 5], vec![1, 2, 3, 4]];
    assert_eq!(run(&exact, &prompts), (8, 4), "identical ones are one");
    assert_eq!(run(&exact, &prompts), (2, 10));
    assert_eq!(run(&exact, &[vec![1, 2, 3, 4, 6]]), (5, 0), "a longer one is another");
    assert_eq!(run(&exact, &[vec![1, 2, 3]]), (3, 0), "and so is a prefix");
    assert_eq!(run(&exact, &[vec![1, 2, 3]]), (1, 2));
    let stats = prefixes.stats();
    assert_eq!((stats.lookups, stats.hits, stats.found_tokens), (7, 3, 8));
    let radix = generator(&prefixes);
    assert_eq!(run(&radix, &[vec![1, 2, 3, 5, 9]]), (1, 4), "the other way takes what it finds");
}

#[test]
fn new_tokens_are_known_if_that_is_asked_for() {
    for cache_generated in [false, true] {
        let prefixes = PrefixCache::new(ROOM);
        let shared = generator(&prefixes);
        let first = GenerateRequest { cache_generated, num_samples: 2, ..greedy(&[vec![1, 2, 3]], 6) };
        let output = shared.complete(&first).unwrap();
        let next = [&[1, 2, 3], &output.completions[0].ids[..], &[9, 9]].concat();
        // The last new token was never fed back.
        assert_eq!(run(&shared, &[next]), if cache_generated { (3, 8) } else { (8, 3) });
    }
}

#[test]
fn models_do_not_mix() {
    let prefixes = PrefixCache::new(ROOM);
    let prompts = [vec![1, 2, 3, 4, 5]];
    let plain = random_model(small_config());
    let other = random_model(Gpt2Config { layer_norm_epsilon: 1e-4, ..small_config() });
    let generators = [
        generator(&prefixes),
        with_prefixes(&plain, CacheStorage::Preallocated, &prefixes),
        with_prefixes(&plain.clone().with_determinism(true).unwrap(), CacheStorage::Preallocated, &prefixes),
        with_prefixes(&other, CacheStorage::Preallocated, &prefixes),
        with_prefixes(&plain.clone().pack(WeightFormat::Bf16).unwrap(), CacheStorage::Preallocated, &prefixes),
        generator(&prefixes).with_cache_dtype(DType::F16).unwrap(),
    ];
    for generator in &generators {
        assert_eq!(run(generator, &prompts), (5, 0));
    }
    for generator in &generators {
        assert_eq!(run(generator, &prompts), (1, 4));
    }
    // One weight of one layer differs.
    let mut changed = plain.clone();
    let gamma = changed.h[1].ln_2.gamma.val();
    let value = gamma.clone().narrow(0, 3, 1) + 1e-3;
    changed.h[1].ln_2.gamma = gpt2_burn::burn::module::Param::from_tensor(gamma.slice_assign(s![3..4], value));
    let changed = with_prefixes(&changed, CacheStorage::Growing, &prefixes);
    assert_eq!(run(&changed, &prompts), (5, 0));
    let growing = with_prefixes(&plain, CacheStorage::Growing, &prefixes);
    assert_eq!(run(&growing, &prompts), (1, 4), "how a cache is stored makes no difference");
    assert_eq!(growing.fingerprint(), Some(Fingerprint::new(&plain, DType::F32).unwrap()));
}

#[test]
fn what_is_pinned_stays_when_all_else_is_cleared() {
    let prefixes = PrefixCache::new(ROOM);
    let shared = generator(&prefixes);
    let fingerprint = shared.fingerprint().unwrap();
    run(&shared, &[vec![1, 2, 3, 4, 5], vec![6, 7]]);
    let pin = prefixes.pin(fingerprint, &[1, 2, 3, 60]);
    assert_eq!(pin.ids(), [1, 2, 3]);
    prefixes.clear();
    assert_eq!(prefixes.to_string(), "[1, 2, 3] pinned\n");
    assert_eq!(run(&shared, &[vec![1, 2, 3, 4, 5]]), (2, 3));
    drop(pin);
    prefixes.clear();
    assert_eq!((prefixes.tokens(), prefixes.bytes()), (0, 0));
    assert_eq!(run(&shared, &[vec![1, 2, 3, 4, 5]]), (5, 0));
    assert!(prefixes.pin(fingerprint, &[9]).ids().is_empty());
}

#[test]
fn a_budget_is_kept_and_results_stay_right() {
    let token = 2 * 2 * 24 * 4;
    for budget in [0, token, 7 * token, 30 * token] {
        let prefixes = PrefixCache::new(budget);
        let (shared, plain) = (generator(&prefixes), Generator::new(model()));
        for n in 0..30_u32 {
            let prompts = [vec![n % 4, 1, 2, 3, n], vec![n % 4, 1, 2, 9], vec![5; 1 + n as usize % 15]];
            assert_eq!(ids_of(&shared, &greedy(&prompts, 3)), ids_of(&plain, &greedy(&prompts, 3)));
            assert!(prefixes.bytes() <= budget, "{} of {budget}", prefixes.bytes());
        }
        assert_eq!(prefixes.stats().found_tokens > 0, budget > token, "{:?}", prefixes.stats());
    }
    // What is pinned may be more; it goes when the pin does.
    let prefixes = PrefixCache::new(5 * token);
    let shared = generator(&prefixes);
    run(&shared, &[vec![1, 2, 3, 4]]);
    let pin = prefixes.pin(shared.fingerprint().unwrap(), &[1, 2, 3, 4]);
    run(&shared, &[vec![7, 8, 9]]);
    assert_eq!((pin.ids().len(), prefixes.tokens()), (4, 4));
    drop(pin);
    run(&shared, &[vec![7, 8, 9]]);
    assert_eq!(prefixes.tokens(), 3);
}

#[test]
fn naive_decoding_has_nothing_to_share() {
    let shared = generator(&PrefixCache::new(ROOM)).with_decoder(Decoder::Naive);
    let error = shared.complete(&greedy(&[vec![1, 2]], 2)).unwrap_err();
    assert!(matches!(error, Error::Mismatch { what: "decoder beside a cache of prefixes", .. }), "{error}");
    assert_eq!(Generator::new(model()).plan(&greedy(&[vec![1]], 1)).unwrap(), None);
    assert!(Generator::new(model()).restore_prefixes("nothing").is_err());
}

#[test]
fn a_request_that_fails_leaves_nothing_in_use() {
    let prefixes = PrefixCache::new(ROOM);
    let shared = generator(&prefixes);
    run(&shared, &[vec![1, 2, 3]]);
    assert!(shared.complete(&greedy(&[vec![1, 2, 3], vec![1, 2, 3, 99]], 2)).is_err());
    assert!(shared.plan(&greedy(&[vec![]], 2)).is_err());
    let mut half = shared.generate(&greedy(&[vec![1, 2, 3, 4]], 5)).unwrap();
    half.next().unwrap().unwrap();
    drop(half);
    prefixes.clear();
    assert_eq!(prefixes.tokens(), 0);
}

#[test]
fn eight_threads_share_a_cache() {
    // Room for a part of what they ask for, so that they take from each other and drive each other's out.
    let prefixes = PrefixCache::new(60 * 2 * 2 * 24 * 4);
    let model = model();
    let plain = Generator::new(model.clone());
    let prompt = |n: u32| -> Vec<u32> {
        let tokens = 1 + n as usize * 7 % 18;
        (0..tokens as u32).map(|at| if at < 6 { n % 3 } else { (n * 13 + at) % 61 }).collect()
    };
    let batch = |n: u32| -> Vec<Vec<u32>> { (0..1 + n % 3).map(|row| prompt(n % 23 + row)).collect() };
    let expected: Vec<_> = (0..23 * 3).map(|n| ids_of(&plain, &greedy(&batch(n), 4))).collect();
    std::thread::scope(|scope| {
        for thread in 0..8_u32 {
            let (prefixes, model, expected) = (prefixes.clone(), model.clone(), &expected);
            scope.spawn(move || {
                let storage = STORAGES[thread as usize % 3];
                let shared = with_prefixes(&model, storage, &prefixes);
                for round in 0..60 {
                    let n = (round * 17 + thread * 29) % (23 * 3);
                    let pin = (round % 4 == 0).then(|| prefixes.pin(shared.fingerprint().unwrap(), &prompt(n)));
                    assert_eq!(ids_of(&shared, &greedy(&batch(n), 4)), expected[n as usize], "thread {thread}, {n}");
                    drop(pin);
                    if round == 30 && thread == 3 {
                        prefixes.clear();
                    }
                }
            });
        }
    });
    assert!(prefixes.bytes() <= prefixes.budget());
    let stats = prefixes.stats();
    assert!(stats.found_tokens > 0 && stats.evicted_tokens > 0, "{stats:?}");
    prefixes.clear();
    assert_eq!(prefixes.tokens(), 0, "nothing is in use any more");
}

fn is_shared<T: Send + Sync>(_: &T) {}

#[test]
fn caches_and_pins_are_for_all_threads() {
    let prefixes = PrefixCache::new(0);
    is_shared(&prefixes);
    is_shared(&prefixes.pin(generator(&prefixes).fingerprint().unwrap(), &[1]));
    is_shared(&generator(&prefixes));
}

/// What is found is where it was computed, whoever asks.
#[test]
fn nothing_is_copied_of_prefixes_in_pages_but_a_tail_for_each_row() {
    let prefixes = PrefixCache::new(ROOM);
    let [first, second] = [(); 2].map(|()| with_prefixes(&model(), CacheStorage::Paged, &prefixes));
    let prompt: Vec<u32> = (1..20).collect();
    assert_eq!(run(&first, std::slice::from_ref(&prompt)), (19, 0));
    let page = 16 * 2 * 2 * 24 * 4;
    assert_eq!((prefixes.tokens(), prefixes.bytes()), (19, 2 * page));
    for generator in [&first, &second] {
        let prompts: Vec<Vec<u32>> = (40..43).map(|id| [&prompt[..18], &[id]].concat()).collect();
        let output = generator.complete(&greedy(&prompts, 2)).unwrap();
        assert_eq!(output.report.reused_prompt_tokens, 3 * 18);
        // A full page that all of them share, and three tails: the first time one of each row, then each where it was.
        assert_eq!((output.report.pages.shared > 0, prefixes.bytes()), (true, 5 * page));
        let plain = Generator::new(model());
        assert_eq!(ids_of(generator, &greedy(&prompts, 2)), ids_of(&plain, &greedy(&prompts, 2)));
    }
    prefixes.clear();
    assert_eq!(prefixes.bytes(), 0);
}

/// Such callers wait for each other on threads that the one who computes needs, if it does not compute apart.
#[test]
fn requests_on_threads_that_compute_do_not_wait_for_each_other_forever() {
    let prefixes = PrefixCache::new(ROOM);
    let (threads, model) = (gpt2_burn::Threads::new(3).unwrap(), model());
    let plain = Generator::new(model.clone());
    let prompts: Vec<Vec<u32>> = (0..40).map(|n| (n % 5..n % 5 + 18).collect()).collect();
    let expected: Vec<_> = prompts.iter().map(|ids| ids_of(&plain, &greedy(std::slice::from_ref(ids), 4))).collect();
    let found = |ids: &Vec<u32>| {
        ids_of(&with_prefixes(&model, CacheStorage::Paged, &prefixes), &greedy(std::slice::from_ref(ids), 4))
    };
    let work = || {
        let results = std::sync::Mutex::new(vec![None; prompts.len()]);
        let each: Vec<(usize, &Vec<u32>)> = prompts.iter().enumerate().collect();
        gpt2_burn::Threads::for_each(each, |(n, ids)| results.lock().unwrap()[n] = Some(found(ids)));
        results.into_inner().unwrap()
    };
    let inside = std::thread::scope(|scope| {
        let outside = scope.spawn(|| prompts.iter().map(found).collect::<Vec<_>>());
        let inside = threads.install(work);
        assert_eq!(outside.join().unwrap(), expected);
        inside
    });
    assert_eq!(inside.into_iter().flatten().collect::<Vec<_>>(), expected);
    assert!(prefixes.stats().found_tokens > 0);
}
