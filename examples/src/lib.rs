//! One request, three decoders, one device: what the examples `cpu`, `wgpu` and `cuda` have in common.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use gpt2_burn::burn::tensor::Device;
use gpt2_burn::generate::{Decoder, GenerateRequest, Generator, Output, Stop};
use gpt2_burn::measure::{Verdict, check_greedy, median};
use gpt2_burn::sampling::Sampling;
use gpt2_burn::speculative::{Draft, Speculation};
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{CacheStorage, Checkpoint, Gpt2, Result, WeightFormat};
use gpt2_burn_pair::{DRAFT, Model, TARGET};

const PROMPT: &str = "ROMEO:\n";
const NEW_TOKENS: usize = 128;
/// Timed runs of each decoder, of which medians are printed.
const RUNS: usize = 3;

/// Runs [`three_ways`] on the device that the command line names, or on `default`.
pub fn main(default: &str) -> ExitCode {
    let name = std::env::args_os().nth(1).map_or(default.into(), |word| word.to_string_lossy().into_owned());
    match gpt2_burn::device(&name).map_err(Into::into).and_then(|device| three_ways(&name, &device)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Generates the same text naively, with a cache and speculatively, and prints what that took.
///
/// # Errors
///
/// If the ids differ, or something went wrong.
pub fn three_ways(name: &str, device: &Device) -> std::result::Result<(), Box<dyn Error>> {
    let model = load(&TARGET, device)?;
    let generator = |decoder| -> Result<Generator> {
        let tokenizer = Tokenizer::from_bytes(TARGET.tokenizer)?;
        Ok(Generator::new(model.clone()).with_tokenizer(tokenizer).with_decoder(decoder))
    };
    let generators = [
        generator(Decoder::Naive)?,
        generator(Decoder::Kv(CacheStorage::Preallocated))?,
        generator(Decoder::Speculative(Speculation::default()))?.with_draft(Draft::Model(load(&DRAFT, device)?))?,
    ];
    // Greedy, so that all of them have the same to say, and behind an end of the text too.
    let request = GenerateRequest {
        max_new_tokens: NEW_TOKENS,
        sampling: Sampling::greedy(),
        stop: Stop { ignore_eos: true, ..Stop::default() },
        ..GenerateRequest::new([PROMPT])
    };

    let mut runs: [Vec<Output>; 3] = Default::default();
    for run in 0..=RUNS {
        for (generator, runs) in generators.iter().zip(&mut runs) {
            let output = generator.complete(&request)?;
            // The first run is a warm-up: it compiles kernels and fills caches.
            if run > 0 {
                runs.push(output);
            }
        }
    }

    let text = runs[0].first().and_then(|output| output.completions[0].text.as_deref()).unwrap_or_default();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{PROMPT}{text}\n\n{name}: {NEW_TOKENS} new tokens, greedy, medians of {RUNS} runs\n")?;
    writeln!(out, "| decoder         | TTFT ms | tokens/s | over naive | ids           |")?;
    writeln!(out, "|-----------------|---------|----------|------------|---------------|")?;
    let naive = rate(&runs[0]);
    let mut differ = Vec::new();
    for (generator, runs) in generators.iter().zip(&runs) {
        let decoder = generator.decoder().to_string();
        let milliseconds = 1e3 * of_runs(runs, |output| output.report.prefill_seconds);
        let (rate, times) = (rate(runs), rate(runs) / naive);
        let verdict = verdict(generator, runs)?;
        let ids = words(generator, &verdict);
        writeln!(out, "| {decoder:15} | {milliseconds:7.2} | {rate:8.1} | {times:8.2} x | {ids:>13} |")?;
        if !verdict.is_equal() {
            differ.push(decoder);
        }
    }
    match differ.is_empty() {
        true => Ok(()),
        false => Err(format!("{} on {name} gave other tokens than naive decoding", differ.join(" and ")).into()),
    }
}

/// A model of the embedded pair, for the device's kernels where it has some.
fn load(model: &Model, device: &Device) -> Result<Gpt2> {
    Checkpoint::from_bytes(model.config, model.weights)?.load_packed(device, WeightFormat::F32)
}

/// Median of a figure.
fn of_runs(runs: &[Output], of: impl Fn(&Output) -> f64) -> f64 {
    median(&runs.iter().map(of).collect::<Vec<_>>()).unwrap_or(f64::NAN)
}

/// New tokens a second, the first one included.
fn rate(runs: &[Output]) -> f64 {
    NEW_TOKENS as f64 / of_runs(runs, |output| output.report.prefill_seconds + output.report.decode_seconds)
}

/// How the ids of all runs compare with naive decoding's.
fn verdict(generator: &Generator, runs: &[Output]) -> Result<Verdict> {
    let completions = runs.iter().flat_map(|output| &output.completions);
    let (prompts, ids): (Vec<_>, Vec<_>) = completions.map(|row| (row.prompt_ids.clone(), row.ids.clone())).unzip();
    check_greedy(generator, &prompts, &ids)
}

fn words(generator: &Generator, verdict: &Verdict) -> String {
    match (generator.decoder(), &verdict.first_divergence, verdict.ties) {
        (_, Some(first), _) => format!("differ from step {} on", first.step),
        (Decoder::Naive, None, 0) => "the reference".to_owned(),
        (_, None, 0) => "equal".to_owned(),
        (_, None, ties) => format!("equal, {ties} ties aside"),
    }
}
