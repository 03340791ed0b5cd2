//! One run of a decoder at a point, timed.

use gpt2_burn::burn::tensor::Device;
use gpt2_burn::generate::{GenerateRequest, Generator, Stop};
use gpt2_burn::measure::Clock;
use gpt2_burn::sampling::Sampling;
use gpt2_burn::speculative::SpeculationReport;

use super::options::{DecoderName, Lengths};
use crate::args::Failure;

/// One run of a decoder.
pub struct Run {
    /// Seconds from the prompt to the last token.
    pub total: f64,
    /// Seconds to the first token.
    pub first: f64,
    /// Seconds per token after that; none if there is only one.
    pub per_token: Option<f64>,
    /// Bytes of all caches.
    pub kv_bytes: usize,
    pub speculation: Option<SpeculationReport>,
}

/// Which of naive decoding's steps are timed; none: all.
pub fn sampled_steps(decoder: DecoderName, lengths: Lengths, max: usize) -> Option<Vec<usize>> {
    if decoder != DecoderName::Naive || lengths.new <= max {
        return None;
    }
    let last = lengths.new - 1;
    Some((0..max).map(|at| at * last / (max - 1).max(1)).collect())
}

/// Greedy, to exactly as many tokens.
pub fn request(prompts: Vec<Vec<u32>>, max_new_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        max_new_tokens,
        sampling: Sampling::greedy(),
        stop: Stop { ignore_eos: true, ..Stop::default() },
        ..GenerateRequest::new(prompts)
    }
}

pub fn cut(rows: &[Vec<u32>], length: usize) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row[..length].to_vec()).collect()
}

/// Times all of it.
pub fn whole(generator: &Generator, rows: &[Vec<u32>], lengths: Lengths, device: &Device) -> Result<Run, Failure> {
    let request = request(cut(rows, lengths.prompt), lengths.new);
    let clock = Clock::start(device)?;
    let report = generator.complete(&request)?.report;
    let steps = lengths.new - 1;
    Ok(Run {
        total: clock.seconds()?,
        first: report.prefill_seconds,
        per_token: (steps > 0).then(|| report.decode_seconds / steps as f64),
        kv_bytes: report.kv_bytes,
        speculation: report.speculation,
    })
}

/// Times some steps of naive decoding, whose time depends on their length alone; those between are interpolated.
pub fn sample(generator: &Generator, rows: &[Vec<u32>], lengths: Lengths, steps: &[usize]) -> Result<Run, Failure> {
    let mut timed = Vec::new();
    for &step in steps {
        let report = generator.complete(&request(cut(rows, lengths.prompt + step), 1))?.report;
        timed.push((step, report.prefill_seconds + report.decode_seconds));
    }
    let between = timed.windows(2).map(|pair| {
        let [(from, start), (to, end)] = [pair[0], pair[1]];
        // Of the steps behind the first of the two, up to the second.
        (1..=to - from).map(|step| start + (end - start) * step as f64 / (to - from) as f64).sum::<f64>()
    });
    let (first, rest) = (timed[0].1, between.sum::<f64>());
    let per_token = (lengths.new > 1).then(|| rest / (lengths.new - 1) as f64);
    Ok(Run { total: first + rest, first, per_token, kv_bytes: 0, speculation: None })
}
