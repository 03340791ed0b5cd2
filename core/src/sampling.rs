//! Logits to distribution to token.
//!
//! Filters are those of `transformers`, in its order: repetition penalty, temperature, top-k, top-p, min-p. Of tokens with the
//! same logit at the k-th place, `top_k` keeps those with the lowest ids, exactly k in all; `transformers` keeps all of them.

use chacha20::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

use crate::{Error, Result};

/// How the next token is chosen.
///
/// ```
/// use gpt2_burn_core::sampling::Sampling;
///
/// let sampling = Sampling { temperature: 0.8, top_k: Some(2), ..Sampling::default() };
/// let distribution = sampling.distribution(&[1.0, 3.0, 2.0], &[])?;
/// assert_eq!(distribution.ids(), [1, 2]);
/// # Ok::<(), gpt2_burn_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0: the most likely token is taken (greedy).
    pub temperature: f64,
    /// Only the k most likely tokens are kept (Fan et al., 2018).
    pub top_k: Option<usize>,
    /// The smallest set of most likely tokens that has this much probability is kept (Holtzman et al., 2020).
    pub top_p: f64,
    /// Tokens with less than this share of the most likely one's probability are dropped (Nguyen et al., 2024).
    pub min_p: f64,
    /// Logits of tokens that have occurred are divided by it if positive, multiplied if negative (Keskar et al., 2019).
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    /// The model's own distribution: temperature 1 and no filter.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl Sampling {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks the parameters.
    ///
    /// # Errors
    ///
    /// [`Error::Sampling`] that names the first one outside its range.
    pub fn validate(&self) -> Result<()> {
        let check = |valid: bool, parameter, value: String, allowed| {
            if valid { Ok(()) } else { Err(Error::Sampling { parameter, value, allowed }) }
        };
        let Self { temperature, top_k, top_p, min_p, repetition_penalty } = *self;
        let finite = |value: f64, least: bool| value.is_finite() && least;
        check(finite(temperature, temperature >= 0.0), "temperature", temperature.to_string(), "a number from 0 up")?;
        check(top_k != Some(0), "top_k", "0".to_owned(), "at least 1, or off")?;
        check(finite(top_p, top_p > 0.0 && top_p <= 1.0), "top_p", top_p.to_string(), "in (0, 1]")?;
        check(finite(min_p, (0.0..=1.0).contains(&min_p)), "min_p", min_p.to_string(), "in [0, 1]")?;
        check(
            finite(repetition_penalty, repetition_penalty > 0.0),
            "repetition_penalty",
            repetition_penalty.to_string(),
            "a number above 0",
        )
    }

    /// Whether the token is the first of the largest logits as they are, so that whoever finds that one, a GPU for instance,
    /// needs neither the others nor the text.
    pub fn is_argmax(&self) -> bool {
        // Every parameter by name: one that is added has to be thought of here. The most likely token passes each filter.
        let Self { temperature, top_k: _, top_p: _, min_p: _, repetition_penalty } = *self;
        temperature == 0.0 && repetition_penalty == 1.0
    }

    /// The distribution of the next token: `logits` has one entry for each id, `previous` the ids of the text so far.
    ///
    /// # Errors
    ///
    /// As [`validate`](Self::validate); [`Error::Mismatch`] if there is no logit, the largest is not finite, or one is
    /// not a number.
    pub fn distribution(&self, logits: &[f32], previous: &[u32]) -> Result<Distribution> {
        self.validate()?;
        let max = largest(logits);
        let max = max.ok_or_else(|| Error::mismatch("logits", "numbers, the largest of them finite", "others"))?;
        if self.is_argmax() {
            // The first of the largest, without a list of all.
            let best = logits.iter().position(|logit| *logit == max).unwrap_or(0);
            return Ok(Distribution { ids: vec![best as u32], probs: vec![1.0] });
        }
        let mut kept: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(id, &logit)| (id as u32, f64::from(logit))).collect();
        self.penalise(&mut kept, previous);
        if self.temperature == 0.0 {
            let best = kept.into_iter().reduce(|best, next| if next.1 > best.1 { next } else { best });
            return Ok(Distribution { ids: best.iter().map(|best| best.0).collect(), probs: vec![1.0] });
        }

        let most_likely_first =
            |left: &(u32, f64), right: &(u32, f64)| right.1.total_cmp(&left.1).then(left.0.cmp(&right.0));
        if let Some(k) = self.top_k.filter(|&k| k < kept.len()) {
            kept.select_nth_unstable_by(k - 1, most_likely_first);
            kept.truncate(k);
        }
        softmax(&mut kept, self.temperature);
        if self.top_p < 1.0 {
            kept.sort_unstable_by(most_likely_first);
            let mut before = 0.0;
            let enough = kept.iter().position(|(_, prob)| {
                let reached = before >= self.top_p;
                before += prob;
                reached
            });
            kept.truncate(enough.unwrap_or(kept.len()));
        }
        if self.min_p > 0.0 {
            let max = kept.iter().map(|(_, prob)| *prob).fold(0.0, f64::max);
            kept.retain(|(_, prob)| *prob >= self.min_p * max);
        }
        kept.sort_unstable_by_key(|(id, _)| *id);
        let total: f64 = kept.iter().map(|(_, prob)| prob).sum();
        let (ids, probs) = kept.into_iter().map(|(id, prob)| (id, prob / total)).unzip();
        Ok(Distribution { ids, probs })
    }

    fn penalise(&self, logits: &mut [(u32, f64)], previous: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let mut seen = vec![false; logits.len()];
        for &id in previous {
            let Some(seen) = seen.get_mut(id as usize) else { continue };
            if !std::mem::replace(seen, true) {
                let logit = &mut logits[id as usize].1;
                // What has no probability keeps none.
                if *logit == f64::NEG_INFINITY {
                    continue;
                }
                let penalised = match *logit < 0.0 {
                    true => *logit * self.repetition_penalty,
                    false => *logit / self.repetition_penalty,
                };
                *logit = penalised.clamp(f64::MIN, f64::MAX);
            }
        }
    }
}

/// The largest of some numbers; none if it is not finite, or one of them is NaN.
///
/// A vocabulary is long, and this is done at every step: sixteen lanes, of which a compiler makes vectors.
fn largest(numbers: &[f32]) -> Option<f32> {
    let (chunks, rest) = numbers.as_chunks::<16>();
    let (mut max, mut has_nan) = ([f32::NEG_INFINITY; 16], [false; 16]);
    for chunk in chunks {
        for lane in 0..16 {
            max[lane] = if chunk[lane] > max[lane] { chunk[lane] } else { max[lane] };
            has_nan[lane] |= chunk[lane].is_nan();
        }
    }
    let largest = max.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    let is_number = !has_nan.contains(&true) && !rest.iter().any(|x| x.is_nan());
    (is_number && largest.is_finite()).then_some(largest)
}

/// Replaces logits by the probabilities at a temperature above 0.
fn softmax(kept: &mut [(u32, f64)], temperature: f64) {
    let max = kept.iter().map(|(_, logit)| *logit).fold(f64::NEG_INFINITY, f64::max);
    // The difference first: a logit divided by a tiny temperature is infinite.
    kept.iter_mut().for_each(|(_, logit)| *logit = ((*logit - max) / temperature).exp());
    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    kept.iter_mut().for_each(|(_, weight)| *weight /= total);
}

/// Probabilities of the tokens that the filters kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Distribution {
    /// In ascending order.
    ids: Vec<u32>,
    /// They add up to 1.
    probs: Vec<f64>,
}

impl Distribution {
    /// The ids that can be drawn, in ascending order.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The probability of each of [`ids`](Self::ids).
    pub fn probs(&self) -> &[f64] {
        &self.probs
    }

    /// The distribution that has only this token.
    pub fn certain(id: u32) -> Self {
        Self { ids: vec![id], probs: vec![1.0] }
    }

    /// Where this distribution exceeds another: `max(0, p - q)`, made to add up to 1 (Leviathan et al., 2023, section
    /// 2.3). If it nowhere does, as only two equal ones do, it is this one.
    pub fn residual(&self, other: &Self) -> Self {
        let mut others = other.ids.iter().zip(&other.probs).peekable();
        let exceeds = |(&id, &p): (&u32, &f64)| {
            while others.next_if(|(other, _)| **other < id).is_some() {}
            let q = others.next_if(|(other, _)| **other == id).map_or(0.0, |(_, q)| *q);
            (p > q).then_some((id, p - q))
        };
        let (ids, mut probs): (Vec<u32>, Vec<f64>) = self.ids.iter().zip(&self.probs).filter_map(exceeds).unzip();
        if ids.is_empty() {
            return self.clone();
        }
        let total: f64 = probs.iter().sum();
        probs.iter_mut().for_each(|prob| *prob /= total);
        Self { ids, probs }
    }

    /// The probability of a token.
    pub fn prob(&self, id: u32) -> f64 {
        self.ids.binary_search(&id).map_or(0.0, |index| self.probs[index])
    }

    /// The token at `uniform` (in [0, 1)) of the cumulative distribution, in order of ids.
    pub fn sample(&self, uniform: f64) -> u32 {
        let mut cumulative = 0.0;
        let index = self.probs.iter().position(|prob| {
            cumulative += prob;
            uniform < cumulative
        });
        // Rounding can leave the sum a little below 1.
        let last = self.probs.iter().rposition(|prob| *prob > 0.0).unwrap_or(0);
        self.ids[index.unwrap_or(last)]
    }
}

/// Natural logarithm of the probability that `logits` give to each id, filters aside.
pub fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - max - total.ln()).collect()
}

/// What a random number is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Purpose {
    /// Drawing a token from the model's distribution.
    Token,
    /// Drawing a token of a draft.
    Draft,
    /// Deciding whether a token of a draft is accepted.
    Accept,
    /// Drawing the token that stands for one that was not.
    Residual,
}

/// A number in [0, 1), as a pure function of where it is used.
///
/// Nothing else is random: what is drawn for a sample depends on its seed, its stream (the sample's index within its
/// prompt, or what the caller sets), the position in its sequence and the purpose, and so neither on its company in
/// a batch nor on how a decoder came to the position. The four are the key of a ChaCha8 generator.
pub fn uniform(seed: u64, rng_stream: u64, position: u64, purpose: Purpose) -> f64 {
    let purpose = match purpose {
        Purpose::Token => 0_u64,
        Purpose::Draft => 1,
        Purpose::Accept => 2,
        Purpose::Residual => 3,
    };
    let mut key = [0; 32];
    for (bytes, part) in key.chunks_exact_mut(8).zip([seed, rng_stream, position, purpose]) {
        bytes.copy_from_slice(&part.to_le_bytes());
    }
    let bits = ChaCha8Rng::from_seed(key).next_u64();
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    struct Recorded {
        logits: Vec<f32>,
        previous_ids: Vec<u32>,
        temperature: f64,
        top_k: Option<usize>,
        top_p: f64,
        min_p: f64,
        repetition_penalty: f64,
        probs: Vec<f64>,
    }

    #[test]
    fn distributions_match_those_of_transformers() {
        let cases: Vec<Recorded> = serde_json::from_str(include_str!("../tests/fixtures/sampling.json")).unwrap();
        assert!(cases.len() >= 12);
        for (index, case) in cases.into_iter().enumerate() {
            let sampling = Sampling {
                temperature: case.temperature,
                top_k: case.top_k,
                top_p: case.top_p,
                min_p: case.min_p,
                repetition_penalty: case.repetition_penalty,
            };
            let distribution = sampling.distribution(&case.logits, &case.previous_ids).unwrap();
            for (id, expected) in case.probs.iter().enumerate() {
                let prob = distribution.prob(id as u32);
                assert!((prob - expected).abs() < 1e-6, "case {index}, id {id}: {prob}, expected {expected}");
            }
        }
    }

    #[test]
    fn greedy_takes_the_first_of_equal_logits() {
        let distribution = Sampling::greedy().distribution(&[1.0, 5.0, 5.0, f32::NEG_INFINITY], &[]).unwrap();
        assert_eq!(distribution.ids(), [1]);
        assert_eq!(distribution.sample(0.999), 1);
    }

    /// The largest logit is enough only where neither the text nor chance has a say.
    #[test]
    fn a_penalty_or_a_temperature_is_no_argmax() {
        let greedy = Sampling::greedy();
        assert!(greedy.is_argmax());
        assert!(Sampling { top_k: Some(3), top_p: 0.5, min_p: 0.5, ..greedy }.is_argmax());
        for other in [Sampling::default(), Sampling { repetition_penalty: 1.5, ..greedy }] {
            assert!(!other.is_argmax(), "{other:?}");
        }
        let chosen = Sampling { repetition_penalty: 1.5, ..greedy }.distribution(&[1.0, 1.2], &[1]).unwrap();
        assert_eq!(chosen.ids(), [0]);
    }

    #[test]
    fn parameters_outside_their_range_are_named() {
        let default = Sampling::default();
        for (bad, name) in [
            (Sampling { temperature: f64::NAN, ..default }, "temperature"),
            (Sampling { temperature: -0.1, ..default }, "temperature"),
            (Sampling { temperature: f64::INFINITY, ..default }, "temperature"),
            (Sampling { top_k: Some(0), ..default }, "top_k"),
            (Sampling { top_p: 0.0, ..default }, "top_p"),
            (Sampling { top_p: 1.1, ..default }, "top_p"),
            (Sampling { top_p: f64::NAN, ..default }, "top_p"),
            (Sampling { min_p: -0.1, ..default }, "min_p"),
            (Sampling { repetition_penalty: 0.0, ..default }, "repetition_penalty"),
        ] {
            match bad.validate() {
                Err(Error::Sampling { parameter, .. }) => assert_eq!(parameter, name),
                other => panic!("{bad:?} gave {other:?}"),
            }
        }
        assert!(default.validate().is_ok() && Sampling::greedy().validate().is_ok());
    }

    #[test]
    fn extreme_parameters_and_logits_give_a_distribution() {
        let tiny = Sampling { temperature: 1e-300, ..Sampling::default() };
        assert_eq!(tiny.distribution(&[1e30, 2e30, -3e38], &[]).unwrap().probs(), [0.0, 1.0, 0.0]);
        for repetition_penalty in [1e-300, 1e300] {
            let sampling = Sampling { repetition_penalty, ..Sampling::default() };
            let distribution = sampling.distribution(&[1e30, -1e30, 0.0], &[0, 1]).unwrap();
            assert!((distribution.probs().iter().sum::<f64>() - 1.0).abs() < 1e-9);
        }
        let sampling = Sampling { temperature: f64::MAX, repetition_penalty: 2.0, ..Sampling::default() };
        let distribution = sampling.distribution(&[f32::NEG_INFINITY, 1.0], &[0]).unwrap();
        assert_eq!(distribution.prob(0), 0.0, "minus infinity stays it under a penalty");
        for logits in [&[][..], &[f32::NAN, 1.0], &[f32::INFINITY, 1.0], &[f32::NEG_INFINITY]] {
            assert!(matches!(Sampling::default().distribution(logits, &[]), Err(Error::Mismatch { .. })));
        }
    }

    #[test]
    fn the_largest_number_is_found_and_so_is_one_that_is_none() {
        for len in [1, 15, 16, 17, 40] {
            for at in 0..len {
                let mut numbers = vec![-2.0; len];
                numbers[at] = -1.0;
                assert_eq!(largest(&numbers), Some(-1.0));
                for bad in [f32::NAN, f32::INFINITY] {
                    numbers[at] = bad;
                    assert_eq!(largest(&numbers), None, "{bad} at {at} of {len}");
                }
            }
            assert_eq!(largest(&vec![f32::NEG_INFINITY; len]), None);
        }
        assert_eq!(largest(&[]), None);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let distribution = Sampling::default().distribution(&[0.0, 1.0, 2.0, -1.0], &[]).unwrap();
        let draws = 40_000;
        let mut counts = [0_f64; 4];
        for position in 0..draws {
            counts[distribution.sample(uniform(7, 0, position, Purpose::Token)) as usize] += 1.0;
        }
        let expected = |id: usize| distribution.probs()[id] * draws as f64;
        let chi_square: f64 = (0..4).map(|id| (counts[id] - expected(id)).powi(2) / expected(id)).sum();
        assert!(chi_square < 16.3, "{chi_square} with 3 degrees of freedom (p < 0.001)");
    }

    #[test]
    fn a_residual_is_what_exceeds() {
        let distribution = |weights: [f32; 4]| Sampling::default().distribution(&weights.map(f32::ln), &[]).unwrap();
        let p = distribution([0.1, 0.2, 0.3, 0.4]);
        let rest = p.residual(&distribution([0.4, 0.1, 0.3, 0.2]));
        assert_eq!(rest.ids(), [1, 3]);
        assert!((rest.prob(1) - 1.0 / 3.0).abs() < 1e-6 && (rest.prob(3) - 2.0 / 3.0).abs() < 1e-6);
        assert_eq!(p.residual(&p), p, "nothing exceeds itself");
        let without = p.residual(&Distribution::certain(2));
        assert_eq!(without.ids(), [0, 1, 3]);
        assert!((without.prob(3) - 4.0 / 7.0).abs() < 1e-6);
        assert_eq!(Distribution::certain(5).residual(&p).ids(), [5]);
    }

    #[test]
    fn random_numbers_depend_on_each_of_their_coordinates() {
        let at = |seed, rng_stream, position| uniform(seed, rng_stream, position, Purpose::Token);
        assert_eq!(at(1, 2, 3), at(1, 2, 3));
        assert_ne!(at(1, 2, 3), at(2, 2, 3));
        assert_ne!(at(1, 2, 3), at(1, 3, 3));
        assert_ne!(at(1, 2, 3), at(1, 2, 4));
        let purposes = [Purpose::Token, Purpose::Draft, Purpose::Accept, Purpose::Residual];
        let drawn = purposes.map(|purpose| uniform(1, 2, 3, purpose).to_bits());
        assert_eq!(drawn.iter().collect::<std::collections::HashSet<_>>().len(), 4);
    }

    proptest! {
        #[test]
        fn every_distribution_adds_up_to_one_and_can_be_drawn(
            logits in proptest::collection::vec(-50_f32..50.0, 1..60),
            temperature in 0.0..3.0_f64,
            top_k in proptest::option::of(1_usize..80),
            top_p in 0.001..=1.0_f64,
            min_p in 0.0..=1.0_f64,
            at in 0.0..1.0_f64,
        ) {
            let sampling = Sampling { temperature, top_k, top_p, min_p, repetition_penalty: 1.2 };
            let distribution = sampling.distribution(&logits, &[0, 3, 99]).unwrap();
            prop_assert!((distribution.probs().iter().sum::<f64>() - 1.0).abs() < 1e-9);
            prop_assert!(distribution.ids().len() <= top_k.unwrap_or(usize::MAX));
            let id = distribution.sample(at);
            prop_assert!(distribution.prob(id) > 0.0);
        }
    }
}
