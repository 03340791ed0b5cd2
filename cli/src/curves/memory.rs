//! Memory of each curve, measured in a process of its own: what a process has freed it may keep, so that a curve would
//! begin where the one before it has ended.

use std::process::{Command, Stdio};

use gpt2_burn::Gpt2Config;
use gpt2_burn::burn::tensor::Device;
use gpt2_burn::generate::Generator;
use gpt2_burn::measure::{MemoryWatch, device_memory, process_memory};
use indicatif::ProgressBar;

use super::options::{Args, Axis, Curve, DecoderName, Lengths, Plan};
use super::runs::{cut, request};
use super::setup::{draft, generator, load, rows};
use crate::args::Failure;

/// Bytes at each point of each curve.
pub struct Memory {
    points: Vec<(Axis, DecoderName, Lengths, Option<usize>)>,
}

impl Memory {
    /// Most bytes at a point beyond those from before the model was loaded; none if they are not known.
    pub fn at(&self, axis: Axis, decoder: DecoderName, lengths: Lengths) -> Option<usize> {
        self.points.iter().find(|point| (point.0, point.1, point.2) == (axis, decoder, lengths))?.3
    }
}

/// Measures all curves on a device, each in a process of its own.
pub fn of_all(plan: &Plan, device: &str) -> Result<Memory, Failure> {
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(std::time::Duration::from_millis(200));
    let mut measured = Vec::new();
    for (axis, points) in Axis::ALL.into_iter().zip(&plan.points) {
        for &decoder in &plan.decoders {
            spinner.set_message(format!("{device}: memory of {}, along the {}", decoder.label(), axis.name()));
            let bytes = in_child(Curve { decoder, axis }, device)?;
            measured.extend(points.iter().zip(bytes).map(|(lengths, bytes)| (axis, decoder, *lengths, bytes)));
        }
    }
    spinner.finish_and_clear();
    Ok(Memory { points: measured })
}

fn in_child(curve: Curve, device: &str) -> Result<Vec<Option<usize>>, Failure> {
    let child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .args(["--memory-of", &format!("{curve},{device}")])
        // glibc keeps what was freed, and more of it the larger it was: with these it gives all but small pieces back, so that
        // what is resident is what is in use. Elsewhere they mean nothing.
        .envs([("MALLOC_MMAP_THRESHOLD_", "131072"), ("MALLOC_TRIM_THRESHOLD_", "131072")])
        .stdin(Stdio::null())
        .output()?;
    if !child.status.success() {
        let said = String::from_utf8_lossy(&child.stderr);
        let said = said.trim();
        return Err(said.strip_prefix("error: ").unwrap_or(said).into());
    }
    Ok(serde_json::from_slice(&child.stdout)?)
}

/// Lets the process take what it takes whatever the model is: threads, their stacks, and the pages of the program that are
/// used, of which the files of embedded models are some.
fn start(args: &Args, plan: &Plan, decoder: DecoderName, device: &Device) -> Result<(), Failure> {
    if plan.config.is_none() && args.model.is_embedded() {
        drop(args.model.load_on(device)?);
        drop(draft(args, plan, device, &[decoder])?);
    }
    let tiny =
        Gpt2Config { vocab_size: 64, n_positions: 16, n_embd: 32, n_layer: 1, n_head: 1, ..Gpt2Config::default() };
    let generator = Generator::new(args.model.pack(tiny.init(device)?)?);
    generator.complete(&request(vec![vec![0; 8]], 4))?;
    Ok(())
}

/// In that process: runs each point of the curve as far as its memory grows, and prints the bytes.
pub fn print(args: &Args, plan: &Plan, curve: Curve, device: &str) -> Result<(), Failure> {
    let device = gpt2_burn::device(device)?;
    start(args, plan, curve.decoder, &device)?;
    let before = process_memory().map_or(0, |memory| memory.resident);
    let (model, _) = load(args, plan, &device)?;
    plan.check(model.config())?;
    // Any tokens take as much, and a tokenizer at work takes more than a small model.
    let rows = rows(args, plan, &model, None)?;
    let draft = draft(args, plan, &device, &[curve.decoder])?;
    let generator = generator(args, plan, &model, curve.decoder, draft.as_ref())?;
    drop((model, draft));
    let mut all = Vec::new();
    for lengths in plan.curve(curve.axis) {
        let watch = MemoryWatch::start();
        let request = match curve.decoder {
            // The last step is the one that takes most.
            DecoderName::Naive => request(cut(&rows, lengths.tokens()), 1),
            DecoderName::Kv | DecoderName::Speculative => request(cut(&rows, lengths.prompt), lengths.new),
        };
        // A cache is there with the first token, and a step behind it shows whatever a step needs.
        let steps = generator.generate(&request)?.take(2 * args.batch_size);
        steps.collect::<Result<Vec<_>, _>>()?;
        let process = watch.finish().map(|memory| memory.peak.saturating_sub(before));
        all.push(device_memory(&device).map(|memory| memory.reserved as usize).or(process));
    }
    println!("{}", serde_json::to_string(&all)?);
    Ok(())
}
