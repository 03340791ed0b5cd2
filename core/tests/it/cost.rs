//! The arithmetic of inference, held to figures that were worked out by hand, and to closed forms.

use gpt2_burn_core::cost::{
    Bound, Cost, Counted, ElementBytes, Hardware, Part, Pass, Reached, SpeculationCost, Term, Work, acceptance,
};
use gpt2_burn_core::sampling::Sampling;
use gpt2_burn_core::speculative::{best_len, expected_tokens};
use gpt2_burn_core::{Error, ModelShape};
use proptest::prelude::*;

const F16: usize = 2;

/// The assignment's costs of a published size, in 16 bit.
fn published(name: &str) -> Cost {
    let gpt2 = ModelShape::default();
    let shape = match name {
        "gpt2" => gpt2,
        "gpt2-xl" => ModelShape { n_layer: 48, n_head: 25, n_embd: 1600, ..gpt2 },
        other => panic!("{other} is not used here"),
    };
    Cost::new(shape, F16).unwrap().counting(Counted::assignment())
}

fn small_shape() -> ModelShape {
    ModelShape { vocab_size: 61, n_positions: 24, n_embd: 24, n_layer: 2, n_head: 3, ..ModelShape::default() }
}

fn with_head(cost: Cost) -> Cost {
    let counted = cost.counted();
    cost.counting(Counted { head: true, ..counted })
}

fn t4() -> Hardware {
    Hardware::preset("t4").unwrap()
}

/// `value` in as many digits as a person would write.
#[track_caller]
fn assert_rounds_to(value: f64, digits: &str) {
    let decimals = digits.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    assert_eq!(format!("{value:.decimals$}"), digits);
}

/// GPT2-XL, naive and with a cache.
const CASES: [(usize, usize); 4] = [(1, 32), (1, 1024), (64, 32), (64, 1024)];

#[test]
fn a_layer_takes_the_flops_of_the_textbook() {
    for (d, n_head) in [(64, 4), (768, 12), (1600, 25)] {
        let shape = ModelShape { n_embd: d, n_head, n_layer: 1, ..ModelShape::default() };
        let cost = Cost::new(shape, F16).unwrap().counting(Counted::assignment());
        for (b, n) in CASES {
            let naive = 24 * b * n * d * d + 4 * b * n * n * d;
            let cached = 24 * b * d * d + 4 * b * n * d;
            assert_eq!(cost.work(Pass::naive(b, n)).unwrap().flops, naive as f64);
            assert_eq!(cost.work(Pass::decode(b, n)).unwrap().flops, cached as f64);
            assert_eq!(cost.kv_bytes_per_layer(b, n), (4 * b * n * d) as f64);
            let attention = 8 * b * n * d * d + 4 * b * n * n * d;
            assert_eq!(cost.work_of(Part::Attention, Pass::naive(b, n)).unwrap().flops, attention as f64);
            assert_eq!(cost.work_of(Part::Mlp, Pass::naive(b, n)).unwrap().flops, (16 * b * n * d * d) as f64);
        }
    }
}

#[test]
fn coefficients_are_those_of_the_docs() {
    let cost = published("gpt2-xl");
    let (d, heads, layers) = (1600.0, 25.0, 48.0);
    let (naive, cached) = (cost.naive(), cost.cached());
    assert_eq!(naive.flops.batch_length, layers * 24.0 * d * d);
    assert_eq!(naive.flops.batch_length_squared, layers * 4.0 * d);
    assert_eq!(naive.bytes.constant, layers * 24.0 * d * d);
    assert_eq!(naive.bytes.batch_length, layers * 40.0 * d);
    assert_eq!(naive.bytes.batch_length_squared, layers * 12.0 * heads);
    assert_eq!(naive.bytes.length_squared, layers * 2.0);
    let rest = [naive.flops.constant, naive.flops.batch, naive.flops.length, naive.flops.length_squared];
    assert_eq!((rest, naive.bytes.batch, naive.bytes.length), ([0.0; 4], 0.0, 0.0), "C1 to C6 are all there is");
    assert_eq!((cached.flops.batch, cached.flops.batch_length), (layers * 24.0 * d * d, layers * 4.0 * d));
    assert_eq!(cached.bytes.constant, layers * 24.0 * d * d);
    assert_eq!(cached.bytes.batch, layers * 36.0 * d);
    assert_eq!(cached.bytes.batch_length, layers * (4.0 * d + 8.0 * heads));
    assert_eq!(with_head(published("gpt2")).naive_of(Part::Head).flops.to_string(), "77194752 B");
}

#[test]
fn closed_forms_are_the_table_summed_at_all_eight_cases() {
    for cost in [published("gpt2-xl"), with_head(published("gpt2-xl")), published("gpt2").counting(Counted::all())] {
        for (b, n) in CASES {
            assert_eq!(cost.naive().at(b, n), cost.work(Pass::naive(b, n)).unwrap());
            assert_eq!(cost.cached().at(b, n), cost.work(Pass::decode(b, n)).unwrap());
        }
    }
}

#[test]
fn the_constant_of_a_decode_step_on_a_t4_is_that_of_the_assignment() {
    let seconds = |cost: &Cost| cost.cached().bytes.constant / t4().bandwidth;
    let (gpt2, xl) = (published("gpt2"), published("gpt2-xl"));
    assert_rounds_to(seconds(&gpt2) * 1e6, "566");
    assert_rounds_to(seconds(&with_head(gpt2)) * 1e6, "824");
    assert_rounds_to(seconds(&xl) * 1e3, "9.83");
    assert_rounds_to(seconds(&with_head(xl)) * 1e3, "10.37");
    assert_rounds_to(seconds(&with_head(gpt2)) / seconds(&xl), "0.0838");
}

#[test]
fn speculation_at_75_percent_is_best_at_six_tokens_and_at_five_with_the_bonus() {
    let draft_cost =
        with_head(published("gpt2")).cached().bytes.constant / published("gpt2-xl").cached().bytes.constant;
    let pair = SpeculationCost::new(0.75, draft_cost).unwrap();
    let (with, without) = (pair.best(30), pair.without_bonus().best(30));
    assert_eq!((without.draft_len, with.draft_len), (6, 5));
    assert_rounds_to(without.speedup, "2.19");
    assert_rounds_to(with.speedup, "2.32");
    // The table in the docs.
    for (m, plain, bonus) in [(4, "2.05", "2.29"), (5, "2.15", "2.32"), (6, "2.19", "2.31"), (7, "2.18", "2.27")] {
        assert_rounds_to(pair.without_bonus().speedup(m), plain);
        assert_rounds_to(pair.speedup(m), bonus);
    }
}

#[test]
fn what_does_not_fit_says_so_with_its_numbers() {
    let cost = published("gpt2-xl");
    assert_rounds_to(cost.kv_bytes(64, 1024) / 1e9, "20.1");
    assert_eq!(cost.kv_bytes(64, 1024), 48.0 * cost.kv_bytes_per_layer(64, 1024));
    let fit = cost.fits(&t4(), Pass::decode(64, 1024)).unwrap();
    assert!(!fit.is_enough());
    let text = fit.to_string();
    for part in ["does not fit", "3.12 GB of parameters", "20.1 GB of keys and values", "are 23.3 GB", "of 16.0 GB"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // The residual stream, the norm's output, queries, keys, values and result, and scores before and after the softmax.
    assert_eq!(fit.needed.activations, 2.0 * 64.0 * (6.0 * 1600.0 + 2.0 * 25.0 * 1024.0));
    let fit = cost.fits(&t4(), Pass::decode(1, 1024)).unwrap();
    assert!(fit.is_enough() && fit.to_string().starts_with("fits: 3.12 GB of parameters + 315 MB of keys and values"));
    assert_eq!(fit.needed.parameters, 2.0 * 1_557_611_200.0);
    // Without a cache, keys and values of other layers are forgotten; scores of one layer are there twice.
    let naive = cost.memory(Pass::naive(64, 1024)).unwrap();
    assert_eq!(naive.kv, 0.0);
    assert!(naive.activations > 2.0 * 2.0 * 64.0 * 25.0 * 1024.0 * 1024.0);
    assert!(cost.counting(Counted::kernels()).memory(Pass::naive(64, 1024)).unwrap().activations < 2e9);
}

#[test]
fn the_roofline_bounds_by_the_slower_of_both() {
    let t4 = t4();
    assert_rounds_to(t4.ridge_point(), "216.67");
    let at = |intensity: f64| t4.roofline(Work { flops: intensity * 3e9, bytes: 3e9 });
    assert_eq!((at(216.0).bound(), at(217.0).bound()), (Bound::Memory, Bound::Compute));
    assert!((at(1.0).seconds() - 0.01).abs() < 1e-12);
    assert!((at(2.0 * t4.ridge_point()).seconds() - 0.02).abs() < 1e-12);
    // The four speed-ups: with a cache, the weights are all that a short context reads.
    let cost = published("gpt2-xl");
    let speedups = CASES.map(|(b, n)| cost.kv_speedup(&t4, b, n).unwrap());
    assert!(speedups[0] < 1.2 && speedups[1] > 5.0 && speedups[2] > 5.0 && speedups[3] > 20.0, "{speedups:?}");
    for name in Hardware::preset_names() {
        let Hardware { name, bandwidth, flops, memory, .. } = Hardware::preset(name).unwrap();
        assert!(Hardware::new(name, bandwidth, flops, memory).unwrap().ridge_point() > 100.0);
    }
}

#[test]
fn terms_one_after_the_other_take_longer_than_the_roofline_and_attention_has_its_own_rate() {
    let (cost, t4) = (published("gpt2").counting(Counted::kernels()), t4());
    for pass in [Pass::naive(1, 32), Pass::naive(8, 512), Pass::decode(1, 512), Pass::verify(1, 100, 4)] {
        let (roofline, seconds) = (t4.roofline(cost.work(pass).unwrap()).seconds(), cost.seconds(&t4, pass).unwrap());
        assert!(seconds >= roofline * 0.999_999 && seconds < 2.0 * roofline, "{pass:?}: {seconds} and {roofline}");
    }
    // A decode step is bound by memory in all of its terms: their times add up.
    let decode = Pass::decode(1, 512);
    let roofline = t4.roofline(cost.work(decode).unwrap());
    assert!((cost.seconds(&t4, decode).unwrap() / roofline.seconds() - 1.0).abs() < 1e-9);
    // Of which weights are read at half the rate, and results written at a hundredth.
    let bytes = |of: fn(&Term) -> f64| {
        cost.terms(decode).unwrap().iter().map(|term| term.times as f64 * of(term)).sum::<f64>() / t4.bandwidth
    };
    let (weights, results) = (bytes(|term| term.weights), bytes(|term| term.written));
    for (reached, more) in [
        (Reached { weights: t4.bandwidth / 2.0, ..t4.reached }, weights),
        (Reached { results: t4.bandwidth / 100.0, ..t4.reached }, 99.0 * results),
    ] {
        let slow = t4.clone().with_reached(reached).unwrap();
        let difference = cost.seconds(&slow, decode).unwrap() - roofline.seconds();
        assert!((difference / more - 1.0).abs() < 1e-6, "{difference} and {more}");
    }
    // Scores and values of a long prefill at a thousandth of the rate.
    let reached = Reached { attention: t4.flops / 1000.0, ..t4.reached };
    let slow = t4.clone().with_reached(reached).unwrap();
    let pass = Pass::naive(8, 1024);
    // Of the last layer, only one query of each row.
    let over_keys = 4.0 * 768.0 * 8.0 * (11.0 * 1024.0 * 1025.0 / 2.0 + 1024.0);
    let seconds = over_keys / reached.attention;
    let difference = cost.seconds(&slow, pass).unwrap() - cost.seconds(&t4, pass).unwrap();
    assert!((difference / seconds - 1.0).abs() < 0.01, "{difference} and {seconds}");
    let slow = t4.clone().with_reached(Reached { linear: t4.flops / 1000.0, ..t4.reached }).unwrap();
    let matrices = cost.naive().flops.at(8, 1024) - over_keys;
    let ratio = cost.seconds(&slow, pass).unwrap() / (matrices / slow.reached.linear);
    assert!((ratio - 1.0).abs() < 0.01, "{ratio}");
    assert!(t4.clone().with_reached(Reached { attention: f64::NAN, ..reached }).is_err());
    assert!(t4.clone().with_reached(Reached { weights: -1.0, ..reached }).is_err());
    assert!(t4.clone().with_reached(Reached { results: f64::INFINITY, ..reached }).is_err());
    assert!(t4.with_reached(Reached { linear: 0.0, ..reached }).is_err());
}

/// By hand, for gpt2's shape and one row of 512: of 12 x 24 d^2 FLOPs a token, the last layer needs 4 d^2 of those whose
/// logits nobody wants; and a part of a prompt that gets no logits leaves only them.
#[test]
fn of_the_last_layer_only_keys_and_values_of_unwanted_tokens_count() {
    let whole = published("gpt2").counting(Counted { causal: true, ..Counted::assignment() });
    let wanted = published("gpt2").counting(Counted { causal: true, whole_last_layer: false, ..Counted::assignment() });
    let (d, tokens) = (768.0, 512.0);
    let difference =
        whole.work(Pass::prefill(1, 512)).unwrap().flops - wanted.work(Pass::prefill(1, 512)).unwrap().flops;
    let pairs = tokens * (tokens + 1.0) / 2.0 - tokens;
    assert_eq!(difference, 20.0 * d * d * (tokens - 1.0) + 4.0 * d * pairs);
    let chunk = Pass { logits: 0, ..Pass::prefill(1, 512) };
    let difference = whole.work(chunk).unwrap().flops - wanted.work(chunk).unwrap().flops;
    assert_eq!(difference, 20.0 * d * d * tokens + 4.0 * d * (pairs + tokens));
    let last = |name: &str| {
        let terms = wanted.terms(chunk).unwrap();
        terms.iter().filter(|term| term.name == name).map(|term| (term.times, term.weights)).collect::<Vec<_>>()
    };
    assert_eq!(last("c_attn"), [(11, 2.0 * 3.0 * d * d), (1, 2.0 * 2.0 * d * d)]);
    assert_eq!(last("c_fc"), [(11, 2.0 * 4.0 * d * d)]);
    // A decode step wants all that it computes.
    assert_eq!(whole.terms(Pass::decode(1, 512)).unwrap(), wanted.terms(Pass::decode(1, 512)).unwrap());
}

#[test]
fn verifying_a_draft_computes_what_as_many_decode_steps_and_one_would() {
    let cost = published("gpt2").counting(Counted::kernels());
    for (context_len, drafted) in [(10, 0), (10, 1), (500, 4), (0, 8)] {
        let verification = cost.work(Pass::verify(2, context_len, drafted)).unwrap();
        let steps = context_len + 1..=context_len + drafted + 1;
        let steps: Vec<Work> = steps.map(|length| cost.work(Pass::decode(2, length)).unwrap()).collect();
        assert_eq!(verification.flops, steps.iter().map(|step| step.flops).sum::<f64>());
        // All of them read the weights, the verification once.
        let weights = cost.parameter_bytes();
        let bytes = steps.iter().map(|step| step.bytes).sum::<f64>() - drafted as f64 * 0.98 * weights;
        assert!(verification.bytes > 0.98 * weights && verification.bytes <= bytes, "{context_len} and {drafted}");
    }
}

#[test]
fn bad_input_is_an_error() {
    let cost = published("gpt2");
    assert!(matches!(cost.work(Pass::naive(0, 1)), Err(Error::EmptyBatch)));
    for pass in [Pass::naive(1, 0), Pass::decode(1, 0), Pass { logits: 2, ..Pass::decode(1, 3) }] {
        assert!(matches!(cost.work(pass), Err(Error::Mismatch { .. })), "{pass:?}");
        assert!(matches!(cost.memory(pass), Err(Error::Mismatch { .. })));
    }
    for pass in [Pass::naive(1, 1025), Pass::verify(1, 1024, 0), Pass::verify(1, usize::MAX, usize::MAX)] {
        assert!(matches!(cost.work(pass), Err(Error::ContextOverflow { .. })), "{pass:?}");
    }
    assert!(cost.work(Pass::naive(usize::MAX, 1024)).unwrap().flops.is_finite());
    let shape = ModelShape { n_head: 5, ..small_shape() };
    assert!(matches!(Cost::new(shape, F16), Err(Error::Config { field: "n_head", .. })));
    let vast = Cost::new(small_shape(), usize::MAX).unwrap();
    assert!(vast.parameter_bytes().is_finite() && vast.kv_bytes(usize::MAX, usize::MAX).is_finite());
    for (bandwidth, flops, memory) in
        [(0.0, 1.0, 1.0), (1.0, f64::NAN, 1.0), (1.0, 1.0, -1.0), (f64::INFINITY, 1.0, 1.0)]
    {
        assert!(matches!(Hardware::new("", bandwidth, flops, memory), Err(Error::Mismatch { .. })));
    }
    assert!(Hardware::new("", 1.0, 1.0, f64::INFINITY).is_ok());
    for (acceptance, draft_cost) in [(-0.1, 0.1), (1.1, 0.1), (f64::NAN, 0.1), (0.5, -1.0), (0.5, f64::INFINITY)] {
        assert!(matches!(SpeculationCost::new(acceptance, draft_cost), Err(Error::Mismatch { .. })));
    }
}

#[test]
fn a_draft_that_is_never_right_or_too_dear_is_not_used() {
    for (a, c) in [(0.0, 0.1), (0.5, 1.0), (0.9, 5.0)] {
        let best = SpeculationCost::new(a, c).unwrap().best(20);
        assert_eq!((best.draft_len, best.speedup), (0, 1.0));
    }
    // One that is always right and costs nothing gives all it may.
    let perfect = SpeculationCost::new(1.0, 0.0).unwrap();
    assert_eq!((perfect.best(20).draft_len, perfect.best(20).speedup), (20, 21.0));
    assert_eq!(perfect.without_bonus().best(20).speedup, 20.0);
    // A verification that costs more per token makes rounds shorter.
    let pair = SpeculationCost::new(0.75, 0.0838).unwrap();
    assert_eq!(pair.best_measured(20, |_| 1.0), pair.best(20));
    let dear = pair.best_measured(20, |m| 1.0 + 0.1 * m as f64);
    assert!(dear.draft_len < 5 && dear.speedup < 2.32 && dear.speedup > 1.0, "{dear:?}");
    assert_eq!(pair.best_measured(20, |m| 3.0 * (m + 1) as f64).draft_len, 0);
}

#[test]
fn acceptance_is_what_both_distributions_share() {
    let distribution = |logits: &[f32], temperature| {
        Sampling { temperature, ..Sampling::default() }.distribution(logits, &[]).unwrap()
    };
    let (p, q) = ([0.0, 1.0, 2.0_f32], [2.0, 1.0, 0.0_f32]);
    let found = acceptance(&distribution(&p, 1.0), &distribution(&q, 1.0));
    let [small, middle, _] = [0_f64, 1.0, 2.0].map(|x| x.exp() / (1.0 + 1_f64.exp() + 2_f64.exp()));
    assert!((found - (2.0 * small + middle)).abs() < 1e-9);
    assert_eq!(acceptance(&distribution(&p, 0.0), &distribution(&q, 0.0)), 0.0);
    assert_eq!(acceptance(&distribution(&p, 0.0), &distribution(&p, 0.0)), 1.0);
    // Nothing is shared of what a filter dropped.
    let first = Sampling { top_k: Some(1), ..Sampling::default() }.distribution(&[1.0; 3], &[]).unwrap();
    assert!((acceptance(&first, &distribution(&p, 1.0)) - small).abs() < 1e-9);
}

prop_compose! {
    fn shapes()(
        head_dim in 1_usize..6,
        n_head in 1_usize..4,
        n_layer in 1_usize..4,
        n_inner in proptest::option::of(1_usize..30),
        vocab_size in 1_usize..40,
        tie_word_embeddings: bool,
        bias: bool,
    ) -> ModelShape {
        let n_embd = head_dim * n_head;
        ModelShape { n_embd, n_head, n_layer, n_inner, vocab_size, tie_word_embeddings, bias, ..small_shape() }
    }
}

prop_compose! {
    fn counteds()(on: [bool; 9]) -> Counted {
        let [head, embeddings, norms, elementwise, biases, activations, scores, causal, whole_last_layer] = on;
        Counted { head, embeddings, norms, elementwise, biases, activations, scores, causal, whole_last_layer }
    }
}

fn element_bytes() -> impl Strategy<Value = ElementBytes> {
    let floats = prop::sample::select(vec![8_usize, 4, 2]);
    let weights = prop::sample::select(vec![4_usize, 2, 1]);
    (weights, floats.clone(), floats).prop_map(|(weights, activations, cache)| ElementBytes {
        weights,
        activations,
        cache,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn closed_forms_are_the_table_summed_for_any_model(
        shape in shapes(),
        counted in counteds(),
        element_bytes in element_bytes(),
        batch in 1_usize..70,
        length in 2_usize..=24,
    ) {
        let cost = Cost::new(shape, element_bytes).unwrap().counting(counted);
        prop_assert_eq!(cost.naive().at(batch, length), cost.work(Pass::naive(batch, length)).unwrap());
        prop_assert_eq!(cost.cached().at(batch, length), cost.work(Pass::decode(batch, length)).unwrap());
        for part in Part::ALL {
            let naive = cost.work_of(part, Pass::naive(batch, length)).unwrap();
            prop_assert_eq!(cost.naive_of(part).at(batch, length), naive);
            let cached = cost.work_of(part, Pass::decode(batch, length)).unwrap();
            prop_assert_eq!(cost.cached_of(part).at(batch, length), cached);
        }
    }

    /// Every run of accepted and rejected tokens, with its probability.
    #[test]
    fn expected_tokens_are_those_of_all_outcomes_enumerated(a in 0.0..=1.0_f64, draft_len in 1_usize..10) {
        let pair = SpeculationCost::new(a, 0.1).unwrap();
        let (mut with, mut without, mut total) = (0.0, 0.0, 0.0);
        for outcome in 0..1_u32 << draft_len {
            let accepted = outcome.trailing_ones() as usize;
            let probability: f64 =
                (0..draft_len).map(|token| if outcome >> token & 1 == 1 { a } else { 1.0 - a }).product();
            total += probability;
            with += probability * (accepted + 1) as f64;
            without += probability * (accepted + 1).min(draft_len) as f64;
        }
        prop_assert!((total - 1.0).abs() < 1e-9);
        prop_assert!((pair.expected_tokens(draft_len) - with).abs() < 1e-9);
        prop_assert!((pair.without_bonus().expected_tokens(draft_len) - without).abs() < 1e-9);
        // What adaptive drafts are decided by is the same, worked out in another way.
        let verify_cost = |m: usize| 1.0 + a * m as f64;
        let (best, other) = (pair.best_measured(9, verify_cost), best_len(a, 0.1, verify_cost, 0..=9).unwrap());
        prop_assert!((expected_tokens(a, draft_len) - with).abs() < 1e-9);
        prop_assert!((best.speedup - other.1).abs() < 1e-9, "{best:?} and {other:?}");
    }
}
