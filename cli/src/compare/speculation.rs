//! The speculative decoder among the others.

use gpt2_burn::burn::tensor::Device;
use gpt2_burn::generate::Decoder;
use gpt2_burn::measure::median;
use gpt2_burn::speculative::{Draft, Scripted};
use serde_json::json;

use super::report::{Row, SpeculationJson};
use super::{Args, Candidate, Work};
use crate::args::shape::{published, random};
use crate::args::{Failure, draft};

/// What makes drafts; `ids` is what the model says.
pub fn draft(args: &Args, device: &Device, ids: &[Vec<u32>]) -> Result<Draft, Failure> {
    let Some(agreement) = args.agreement else { return args.draft.load_on(&args.model, device, args.deterministic) };
    let script = Scripted::new(ids.to_vec(), agreement);
    let model = match (&args.draft_config, &args.draft.draft) {
        (Some(name), _) => Some(random(&published(name)?, &args.model, args.seed, args.model.dtype.into(), device)?),
        (None, None) => None,
        (None, Some(_)) => match args.draft.load_on(&args.model, device, args.deterministic)? {
            Draft::Model(model) => Some(model),
            other => return Err(format!("--agreement needs a draft that is a model, or none: not {other}").into()),
        },
    };
    Ok(Draft::Scripted(match model {
        Some(model) => script.with_model(model),
        None => script,
    }))
}

/// Median of the repetitions' mean seconds per token of a row, since a step gives more than one; none without drafts.
pub fn tpot_seconds(candidate: &Candidate, work: &Work) -> Option<f64> {
    let Decoder::Speculative(_) = candidate.generator.decoder() else { return None };
    let tokens = work.new_tokens.checked_sub(1).filter(|tokens| *tokens > 0)?;
    Some(candidate.median(|run| run.decode_seconds / tokens as f64))
}

/// Adds what drafts were worth, against the decode steps of the plain decoder with the same cache.
pub fn add_figures(rows: &mut [Row], candidates: &[Candidate]) {
    let of = |name: &str| rows.iter().find(|row| row.decoder == name);
    let plain = of("kv-preallocated").or(of("kv-paged")).map(|row| (row.tpot_seconds, row.seconds));
    for (row, candidate) in rows.iter_mut().zip(candidates) {
        // Of the repetition that took the median time; greedy ones do the same.
        let mut runs: Vec<_> = candidate.runs.iter().filter(|run| run.speculation.is_some()).collect();
        runs.sort_by(|a, b| a.decode_seconds.total_cmp(&b.decode_seconds));
        let Some(report) = runs.get(runs.len().saturating_sub(1) / 2).and_then(|run| run.speculation.as_ref()) else {
            continue;
        };
        let step = plain.and_then(|(step, _)| step).or(report.plain_step_seconds());
        let usual_len =
            report.rounds_by_len.iter().enumerate().max_by_key(|(_, rounds)| **rounds).map_or(0, |(len, _)| len);
        let verification = median(
            &candidate
                .runs
                .iter()
                .filter_map(|run| run.speculation.as_ref()?.verification_seconds(usual_len))
                .collect::<Vec<_>>(),
        );
        let mut figures = draft::figures(report, step);
        figures["usual_draft_len"] = json!(usual_len);
        figures["verification_seconds"] = json!(verification);
        figures["verification_cost"] = json!(verification.zip(step).map(|(verification, step)| verification / step));
        figures["draft_cost"] = json!(report.draft_token_seconds().zip(step).map(|(draft, step)| draft / step));
        figures["speedup_over_kv"] = json!(plain.map(|(_, seconds)| seconds / row.seconds));
        let cost = verification.zip(step).map_or(String::new(), |(verification, step)| {
            format!("; verifying {} tokens costs {:.2} steps", usual_len + 1, verification / step)
        });
        let words = format!("speculative ({}): {}{cost}", report.draft, draft::summary(report, step));
        row.speculation = Some(SpeculationJson { figures, words });
    }
}
