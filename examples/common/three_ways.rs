//! One request, three decoders, one device: what `cpu`, `wgpu` and `cuda` have in common.

use std::io::Write;

use comfy_table::{CellAlignment, Table, presets};
use gpt2_burn::burn::tensor::Device;
use gpt2_burn::generate::{Decoder, GenerateRequest, Generator, Output, Stop};
use gpt2_burn::measure::{Verdict, check_greedy, median};
use gpt2_burn::sampling::Sampling;
use gpt2_burn::speculative::{Draft, Speculation};
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{CacheStorage, Checkpoint, Gpt2, WeightFormat};
use gpt2_burn_pair::{DRAFT, Model, TARGET};

use super::Failure;

const PROMPT: &str = "ROMEO:\n";
const NEW_TOKENS: usize = 128;
/// Timed runs of each decoder, of which medians are printed.
const RUNS: usize = 3;

/// Generates the same text naively, with a cache and speculatively, and prints what that took; fails if the ids differ.
pub fn three_ways(name: &str, device: &Device) -> Result<(), Failure> {
    let model = load(&TARGET, device)?;
    let generator = |decoder| -> Result<Generator, Failure> {
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
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["decoder", "TTFT ms", "tokens/s", "over naive", "ids"]);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    let naive = rate(&runs[0]);
    let mut failed = Ok(());
    for (generator, runs) in generators.iter().zip(&runs) {
        let verdict = verdict(generator, runs)?;
        if !verdict.is_equal() {
            failed = Err(format!("{} on {name} gave other tokens than naive decoding", generator.decoder()).into());
        }
        table.add_row([
            generator.decoder().to_string(),
            format!("{:.2}", 1e3 * of_runs(runs, |output| output.report.prefill_seconds)),
            format!("{:.1}", rate(runs)),
            format!("{:.2} x", rate(runs) / naive),
            words(generator, &verdict),
        ]);
    }
    let text = runs[0].first().and_then(|output| output.completions[0].text.as_deref()).unwrap_or_default();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{PROMPT}{text}\n\n{name}: {NEW_TOKENS} new tokens, greedy, medians of {RUNS} runs\n\n{table}")?;
    failed
}

/// A model of the embedded pair, for the device's kernels where it has some.
fn load(model: &Model, device: &Device) -> Result<Gpt2, Failure> {
    Ok(Checkpoint::from_bytes(model.config, model.weights)?.load_prepared(device, WeightFormat::F32)?)
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
fn verdict(generator: &Generator, runs: &[Output]) -> Result<Verdict, Failure> {
    let completions = runs.iter().flat_map(|output| &output.completions);
    let (prompts, ids): (Vec<_>, Vec<_>) = completions.map(|row| (row.prompt_ids.clone(), row.ids.clone())).unzip();
    Ok(check_greedy(generator, &prompts, &ids)?)
}

fn words(generator: &Generator, verdict: &Verdict) -> String {
    match (generator.decoder(), &verdict.first_divergence, verdict.ties) {
        (_, Some(first), _) => format!("differ from step {} on", first.step),
        (Decoder::Naive, None, 0) => "the reference".to_owned(),
        (_, None, 0) => "equal".to_owned(),
        (_, None, ties) => format!("equal, {ties} ties aside"),
    }
}
