//! Naive decoding, of which some steps can stand for all: the time of a step depends on its length alone.

use gpt2_burn::cache::PageCounts;
use gpt2_burn::generate::Generator;

use super::{Run, Work, request};
use crate::args::Failure;

/// Fewest steps that are timed.
const MIN_STEPS: usize = 5;

/// The steps to be timed so that it takes about `seconds`; none if there is time for all.
pub fn steps(generator: &Generator, work: &Work, seconds: f64) -> Result<Option<Vec<usize>>, Failure> {
    let first = step_seconds(generator, work.prompts.clone())?;
    // Estimated with steps that cost as much as they are long.
    let prompt_length = work.prompts.iter().map(Vec::len).sum::<usize>() as f64 / work.prompts.len() as f64;
    let mean = first * (prompt_length + (work.new_tokens - 1) as f64 / 2.0) / prompt_length;
    if mean * work.new_tokens as f64 <= seconds || work.new_tokens <= MIN_STEPS {
        return Ok(None);
    }
    let count = ((seconds / mean) as usize).clamp(MIN_STEPS, work.new_tokens);
    Ok(Some((0..count).map(|at| at * (work.new_tokens - 1) / (count - 1)).collect()))
}

/// Times the steps `sampled`, with the tokens before them taken from `ids`; those between are interpolated.
pub fn sample(generator: &Generator, work: &Work, ids: &[Vec<u32>], sampled: &[usize]) -> Result<Run, Failure> {
    let mut timed = Vec::new();
    for &step in sampled {
        let rows = work.prompts.iter().zip(ids);
        let sequences = rows.map(|(prompt, ids)| [&prompt[..], &ids[..step]].concat()).collect();
        timed.push((step, step_seconds(generator, sequences)?));
    }
    let all = interpolate(&timed);
    Ok(Run {
        ttft_seconds: all[0],
        alone_seconds: None,
        decode_seconds: all[1..].iter().sum(),
        step_seconds: all[1..].to_vec(),
        speculation: None,
        kv_bytes: 0,
        pages: PageCounts::default(),
        ids: None,
    })
}

fn step_seconds(generator: &Generator, sequences: Vec<Vec<u32>>) -> Result<f64, Failure> {
    let report = generator.complete(&request(sequences, 1))?.report;
    Ok(report.prefill_seconds + report.decode_seconds)
}

/// The seconds of every step from the first to the last that was timed.
fn interpolate(timed: &[(usize, f64)]) -> Vec<f64> {
    let mut all = vec![timed[0].1];
    for pair in timed.windows(2) {
        let [(from, start), (to, end)] = [pair[0], pair[1]];
        all.extend((from + 1..=to).map(|step| start + (end - start) * (step - from) as f64 / (to - from) as f64));
    }
    all
}
