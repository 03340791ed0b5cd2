//! Speculative sampling: exactly the target's filtered distribution, by enumeration and by counting.

use std::collections::BTreeMap;

use crate::common::{greedy, logits_of, random_model, small_config};
use gpt2_burn::generate::{Decoder, GenerateRequest, Generator};
use gpt2_burn::sampling::{Distribution, Purpose, Sampling, uniform};
use gpt2_burn::speculative::{Acceptance, Draft, DraftLen, Ngram, Scripted, Speculation, VerifiedToken};
use gpt2_burn::{Gpt2, Gpt2Config, WeightFormat};

const VOCAB: u32 = 4;

/// New tokens: one of the prefill and three that are speculated on.
const LENGTH: usize = 4;

const DRAWS: usize = 100_000;

const PROMPT: [u32; 3] = [2, 0, 2];

/// The target has two layers; a draft of one has the same embedding and first layer, so it often agrees.
fn model(n_layer: usize) -> Gpt2 {
    let config = Gpt2Config {
        vocab_size: VOCAB as usize,
        n_positions: PROMPT.len() + LENGTH - 1,
        n_embd: 8,
        n_layer,
        n_head: 2,
        ..small_config()
    };
    random_model(config).pack(WeightFormat::F32).unwrap()
}

fn filters() -> [(&'static str, Sampling); 5] {
    let all = Sampling::default();
    [
        ("none", all),
        ("temperature", Sampling { temperature: 0.7, ..all }),
        ("top-k", Sampling { top_k: Some(2), ..all }),
        ("top-p", Sampling { top_p: 0.8, ..all }),
        (
            "all filters",
            Sampling { temperature: 1.3, top_k: Some(3), top_p: 0.9, min_p: 0.05, repetition_penalty: 1.2 },
        ),
    ]
}

/// Probabilities of texts behind the prompt.
type Law = BTreeMap<Vec<u32>, f64>;

/// Distributions behind every text of up to [`LENGTH`] - 1 tokens, computed once.
struct Table(BTreeMap<Vec<u32>, Distribution>);

impl Table {
    fn new(model: &Gpt2, sampling: Sampling) -> Self {
        let mut table = BTreeMap::new();
        let mut texts = vec![Vec::new()];
        while let Some(text) = texts.pop() {
            let whole = [&PROMPT[..], &text].concat();
            let logits = logits_of(model, &whole).pop().unwrap();
            table.insert(text.clone(), sampling.distribution(&logits, &whole).unwrap());
            if text.len() + 1 < LENGTH {
                texts.extend((0..VOCAB).map(|id| [&text[..], &[id]].concat()));
            }
        }
        Self(table)
    }

    /// What plain sampling gives: the product of what the tokens have behind each other.
    fn law(&self) -> Law {
        let mut law = Law::from([(Vec::new(), 1.0)]);
        for _ in 0..LENGTH {
            let longer = law.iter().flat_map(|(text, so_far)| {
                let next = &self.0[text];
                next.ids().iter().zip(next.probs()).map(move |(&id, prob)| ([&text[..], &[id]].concat(), so_far * prob))
            });
            law = longer.collect();
        }
        law
    }
}

/// How long each id's part of [0, 1) is, for a function that grows.
fn lengths(id_at: impl Fn(f64) -> u32) -> [f64; VOCAB as usize] {
    // Where ids from `id` on begin.
    let start = |id: u32| {
        let (mut low, mut high) = (0.0, 1.0);
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            if id_at(middle) >= id { high = middle } else { low = middle }
        }
        high
    };
    let starts: Vec<f64> = (0..VOCAB).map(start).collect();
    std::array::from_fn(|id| starts.get(id + 1).copied().unwrap_or(1.0) - if id == 0 { 0.0 } else { starts[id] })
}

/// A rule for one token: the target's distribution, the draft's, what was proposed, and random numbers.
type Rule<'a> = &'a dyn Fn(&Distribution, &Distribution, u32, &dyn Fn(Purpose) -> f64) -> VerifiedToken;

fn rejection(
    target: &Distribution,
    draft: &Distribution,
    proposed: u32,
    random: &dyn Fn(Purpose) -> f64,
) -> VerifiedToken {
    Acceptance::Rejection.verify(target, draft, proposed, random)
}

/// The law of texts under a rule, with drafts of `m` tokens: every draft, and every way in which it is verified.
fn enumerate(target: &Table, draft: &Table, m: usize, rule: Rule<'_>) -> Law {
    let mut law = Law::new();
    let mut open = vec![(Vec::new(), 1.0, 0)];
    while let Some((text, prob, drafted)) = open.pop() {
        if text.len() == LENGTH {
            *law.entry(text).or_insert(0.0) += prob;
            continue;
        }
        let longer = |id: u32| [&text[..], &[id]].concat();
        let p = &target.0[&text];
        if drafted == 0 {
            // The first token, or one behind a draft that stands: the target's own, and then a new round.
            let next = p.ids().iter().zip(p.probs());
            open.extend(next.map(|(&id, of_id)| (longer(id), prob * of_id, m)));
            continue;
        }
        let q = &draft.0[&text];
        for (&x, of_x) in q.ids().iter().zip(q.probs()) {
            let accepts = |at: f64| rule(p, q, x, &|_| at).accepted;
            let accepted = lengths(|at| u32::from(!accepts(at)))[0];
            open.push((longer(x), prob * of_x * accepted, drafted - 1));
            let other = |at: f64| {
                let random = |purpose| if purpose == Purpose::Accept { 1.0 - f64::EPSILON } else { at };
                rule(p, q, x, &random).id
            };
            if accepted < 1.0 {
                for (id, of_id) in (0..VOCAB).zip(lengths(other)) {
                    open.push((longer(id), prob * of_x * (1.0 - accepted) * of_id, m));
                }
            }
        }
        open.retain(|(_, prob, _)| *prob > 0.0);
    }
    law
}

fn largest_difference(left: &Law, right: &Law) -> f64 {
    let at = |law: &Law, text: &Vec<u32>| law.get(text).copied().unwrap_or(0.0);
    left.keys().chain(right.keys()).map(|text| (at(left, text) - at(right, text)).abs()).fold(0.0, f64::max)
}

#[test]
fn every_way_to_a_text_adds_up_to_its_probability() {
    for (name, sampling) in filters() {
        let (target, other) = (Table::new(&model(2), sampling), Table::new(&model(1), sampling));
        let exact = target.law();
        assert!((exact.values().sum::<f64>() - 1.0).abs() < 1e-9);
        assert!(largest_difference(&exact, &other.law()) > 1e-3, "{name}: the draft is another model");
        let certain =
            other.0.keys().map(|text| (text.clone(), Distribution::certain(text.iter().sum::<u32>() % VOCAB)));
        let certain = Table(certain.collect());
        for m in 1..LENGTH {
            for draft in [&other, &certain, &target] {
                let found = enumerate(&target, draft, m, &rejection);
                let difference = largest_difference(&found, &exact);
                assert!(difference < 1e-9, "{name}, drafts of {m}: {difference}");
            }
            // What a wrong rule does.
            for (what, rule) in wrong_rules() {
                let difference = largest_difference(&enumerate(&target, &other, m, rule), &exact);
                assert!(difference > 1e-3, "{name}, drafts of {m}, {what}: {difference}");
            }
        }
    }
}

/// Rules with an error each.
fn wrong_rules() -> [(&'static str, Rule<'static>); 2] {
    fn verified(accepted: bool, proposed: u32, other: impl Fn() -> u32) -> VerifiedToken {
        VerifiedToken { id: if accepted { proposed } else { other() }, accepted }
    }
    [
        ("accepts where the draft is surer", &|p, q, x, random| {
            let accepted = q.prob(x) > p.prob(x);
            verified(accepted, x, || p.residual(q).sample(random(Purpose::Residual)))
        }),
        ("has no residual", &|p, q, x, random| {
            let accepted = random(Purpose::Accept) * q.prob(x) < p.prob(x);
            verified(accepted, x, || p.sample(random(Purpose::Residual)))
        }),
    ]
}

/// Whether counts of texts fit a law: Pearson's chi-square, with texts that are rarer than five taken together, against
/// its quantile for p = 0.0001 (Wilson and Hilferty, 1931).
fn fits(counts: &BTreeMap<Vec<u32>, usize>, law: &Law) -> bool {
    let draws: usize = counts.values().sum();
    let count = |text: &Vec<u32>| counts.get(text).copied().unwrap_or(0) as f64;
    let cells = law.iter().map(|(text, prob)| (count(text), prob * draws as f64));
    let (rare, mut cells): (Vec<_>, Vec<_>) = cells.partition(|(_, expected)| *expected < 5.0);
    let together = rare.iter().fold((0.0, 0.0), |sum, cell| (sum.0 + cell.0, sum.1 + cell.1));
    if together.1 >= 5.0 {
        cells.push(together);
    }
    let impossible: usize = counts.iter().filter(|(text, _)| !law.contains_key(*text)).map(|(_, count)| count).sum();
    let chi_square: f64 = cells.iter().map(|(count, expected)| (count - expected).powi(2) / expected).sum();
    let freedom = (cells.len() - 1) as f64;
    let spread = 2.0 / (9.0 * freedom);
    impossible == 0 && chi_square < freedom * (1.0 - spread + 3.719 * spread.sqrt()).powi(3)
}

/// The texts that a generator draws, and how often; some are accepted and some rejected on the way.
fn count(generator: &Generator, sampling: Sampling) -> BTreeMap<Vec<u32>, usize> {
    let request = GenerateRequest { sampling, num_samples: DRAWS, ..greedy(&[PROMPT.to_vec()], LENGTH) };
    let output = generator.complete(&request).unwrap();
    if let Some(report) = &output.report.speculation {
        assert!(report.accepted > DRAWS / 20 && report.rejected > DRAWS / 20, "{report:?}");
    }
    let mut counts = BTreeMap::new();
    output.completions.into_iter().for_each(|completion| *counts.entry(completion.ids).or_insert(0) += 1);
    counts
}

fn check(name: &str, draft: &Draft) {
    let target = model(2);
    for (filter, sampling) in filters() {
        let exact = Table::new(&target, sampling).law();
        for acceptance in [Acceptance::Rejection, Acceptance::Match] {
            let speculation = Speculation { draft_len: DraftLen::Fixed(2), acceptance, ..Speculation::default() };
            let generator = Generator::new(target.clone()).with_decoder(Decoder::Speculative(speculation));
            let generator = generator.with_draft(draft.clone()).unwrap();
            assert!(fits(&count(&generator, sampling), &exact), "{name}, {acceptance:?}, {filter}");
        }
    }
}

#[test]
fn texts_with_a_draft_model_are_as_frequent_as_they_should_be() {
    check("model", &Draft::Model(model(1)));
}

#[test]
fn texts_with_an_early_exit_are_as_frequent_as_they_should_be() {
    check("early exit", &Draft::EarlyExit { layers: 1 });
}

#[test]
fn texts_with_prompt_lookup_are_as_frequent_as_they_should_be() {
    check("ngram", &Draft::Ngram(Ngram { max_len: 2, min_len: 1 }));
}

#[test]
fn texts_with_a_scripted_draft_are_as_frequent_as_they_should_be() {
    check("scripted", &Draft::Scripted(Scripted::new(vec![vec![1, 3, 0, 2]], 0.6)));
}

#[test]
fn a_wrong_rule_is_found_by_counting() {
    let (target, draft) = (Table::new(&model(2), Sampling::default()), Table::new(&model(1), Sampling::default()));
    let exact = target.law();
    let draw = |rule: Rule<'_>| {
        let mut counts = BTreeMap::new();
        for stream in 0..DRAWS as u64 {
            let mut text = Vec::new();
            let mut left = 0;
            while text.len() < LENGTH {
                let random = |purpose| uniform(5, stream, text.len() as u64, purpose);
                let p = &target.0[&text];
                let id = match left {
                    0 => {
                        left = 2;
                        p.sample(random(Purpose::Token))
                    }
                    _ => {
                        let q = &draft.0[&text];
                        let verified = rule(p, q, q.sample(random(Purpose::Draft)), &random);
                        left = if verified.accepted { left - 1 } else { 2 };
                        verified.id
                    }
                };
                text.push(id);
            }
            *counts.entry(text).or_insert(0) += 1;
        }
        counts
    };
    assert!(fits(&draw(&rejection), &exact));
    for (what, rule) in wrong_rules() {
        assert!(!fits(&draw(rule), &exact), "{what} is not found");
    }
}
