//! [`Generation`]: a request being worked off.

use std::collections::VecDeque;

use web_time::Instant;

use super::{Completion, Decoder, GenerateRequest, Generator, Output, Report, TokenEvent, reckon};
use crate::batch::{Batch, BatchOptions, FinishReason, RowEvent, RowToken, TokenLogprobs};
use crate::prefix::{Plan, Prefixes, Sharing};
use crate::speculative::Acceptance;
use crate::{Error, MemoryLimit, Result};

/// A request being worked off: an iterator of tokens, in the order in which they are made.
///
/// Dropping it cancels. After an error it ends.
pub struct Generation<'a> {
    generator: &'a Generator,
    batch: Batch<'a>,
    /// What of each prompt stands in the context at first.
    windows: Vec<usize>,
    /// All rows, by prompt and then by sample.
    rows: Vec<Made>,
    prompts: Vec<Vec<u32>>,
    num_samples: usize,
    has_logprobs: bool,
    events: VecDeque<TokenEvent>,
    failed: Option<Error>,
    is_done: bool,
    report: Report,
}

/// What has been made of a row.
#[derive(Clone, Default)]
struct Made {
    ids: Vec<u32>,
    text: String,
    logprobs: Vec<TokenLogprobs>,
    finish: Option<FinishReason>,
}

impl<'a> Generation<'a> {
    pub(super) fn new(generator: &'a Generator, request: &GenerateRequest) -> Result<Self> {
        let prompts = request.check(generator)?;
        reckon::check(generator, request, &prompts)?;
        let n_positions = generator.model.config().n_positions;
        let capacity = reckon::capacity(request, &prompts, n_positions);
        let rows = prompts.len() * request.num_samples;
        // All rows together, and each prompt at once.
        let options = BatchOptions::default().with_max_rows(rows).with_step_tokens(usize::MAX);
        // It has been reckoned: what a step needs does not depend on what others have taken meanwhile.
        let mut batch = generator.batch_of(options, capacity, MemoryLimit::bytes(usize::MAX))?;
        let acceptance = match &generator.decoder {
            Decoder::Speculative(speculation) => speculation.acceptance,
            _ => Acceptance::default(),
        };
        if request.max_new_tokens > 0 {
            for (prompt, ids) in prompts.iter().enumerate() {
                for sample in 0..request.num_samples {
                    batch.insert(request.row(sample, acceptance), ids.clone(), [prompt, sample]);
                }
            }
        }
        let window = |ids: &Vec<u32>| request.on_context_end.window(ids.len(), n_positions);
        let report = Report {
            decoder: generator.decoder.clone(),
            prompt_tokens: prompts.iter().map(Vec::len).sum(),
            ..Report::default()
        };
        Ok(Self {
            generator,
            is_done: batch.is_empty(),
            batch,
            windows: prompts.iter().map(window).collect(),
            rows: vec![Made::default(); rows],
            prompts,
            num_samples: request.num_samples,
            has_logprobs: request.logprobs.is_some(),
            events: VecDeque::new(),
            failed: None,
            report,
        })
    }

    /// Runs to the end, and returns everything; events that were not asked for are in it too.
    ///
    /// # Errors
    ///
    /// The first error that the iterator would give.
    pub fn finish(mut self) -> Result<Output> {
        for event in self.by_ref() {
            event?;
        }
        let report = self.report();
        let (samples, has_text) = (self.num_samples, self.generator.tokenizer.is_some());
        let completions = self.rows.into_iter().enumerate().map(|(index, row)| Completion {
            prompt_index: index / samples,
            sample: index % samples,
            prompt_ids: self.prompts[index / samples].clone(),
            ids: row.ids,
            text: has_text.then_some(row.text),
            logprobs: self.has_logprobs.then_some(row.logprobs),
            finish: row.finish.unwrap_or(FinishReason::Length),
        });
        Ok(Output { completions: completions.collect(), report })
    }

    /// What has been done so far.
    pub fn report(&self) -> Report {
        Report { speculation: self.batch.speculation().cloned(), ..self.report.clone() }
    }

    /// How the prompts would be computed now.
    pub(super) fn plan(&self, prefixes: &Prefixes) -> Plan {
        let windows = self.prompts.iter().zip(&self.windows).map(|(ids, window)| &ids[ids.len() - window..]);
        prefixes.plan(&windows.collect::<Vec<_>>())
    }

    /// Computes the next tokens of all rows that go on.
    fn step(&mut self) -> Result<()> {
        let events = match self.batch.report().steps {
            0 => self.prefill()?,
            _ => {
                let events = self.batch.step()?;
                let step = self.batch.last_step();
                let steps = step.multi_steps.max(1);
                self.report.decode_seconds += step.seconds;
                self.report.step_seconds.extend(std::iter::repeat_n(step.seconds / steps as f64, steps));
                self.report.multi_steps += step.multi_steps;
                events
            }
        };
        let done = self.batch.report();
        self.report.new_tokens = done.new_tokens;
        self.report.computed_tokens = done.computed_tokens;
        self.report.kv_bytes = done.kv_bytes;
        self.report.pages = done.pages;
        for event in events {
            match event {
                RowEvent::Token(token) => self.note(token),
                RowEvent::Finished { .. } => {}
                RowEvent::Failed { error, .. } => return Err(error),
            }
        }
        self.is_done = self.batch.is_empty();
        Ok(())
    }

    /// The step that computes the prompts.
    fn prefill(&mut self) -> Result<Vec<RowEvent>> {
        let started = Instant::now();
        let shape = self.generator.model.config();
        let prefixes = self.generator.prefixes.as_ref().map(Prefixes::now);
        let plan = prefixes.as_ref().map(|prefixes| self.plan(prefixes));
        let events = self.batch.step()?;
        let seconds = started.elapsed().as_secs_f64();
        let requested: usize = self.windows.iter().sum();
        let computed = self.batch.report().computed_prompt_tokens;
        self.report.computed_prompt_tokens = computed;
        self.report.reused_prompt_tokens = requested.saturating_sub(computed);
        self.report.prefill_seconds = seconds;
        if let Some((prefixes, plan)) = prefixes.zip(plan) {
            let flops = plan.flops(shape);
            self.report.sharing = Some(Sharing {
                requested_tokens: requested,
                computed_tokens: computed,
                saved_tokens: self.report.reused_prompt_tokens,
                forwards: self.batch.last_step().forwards,
                flops,
                flops_without: plan.flops_without(shape),
                estimated_seconds: prefixes.rate().map(|rate| flops / rate),
                seconds,
            });
            prefixes.set_rate(flops / seconds);
        }
        Ok(events)
    }

    /// Keeps a token, and tells of it.
    fn note(&mut self, token: RowToken) {
        let RowToken { row, id, text, logprobs, finish } = token;
        let index = row.index() as usize;
        let (prompt_index, sample) = (index / self.num_samples, index % self.num_samples);
        if let Some(row) = self.rows.get_mut(index) {
            row.ids.push(id);
            row.text += &text;
            row.logprobs.extend(logprobs.clone());
            row.finish = finish;
        }
        self.events.push_back(TokenEvent { prompt_index, sample, id, text, logprobs, finish });
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<TokenEvent>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.events.is_empty() && !self.is_done {
            if let Err(error) = self.step() {
                self.is_done = true;
                self.failed = Some(error);
            }
        }
        // What was made before an error is there nevertheless.
        self.events.pop_front().map(Ok).or_else(|| self.failed.take().map(Err))
    }
}
