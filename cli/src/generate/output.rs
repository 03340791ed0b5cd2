//! What is printed.

use std::io::Write;

use gpt2_burn::generate::{Completion, GenerateRequest, Generation, Generator, Output, Report};
use serde_json::json;

use crate::args::{Failure, draft};

/// Prints completions one after the other: the first unfinished one as it is made, those behind it when it is done.
pub fn print_stream(
    generation: Generation<'_>,
    generator: &Generator,
    request: &GenerateRequest,
) -> Result<Report, Failure> {
    let has_text = generator.tokenizer().is_some();
    let samples = request.num_samples;
    let count = request.prompts.len() * samples;
    let mut waiting = vec![String::new(); count];
    let mut finished = vec![request.max_new_tokens == 0; count];
    let mut current = 0;
    let mut out = std::io::stdout().lock();
    let mut generation = generation;

    let head = |index: usize| -> Result<String, Failure> {
        let ids = generator.prompt_ids(&request.prompts[index / samples])?;
        match generator.tokenizer() {
            Some(tokenizer) => Ok(tokenizer.decode(&ids)?),
            None => Ok(ids.iter().map(|id| format!("{id} ")).collect::<String>() + "|"),
        }
    };
    write!(out, "{}", head(0)?)?;
    loop {
        while current < count && finished[current] {
            writeln!(out)?;
            current += 1;
            if current < count {
                write!(out, "---------------\n{}{}", head(current)?, std::mem::take(&mut waiting[current]))?;
            }
        }
        out.flush()?;
        let Some(event) = generation.next() else { break };
        let event = event?;
        let index = event.prompt_index * samples + event.sample;
        let text = if has_text { event.text } else { format!(" {}", event.id) };
        if index == current {
            write!(out, "{text}")?;
        } else {
            waiting[index] += &text;
        }
        finished[index] |= event.finish.is_some();
    }
    Ok(generation.report())
}

/// How fast it was, in words.
pub fn speed(report: &Report) -> String {
    let per_token = report.seconds_per_token().map_or(String::new(), |s| format!(", {:.1} ms per token", s * 1e3));
    let speculation = report.speculation.as_ref();
    let speculation = speculation.map_or(String::new(), |report| format!("\n{}", draft::summary(report, None)));
    let known = match report.reused_prompt_tokens {
        0 => String::new(),
        known => format!(" ({known} of them known)"),
    };
    format!(
        "[{}] {} prompt tokens{known} in {:.2} s, {} new ones in {:.2} s{per_token}: {:.1} tokens/s; cache {:.1} MB{speculation}",
        report.decoder,
        report.prompt_tokens,
        report.prefill_seconds,
        report.new_tokens,
        report.decode_seconds,
        report.tokens_per_second(),
        report.kv_bytes as f64 / 1e6,
    )
}

/// Completions and what they took.
pub fn as_json(output: &Output) -> serde_json::Value {
    let completion = |completion: &Completion| {
        json!({
            "prompt_index": completion.prompt_index,
            "sample": completion.sample,
            "prompt_ids": completion.prompt_ids,
            "ids": completion.ids,
            "text": completion.text,
            "finish": completion.finish.to_string(),
        })
    };
    let report = &output.report;
    let [rounds, drafted, accepted] = draft::counts(report);
    json!({
        "completions": output.completions.iter().map(completion).collect::<Vec<_>>(),
        "stats": {
            "prompt_tokens": report.prompt_tokens,
            "computed_prompt_tokens": report.computed_prompt_tokens,
            "reused_prompt_tokens": report.reused_prompt_tokens,
            "new_tokens": report.new_tokens,
            "prefill_seconds": report.prefill_seconds,
            "decode_seconds": report.decode_seconds,
            "kv_bytes": report.kv_bytes,
            "pages_used": report.pages.used,
            "pages_shared": report.pages.shared,
            "pages_copied": report.pages.copied,
            "rounds": rounds,
            "drafted": drafted,
            "accepted": accepted,
            "acceptance_rate": report.speculation.as_ref().and_then(|speculation| speculation.acceptance_rate()),
            "speculation": report.speculation.as_ref().map(|speculation| draft::figures(speculation, None)),
        },
    })
}
