//! Generation: decoders agree, rows do not influence each other, and texts end where they should.

use crate::common::{self, DECODERS, device, fixture, greedy, ids_of, kv_bytes, random_model, small_config};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::generate::{ContextEnd, Decoder, FinishReason, GenerateRequest, Generator, Prompt, Stop};
use gpt2_burn::sampling::{Sampling, log_softmax};
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{CacheStorage, Checkpoint, Error, Gpt2Config, backends};

fn generator(decoder: Decoder) -> Generator {
    Generator::new(random_model(small_config())).with_decoder(decoder)
}

/// The stand-in model with its tokenizer.
fn text_generator() -> Generator {
    let checkpoint = Checkpoint::open(fixture("byte-shakespeare")).unwrap();
    let model = checkpoint.load(&device(), DType::F32).unwrap();
    Generator::new(model).with_tokenizer(checkpoint.tokenizer().unwrap())
}

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![1, 2, 3, 4, 5], vec![7], vec![9, 10, 11]]
}

fn sampled(prompts: &[Vec<u32>], num_samples: usize) -> GenerateRequest {
    GenerateRequest {
        sampling: Sampling { top_k: Some(20), top_p: 0.95, ..Sampling::default() },
        num_samples,
        ..greedy(prompts, 9)
    }
}

#[test]
fn decoders_give_the_same_ids_under_every_end_of_the_context() {
    let ends = [
        ContextEnd::Stop,
        ContextEnd::Slide { keep: None },
        ContextEnd::Slide { keep: Some(10) },
        ContextEnd::Slide { keep: Some(0) },
    ];
    for on_context_end in ends {
        let request = GenerateRequest { on_context_end, num_samples: 2, ..sampled(&prompts(), 2) };
        let request = GenerateRequest { max_new_tokens: 40, ..request };
        let reference = ids_of(&generator(Decoder::Naive), &request);
        let slides = on_context_end != ContextEnd::Stop;
        assert_eq!(reference.iter().all(|ids| ids.len() == 40), slides);
        for decoder in DECODERS {
            assert_eq!(ids_of(&generator(decoder.clone()), &request), reference, "{decoder}, {on_context_end:?}");
        }
    }
}

#[test]
fn a_completion_does_not_depend_on_its_company() {
    for decoder in DECODERS {
        let generator = generator(decoder.clone());
        let together = ids_of(&generator, &sampled(&prompts(), 3));
        for (index, prompt) in prompts().iter().enumerate() {
            let alone = ids_of(&generator, &sampled(std::slice::from_ref(prompt), 3));
            assert_eq!(alone, together[3 * index..][..3], "{decoder}");
            for sample in 0..3 {
                let stream = GenerateRequest { first_rng_stream: sample, ..sampled(std::slice::from_ref(prompt), 1) };
                assert_eq!(ids_of(&generator, &stream), together[3 * index + sample as usize..][..1], "{decoder}");
            }
        }
    }
}

#[test]
fn seeds_and_samples_differ_and_repeat() {
    let generator = generator(Decoder::default());
    let request = sampled(&prompts(), 2);
    let first = ids_of(&generator, &request);
    assert_eq!(first, ids_of(&generator, &request));
    assert_ne!(first[0], first[1]);
    assert_ne!(first, ids_of(&generator, &GenerateRequest { seed: 1, ..request }));
}

#[test]
fn a_row_that_ends_leaves_the_others_alone() {
    // The third token of the first row's greedy text is made to end a text: the rows end at different steps.
    let free = ids_of(&generator(Decoder::Naive), &greedy(&prompts(), 9));
    let config = Gpt2Config { eos_token_id: vec![free[0][2]], ..small_config() };
    for decoder in DECODERS {
        let generator = Generator::new(random_model(config.clone())).with_decoder(decoder.clone());
        let request = GenerateRequest { stop: Stop::default(), ..greedy(&prompts(), 9) };
        let output = generator.complete(&request).unwrap();
        for (completion, free) in output.completions.iter().zip(&free) {
            let end = free.iter().position(|id| config.eos_token_id.contains(id));
            let expected = &free[..end.map_or(9, |end| end + 1)];
            assert_eq!(completion.ids, expected, "{decoder}");
            let finish = if end.is_some() { FinishReason::Stop } else { FinishReason::Length };
            assert_eq!(completion.finish, finish);
        }
        assert_eq!(output.completions[0].finish, FinishReason::Stop);
    }
}

#[test]
fn a_request_fits_when_prompt_and_new_tokens_less_one_do() {
    let prompt = [vec![1_u32; 20]];
    for decoder in DECODERS {
        let generator = generator(decoder.clone());
        let finish = |max_new_tokens, on_context_end| {
            let request = GenerateRequest { on_context_end, ..greedy(&prompt, max_new_tokens) };
            let completion = generator.complete(&request)?.completions.pop().unwrap();
            Ok::<_, Error>((completion.ids.len(), completion.finish))
        };
        assert_eq!(finish(5, ContextEnd::Error).unwrap(), (5, FinishReason::Length));
        assert_eq!(finish(5, ContextEnd::Stop).unwrap(), (5, FinishReason::Length));
        assert_eq!(finish(6, ContextEnd::Stop).unwrap(), (5, FinishReason::Context));
        assert_eq!(finish(usize::MAX, ContextEnd::Stop).unwrap(), (5, FinishReason::Context));
        let error = finish(6, ContextEnd::Error).unwrap_err();
        assert!(matches!(error, Error::RequestTooLong { prompt_tokens: 20, max_new_tokens: 6, .. }), "{error}");
        assert_eq!(finish(0, ContextEnd::Stop).unwrap(), (0, FinishReason::Length));
    }
}

#[test]
fn a_prompt_longer_than_the_context_slides_or_is_refused() {
    let long: Vec<u32> = (0..40).collect();
    let generator = generator(Decoder::default());
    let error = generator.complete(&greedy(std::slice::from_ref(&long), 3)).unwrap_err();
    assert!(matches!(error, Error::ContextOverflow { row: 0, tokens: 40, n_positions: 24 }), "{error}");
    let slide = |prompt: &[u32]| {
        let on_context_end = ContextEnd::Slide { keep: None };
        ids_of(&generator, &GenerateRequest { on_context_end, ..greedy(&[prompt.to_vec()], 3) })
    };
    assert_eq!(slide(&long), slide(&long[16..]), "only the last 24 tokens count");
}

#[test]
fn bad_requests_are_errors() {
    let generator = generator(Decoder::default());
    let error = |request: GenerateRequest| generator.complete(&request).unwrap_err();
    let good = greedy(&prompts(), 3);
    assert!(matches!(error(greedy(&[], 3)), Error::EmptyBatch));
    assert!(matches!(error(greedy(&[vec![1], vec![]], 3)), Error::EmptyPrompt { index: 1 }));
    let outside = error(greedy(&[vec![1], vec![2, 61]], 3));
    assert!(matches!(outside, Error::TokenOutOfRange { id: 61, row: 1, position: 1, vocab_size: 61 }), "{outside}");
    let huge = error(greedy(&[vec![u32::MAX]], 3));
    assert!(matches!(huge, Error::TokenOutOfRange { .. }));
    assert!(matches!(error(GenerateRequest { num_samples: 0, ..good.clone() }), Error::Mismatch { .. }));
    for num_samples in [1 << 30, usize::MAX] {
        assert!(matches!(error(GenerateRequest { num_samples, ..good.clone() }), Error::OutOfMemory { .. }));
    }
    let text = GenerateRequest { prompts: vec![Prompt::from("hello")], ..good.clone() };
    assert!(matches!(error(text), Error::NoTokenizer { .. }));
    let stop = Stop { texts: vec!["x".into()], ..Stop::default() };
    assert!(matches!(error(GenerateRequest { stop, ..good.clone() }), Error::NoTokenizer { .. }));
    let on_context_end = ContextEnd::Slide { keep: Some(24) };
    assert!(matches!(error(GenerateRequest { on_context_end, ..good.clone() }), Error::Mismatch { .. }));
    let sampling = Sampling { top_k: Some(0), ..Sampling::default() };
    assert!(matches!(error(GenerateRequest { sampling, ..good }), Error::Sampling { parameter: "top_k", .. }));
}

/// A tokenizer for the small model, with a letter a token but for `half`: a blank and two of the three bytes of a quotation mark.
fn letters_with_half_a_character(half: u32) -> Tokenizer {
    let token = |id| if id == half { "ĠâĢ".to_owned() } else { char::from(b'A' + id as u8).to_string() };
    let vocab: serde_json::Map<_, _> = (0..61).map(|id| (token(id), id.into())).collect();
    Tokenizer::from_vocab_and_merges(&serde_json::Value::from(vocab).to_string(), "").unwrap()
}

#[test]
fn a_stop_text_that_appears_with_half_a_character_is_a_stop() {
    let model = random_model(small_config());
    let request = greedy(&[vec![1, 2, 3]], 8);
    let ids = ids_of(&Generator::new(model.clone()), &request).remove(0);
    // The last of the ids that is not among those before it.
    let at = (0..ids.len()).rfind(|&at| !ids[..at].contains(&ids[at])).unwrap();
    let generator = Generator::new(model).with_tokenizer(letters_with_half_a_character(ids[at]));
    let complete = |stop: &str, max_new_tokens| {
        let stop = Stop { texts: vec![stop.to_owned()], ignore_eos: true };
        let output = generator.complete(&GenerateRequest { stop, max_new_tokens, ..request.clone() });
        let completion = output.unwrap().completions.remove(0);
        (completion.ids.len(), completion.finish, completion.text.unwrap())
    };
    let letters: String = ids[..at].iter().map(|id| char::from(b'A' + *id as u8)).collect();
    // With the last token that is allowed, and with more to come.
    for max_new_tokens in [at + 1, 8] {
        assert_eq!(complete(" ", max_new_tokens), (at + 1, FinishReason::Stop, letters.clone()));
    }
    // Only when nothing comes any more is it known that the character never will be complete.
    let flushed = complete("\u{fffd}", at + 1);
    assert_eq!(flushed, (at + 1, FinishReason::Stop, letters.clone() + " "));
    assert_eq!(complete("~", at + 1), (at + 1, FinishReason::Length, letters + " \u{fffd}"));
}

#[test]
fn logits_that_are_not_finite_end_the_generation_with_an_error() {
    let mut model = random_model(small_config());
    let weight = model.ln_f.gamma.val() * f32::NAN;
    model.ln_f.gamma = gpt2_burn::burn::module::Param::from_tensor(weight);
    let generator = Generator::new(model);
    let mut generation = generator.generate(&greedy(&prompts(), 3)).unwrap();
    assert!(matches!(generation.next(), Some(Err(Error::NotFinite { prompt: 0, .. }))));
    assert!(generation.next().is_none());
}

#[test]
fn log_probabilities_are_those_of_the_model() {
    let generator = generator(Decoder::default());
    let request = GenerateRequest { logprobs: Some(3), ..greedy(&prompts()[..1], 4) };
    let completion = generator.complete(&request).unwrap().completions.pop().unwrap();
    let mut ids = completion.prompt_ids.clone();
    for (id, logprobs) in completion.ids.iter().zip(completion.logprobs.unwrap()) {
        let all = log_softmax(&common::logits_of(generator.model(), &ids).pop().unwrap());
        assert!((logprobs.chosen - all[*id as usize]).abs() < 1e-4);
        assert_eq!(logprobs.top.len(), 3);
        assert_eq!(logprobs.top[0].0, *id, "greedy chooses the most likely");
        assert!(logprobs.top.is_sorted_by(|left, right| left.1 >= right.1));
        ids.push(*id);
    }
    let all = GenerateRequest { logprobs: Some(1000), ..greedy(&prompts()[..1], 1) };
    let completion = generator.complete(&all).unwrap().completions.pop().unwrap();
    let total: f64 = completion.logprobs.unwrap()[0].top.iter().map(|(_, logprob)| logprob.exp()).sum();
    assert!((total - 1.0).abs() < 1e-6);
}

#[test]
fn text_streams_as_it_is_made_and_is_the_whole_in_the_end() {
    let generator = text_generator();
    let mut request = GenerateRequest::new(["ROMEO:\n", "First Citizen:\nWe "]);
    request.max_new_tokens = 60;
    request.num_samples = 2;
    let mut streamed = vec![String::new(); 4];
    let mut ids = vec![Vec::new(); 4];
    for event in generator.generate(&request).unwrap() {
        let event = event.unwrap();
        streamed[2 * event.prompt_index + event.sample] += &event.text;
        ids[2 * event.prompt_index + event.sample].push(event.id);
    }
    let output = generator.complete(&request).unwrap();
    for (index, completion) in output.completions.iter().enumerate() {
        assert_eq!((completion.prompt_index, completion.sample), (index / 2, index % 2));
        assert_eq!(completion.text.as_ref(), Some(&streamed[index]));
        assert_eq!(completion.ids, ids[index]);
        assert_eq!(generator.tokenizer().unwrap().decode(&completion.ids).unwrap(), streamed[index]);
    }
    assert_eq!(output.report.new_tokens, 240);
    assert_eq!(output.report.step_seconds.len(), 59);
    assert!(output.report.prefill_seconds > 0.0 && output.report.tokens_per_second() > 0.0);
}

#[test]
fn a_stop_text_ends_the_text_before_it() {
    let generator = text_generator();
    let mut request = GenerateRequest::new(["ROMEO:\n"]);
    request.max_new_tokens = 120;
    let free = generator.complete(&request).unwrap().completions.pop().unwrap();
    let whole = free.text.unwrap();
    // Longer than a token, so that it is completed piece by piece; some of it is held back on the way.
    let stop = &whole[50..57];
    assert!(whole.is_ascii());
    request.stop.texts = vec!["not in the text, surely".into(), stop.to_owned()];
    let mut streamed = String::new();
    let mut finish = None;
    for event in generator.generate(&request).unwrap() {
        let event = event.unwrap();
        streamed += &event.text;
        assert!(!streamed.contains(stop));
        finish = finish.or(event.finish);
    }
    assert_eq!(streamed, whole[..whole.find(stop).unwrap()]);
    assert_eq!(finish, Some(FinishReason::Stop));
    let stopped = generator.complete(&request).unwrap().completions.pop().unwrap();
    assert_eq!(stopped.ids, free.ids[..stopped.ids.len()]);
    assert_eq!(stopped.text.unwrap(), streamed);
}

#[test]
fn an_unfinished_stop_text_is_let_go_at_the_end() {
    let generator = text_generator();
    let mut request = GenerateRequest::new(["ROMEO:\n"]);
    request.max_new_tokens = 30;
    let whole = generator.complete(&request).unwrap().completions.pop().unwrap().text.unwrap();
    request.stop.texts = vec![format!("{}#", &whole[25..])];
    let completion = generator.complete(&request).unwrap().completions.pop().unwrap();
    assert_eq!((completion.text.unwrap(), completion.finish), (whole, FinishReason::Length));
}

#[test]
fn the_cache_is_reported() {
    let config = small_config();
    let request = greedy(&prompts(), 9);
    for decoder in DECODERS {
        let report = generator(decoder.clone()).complete(&request).unwrap().report;
        let tokens = 5 + 9 - 1; // of the longest row; the last token is never fed back
        let expected = match decoder {
            Decoder::Naive => 0,
            // The pages that a step copies from, and those to which.
            Decoder::Kv(CacheStorage::Growing) if backends::has_page_kernels(&device()) => {
                2 * kv_bytes(&config, 3, tokens)
            }
            _ => kv_bytes(&config, 3, tokens),
        };
        assert_eq!(report.kv_bytes, expected, "{decoder}");
        assert_eq!((report.decoder, report.prompt_tokens, report.new_tokens), (decoder, 9, 27));
    }
}

#[test]
fn a_cache_saves_what_it_is_there_to_save() {
    // 5 + 1 + 3 prompt tokens, computed once for both samples, and 8 of the 9 new ones of each of 6 rows.
    let request = sampled(&prompts(), 2);
    let computed = |decoder| generator(decoder).complete(&request).unwrap().report.computed_tokens;
    let [naive, cached @ ..] = DECODERS.map(computed);
    assert_eq!(cached, [9 + 6 * 8; 3]);
    let again: usize = (1..9).map(|new| 2 * (9 + 3 * new)).sum();
    assert_eq!(naive, 9 + again);
}

#[test]
fn a_row_whose_context_slides_does_not_make_the_others_wait() {
    // The first row slides twice, and computes 11 tokens each time, while the second decodes one.
    let prompts = [(0..20).collect(), vec![1, 2, 3]];
    let request = GenerateRequest { on_context_end: ContextEnd::Slide { keep: Some(10) }, ..greedy(&prompts, 21) };
    for decoder in DECODERS.into_iter().skip(1) {
        let report = generator(decoder).complete(&request).unwrap().report;
        assert_eq!(report.computed_tokens, 23 + 2 * 20 + 2 * 10);
    }
}

#[test]
fn a_row_is_not_touched_by_values_that_are_only_in_another() {
    // Id 0 gives NaN; a row without it must not notice that another has it, or that there is room behind its end.
    let mut model = random_model(small_config());
    let weight = model.wte.weight.val();
    let poison = weight.clone().narrow(0, 0, 1) * f32::NAN;
    let model_weight = weight.slice_assign([0..1, 0..24], poison);
    model.wte.weight = gpt2_burn::burn::module::Param::from_tensor(model_weight);
    let clean = [vec![5_u32, 6, 7, 8], vec![1]];
    // The head is tied, so every logit of id 0 is NaN: compare states, not logits.
    for storage in common::STORAGES {
        let states = |rows: &[Vec<u32>]| {
            let mut cache = model.cache(storage, rows.len(), 10).unwrap();
            let tokens = gpt2_burn::TokenBatch::new(rows, &model).unwrap();
            common::rows(model.hidden_states(&tokens, &mut cache).unwrap())
        };
        let together = states(&clean);
        assert!(together.iter().flatten().all(|value| value.is_finite()), "{storage:?}");
        // Rows of the same lengths, since the order of sums depends on how many tokens there are.
        let with_poison = states(&[clean[0].clone(), vec![0]]);
        assert_eq!(with_poison[..4], together[..4], "{storage:?}");
        assert!(with_poison[4].iter().any(|value| value.is_nan()));
        let with_poison = states(&[vec![0; 4], clean[1].clone()]);
        assert_eq!(with_poison[4], together[4], "{storage:?}");
        assert!(with_poison[0].iter().any(|value| value.is_nan()));
    }
}

#[test]
fn dropping_an_iterator_cancels() {
    let generator = generator(Decoder::default());
    let mut generation = generator.generate(&greedy(&prompts(), 9)).unwrap();
    generation.next().unwrap().unwrap();
    assert_eq!(generation.report().new_tokens, 3, "one step of three rows");
    drop(generation);
    assert_eq!(generator.complete(&greedy(&prompts(), 2)).unwrap().report.new_tokens, 6);
}
