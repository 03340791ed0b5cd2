//! Speculative decoding: the same text as without, in fewer steps.

use std::sync::Arc;

use crate::common::{self, STORAGES, greedy, ids_of, random_model, rows, small_config};
use gpt2_burn::burn::module::Param;
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::generate::{Completion, ContextEnd, Decoder, FinishReason, GenerateRequest, Generator, Output, Stop};
use gpt2_burn::measure::check_greedy;
use gpt2_burn::sampling::{Purpose, Sampling, uniform};
use gpt2_burn::speculative::{Acceptance, Draft, DraftLen, Ngram, Scripted, Speculation};
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{CacheStorage, Checkpoint, Error, Gpt2, Gpt2Config, Logits, TokenBatch, WeightFormat};

fn packed(config: Gpt2Config) -> Gpt2 {
    random_model(config).pack(WeightFormat::F32).unwrap()
}

fn embedded(model: gpt2_burn_pair::Model) -> Gpt2 {
    let model = Checkpoint::from_bytes(model.config, model.weights).unwrap();
    model.load(&common::device(), DType::F32).unwrap().pack(WeightFormat::F32).unwrap()
}

fn speculative(draft_len: usize) -> Decoder {
    with_rule(draft_len, Acceptance::default())
}

fn with_rule(draft_len: usize, acceptance: Acceptance) -> Decoder {
    Decoder::Speculative(Speculation { draft_len: DraftLen::Fixed(draft_len), acceptance, ..Speculation::default() })
}

fn drafting(model: &Gpt2, decoder: Decoder, draft: Draft) -> Generator {
    Generator::new(model.clone()).with_decoder(decoder).with_draft(draft).unwrap()
}

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![1, 2, 3, 4, 5], vec![7], vec![9, 10, 11]]
}

/// A function that proposes ids which depend on the text, and are nearly always wrong; and too many, or none.
fn adversary(vocab_size: usize) -> Draft {
    Draft::Function(Arc::new(move |text, len| {
        let sum: u32 = text.iter().sum();
        match sum % 4 {
            0 => Vec::new(),
            1 => vec![0; len + 3],
            _ => (0..len as u32).map(|at| (sum + at * 7) % vocab_size as u32).collect(),
        }
    }))
}

/// Numbers that make a case.
struct Dice {
    case: u64,
    thrown: u64,
}

impl Dice {
    fn below(&mut self, sides: usize) -> usize {
        self.thrown += 1;
        (uniform(11, self.case, self.thrown, Purpose::Token) * sides as f64) as usize
    }

    fn among<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }
}

/// What happened in all cases.
#[derive(Default)]
struct Tally {
    accepted: usize,
    rejected: usize,
    stopped_inside: usize,
    context_ended: usize,
    slid: usize,
}

impl Tally {
    fn note(&mut self, output: &Output, n_positions: usize) {
        let report = output.report.speculation.as_ref().unwrap();
        self.accepted += report.accepted;
        self.rejected += report.rejected;
        // A round gives a token that is not a draft's, but where the text ends with one that is.
        let ended_inside = report.rounds + report.accepted - report.tokens;
        let stopped = |completion: &&Completion| completion.finish == FinishReason::Stop;
        assert!(ended_inside <= output.completions.iter().filter(stopped).count());
        self.stopped_inside += ended_inside;
        let full = |completion: &&Completion| completion.finish == FinishReason::Context;
        self.context_ended += output.completions.iter().filter(full).count();
        let long = |completion: &&Completion| completion.prompt_ids.len() + completion.ids.len() > n_positions + 1;
        self.slid += output.completions.iter().filter(long).count();
        assert_eq!(report.tokens, output.report.new_tokens - output.completions.len());
        assert_eq!(report.rounds_by_len.iter().sum::<usize>(), report.rounds);
        let verified: usize = report.by_position.iter().map(|place| place.verified).sum();
        assert!(verified == report.accepted + report.rejected && verified <= report.drafted);
        // The first token of each draft was verified.
        let first = report.by_position.first().map_or(0, |place| place.verified);
        assert_eq!(first + report.rounds_by_len.first().unwrap_or(&0), report.rounds);
    }
}

/// A greedy request of some rows of unequal length, to be stopped by something that occurs.
fn random_request(dice: &mut Dice, model: &Gpt2, tokenizer: Option<&Tokenizer>) -> (GenerateRequest, Vec<u32>) {
    let (vocab_size, n_positions) = (model.config().vocab_size, model.config().n_positions);
    let max_len = n_positions.min(40) - 4;
    let batch = 1 + dice.below(8);
    let prompts: Vec<Vec<u32>> =
        (0..batch).map(|_| (0..1 + dice.below(max_len)).map(|_| dice.below(vocab_size) as u32).collect()).collect();
    let on_context_end =
        dice.among(&[ContextEnd::Stop, ContextEnd::Slide { keep: Some(n_positions / 2) }, ContextEnd::Stop]);
    let mut request = GenerateRequest {
        sampling: Sampling { repetition_penalty: dice.among(&[1.0, 1.0, 1.3]), ..Sampling::greedy() },
        num_samples: dice.among(&[1, 1, 2]),
        logprobs: dice.among(&[None, Some(2)]),
        on_context_end,
        ..greedy(&prompts, 1 + dice.below(40))
    };
    // What it says without a stop; the end of it is made to be something in there.
    let free = Generator::new(model.clone()).with_tokenizer(tokenizer.cloned()).complete(&request).unwrap();
    let completion = &free.completions[dice.below(free.completions.len())];
    let at = dice.below(completion.ids.len());
    match (dice.below(3), tokenizer) {
        (0, _) => {}
        (_, Some(_)) => {
            let text: Vec<char> = completion.text.as_ref().unwrap().chars().collect();
            let from = dice.below(text.len());
            request.stop.texts = vec![text[from..(from + 3).min(text.len())].iter().collect()];
        }
        (_, None) => {
            request.stop = Stop::default();
            return (request, vec![completion.ids[at]]);
        }
    }
    (request, Vec::new())
}

/// `model` makes a model that ends texts with the ids given.
fn check_case(
    case: u64,
    model: impl Fn(Vec<u32>) -> Gpt2,
    tokenizer: Option<&Tokenizer>,
    draft: &Draft,
    tally: &mut Tally,
) {
    let mut dice = Dice { case, thrown: 0 };
    let (request, eos) = random_request(&mut dice, &model(Vec::new()), tokenizer);
    let model = model(eos);
    let storage = dice.among(&STORAGES);
    let draft_len = 1 + dice.below(16);
    let speculation = Speculation { storage, draft_len: DraftLen::Fixed(draft_len), ..Speculation::default() };
    let plain = Generator::new(model.clone()).with_tokenizer(tokenizer.cloned()).with_decoder(Decoder::Kv(storage));
    let generator = drafting(&model, Decoder::Speculative(speculation), draft.clone());
    let generator = generator.with_tokenizer(tokenizer.cloned());
    let (expected, output) = (plain.complete(&request).unwrap(), generator.complete(&request).unwrap());
    let n_positions = model.config().n_positions;
    assert_eq!(output.completions, expected.completions, "case {case}: {draft:?}, {speculation:?}, {request:?}");
    tally.note(&output, n_positions);
}

#[test]
fn two_hundred_greedy_requests_give_plain_decodings_ids() {
    let config = small_config();
    let tiny = packed(config.clone());
    let small = packed(Gpt2Config { n_layer: 1, n_head: 2, n_embd: 16, ..config.clone() });
    let short = packed(Gpt2Config { n_layer: 1, n_positions: 12, ..config.clone() });
    let (target, draft) = (embedded(gpt2_burn_pair::TARGET), embedded(gpt2_burn_pair::DRAFT));
    let tokenizer = Tokenizer::from_bytes(gpt2_burn_pair::TARGET.tokenizer).unwrap();
    let mut tally = Tally::default();
    for case in 0..140 {
        // One in the deterministic mode, the others with kernels.
        let is_batch_invariant = case % 4 == 0;
        let model = |eos_token_id| {
            let model = random_model(Gpt2Config { eos_token_id, ..config.clone() });
            match is_batch_invariant {
                true => model.with_determinism(true).unwrap(),
                false => model.pack(WeightFormat::F32).unwrap(),
            }
        };
        let draft = match case % 7 {
            0 => Draft::Model(tiny.clone()),
            1 => Draft::EarlyExit { layers: 1 },
            2 => Draft::EarlyExit { layers: 2 },
            3 => Draft::Model(small.clone()),
            4 => Draft::Model(short.clone()),
            5 => Draft::Ngram(Ngram { max_len: 3, min_len: 1 }),
            _ => adversary(config.vocab_size),
        };
        check_case(case, model, None, &draft, &mut tally);
    }
    assert!(tally.context_ended > 20 && tally.slid > 20, "{} {}", tally.context_ended, tally.slid);
    for case in 140..200 {
        let draft = match case % 5 {
            0 | 1 => Draft::Model(draft.clone()),
            2 => Draft::EarlyExit { layers: 3 },
            3 => Draft::Ngram(Ngram::default()),
            _ => adversary(512),
        };
        check_case(case, |_| target.clone(), Some(&tokenizer), &draft, &mut tally);
    }
    let Tally { accepted, rejected, stopped_inside, .. } = tally;
    assert!(accepted > 2_000 && rejected > 1_000 && stopped_inside > 20, "{accepted} {rejected} {stopped_inside}");
}

#[test]
fn drafts_that_agree_sometimes_change_nothing() {
    let model = packed(small_config());
    let plain = ids_of(&Generator::new(model.clone()), &greedy(&prompts(), 19));
    for (percent, draft_len) in [(0, 3), (50, 1), (50, 7), (90, 4), (100, 16)] {
        let script = Scripted::new(plain.clone(), f64::from(percent) / 100.0);
        for script in [script.clone(), script.with_model(model.clone())] {
            let output =
                drafting(&model, speculative(draft_len), Draft::Scripted(script)).complete(&greedy(&prompts(), 19));
            let output = output.unwrap();
            let ids: Vec<_> = output.completions.iter().map(|completion| completion.ids.clone()).collect();
            assert_eq!(ids, plain);
            let report = output.report.speculation.unwrap();
            assert!(report.accepted > 0 || percent == 0, "{percent}%");
            assert!(report.rejected > 0 || percent == 100, "{percent}%");
            assert!(percent != 0 || report.accepted == 0);
            assert!(percent != 100 || report.rejected == 0);
        }
    }
}

#[test]
fn a_perfect_draft_takes_the_least_steps() {
    let model = packed(small_config());
    let prompt = [vec![1_u32, 2, 3]];
    for n in 1..=21 {
        let plain = ids_of(&Generator::new(model.clone()), &greedy(&prompt, n));
        let perfect = Draft::Scripted(Scripted::new(plain.clone(), 1.0));
        for draft in [perfect, Draft::Model(model.clone()), Draft::EarlyExit { layers: 2 }] {
            let generator = drafting(&model, speculative(4), draft);
            let output = generator.complete(&greedy(&prompt, n)).unwrap();
            assert_eq!(output.completions[0].ids, plain[0]);
            assert_eq!(output.report.step_seconds.len(), (n - 1).div_ceil(5), "{n} {:?}", generator.draft());
            let report = output.report.speculation.unwrap();
            assert_eq!((report.rounds, report.rejected), ((n - 1).div_ceil(5), 0));
            // The prompt, and for each round a token and its draft.
            assert_eq!(output.report.computed_tokens, 3 + report.rounds + report.drafted);
        }
    }
}

#[test]
fn a_draft_that_is_the_target_is_never_rejected() {
    let model = packed(small_config());
    // Rows that slide, rows that wait for others, since they have no room left, and samples of one prompt.
    let prompts = [(0..21).collect(), vec![7], (3..13).collect()];
    for on_context_end in [ContextEnd::Stop, ContextEnd::Slide { keep: Some(8) }] {
        for storage in STORAGES {
            for draft in [Draft::Model(model.clone()), Draft::EarlyExit { layers: 2 }] {
                for acceptance in [Acceptance::Rejection, Acceptance::Match] {
                    let sampling = Sampling::default();
                    let request = GenerateRequest { on_context_end, sampling, ..sampled(&prompts, 3) };
                    let speculation = Speculation { storage, draft_len: DraftLen::Fixed(5), acceptance };
                    let generator = drafting(&model, Decoder::Speculative(speculation), draft.clone());
                    let report = generator.complete(&request).unwrap().report.speculation.unwrap();
                    assert_eq!((report.rejected, report.accepted), (0, report.drafted), "{draft:?}, {acceptance:?}");
                    assert!(report.accepted > 50);
                }
            }
        }
    }
}

/// The most likely of the logits behind each row, computed from nothing.
fn argmax(model: &Gpt2, texts: &[Vec<u32>]) -> Vec<u32> {
    let mut cache = model.cache(CacheStorage::Growing, texts.len(), model.config().n_positions).unwrap();
    let logits = rows(model.forward(&TokenBatch::new(texts, model).unwrap(), &mut cache, Logits::Last).unwrap());
    let argmax = |logits: &Vec<f32>| Sampling::greedy().distribution(logits, &[]).unwrap().sample(0.0);
    logits.iter().map(argmax).collect()
}

/// Speculation as an assignment words it: the prefixes of the draft as a batch, without a cache. Returns the new ids and
/// how many rounds they took.
fn literally(target: &Gpt2, draft: &Gpt2, prompt: &[u32], draft_len: usize, wanted: usize) -> (Vec<u32>, usize) {
    let mut text = prompt.to_vec();
    let mut rounds = 0;
    text.extend(argmax(target, &[text.clone()]));
    while text.len() < prompt.len() + wanted {
        let draft_len = draft_len.min(prompt.len() + wanted - text.len() - 1);
        let mut prefixes = vec![text.clone()];
        for _ in 0..draft_len {
            let mut next = prefixes[prefixes.len() - 1].clone();
            next.extend(argmax(draft, &[next.clone()]));
            prefixes.push(next);
        }
        let chosen = argmax(target, &prefixes);
        let right = (0..draft_len).take_while(|&at| prefixes[at + 1].last() == Some(&chosen[at])).count();
        text.extend(&chosen[..=right]);
        rounds += 1;
    }
    (text.split_off(prompt.len()), rounds)
}

#[test]
fn the_literal_form_gives_the_same_ids_in_as_many_rounds() {
    let (target, draft) = (embedded(gpt2_burn_pair::TARGET), embedded(gpt2_burn_pair::DRAFT));
    let tokenizer = Tokenizer::from_bytes(gpt2_burn_pair::TARGET.tokenizer).unwrap();
    for (text, draft_len) in [("ROMEO:\n", 4), ("What say you to that", 1), ("First Citizen:\nWe ", 9)] {
        let prompt = tokenizer.encode(text).unwrap();
        let (ids, rounds) = literally(&target, &draft, &prompt, draft_len, 40);
        let generator = drafting(&target, speculative(draft_len), Draft::Model(draft.clone()));
        let output = generator.complete(&greedy(std::slice::from_ref(&prompt), 40)).unwrap();
        assert_eq!(output.completions[0].ids, ids);
        let report = output.report.speculation.unwrap();
        assert_eq!(report.rounds, rounds);
        assert!(report.accepted > 0 && report.rejected > 0);
    }
}

/// Sampling with every filter.
fn sampled(prompts: &[Vec<u32>], num_samples: usize) -> GenerateRequest {
    let sampling = Sampling { temperature: 1.1, top_k: Some(20), top_p: 0.9, min_p: 0.01, repetition_penalty: 1.1 };
    GenerateRequest { sampling, num_samples, ..greedy(prompts, 18) }
}

fn drafts(model: &Gpt2) -> Vec<Draft> {
    let small = packed(Gpt2Config { n_layer: 1, ..model.config().clone() });
    vec![
        Draft::Model(small),
        Draft::Ngram(Ngram { max_len: 3, min_len: 1 }),
        Draft::EarlyExit { layers: 1 },
        adversary(model.config().vocab_size),
    ]
}

#[test]
fn sample_and_match_gives_plain_samplings_ids() {
    let model = packed(small_config());
    for on_context_end in [ContextEnd::Stop, ContextEnd::Slide { keep: Some(8) }] {
        let request = GenerateRequest { on_context_end, max_new_tokens: 40, ..sampled(&prompts(), 2) };
        let plain = ids_of(&Generator::new(model.clone()), &request);
        for draft in drafts(&model) {
            for draft_len in [DraftLen::Fixed(1), DraftLen::Fixed(5), DraftLen::Auto] {
                let speculation = Speculation { draft_len, acceptance: Acceptance::Match, ..Speculation::default() };
                let generator = drafting(&model, Decoder::Speculative(speculation), draft.clone());
                let output = generator.complete(&request).unwrap();
                let report = output.report.speculation.unwrap();
                assert!(report.drafted > 0 && report.rejected > 0, "{draft:?}: {report:?}");
                let ids: Vec<_> = output.completions.into_iter().map(|completion| completion.ids).collect();
                assert_eq!(ids, plain, "{draft:?}, {draft_len:?}");
            }
        }
    }
}

#[test]
fn a_completion_does_not_depend_on_its_company() {
    let model = packed(small_config());
    for acceptance in [Acceptance::Rejection, Acceptance::Match] {
        for draft in drafts(&model) {
            for storage in STORAGES {
                let draft_len = DraftLen::Fixed(3);
                let speculation = Speculation { storage, draft_len, acceptance };
                let generator = drafting(&model, Decoder::Speculative(speculation), draft.clone());
                let output = generator.complete(&sampled(&prompts(), 3)).unwrap();
                let together: Vec<_> = output.completions.iter().map(|completion| &completion.ids).collect();
                assert!(output.report.speculation.unwrap().drafted > 0);
                for (index, prompt) in prompts().iter().enumerate() {
                    for sample in 0..3 {
                        let first_rng_stream = sample as u64;
                        let alone = GenerateRequest { first_rng_stream, ..sampled(std::slice::from_ref(prompt), 1) };
                        assert_eq!(&ids_of(&generator, &alone)[0], together[3 * index + sample], "{draft:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn without_kernels_ties_are_all_that_differs() {
    let (target, draft) = (random_model(small_config()), random_model(Gpt2Config { n_layer: 1, ..small_config() }));
    for draft in [Draft::Model(draft), Draft::EarlyExit { layers: 1 }, Draft::Model(target.clone())] {
        for draft_len in [1, 4, 11] {
            let generator = drafting(&target, speculative(draft_len), draft.clone());
            let output = generator.complete(&greedy(&prompts(), 19)).unwrap();
            let ids: Vec<_> = output.completions.into_iter().map(|completion| completion.ids).collect();
            assert!(check_greedy(&generator, &prompts(), &ids).unwrap().is_equal(), "{draft:?}");
        }
    }
}

#[test]
fn a_cache_in_half_precision_holds_the_same_either_way() {
    let model = packed(small_config());
    let plain = Generator::new(model.clone()).with_cache_dtype(DType::F16).unwrap();
    let expected = ids_of(&plain, &greedy(&prompts(), 19));
    for draft in drafts(&model) {
        let generator = drafting(&model, speculative(4), draft).with_cache_dtype(DType::F16).unwrap();
        assert_eq!(ids_of(&generator, &greedy(&prompts(), 19)), expected);
    }
}

#[test]
fn the_draft_computes_what_samples_share_once() {
    let model = packed(small_config());
    let prompt = [(0..15).collect::<Vec<u32>>()];
    let generator = drafting(&model, with_rule(2, Acceptance::Match), Draft::Model(model.clone()));
    let report = generator.complete(&sampled(&prompt, 5)).unwrap().report;
    let speculation = report.speculation.unwrap();
    // A draft feeds a token less than it proposes, one more of its own if all were accepted, and the target's.
    let of_rounds = 3 * speculation.rounds;
    assert!(speculation.draft_computed_tokens <= 15 + of_rounds, "{} {of_rounds}", speculation.draft_computed_tokens);
    // Both caches hold every row.
    let capacity = 15 + 18 - 1;
    let positions = model.config().n_positions.min(capacity);
    assert_eq!(report.kv_bytes, 2 * common::kv_bytes(model.config(), 5, positions));
}

#[test]
fn a_draft_with_a_shorter_context_drafts_as_far_as_it_reaches() {
    let model = packed(small_config());
    let short = packed(Gpt2Config { n_positions: 10, ..small_config() });
    let expected = ids_of(&Generator::new(model.clone()), &greedy(&prompts(), 19));
    let generator = drafting(&model, speculative(3), Draft::Model(short));
    let output = generator.complete(&greedy(&prompts(), 19)).unwrap();
    assert_eq!(output.completions.iter().map(|c| c.ids.clone()).collect::<Vec<_>>(), expected);
    let report = output.report.speculation.unwrap();
    assert!(report.drafted > 0 && report.rounds_by_len[0] > 10, "{report:?}");
}

#[test]
fn drafting_that_loses_stops_and_says_so() {
    let model = packed(Gpt2Config { n_positions: 300, ..small_config() });
    let slow = packed(Gpt2Config { n_positions: 300, n_layer: 12, ..small_config() });
    let request = greedy(&[vec![1, 2, 3]], 250);
    let expected = ids_of(&Generator::new(model.clone()), &request);
    // Never right, and dearer than what it is to save.
    let script = Scripted::new(expected.clone(), 0.0).with_model(slow);
    let speculation = Speculation { draft_len: DraftLen::Auto, ..Speculation::default() };
    let generator = drafting(&model, Decoder::Speculative(speculation), Draft::Scripted(script));
    let output = generator.complete(&request).unwrap();
    assert_eq!(output.completions[0].ids, expected[0]);
    let report = output.report.speculation.unwrap();
    assert!(report.drafting_loses);
    let [without, with] = [report.rounds_by_len[0], report.rounds_by_len[1..].iter().sum()];
    assert!(with >= 2 && without > 200, "{:?}", report.rounds_by_len);
    assert!(report.predicted_speedup(1.0).is_some() && report.plain_step_seconds().is_some());
}

#[test]
fn the_report_says_what_was_done() {
    let model = packed(small_config());
    let draft = Draft::Model(packed(Gpt2Config { n_layer: 1, ..small_config() }));
    let generator = drafting(&model, speculative(3), draft);
    let mut generation = generator.generate(&greedy(&prompts(), 12)).unwrap();
    assert_eq!(generation.report().speculation.as_ref().unwrap().rounds, 0);
    generation.by_ref().for_each(|event| drop(event.unwrap()));
    let report = generation.report();
    let speculation = report.speculation.clone().unwrap();
    assert_eq!((speculation.draft.as_str(), speculation.tokens), ("model", 3 * 11));
    assert_eq!(speculation.steps.len(), report.step_seconds.len());
    for (step, seconds) in speculation.steps.iter().zip(&report.step_seconds) {
        assert!((step.seconds() - seconds).abs() < 1e-9 && step.verify_seconds > 0.0);
        assert!(step.max_draft_len == 0 || step.draft_seconds > 0.0);
    }
    assert_eq!(report.decoder, speculative(3));
    let per_token = report.seconds_per_token().unwrap();
    let expected = report.decode_seconds / report.step_seconds.len() as f64 / (33.0 / speculation.rounds as f64);
    assert!((per_token - expected).abs() < 1e-12);
}

#[test]
fn what_cannot_draft_is_an_error() {
    let model = packed(small_config());
    let with = |draft| Generator::new(model.clone()).with_draft(draft).map(drop).unwrap_err();
    let stranger = packed(Gpt2Config { vocab_size: 60, ..small_config() });
    assert!(matches!(with(Draft::Model(stranger.clone())), Error::Mismatch { .. }));
    for layers in [0, 3, usize::MAX] {
        assert!(matches!(with(Draft::EarlyExit { layers }), Error::Mismatch { .. }));
    }
    for (max_len, min_len) in [(3, 0), (1, 2), (0, 0)] {
        assert!(matches!(with(Draft::Ngram(Ngram { max_len, min_len })), Error::Mismatch { .. }));
    }
    for agreement in [-0.1, 1.1, f64::NAN] {
        assert!(matches!(with(Draft::Scripted(Scripted::new(vec![vec![1]], agreement))), Error::Mismatch { .. }));
    }
    let unknown = with(Draft::Scripted(Scripted::new(vec![vec![1], vec![2, 61]], 0.5)));
    assert!(matches!(unknown, Error::TokenOutOfRange { id: 61, row: 1, position: 1, .. }), "{unknown}");
    let script = Scripted::new(vec![vec![1]], 0.5).with_model(stranger);
    assert!(matches!(with(Draft::Scripted(script)), Error::Mismatch { .. }));

    let alone = Generator::new(model.clone()).with_decoder(speculative(4));
    assert!(matches!(alone.complete(&greedy(&prompts(), 3)), Err(Error::NoDraft)));
    let wrong = Draft::Function(Arc::new(|_, _| vec![61]));
    let found = drafting(&model, speculative(4), wrong).complete(&greedy(&prompts(), 3)).unwrap_err();
    assert!(matches!(found, Error::TokenOutOfRange { id: 61, row: 0, position: 6, .. }), "{found}");
    let mut broken = random_model(small_config());
    broken.ln_f.gamma = Param::from_tensor(broken.ln_f.gamma.val() * f32::NAN);
    let found = drafting(&model, speculative(4), Draft::Model(broken)).complete(&greedy(&prompts(), 3)).unwrap_err();
    assert!(matches!(found, Error::DraftNotFinite { prompt: 0, sample: 0, position: 6 }), "{found}");
}

#[test]
fn a_draft_of_no_tokens_is_plain_decoding() {
    let model = packed(small_config());
    let generator = drafting(&model, speculative(0), Draft::Ngram(Ngram::default()));
    let output = generator.complete(&sampled(&prompts(), 2)).unwrap();
    let plain = Generator::new(model.clone()).complete(&sampled(&prompts(), 2)).unwrap();
    assert_eq!(output.completions, plain.completions);
    assert_eq!(output.report.speculation.unwrap().drafted, 0);
}
