//! One running batch: whatever rows come, go and stand beside it, a row gets what it gets alone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use gpt2_burn::backends::has_page_kernels;
use gpt2_burn::batch::{Batch, BatchOptions, BatchReport, RowEvent, RowId, RowRequest, RowToken};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::generate::{ContextEnd, Decoder, FinishReason, Generator, Prompt, Stop};
use gpt2_burn::prefix::{PrefixCache, Reuse};
use gpt2_burn::sampling::Sampling;
use gpt2_burn::speculative::{Acceptance, Draft, DraftLen, Ngram, Speculation};
use gpt2_burn::{CacheStorage, Error, Gpt2, Gpt2Config, MemoryLimit, WeightFormat};
use proptest::prelude::*;

use crate::common::{STORAGES, device, kv_bytes, random_model, small_config};

fn model() -> Gpt2 {
    random_model(small_config()).pack(WeightFormat::F32).unwrap()
}

fn request(prompt: &[u32], max_new_tokens: usize) -> RowRequest {
    RowRequest { max_new_tokens, sampling: Sampling::greedy(), ..RowRequest::new(prompt.to_vec()) }
}

/// What a row came to.
#[derive(Debug, Default)]
struct Outcome {
    tokens: Vec<RowToken>,
    finish: Option<FinishReason>,
    error: Option<Error>,
}

/// What is compared of tokens: ids and the bits of log-probabilities.
fn bits(tokens: &[RowToken]) -> Vec<(u32, Vec<u64>)> {
    let of_token = |token: &RowToken| {
        let logprobs = token.logprobs.iter();
        let values =
            logprobs.flat_map(|logprobs| [logprobs.chosen].into_iter().chain(logprobs.top.iter().map(|top| top.1)));
        (token.id, values.map(f64::to_bits).collect())
    };
    tokens.iter().map(of_token).collect()
}

#[derive(Default)]
struct Outcomes(BTreeMap<RowId, Outcome>);

impl Outcomes {
    fn note(&mut self, events: Vec<RowEvent>) {
        for event in events {
            let outcome = self.0.entry(event.row()).or_default();
            assert!(outcome.finish.is_none() && outcome.error.is_none(), "nothing comes behind a row's end");
            match event {
                RowEvent::Token(token) => {
                    outcome.finish = token.finish;
                    outcome.tokens.push(token);
                }
                RowEvent::Finished { finish, .. } => outcome.finish = Some(finish),
                RowEvent::Failed { error, .. } => outcome.error = Some(error),
                other => panic!("{other:?}"),
            }
        }
    }

    fn run(&mut self, batch: &mut Batch<'_>) {
        while !batch.is_empty() {
            let report = *batch.report();
            self.note(batch.step().unwrap());
            assert!(batch.report().computed_tokens > report.computed_tokens || batch.is_empty(), "it gets on");
        }
    }
}

/// A row by itself, all of it computed again for each token: nothing is kept that could be stale.
fn alone(model: &Gpt2, request: &RowRequest) -> Outcome {
    alone_by(&Generator::new(model.clone()).with_decoder(Decoder::Naive), request)
}

/// A row by itself. In a cache that rounds, it is what it is in such a cache.
fn alone_in(model: &Gpt2, dtype: DType, request: &RowRequest) -> Outcome {
    match dtype {
        DType::F32 => alone(model, request),
        dtype => alone_by(&Generator::new(model.clone()).with_cache_dtype(dtype).unwrap(), request),
    }
}

fn alone_by(generator: &Generator, request: &RowRequest) -> Outcome {
    let mut batch = generator.batch(BatchOptions::default().with_max_rows(1)).unwrap();
    batch.add(request).unwrap();
    let mut outcomes = Outcomes::default();
    outcomes.run(&mut batch);
    outcomes.0.into_values().next().unwrap()
}

#[derive(Clone, Debug)]
enum Action {
    Add(RowRequest),
    Step(usize),
    Cancel(usize),
}

/// Rows whose prompts begin with a part of one of a few texts.
fn rows() -> impl Strategy<Value = RowRequest> {
    // Up to two pages, and as few texts as make rows share them.
    let cut = prop_oneof![1 => 0_usize..16, 2 => 16_usize..34];
    let prompt = (0_u32..3, cut, proptest::collection::vec(0_u32..61, 0..6)).prop_map(|(text, cut, more)| {
        let mut ids: Vec<u32> = (0..cut as u32).map(|at| (at * 7 + text * 11) % 61).chain(more).collect();
        if ids.is_empty() {
            ids.push(text);
        }
        ids
    });
    let sampling = prop_oneof![
        3 => Just(Sampling::greedy()),
        2 => Just(Sampling::default()),
        1 => Just(Sampling { top_k: Some(5), temperature: 0.8, ..Sampling::default() }),
        1 => Just(Sampling { repetition_penalty: 1.4, ..Sampling::greedy() }),
    ];
    let end = prop_oneof![
        3 => Just(ContextEnd::Stop),
        1 => Just(ContextEnd::Slide { keep: None }),
        1 => Just(ContextEnd::Slide { keep: Some(6) }),
    ];
    let logprobs = prop_oneof![1 => Just(None), 3 => (0_usize..3).prop_map(Some)];
    (prompt, 0_usize..14, sampling, 0_u64..3, 0_u64..3, end, any::<bool>(), logprobs).prop_map(
        |(ids, max_new_tokens, sampling, seed, rng_stream, on_context_end, cache_generated, logprobs)| RowRequest {
            max_new_tokens,
            sampling,
            seed,
            rng_stream,
            on_context_end,
            cache_generated,
            logprobs,
            ..RowRequest::new(ids)
        },
    )
}

fn schedules() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        5 => rows().prop_map(Action::Add),
        4 => (1_usize..4).prop_map(Action::Step),
        1 => (0_usize..8).prop_map(Action::Cancel),
    ];
    proptest::collection::vec(action, 1..16)
}

/// No draft, good ones, and bad ones, of every length.
fn speculations() -> impl Strategy<Value = Option<(usize, DraftLen)>> {
    let len = prop_oneof![4 => (0_usize..6).prop_map(DraftLen::Fixed), 1 => Just(DraftLen::Auto)];
    prop_oneof![1 => Just(None), 2 => (0_usize..5, len).prop_map(Some)]
}

fn draft(model: &Gpt2, kind: usize) -> Draft {
    let small = || random_model(Gpt2Config { n_layer: 1, n_embd: 12, ..small_config() });
    match kind {
        0 => Draft::Model(small().pack(WeightFormat::F32).unwrap()),
        1 => Draft::Model(model.clone()),
        2 => Draft::EarlyExit { layers: 1 },
        3 => Draft::Ngram(Ngram { max_len: 3, min_len: 1 }),
        // As good as random, and shorter than asked for.
        _ => Draft::Function(Arc::new(|text, len| {
            let last = text.last().copied().unwrap_or(0);
            (0..(len as u32).min(last % 4)).map(|at| (last + at) % 61).collect()
        })),
    }
}

/// As many as `PROPTEST_CASES` says.
fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig::with_cases(cases.unwrap_or(default))
}

#[test]
fn any_schedule_gives_each_row_what_it_gets_alone() {
    let model = random_model(Gpt2Config { n_positions: 40, ..small_config() }).pack(WeightFormat::F32).unwrap();
    let [joins, leaves, hits, accepted, cancelled, finished] = [(); 6].map(|()| AtomicUsize::new(0));
    let [shared, copied] = [(); 2].map(|()| AtomicUsize::new(0));
    let mut dtypes = vec![DType::F32; 4];
    if has_page_kernels(&device()) {
        dtypes.extend([DType::F16, DType::I8]);
    }
    let count = |counter: &AtomicUsize, more: usize| counter.fetch_add(more, Ordering::Relaxed);
    proptest!(cases(300), |(
        actions in schedules(),
        storage in prop_oneof![
            1 => Just(CacheStorage::Growing),
            1 => Just(CacheStorage::Preallocated),
            3 => Just(CacheStorage::Paged),
        ],
        max_rows in 1_usize..7,
        step_tokens in prop_oneof![3 => 1_usize..40, 1 => Just(usize::MAX)],
        max_wait in 0_usize..4,
        prefixes in prop_oneof![
            Just(None),
            Just(Some((Reuse::Radix, 1 << 30))),
            Just(Some((Reuse::Exact, 1 << 30))),
            (0_usize..20_000).prop_map(|budget| Some((Reuse::Radix, budget))),
        ],
        speculation in speculations(),
        dtype in proptest::sample::select(dtypes.clone()),
    )| {
        let generator = Generator::new(model.clone()).with_decoder(Decoder::Kv(storage)).with_cache_dtype(dtype).unwrap();
        let generator = match speculation {
            None => generator,
            Some((kind, draft_len)) => {
                let speculation = Speculation { storage, draft_len, acceptance: Acceptance::Match };
                let generator = generator.with_decoder(Decoder::Speculative(speculation));
                generator.with_draft(draft(&model, kind)).unwrap()
            }
        };
        let generator = match prefixes {
            None => generator,
            Some((reuse, budget)) => generator.with_prefix_cache(&PrefixCache::new(budget).with_reuse(reuse)).unwrap(),
        };
        let options = BatchOptions::default().with_max_rows(max_rows).with_step_tokens(step_tokens);
        let Ran { report, accepted: drafted, asked, gone } = run_schedule(&generator, options.with_max_wait(max_wait), actions)?;
        count(&joins, report.joins);
        count(&leaves, report.leaves);
        count(&hits, report.prefix_hits);
        count(&accepted, drafted);
        count(&cancelled, gone);
        count(&finished, asked - gone);
        if storage == CacheStorage::Paged {
            count(&shared, report.pages.shared);
            count(&copied, report.pages.copied);
        }
        prop_assert_eq!(report.preemptions, 0);
    });
    if has_page_kernels(&device()) {
        let counts = [&shared, &copied].map(|count| count.load(Ordering::Relaxed));
        assert!(counts.iter().all(|count| *count > 20), "pages shared and copied: {counts:?}");
    }
    let counts = [&joins, &leaves, &hits, &accepted, &cancelled, &finished].map(|count| count.load(Ordering::Relaxed));
    assert!(counts.iter().all(|count| *count > 20), "joins, leaves, hits, accepted, cancelled, finished: {counts:?}");
}

/// What came of a schedule.
struct Ran {
    report: BatchReport,
    accepted: usize,
    /// Rows that were asked for, and those of them that were cancelled.
    asked: usize,
    gone: usize,
}

/// Does what a schedule says; each row gets what it gets alone.
fn run_schedule(generator: &Generator, options: BatchOptions, actions: Vec<Action>) -> Result<Ran, TestCaseError> {
    let mut batch = generator.batch(options).unwrap();
    let (mut asked, mut gone) = (Vec::new(), Vec::new());
    let mut outcomes = Outcomes::default();
    for action in actions {
        match action {
            Action::Add(request) => {
                let id = batch.add(&request).unwrap();
                asked.push((id, request));
            }
            Action::Step(steps) => (0..steps).for_each(|_| outcomes.note(batch.step().unwrap())),
            Action::Cancel(index) => {
                if let Some((id, _)) = asked.get(index)
                    && batch.cancel(*id)
                {
                    gone.push(*id);
                }
            }
        }
    }
    outcomes.run(&mut batch);
    for (id, request) in &asked {
        let expected = alone_in(generator.model(), generator.cache_dtype(), request);
        let found = outcomes.0.remove(id).unwrap_or_default();
        prop_assert!(found.error.is_none(), "{:?}", found.error);
        if gone.contains(id) {
            prop_assert_eq!(found.finish, None);
            let tokens = found.tokens.len();
            prop_assert_eq!(bits(&found.tokens), bits(&expected.tokens[..tokens]), "{} was cancelled", id);
            continue;
        }
        prop_assert_eq!(bits(&found.tokens), bits(&expected.tokens), "{} of {:?}", id, request);
        prop_assert_eq!(found.finish, expected.finish);
    }
    prop_assert!(outcomes.0.is_empty());
    let accepted = batch.speculation().map_or(0, |report| report.accepted);
    Ok(Ran { report: *batch.report(), accepted, asked: asked.len(), gone: gone.len() })
}

#[test]
fn rows_that_are_preempted_get_what_they_get_alone() {
    if !has_page_kernels(&device()) {
        return;
    }
    // A page takes more than what a forward computes with.
    let model = random_model(Gpt2Config { n_positions: 40, n_layer: 16, ..small_config() });
    let model = model.pack(WeightFormat::F32).unwrap();
    let page = 16 * 2 * 16 * 24 * 4;
    let [preempted, evicted, shared, accepted] = [(); 4].map(|()| AtomicUsize::new(0));
    proptest!(cases(150), |(
        actions in schedules(),
        storage in prop_oneof![1 => Just(CacheStorage::Growing), 3 => Just(CacheStorage::Paged)],
        pages in 8_usize..14,
        budget in prop_oneof![Just(None), Just(Some(0)), (0_usize..12).prop_map(Some), Just(Some(1000))],
        speculation in prop_oneof![1 => Just(None), 1 => (0_usize..5).prop_map(Some)],
    )| {
        let generator = Generator::new(model.clone()).with_decoder(Decoder::Kv(storage));
        let generator = match speculation {
            None => generator,
            Some(kind) => {
                let speculation = Speculation { storage, draft_len: DraftLen::Fixed(3), acceptance: Acceptance::Match };
                let generator = generator.with_decoder(Decoder::Speculative(speculation));
                generator.with_draft(draft(&model, kind)).unwrap()
            }
        };
        let prefixes = PrefixCache::new(budget.unwrap_or(0) * page);
        let generator = match budget {
            None => generator,
            Some(_) => generator.with_prefix_cache(&prefixes).unwrap(),
        };
        let generator = generator.with_memory_limit(MemoryLimit::bytes(pages * page));
        let ran = run_schedule(&generator, BatchOptions::default().with_max_rows(6), actions)?;
        preempted.fetch_add(ran.report.preemptions, Ordering::Relaxed);
        evicted.fetch_add(prefixes.stats().evicted_tokens, Ordering::Relaxed);
        shared.fetch_add(ran.report.pages.shared, Ordering::Relaxed);
        accepted.fetch_add(ran.accepted, Ordering::Relaxed);
        prop_assert!(ran.report.pages.used <= pages, "{:?} of {} pages", ran.report.pages, pages);
    });
    let counts = [&preempted, &evicted, &shared, &accepted].map(|count| count.load(Ordering::Relaxed));
    assert!(counts.iter().all(|count| *count > 20), "preempted, evicted, shared, accepted: {counts:?}");
}

/// A batch of greedy rows, and what they come to.
fn run(generator: &Generator, options: BatchOptions, rows: &[RowRequest]) -> (Vec<Outcome>, BatchReport) {
    let mut batch = generator.batch(options).unwrap();
    for row in rows {
        batch.add(row).unwrap();
    }
    let mut outcomes = Outcomes::default();
    outcomes.run(&mut batch);
    (outcomes.0.into_values().collect(), *batch.report())
}

#[test]
fn equal_prompts_are_computed_once() {
    let generator = Generator::new(model());
    let rows: Vec<RowRequest> = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
        .iter()
        .enumerate()
        .map(|(at, ids)| RowRequest { rng_stream: at as u64, sampling: Sampling::default(), ..request(ids, 3) })
        .collect();
    let (outcomes, report) = run(&generator, BatchOptions::default(), &rows);
    assert_eq!((report.computed_prompt_tokens, report.reused_prompt_tokens, report.prefix_hits), (10, 10, 2));
    for (outcome, row) in outcomes.iter().zip(&rows) {
        assert_eq!(bits(&outcome.tokens), bits(&alone(generator.model(), row).tokens));
    }
    // With room for one at a time nobody computes it for another.
    let (_, report) = run(&generator, BatchOptions::default().with_max_rows(1), &rows);
    assert_eq!((report.computed_prompt_tokens, report.joins), (20, 0));
}

#[test]
fn rows_share_whole_pages_without_a_cache_of_prefixes() {
    if !has_page_kernels(&device()) {
        return;
    }
    let generator = Generator::new(model());
    let text: Vec<u32> = (1..18).collect();
    // A page is 16 tokens here: the second row saves one, and the third one would save less.
    let rows = [&text[..], &[&text[..16], &[40, 41]].concat(), &[&text[..15], &[42, 43]].concat()];
    let rows: Vec<RowRequest> = rows.iter().map(|ids| request(ids, 4)).collect();
    let (outcomes, report) = run(&generator, BatchOptions::default(), &rows);
    assert_eq!((report.computed_prompt_tokens, report.reused_prompt_tokens), (17 + 2 + 17, 16));
    assert_eq!((report.pages.shared, report.pages.used, report.pages.copied), (1, 5, 0));
    for (outcome, row) in outcomes.iter().zip(&rows) {
        assert_eq!(bits(&outcome.tokens), bits(&alone(generator.model(), row).tokens));
    }
}

#[test]
fn a_prompt_waits_for_the_beginning_that_another_row_computes() {
    let (text, tokens): (Vec<u32>, _) = ((1..19).collect(), 18 + 2 + 2);
    let rows = [&text[..], &[&text[..16], &[40, 41]].concat(), &[&text[..16], &[42, 43]].concat()];
    let rows: Vec<RowRequest> = rows.iter().map(|ids| request(ids, 4)).collect();
    for storage in STORAGES {
        for step_tokens in [1, 7, 64, usize::MAX] {
            let generator = Generator::new(model()).with_decoder(Decoder::Kv(storage));
            let generator = generator.with_prefix_cache(&PrefixCache::new(1 << 30)).unwrap();
            let options = BatchOptions::default().with_step_tokens(step_tokens).with_max_wait(usize::MAX);
            let (outcomes, report) = run(&generator, options, &rows);
            assert_eq!((report.computed_prompt_tokens, report.prefix_hits), (tokens, 2), "{storage:?}, {step_tokens}");
            for (outcome, row) in outcomes.iter().zip(&rows) {
                assert_eq!(bits(&outcome.tokens), bits(&alone(generator.model(), row).tokens));
            }
        }
    }
}

#[test]
fn a_step_keeps_to_its_tokens_and_rows_that_decode_do_not_wait() {
    let generator = Generator::new(model());
    let mut batch = generator.batch(BatchOptions::default().with_step_tokens(8)).unwrap();
    let first = batch.add(&request(&[1, 2], 15)).unwrap();
    batch.step().unwrap();
    let second = batch.add(&request(&[9; 20], 2)).unwrap();
    for left in [13, 6, 0] {
        let events = batch.step().unwrap();
        let rows: Vec<RowId> = events.iter().map(RowEvent::row).collect();
        assert_eq!(rows, if left > 0 { vec![first] } else { vec![first, second] });
        assert_eq!(batch.last_step().computed_tokens, if left > 0 { 1 + 7 } else { 1 + 6 });
    }
}

#[test]
fn a_prompt_is_not_kept_waiting_for_ever() {
    let generator = Generator::new(model());
    let mut batch = generator.batch(BatchOptions::default().with_step_tokens(2).with_max_wait(3)).unwrap();
    let rows: Vec<RowId> = (0..2).map(|id| batch.add(&request(&[id], 20)).unwrap()).collect();
    batch.step().unwrap();
    let late = batch.add(&request(&[5, 6, 7], 2)).unwrap();
    let firsts: Vec<bool> = (0..5).map(|_| batch.step().unwrap().iter().any(|event| event.row() == late)).collect();
    assert_eq!(firsts, [false, false, false, true, true], "beside {rows:?}");
}

#[test]
fn rows_come_and_go_in_the_memory_of_others() {
    let generator = Generator::new(model());
    let mut batch = generator.batch(BatchOptions::default().with_max_rows(3)).unwrap();
    for id in 0..40_u32 {
        batch.add(&request(&[id, id + 1, 3], 1 + id as usize % 5)).unwrap();
    }
    Outcomes::default().run(&mut batch);
    assert_eq!(batch.report().kv_bytes, kv_bytes(&small_config(), 3, 8));
    assert!(batch.report().joins > 20 && batch.report().leaves > 20);
}

#[test]
fn a_row_that_fails_is_told_and_forgotten() {
    // Whoever has token 7 gets logits that are no numbers.
    let mut plain = random_model(Gpt2Config { tie_word_embeddings: false, ..small_config() });
    let weight = plain.wte.weight.val();
    let poison = weight.clone().narrow(0, 7, 1) * f32::NAN;
    let weight = weight.slice_assign([7..8, 0..24], poison);
    plain.wte.weight = gpt2_burn::burn::module::Param::from_tensor(weight);
    let draft = plain.clone();
    for model in [plain.clone(), plain.pack(WeightFormat::F32).unwrap()] {
        for storage in STORAGES {
            let rows: Vec<RowRequest> =
                [vec![1, 2, 3], vec![4, 7, 5, 6], vec![8, 9]].iter().map(|ids| request(ids, 6)).collect();
            let speculation = Speculation { storage, draft_len: DraftLen::Fixed(2), acceptance: Acceptance::Match };
            let speculative = Generator::new(model.clone()).with_decoder(Decoder::Speculative(speculation));
            let generators = [
                Generator::new(model.clone()).with_decoder(Decoder::Kv(storage)),
                speculative.with_draft(Draft::Model(draft.clone())).unwrap(),
            ];
            for generator in generators {
                let mut batch = generator.batch(BatchOptions::default().with_max_rows(3)).unwrap();
                let ids: Vec<RowId> = rows.iter().map(|row| batch.add(row).unwrap()).collect();
                let mut outcomes = Outcomes::default();
                outcomes.note(batch.step().unwrap());
                // In the slot of the one that has failed.
                let late = batch.add(&request(&[10], 6)).unwrap();
                outcomes.run(&mut batch);
                let error = outcomes.0[&ids[1]].error.as_ref().unwrap();
                assert!(matches!(error, Error::NotFinite { prompt: 1, .. }), "{error}");
                for (id, row) in [(ids[0], rows[0].clone()), (ids[2], rows[2].clone()), (late, request(&[10], 6))] {
                    assert!(outcomes.0[&id].error.is_none(), "{:?}", outcomes.0[&id].error);
                    let expected = alone(&model, &row);
                    let of = |tokens: &[RowToken]| tokens.iter().map(|token| token.id).collect::<Vec<u32>>();
                    assert_eq!(of(&outcomes.0[&id].tokens), of(&expected.tokens));
                }
            }
        }
    }
}

#[test]
fn a_row_that_is_cancelled_leaves_nothing_to_the_next_one_in_its_slot() {
    // Token 7 gives keys and values that are no numbers; burn's operations multiply what they do not see by zero.
    let mut model = random_model(small_config());
    let weight = model.wte.weight.val();
    let poison = weight.clone().narrow(0, 7, 1) * f32::NAN;
    let head = gpt2_burn::burn::module::Param::from_tensor(weight.clone());
    model.wte.weight = gpt2_burn::burn::module::Param::from_tensor(weight.slice_assign([7..8, 0..24], poison));
    model.lm_head = Some(gpt2_burn::model::Head { weight: head });
    for storage in STORAGES {
        let generator = Generator::new(model.clone()).with_decoder(Decoder::Kv(storage));
        let mut batch = generator.batch(BatchOptions::default().with_max_rows(2).with_step_tokens(8)).unwrap();
        let stays = batch.add(&request(&[1, 2, 3, 4, 5, 6], 9)).unwrap();
        let mut outcomes = Outcomes::default();
        outcomes.note(batch.step().unwrap());
        let goes = batch.add(&request(&[7; 20], 9)).unwrap();
        outcomes.note(batch.step().unwrap());
        assert!(batch.cancel(goes));
        let late = batch.add(&request(&[9], 5)).unwrap();
        outcomes.run(&mut batch);
        let ended: Vec<RowId> = outcomes.0.keys().copied().collect();
        assert_eq!(ended, [stays, late]);
        for (id, row) in [(stays, request(&[1, 2, 3, 4, 5, 6], 9)), (late, request(&[9], 5))] {
            assert!(outcomes.0[&id].error.is_none(), "{storage:?}: {:?}", outcomes.0[&id].error);
            let of = |tokens: &[RowToken]| tokens.iter().map(|token| token.id).collect::<Vec<u32>>();
            assert_eq!(of(&outcomes.0[&id].tokens), of(&alone(&model, &row).tokens), "{storage:?}");
        }
    }
}

#[test]
fn what_others_wait_for_is_computed_though_its_row_is_cancelled() {
    let generator = Generator::new(model());
    let mut batch = generator.batch(BatchOptions::default().with_step_tokens(4)).unwrap();
    let ids: Vec<RowId> = (0..3).map(|_| batch.add(&request(&[3; 10], 4)).unwrap()).collect();
    batch.step().unwrap();
    assert!(batch.cancel(ids[0]) && !batch.cancel(ids[0]));
    let mut outcomes = Outcomes::default();
    outcomes.run(&mut batch);
    let report = batch.report();
    assert_eq!(
        (report.computed_tokens, report.computed_prompt_tokens, report.reused_prompt_tokens),
        (10 + 2 * 3, 10, 10)
    );
    let expected = alone(generator.model(), &request(&[3; 10], 4));
    assert_eq!(outcomes.0.len(), 2);
    outcomes.0.values().for_each(|outcome| assert_eq!(bits(&outcome.tokens), bits(&expected.tokens)));
}

#[test]
fn rows_and_options_that_cannot_be_served_are_refused() {
    let generator = Generator::new(model());
    let refused = |options: BatchOptions| generator.batch(options).err().unwrap().to_string();
    assert!(refused(BatchOptions::default().with_max_rows(0)).contains("at least 1"));
    assert!(refused(BatchOptions::default().with_step_tokens(0)).contains("at least 1"));
    assert!(refused(BatchOptions::default().with_max_row_tokens(25)).contains("1 to 24"));
    assert!(refused(BatchOptions::default().with_max_row_tokens(0)).contains("1 to 24"));
    assert!(matches!(
        generator.batch(BatchOptions::default().with_max_rows(1 << 40)).err().unwrap(),
        Error::OutOfMemory { .. } | Error::Mismatch { .. }
    ));

    let options = BatchOptions::default().with_max_rows(1).with_max_waiting(2).with_max_row_tokens(10);
    let mut batch = generator.batch(options).unwrap();
    assert!(batch.add(&request(&[1; 8], 4)).unwrap_err().to_string().contains("at most 10"));
    let slides = RowRequest { on_context_end: ContextEnd::Slide { keep: None }, ..request(&[1], 2) };
    assert!(batch.add(&slides).unwrap_err().to_string().contains("at most 10"));
    assert!(matches!(batch.add(&request(&[], 4)), Err(Error::EmptyPrompt { index: 0 })));
    assert!(matches!(batch.add(&request(&[61], 4)), Err(Error::TokenOutOfRange { id: 61, .. })));
    let text = RowRequest { prompt: Prompt::Text("a".to_owned()), ..request(&[1], 1) };
    assert!(matches!(batch.add(&text), Err(Error::NoTokenizer { .. })));
    let stop = RowRequest { stop: Stop { texts: vec!["a".to_owned()], ..Stop::default() }, ..request(&[1], 1) };
    assert!(matches!(batch.add(&stop), Err(Error::NoTokenizer { .. })));
    let sampling = RowRequest { sampling: Sampling { top_p: 0.0, ..Sampling::default() }, ..request(&[1], 1) };
    assert!(matches!(batch.add(&sampling), Err(Error::Sampling { .. })));
    assert!(batch.step().unwrap().is_empty() && batch.is_empty());

    // One is computed, and two wait, whether a step has been taken or not.
    batch.add(&request(&[1; 8], 3)).unwrap();
    batch.add(&request(&[2], 1)).unwrap();
    batch.add(&request(&[3], 0)).unwrap();
    assert_eq!((batch.len(), batch.waiting()), (3, 3));
    assert!(matches!(batch.add(&request(&[3], 1)), Err(Error::BatchFull { waiting: 2, max_waiting: 2 })));
    let mut outcomes = Outcomes::default();
    outcomes.note(batch.step().unwrap());
    assert_eq!((batch.len(), batch.waiting()), (2, 1), "the one that wants nothing does not wait for long");
    batch.add(&request(&[4], 1)).unwrap();
    assert!(matches!(batch.add(&request(&[5], 1)), Err(Error::BatchFull { waiting: 2, .. })));
    outcomes.run(&mut batch);
    let ended: Vec<usize> = outcomes.0.values().map(|outcome| outcome.tokens.len()).collect();
    assert_eq!(ended, [3, 1, 0, 1]);
}
