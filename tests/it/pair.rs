//! The embedded pair is what its model card says.

use crate::common::{self, device, greedy, ids_of, logits_of};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::generate::{GenerateRequest, Generator};
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{Checkpoint, Gpt2, WeightFormat};
use gpt2_burn_pair::{CARD, DRAFT, HELD_OUT, Model, TARGET};

fn load(model: &Model) -> Gpt2 {
    let model = Checkpoint::from_bytes(model.config, model.weights).unwrap().load(&device(), DType::F32).unwrap();
    model.pack(WeightFormat::F32).unwrap()
}

/// The figures of a line of the card's table: the target's and the draft's.
fn figures(label: &str) -> Vec<f64> {
    let line = CARD.lines().find(|line| line.starts_with(&format!("| {label}"))).expect("a line of the card");
    line.split('|').filter_map(|cell| cell.trim().replace(',', "").parse().ok()).collect()
}

#[test]
fn the_models_are_a_target_and_a_draft_of_a_size_to_embed() {
    let (target, draft) = (load(&TARGET), load(&DRAFT));
    let parameters = [target.config().num_params(), draft.config().num_params()];
    assert!((2_500_000..=4_000_000).contains(&parameters[0]), "{parameters:?}");
    assert_eq!(figures("parameters"), parameters.map(|count| count as f64));
    assert!((6..=8).contains(&target.config().n_layer) && draft.config().n_layer <= 2);
    assert_eq!(figures("layers"), [target.config().n_layer as f64, draft.config().n_layer as f64]);
    assert_eq!(draft.config().vocab_size, target.config().vocab_size);
    assert_eq!(draft.config().n_positions, target.config().n_positions);
    assert_eq!(DRAFT.tokenizer, TARGET.tokenizer);
    let bytes = |model: &Model| model.config.len() + model.weights.len() + model.tokenizer.len();
    assert!(bytes(&TARGET) + bytes(&DRAFT) + HELD_OUT.len() < 9_000_000);
}

#[test]
fn losses_and_agreement_on_held_out_text_are_those_of_the_card() {
    let (target, draft) = (load(&TARGET), load(&DRAFT));
    let ids = Tokenizer::from_bytes(TARGET.tokenizer).unwrap().encode(HELD_OUT).unwrap();
    let stride = target.config().n_positions / 2;
    let losses = [&target, &draft].map(|model| {
        let result = model.perplexity(&ids, stride, |_| {}).unwrap();
        result.loss * result.tokens as f64 / HELD_OUT.len() as f64
    });
    assert!(losses[0] < 1.65 && losses[1] < 1.95, "{losses:?}");
    let agreement = target.agreement(&draft, &ids, stride, |_| {}).unwrap();
    assert!(agreement.greedy >= 0.65, "{agreement:?}");

    let card = [figures("held-out loss"), figures("greedy agreement"), figures("sampled agreement")].concat();
    let found = [losses[0], losses[1], agreement.greedy, agreement.sampled];
    assert_eq!(card.len(), found.len());
    for (card, found) in card.iter().zip(found) {
        assert!((card - found).abs() < 2e-4, "the card says {card}, it is {found}");
    }
}

#[test]
fn fewer_bits_cost_little() {
    let ids = Tokenizer::from_bytes(TARGET.tokenizer).unwrap().encode(HELD_OUT).unwrap();
    let loss = |format| {
        let checkpoint = Checkpoint::from_bytes(TARGET.config, TARGET.weights).unwrap();
        let model = checkpoint.load_packed(&device(), format).unwrap();
        model.perplexity(&ids, model.config().n_positions, |_| {}).unwrap().loss
    };
    let exact = loss(WeightFormat::F32);
    // The file holds halves.
    assert_eq!(loss(WeightFormat::F16), exact);
    for (format, max) in [(WeightFormat::Bf16, 0.001), (WeightFormat::Int8, 0.01)] {
        let more = loss(format) / exact - 1.0;
        assert!(more != 0.0 && more < max, "{format:?}: {:.3}% more loss", 100.0 * more);
    }
}

/// What `transformers` computed, see `fixtures/make_pair_expected.py`.
#[derive(serde::Deserialize)]
struct Recorded {
    prompts: Vec<Vec<u32>>,
    logits: Vec<Vec<f32>>,
    greedy: Vec<Vec<u32>>,
    loss: f64,
}

#[test]
fn transformers_computes_the_same_with_the_files() {
    let recorded = std::fs::read_to_string(common::fixture("pair.expected.json")).unwrap();
    let recorded: std::collections::HashMap<String, Recorded> = serde_json::from_str(&recorded).unwrap();
    for (name, files) in [("target", TARGET), ("draft", DRAFT)] {
        let (model, recorded) = (load(&files), &recorded[name]);
        for (prompt, expected) in recorded.prompts.iter().zip(&recorded.logits) {
            let logits = logits_of(&model, prompt).pop().unwrap();
            let differences = logits.iter().zip(expected).map(|(a, b)| (a - b).abs());
            let worst = differences.fold(0.0, f32::max);
            assert!(logits.len() == expected.len() && worst < 1e-3, "{name}: logits differ by {worst}");
        }
        let longest = recorded.prompts.last().unwrap();
        let loss = model.perplexity(longest, model.config().n_positions, |_| {}).unwrap().loss;
        assert!((loss - recorded.loss).abs() < 1e-4, "{name}: {loss} and {}", recorded.loss);
        let generator = Generator::new(model);
        assert_eq!(ids_of(&generator, &greedy(&recorded.prompts, 40)), recorded.greedy, "{name}");
    }
}

#[test]
fn the_text_reads_like_the_plays() {
    let generator = Generator::new(load(&TARGET)).with_tokenizer(Tokenizer::from_bytes(TARGET.tokenizer).unwrap());
    let mut request = GenerateRequest { max_new_tokens: 200, num_samples: 8, ..GenerateRequest::new(["ROMEO:\n"]) };
    request.sampling.temperature = 0.8;
    let completions = generator.complete(&request).unwrap().completions;
    let text: String = completions.iter().filter_map(|completion| completion.text.as_deref()).collect();

    let words = |text: &str| -> Vec<String> {
        text.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty()).map(str::to_lowercase).collect()
    };
    // A tenth of the plays does not have all of their words: text of Shakespeare's own does not reach 1 either.
    let known: std::collections::HashSet<String> = words(HELD_OUT).into_iter().collect();
    let spoken = words(&text);
    let spelled = spoken.iter().filter(|word| known.contains(*word)).count() as f64 / spoken.len() as f64;
    assert!(spelled > 0.75, "{spelled:.2} of the words are Shakespeare's:\n{text}");
    assert!(text.lines().count() > 15, "{text}");
    let speakers = text.lines().filter(|line| line.ends_with(':') && line.starts_with(char::is_uppercase)).count();
    assert!(speakers >= 3, "{text}");
}
