//! The measuring: every point by every decoder, in rounds.

use std::time::{Duration, Instant};

use gpt2_burn::Threads;
use gpt2_burn::burn::tensor::Device;
use gpt2_burn::cost::{Hardware, Reached};
use gpt2_burn::generate::Generator;
use gpt2_burn::measure::{Repeats, Timing, median, peaks};
use gpt2_burn::speculative::Draft;
use indicatif::{ProgressBar, ProgressStyle};

use super::memory;
use super::options::{Args, Axis, DecoderName, Lengths, Plan};
use super::predict::{Drafting, Predicted, Predictor};
use super::runs::{Run, cut, request, sample, sampled_steps, whole};
use super::setup::{draft, generator, load, model_name, rows};
use crate::args::Failure;
use crate::args::model::OnOff;

/// How often each of the machine's rates is measured at a time.
const RATES: Repeats = Repeats { warm_up: 1, min_runs: 5, seconds: 0.15 };

/// When it is time to measure them again: what else a machine does changes them.
const RATES_EVERY: Duration = Duration::from_secs(20);

/// All points on one device.
pub struct Sweep {
    pub device: String,
    pub model: String,
    pub parameters: usize,
    pub dtype: String,
    pub kernels: bool,
    pub threads: usize,
    pub batch: usize,
    pub decoders: Vec<DecoderName>,
    /// What proposed tokens to the speculative decoder, if that is among them.
    pub draft: Option<String>,
    /// Medians of what was measured before, in and after the rounds.
    pub machine: Hardware,
    pub rounds: usize,
    pub points: Vec<Point>,
    pub predictor: Predictor,
}

/// A decoder at some lengths.
pub struct Point {
    pub axis: Axis,
    pub lengths: Lengths,
    pub decoder: DecoderName,
    /// Seconds from the prompt to the last token.
    pub total: Timing,
    /// Seconds to the first token.
    pub first: Timing,
    /// Seconds per token after that; none if there is only one.
    pub per_token: Option<Timing>,
    /// Most bytes that the process had more than before the model was loaded, or that the device's allocator had taken.
    pub memory: Option<usize>,
    /// Bytes of the weights and the cache, as they count themselves.
    pub accounted: usize,
    /// Steps of naive decoding that were timed, if not all.
    pub sampled_steps: Option<usize>,
    /// How drafts went, if there were any.
    pub drafting: Option<Drafting>,
    pub predicted: Predicted,
}

/// What is measured, before there is anything to report.
struct Candidate<'a> {
    axis: Axis,
    lengths: Lengths,
    decoder: DecoderName,
    generator: &'a Generator,
    sampled: Option<Vec<usize>>,
    runs: Vec<Run>,
}

impl Sweep {
    pub fn run(args: &Args, plan: &Plan, device_name: &str, device: &Device) -> Result<Self, Failure> {
        let memory = memory::of_all(plan, device_name)?;
        let (model, text) = load(args, plan, device)?;
        plan.check(model.config())?;
        let rows = rows(args, plan, &model, text)?;
        let draft = draft(args, plan, device, &plan.decoders)?;
        let generators = plan.decoders.iter().map(|name| generator(args, plan, &model, *name, draft.as_ref()));
        let generators = generators.collect::<Result<Vec<_>, Failure>>()?;

        let mut candidates = Vec::new();
        for (axis, points) in Axis::ALL.into_iter().zip(&plan.points) {
            for &lengths in points {
                for (&decoder, generator) in plan.decoders.iter().zip(&generators) {
                    let sampled = sampled_steps(decoder, lengths, plan.naive_steps);
                    candidates.push(Candidate { axis, lengths, decoder, generator, sampled, runs: Vec::new() });
                }
            }
        }
        let format = (args.model.kernels == OnOff::On).then(|| args.model.dtype.into());
        let measure = || peaks(device, model.config(), format, RATES);
        let mut machines = vec![measure()?];
        let predictor = Predictor::new(&generators[0], draft.as_ref(), args.batch_size)?;
        let guess = Drafting::guess(plan.draft.draft_len);
        let costs = candidates.iter().map(|Candidate { decoder, lengths, .. }| {
            Ok(predictor.predict(&machines[0], *decoder, *lengths, &guess)?.total)
        });
        let costs = costs.collect::<Result<Vec<f64>, Failure>>()?;
        let bar = bar(device_name, plan.rounds, &costs)?;
        for generator in &generators {
            generator.complete(&request(cut(&rows, plan.points[0][0].prompt), 2))?; // warm-up
        }
        let mut measured = Instant::now();
        for round in 0..plan.rounds {
            // In turns, so that whatever else the machine does befalls all of them, and each round from another point on.
            let first = round * candidates.len() / plan.rounds;
            let count = candidates.len();
            for at in (0..count).map(|turn| (first + turn) % count) {
                let (candidate, cost) = (&mut candidates[at], costs[at]);
                let Lengths { prompt, new } = candidate.lengths;
                let name = candidate.decoder.label();
                bar.set_message(format!("round {} of {}: {name}, {prompt} + {new}", round + 1, plan.rounds));
                candidate.run(&rows, device)?;
                bar.inc(units(cost));
                if measured.elapsed() > RATES_EVERY {
                    bar.set_message("what the machine can do");
                    machines.push(measure()?);
                    measured = Instant::now();
                }
            }
            machines.push(measure()?);
        }
        bar.finish_and_clear();

        let machine = middle(&machines)?;
        let points = candidates.into_iter().map(|candidate| {
            let memory = memory.at(candidate.axis, candidate.decoder, candidate.lengths);
            candidate.point(memory, &predictor, &machine)
        });
        Ok(Self {
            device: device_name.to_owned(),
            model: model_name(args, plan),
            parameters: model.config().num_params(),
            dtype: args.model.dtype.to_string(),
            kernels: model.is_packed(),
            threads: Threads::current(),
            batch: args.batch_size,
            decoders: plan.decoders.clone(),
            draft: plan.draft.draft.clone().filter(|_| draft.is_some()),
            rounds: plan.rounds,
            points: points.collect::<Result<_, _>>()?,
            machine,
            predictor,
        })
    }

    /// The points of a curve, in order.
    pub fn curve(&self, axis: Axis, decoder: DecoderName) -> impl Iterator<Item = &Point> {
        self.points.iter().filter(move |point| point.axis == axis && point.decoder == decoder)
    }
}

/// How far a bar goes for so many seconds.
fn units(seconds: f64) -> u64 {
    (seconds * 1e3).ceil().max(1.0) as u64
}

fn bar(device: &str, rounds: usize, costs: &[f64]) -> Result<ProgressBar, Failure> {
    let length = rounds as u64 * costs.iter().map(|cost| units(*cost)).sum::<u64>();
    let style = ProgressStyle::with_template(&format!("{device} {{wide_bar}} {{percent}}%, {{eta}} left: {{msg}}"))?;
    let bar = ProgressBar::new(length).with_style(style);
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    Ok(bar)
}

/// Medians of what was measured of the machine at several times.
fn middle(machines: &[Hardware]) -> Result<Hardware, Failure> {
    let of =
        |figure: fn(&Hardware) -> f64| median(&machines.iter().map(figure).collect::<Vec<_>>()).unwrap_or(f64::NAN);
    let [bandwidth, flops] = [of(|machine| machine.bandwidth), of(|machine| machine.flops)];
    let reached = Reached {
        weights: of(|machine| machine.reached.weights),
        results: of(|machine| machine.reached.results),
        linear: of(|machine| machine.reached.linear),
        attention: of(|machine| machine.reached.attention),
    };
    Ok(Hardware::new(machines[0].name.clone(), bandwidth, flops, machines[0].memory)?.with_reached(reached)?)
}

impl Candidate<'_> {
    fn run(&mut self, rows: &[Vec<u32>], device: &Device) -> Result<(), Failure> {
        self.runs.push(match &self.sampled {
            Some(steps) => sample(self.generator, rows, self.lengths, steps)?,
            None => whole(self.generator, rows, self.lengths, device)?,
        });
        Ok(())
    }

    fn point(self, memory: Option<usize>, predictor: &Predictor, machine: &Hardware) -> Result<Point, Failure> {
        let timing = |of: fn(&Run) -> f64| Timing::from(self.runs.iter().map(of).collect::<Vec<f64>>());
        let drafting = Drafting::of(self.runs.iter().filter_map(|run| run.speculation.as_ref()));
        let (model, draft) = (self.generator.model(), self.generator.draft());
        let of_draft = match draft {
            Some(Draft::Model(draft)) => draft.bytes(),
            _ => 0,
        };
        let per_token: Option<Vec<f64>> = self.runs.iter().map(|run| run.per_token).collect();
        Ok(Point {
            axis: self.axis,
            lengths: self.lengths,
            decoder: self.decoder,
            total: timing(|run| run.total),
            first: timing(|run| run.first),
            per_token: per_token.map(Timing::from),
            memory,
            accounted: model.bytes() + of_draft + self.runs.iter().map(|run| run.kv_bytes).max().unwrap_or(0),
            sampled_steps: self.sampled.map(|steps| steps.len()),
            predicted: predictor.predict(
                machine,
                self.decoder,
                self.lengths,
                drafting.as_ref().unwrap_or(&Drafting::default()),
            )?,
            drafting,
        })
    }
}
