//! `--draft`, `--draft-len`.

use clap::Args;
use gpt2_burn::burn::tensor::Device;
use gpt2_burn::generate::{Decoder, Report};
use gpt2_burn::speculative::{Draft, DraftLen, Ngram, Speculation, SpeculationReport};
use gpt2_burn::{CacheStorage, Gpt2};
use serde_json::{Value, json};

use super::model::ModelArgs;
use super::{Failure, Given};

/// How speculation is done.
#[derive(Args, Clone, Debug)]
pub struct DraftArgs {
    /// What proposes tokens, which implies the speculative decoder: the embedded draft, the text itself (`ngram`), the first L
    /// layers of the model, or another model. Default: `embedded` for the embedded model, `ngram` for others
    #[arg(long, value_name = "embedded|ngram|early-exit:L|NAME|DIR|FILE.pt")]
    pub draft: Option<String>,
    /// Tokens that are proposed at a time; `auto`: as many as pay, by what is measured on the way
    #[arg(long, default_value = "4", value_parser = draft_len, value_name = "N|auto")]
    pub draft_len: DraftLen,
}

fn draft_len(text: &str) -> Result<DraftLen, String> {
    match (text, text.parse()) {
        ("auto", _) => Ok(DraftLen::Auto),
        (_, Ok(len @ 1..)) => Ok(DraftLen::Fixed(len)),
        (_, Ok(_)) => Err("at least 1, or `auto`".to_owned()),
        (_, Err(error)) => Err(format!("{error}, and not `auto`")),
    }
}

impl DraftArgs {
    /// The speculative decoder.
    pub fn decoder(&self, storage: CacheStorage) -> Decoder {
        Decoder::Speculative(Speculation { storage, draft_len: self.draft_len, ..Speculation::default() })
    }

    /// Refuses all that is said about drafts, where none are made.
    pub fn refuse(given: &Given) -> Result<(), Failure> {
        let ids = ["draft", "draft_len", "acceptance", "agreement", "draft_config"];
        given.refuse(&ids, "has no effect: it is for the speculative decoder, which is not chosen here (see --help)")
    }

    /// What proposes tokens, on the device of its target.
    pub fn load_on(&self, model: &ModelArgs, device: &Device, deterministic: bool) -> Result<Draft, Failure> {
        let default = if model.is_embedded() { "embedded" } else { "ngram" };
        let name = self.draft.as_deref().unwrap_or(default);
        Ok(match (name, name.strip_prefix("early-exit:")) {
            ("ngram", _) => Draft::Ngram(Ngram::default()),
            (_, Some(layers)) => {
                let layers = layers.parse().map_err(|error| format!("--draft early-exit:{layers}: {error}"))?;
                Draft::EarlyExit { layers }
            }
            _ => Draft::Model(Gpt2::with_determinism(model.load_draft_on(name, device)?, deterministic)?),
        })
    }
}

/// What drafts were worth, in words; `plain` is the time of a plain decode step, where that was measured.
pub fn summary(report: &SpeculationReport, plain: Option<f64>) -> String {
    let percent = |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.1}%", 100.0 * share));
    let positions =
        report.by_position.iter().map(|position| percent(Some(position.accepted as f64 / position.verified as f64)));
    let positions: Vec<String> = positions.collect();
    let (rounds, drafted, accepted) = (report.rounds, report.drafted, report.accepted);
    let mut text = format!(
        "{accepted} of {drafted} drafted tokens accepted ({}), a = {} ({} by position), {:.2} tokens a round in {rounds} rounds",
        percent(report.acceptance_rate()),
        percent(report.acceptance()),
        positions.join(" "),
        report.tokens_per_round().unwrap_or(0.0),
    );
    let parts = [report.draft_seconds(), report.verify_seconds(), report.rest_seconds()];
    let total: f64 = parts.iter().sum();
    let [draft, verify, rest] = parts.map(|part| percent(Some(part / total)));
    text += &format!("; time: {draft} draft, {verify} verify, {rest} rest");
    let plain = plain.or(report.plain_step_seconds());
    if let Some((predicted, measured)) =
        plain.and_then(|plain| report.predicted_speedup(plain).zip(report.measured_speedup(plain)))
    {
        text += &format!("; {measured:.2} x plain decoding, {predicted:.2} x predicted");
    }
    let undrafted = report.rounds_by_len.first().copied().unwrap_or(0);
    if report.drafting_loses {
        text += &format!("; drafting would lose, {undrafted} rounds were without");
    }
    text
}

/// The same in figures, for JSON.
pub fn figures(report: &SpeculationReport, plain: Option<f64>) -> Value {
    let plain = plain.or(report.plain_step_seconds());
    let by_position: Vec<_> =
        report.by_position.iter().map(|position| position.accepted as f64 / position.verified as f64).collect();
    json!({
        "draft": report.draft,
        "rounds": report.rounds,
        "drafted": report.drafted,
        "accepted": report.accepted,
        "rejected": report.rejected,
        "acceptance_rate": report.acceptance_rate(),
        "acceptance": report.acceptance(),
        "acceptance_by_position": by_position,
        "tokens_per_round": report.tokens_per_round(),
        "rounds_by_draft_len": report.rounds_by_len,
        "draft_seconds": report.draft_seconds(),
        "verify_seconds": report.verify_seconds(),
        "rest_seconds": report.rest_seconds(),
        "plain_step_seconds": plain,
        "draft_token_seconds": report.draft_token_seconds(),
        "predicted_speedup": plain.and_then(|plain| report.predicted_speedup(plain)),
        "measured_speedup": plain.and_then(|plain| report.measured_speedup(plain)),
        "drafting_loses": report.drafting_loses,
    })
}

/// The figures of a report that every decoder has, for JSON.
pub fn counts(report: &Report) -> [usize; 3] {
    report
        .speculation
        .as_ref()
        .map_or([0; 3], |speculation| [speculation.rounds, speculation.drafted, speculation.accepted])
}
