//! The measuring: every point by every decoder, in rounds.

use gpt2_burn::burn::tensor::Device;
use gpt2_burn::cost::{Hardware, Reached};
use gpt2_burn::generate::{Decoder, GenerateRequest, Generator, Stop};
use gpt2_burn::measure::{Clock, Repeats, Timing, median, peaks};
use gpt2_burn::sampling::Sampling;
use gpt2_burn::{Gpt2, Threads};
use indicatif::{ProgressBar, ProgressStyle};

use crate::common::Failure;
use crate::common::model::OnOff;
use crate::memory;
use crate::options::{Args, Axis, DecoderName, Lengths, Plan};
use crate::predict::{Predicted, Predictor};
use crate::prompts;

/// How often each of the machine's rates is measured, before, between and after the rounds.
const RATES: Repeats = Repeats { warm_up: 1, fewest: 5, seconds: 0.15 };

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
    /// Medians of what was measured before, between and after the rounds.
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
    pub predicted: Predicted,
}

/// One run of a decoder.
struct Run {
    total: f64,
    first: f64,
    per_token: Option<f64>,
    kv_bytes: usize,
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
        let memory = memory::of_all(args, plan, device_name)?;
        let (model, text) = load(args, plan, device)?;
        plan.check(model.config())?;
        let rows = rows(args, plan, &model, text)?;
        let generators = args.decoders.iter().map(|name| generator(args, &model, *name));
        let generators = generators.collect::<Result<Vec<_>, Failure>>()?;

        let mut candidates = Vec::new();
        for (axis, points) in Axis::ALL.into_iter().zip(&plan.points) {
            for &lengths in points {
                for (&decoder, generator) in args.decoders.iter().zip(&generators) {
                    let sampled = sampled_steps(decoder, lengths, plan.naive_steps);
                    candidates.push(Candidate { axis, lengths, decoder, generator, sampled, runs: Vec::new() });
                }
            }
        }
        let format = (args.model.kernels == OnOff::On).then(|| args.model.dtype.into());
        let mut machines = vec![peaks(device, model.config(), format, RATES)?];
        let predictor = Predictor::new(&generators[0], args.batch_size)?;
        let cost_of = |candidate: &Candidate| predictor.estimate(&machines[0], candidate.decoder, candidate.lengths);
        let costs = candidates.iter().map(cost_of).collect::<Result<Vec<f64>, Failure>>()?;
        let bar = bar(device_name, plan.rounds, &costs)?;
        for generator in &generators {
            generator.complete(&request(cut(&rows, plan.points[0][0].prompt), 2))?; // warm-up
        }
        for round in 0..plan.rounds {
            // In turns, so that whatever else the machine does befalls all of them.
            for (candidate, cost) in candidates.iter_mut().zip(&costs) {
                let Lengths { prompt, new } = candidate.lengths;
                let name = candidate.decoder.label();
                bar.set_message(format!("round {} of {}: {name}, {prompt} + {new}", round + 1, plan.rounds));
                candidate.run(&rows, device)?;
                bar.inc(units(*cost));
            }
            bar.set_message("what the machine can do");
            machines.push(peaks(device, model.config(), format, RATES)?);
        }
        bar.finish_and_clear();

        let machine = middle(&machines)?;
        let points = candidates.into_iter().map(|candidate| {
            let memory = memory.at(candidate.axis, candidate.decoder, candidate.lengths);
            candidate.point(&model, memory, &predictor, &machine)
        });
        Ok(Self {
            device: device_name.to_owned(),
            model: model_name(args, plan),
            parameters: model.config().num_params(),
            dtype: args.model.dtype.to_string(),
            kernels: model.is_prepared(),
            threads: Threads::current(),
            batch: args.batch_size,
            decoders: args.decoders.clone(),
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

fn model_name(args: &Args, plan: &Plan) -> String {
    match (&args.config, &plan.config) {
        (Some(name), _) => name.clone(),
        (None, Some(_)) => "gpt2".to_owned(),
        (None, None) => args.model.model.clone(),
    }
}

pub fn load(
    args: &Args,
    plan: &Plan,
    device: &Device,
) -> Result<(Gpt2, Option<gpt2_burn::tokenizer::Tokenizer>), Failure> {
    let Some(config) = &plan.config else { return args.model.load_on(device) };
    device.seed(args.seed);
    Ok((args.model.prepare(config.init(device)?)?, None))
}

/// Rows as long as the longest point; shorter ones take what they need from their start.
pub fn rows(
    args: &Args,
    plan: &Plan,
    model: &Gpt2,
    tokenizer: Option<gpt2_burn::tokenizer::Tokenizer>,
) -> Result<Vec<Vec<u32>>, Failure> {
    let longest = plan.points.iter().flatten().map(|lengths| lengths.tokens()).max().unwrap_or(1);
    match tokenizer {
        Some(tokenizer) => prompts::held_out(&tokenizer, args.batch_size, longest),
        None => Ok(prompts::random(model.config().vocab_size, args.batch_size, longest, args.seed)),
    }
}

pub fn generator(args: &Args, model: &Gpt2, name: DecoderName) -> Result<Generator, Failure> {
    let generator = Generator::new(model.clone()).with_decoder(name.decoder());
    match args.cache_dtype {
        Some(dtype) => Ok(generator.with_cache_dtype(dtype.into())?),
        None => Ok(generator),
    }
}

/// Which of naive decoding's steps are timed; none: all.
fn sampled_steps(decoder: DecoderName, lengths: Lengths, most: usize) -> Option<Vec<usize>> {
    if decoder.decoder() != Decoder::Naive || lengths.new <= most {
        return None;
    }
    let last = lengths.new - 1;
    Some((0..most).map(|at| at * last / (most - 1).max(1)).collect())
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

    fn point(
        self,
        model: &Gpt2,
        memory: Option<usize>,
        predictor: &Predictor,
        machine: &Hardware,
    ) -> Result<Point, Failure> {
        let timing = |of: fn(&Run) -> f64| Timing::from(self.runs.iter().map(of).collect::<Vec<f64>>());
        let per_token: Option<Vec<f64>> = self.runs.iter().map(|run| run.per_token).collect();
        Ok(Point {
            axis: self.axis,
            lengths: self.lengths,
            decoder: self.decoder,
            total: timing(|run| run.total),
            first: timing(|run| run.first),
            per_token: per_token.map(Timing::from),
            memory,
            accounted: model.bytes() + self.runs.iter().map(|run| run.kv_bytes).max().unwrap_or(0),
            sampled_steps: self.sampled.map(|steps| steps.len()),
            predicted: predictor.predict(machine, self.decoder, self.lengths)?,
        })
    }
}

fn whole(generator: &Generator, rows: &[Vec<u32>], lengths: Lengths, device: &Device) -> Result<Run, Failure> {
    let request = request(cut(rows, lengths.prompt), lengths.new);
    let clock = Clock::start(device)?;
    let report = generator.complete(&request)?.report;
    let steps = lengths.new - 1;
    Ok(Run {
        total: clock.seconds()?,
        first: report.prefill_seconds,
        per_token: (steps > 0).then(|| report.decode_seconds / steps as f64),
        kv_bytes: report.kv_bytes,
    })
}

/// Times some steps of naive decoding, whose time depends on their length alone; those between are interpolated.
fn sample(generator: &Generator, rows: &[Vec<u32>], lengths: Lengths, steps: &[usize]) -> Result<Run, Failure> {
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
    Ok(Run { total: first + rest, first, per_token, kv_bytes: 0 })
}
