//! [`Generation`]: the loop.

use std::collections::VecDeque;

use web_time::Instant;

use super::reckon;
use super::text::TextTail;
use super::{Completion, ContextEnd, Decoder, FinishReason, GenerateRequest, Generator, Output, Report};
use super::{TokenEvent, TokenLogprobs};
use crate::contexts::Contexts;
use crate::prefix::{Plan, Prefixes};
use crate::sampling::{Purpose, log_softmax, uniform};
use crate::speculative::proposer::{DraftRow, Proposal, Rules};
use crate::speculative::verifier::Verified;
use crate::speculative::{DraftCaches, Judged, Speculating, SpeculationReport};
use crate::{Error, MemoryLimit, Result};

/// A request being worked off: an iterator of tokens, in the order in which they are made.
///
/// Dropping it cancels. After an error it ends.
pub struct Generation<'a> {
    generator: &'a Generator,
    request: GenerateRequest,
    prompts: Vec<Vec<u32>>,
    contexts: Contexts<'a>,
    /// None: no row ever has a draft.
    speculating: Option<Speculating<'a>>,
    /// All rows; at first there is one a prompt, after prefill one a completion.
    rows: Vec<Row<'a>>,
    /// Rows that go on, in the order of the decoder's rows.
    live: Vec<usize>,
    state: State,
    events: VecDeque<TokenEvent>,
    failed: Option<Error>,
    report: Report,
}

/// Most steps that a device takes before their tokens are looked at: enough to hide the waiting, few enough to be shown as
/// they come, and to be thrown away behind the end of a text.
const STEPS_AHEAD: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Prefill,
    Decode,
    Done,
}

/// One completion.
struct Row<'a> {
    prompt_index: usize,
    sample: usize,
    /// The prompt and what follows it.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    /// The context holds `tokens[window_start..]`.
    window_start: usize,
    tail: Option<TextTail<'a>>,
    text: String,
    logprobs: Vec<TokenLogprobs>,
    finish: Option<FinishReason>,
}

impl Row<'_> {
    fn window(&self) -> &[u32] {
        &self.tokens[self.window_start..]
    }

    /// The random stream that it draws from.
    fn stream(&self, request: &GenerateRequest) -> u64 {
        request.first_stream.wrapping_add(self.sample as u64)
    }

    fn new_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }
}

impl<'a> Generation<'a> {
    pub(super) fn new(generator: &'a Generator, request: &GenerateRequest) -> Result<Self> {
        let prompts = request.check(generator)?;
        reckon::check(generator, request, &prompts)?;
        let capacity = reckon::capacity(request, &prompts, generator.model.config().n_positions);
        // It has been reckoned: what a step needs does not depend on what others have taken meanwhile.
        let limit = MemoryLimit::bytes(usize::MAX);
        let storage = generator.decoder.storage();
        if generator.prefixes.is_some() && storage.is_none() {
            let what = "decoder beside a cache of prefixes";
            return Err(Error::mismatch(what, "one with keys and values", &generator.decoder));
        }
        let contexts = Contexts::new(&generator.model, storage, capacity, generator.cache_dtype())?
            .with_prefixes(generator.prefixes.clone())
            .with_limit(limit);
        let speculating = match (&generator.decoder, &generator.draft) {
            (Decoder::Speculative(_), None) => return Err(Error::NoDraft),
            (Decoder::Speculative(speculation), Some(draft)) => {
                let acceptance = speculation.acceptance;
                let rules = Rules { sampling: request.sampling, seed: request.seed, acceptance };
                let (dtype, prefixes) = (generator.cache_dtype, generator.draft_prefixes.clone());
                let caches = DraftCaches { capacity, dtype, prefixes, limit };
                Some(Speculating::new(*speculation, draft, rules, &generator.model, caches)?)
            }
            _ => None,
        };
        let report = Report {
            decoder: generator.decoder.clone(),
            speculation: speculating.as_ref().and(generator.draft.as_ref()).map(SpeculationReport::new),
            prompt_tokens: prompts.iter().map(Vec::len).sum(),
            ..Report::default()
        };
        let mut generation = Self {
            generator,
            request: request.clone(),
            prompts,
            contexts,
            speculating,
            rows: Vec::new(),
            live: Vec::new(),
            state: State::Prefill,
            events: VecDeque::new(),
            failed: None,
            report,
        };
        generation.rows = generation.new_rows();
        if request.max_new_tokens == 0 {
            generation.rows.iter_mut().for_each(|row| row.finish = Some(FinishReason::Length));
            generation.state = State::Done;
        }
        Ok(generation)
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
        let prompts = self.prompts;
        let has_text = self.generator.tokenizer.is_some();
        let completions = self.rows.into_iter().map(|row| Completion {
            prompt_index: row.prompt_index,
            sample: row.sample,
            prompt_ids: prompts[row.prompt_index].clone(),
            ids: row.tokens[row.prompt_tokens..].to_vec(),
            text: has_text.then_some(row.text),
            logprobs: self.request.logprobs.map(|_| row.logprobs),
            finish: row.finish.unwrap_or(FinishReason::Length),
        });
        Ok(Output { completions: completions.collect(), report: self.report })
    }

    /// What has been done so far.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// What computing the prompts would take.
    pub(super) fn plan(&self, prefixes: &Prefixes) -> Plan {
        prefixes.plan(&prompt_windows(&self.rows, self.request.num_samples))
    }

    fn new_rows(&self) -> Vec<Row<'a>> {
        let samples = self.request.num_samples;
        let tokenizer = self.generator.tokenizer.as_ref();
        let row = |prompt_index: usize, sample: usize| {
            let tokens = self.prompts[prompt_index].clone();
            Row {
                prompt_index,
                sample,
                prompt_tokens: tokens.len(),
                window_start: self.slide_start(tokens.len(), 0),
                tokens,
                tail: tokenizer.map(|tokenizer| TextTail::new(tokenizer.stream(), self.request.stop.texts.clone())),
                text: String::new(),
                logprobs: Vec::new(),
                finish: None,
            }
        };
        (0..self.prompts.len())
            .flat_map(|prompt| (0..samples).map(move |sample| (prompt, sample)))
            .map(|(prompt, sample)| row(prompt, sample))
            .collect()
    }

    /// Where the window of a row of `tokens` tokens starts that started at `start`, under the policy `slide`.
    fn slide_start(&self, tokens: usize, start: usize) -> usize {
        let n_positions = self.generator.model.config().n_positions;
        tokens - self.request.on_context_end.window(tokens - start, n_positions)
    }

    /// Computes the next logits of all rows that go on, and chooses a token for each; or more, where a draft is right.
    fn step(&mut self) -> Result<()> {
        let started = Instant::now();
        let is_prefill = self.state == State::Prefill;
        let before = self.report.new_tokens;
        let steps = if is_prefill { 0 } else { self.steps_ahead() };
        let ahead = if steps > 0 { self.run_ahead(steps)? } else { None };
        let steps = if ahead.is_some() { steps } else { 1 };
        let live = match ahead {
            Some(live) => live,
            None => {
                let verified = if is_prefill { self.prefill()? } else { self.decode()? };
                let live = std::mem::take(&mut self.live);
                for (at, &row) in live.iter().enumerate() {
                    self.extend(row, verified.row(at))?;
                }
                live
            }
        };
        self.note_kv_bytes();
        self.report.computed_tokens = self.contexts.computed().tokens;
        self.state = State::Decode;
        if self.request.keep_generated {
            self.keep_finished(&live)?;
        }
        let (kept, finished): (Vec<usize>, Vec<usize>) =
            (0..live.len()).partition(|&at| self.rows[live[at]].finish.is_none());
        self.live = kept.iter().map(|&at| live[at]).collect();
        if kept.is_empty() {
            self.state = State::Done;
        } else {
            // A finished row is not computed any more; the last one first, since those behind it move up.
            for &at in finished.iter().rev() {
                self.contexts.remove(at)?;
                self.speculating.as_mut().map_or(Ok(()), |speculating| speculating.remove(at))?;
            }
            self.note_kv_bytes();
            self.cut_back()?;
        }
        let seconds = started.elapsed().as_secs_f64();
        if is_prefill {
            self.report.prefill_seconds = seconds;
        } else {
            self.report.decode_seconds += seconds;
            self.report.step_seconds.extend(std::iter::repeat_n(seconds / steps as f64, steps));
            let tokens = self.report.new_tokens - before;
            if let Some((speculating, report)) = self.speculating.as_mut().zip(self.report.speculation.as_mut()) {
                speculating.note_step(seconds, tokens, report);
            }
        }
        Ok(())
    }

    /// Keeps what is known of finished rows for requests to come.
    fn keep_finished(&mut self, live: &[usize]) -> Result<()> {
        for (at, row) in live.iter().map(|&row| &self.rows[row]).enumerate().filter(|(_, row)| row.finish.is_some()) {
            self.contexts.keep(at, row.window())?;
            self.speculating.as_mut().map_or(Ok(()), |speculating| speculating.keep(at, row.window()))?;
        }
        Ok(())
    }

    fn note_kv_bytes(&mut self) {
        let of_draft = self.speculating.as_ref().map_or(0, Speculating::kv_bytes);
        self.report.kv_bytes = self.report.kv_bytes.max(self.contexts.kv_bytes() + of_draft);
    }

    /// Computes each prompt once; then there is a row for each sample.
    fn prefill(&mut self) -> Result<Verified> {
        let windows = prompt_windows(&self.rows, self.request.num_samples);
        let mut logits = self.contexts.logits(&windows, &vec![1; windows.len()])?;
        let tokens: usize = windows.iter().map(|window| window.len()).sum();
        self.report.sharing = self.contexts.sharing().cloned();
        self.report.reused_prompt_tokens = self.report.sharing.as_ref().map_or(0, |sharing| sharing.saved_tokens);
        self.report.computed_prompt_tokens = tokens - self.report.reused_prompt_tokens;
        let of_prompt: Vec<usize> = self.rows.iter().map(|row| row.prompt_index).collect();
        self.contexts.gather(&of_prompt)?;
        logits.gather(&of_prompt);
        self.live = (0..self.rows.len()).collect();
        Ok(Verified::plain(logits, self.rows.len()))
    }

    /// Steps that can be taken before any of their tokens is looked at; 0 if it has to be looked at each.
    fn steps_ahead(&self) -> usize {
        let is_argmax = self.request.sampling.is_argmax() && self.request.logprobs.is_none();
        if !is_argmax || self.speculating.is_some() || !self.contexts.can_run_ahead() {
            return 0;
        }
        let n_positions = self.generator.model.config().n_positions;
        let room = |(at, &row): (usize, &usize)| {
            let row = &self.rows[row];
            // Behind the context's end, a row is cut or its window slides: that is for single steps.
            let in_context = match self.contexts.len(at) + 1 == row.window().len() {
                true => (n_positions + 1).saturating_sub(row.window().len()),
                false => 0,
            };
            in_context.min(self.request.max_new_tokens - row.new_tokens())
        };
        let steps = self.live.iter().enumerate().map(room).min().unwrap_or(0).min(STEPS_AHEAD);
        if steps > 1 { steps } else { 0 }
    }

    /// Takes steps without waiting for their tokens, and chooses those then; returns the rows that went on before. What was
    /// computed behind the end of a row is dropped. None: nothing came of it.
    fn run_ahead(&mut self, steps: usize) -> Result<Option<Vec<usize>>> {
        let windows: Vec<&[u32]> = self.live.iter().map(|&row| self.rows[row].window()).collect();
        let Some(chosen) = self.contexts.greedy(&windows, steps, STEPS_AHEAD)? else { return Ok(None) };
        self.report.steps_ahead += steps;
        let live = std::mem::take(&mut self.live);
        let vocab_size = self.generator.model.config().vocab_size;
        for ids in chosen {
            for (&index, id) in live.iter().zip(ids) {
                let row = &self.rows[index];
                if row.finish.is_some() {
                    continue;
                }
                let id = u32::try_from(id).ok().filter(|id| (*id as usize) < vocab_size);
                let (prompt, sample, position) = (row.prompt_index, row.sample, row.tokens.len());
                let id = id.ok_or(Error::NotFinite { prompt, sample, position })?;
                self.push(index, id, None)?;
            }
        }
        Ok(Some(live))
    }

    /// Drafts, if there is something that makes them, and what the target says about them.
    fn decode(&mut self) -> Result<Verified> {
        for at in 0..self.live.len() {
            let row = &self.rows[self.live[at]];
            let start = self.slide_start(row.tokens.len(), row.window_start);
            if start != row.window_start {
                self.rows[self.live[at]].window_start = start;
                self.contexts.truncate(at, 0)?;
                self.speculating.as_mut().map_or(Ok(()), |speculating| speculating.truncate(at, 0))?;
            }
        }
        let drafts = self.drafts()?;
        let started = Instant::now();
        let windows: Vec<&[u32]> = self.live.iter().map(|&row| self.rows[row].window()).collect();
        let verified = Verified::new(&mut self.contexts, &windows, drafts)?;
        if let Some(speculating) = &mut self.speculating {
            speculating.note_verified(started.elapsed().as_secs_f64());
        }
        Ok(verified)
    }

    /// A draft for each row, of no more tokens than the context has room for, and than can be wanted besides the one that
    /// the target adds.
    fn drafts(&mut self) -> Result<Vec<Vec<Proposal>>> {
        let Some((speculating, report)) = self.speculating.as_mut().zip(self.report.speculation.as_mut()) else {
            return Ok(vec![Vec::new(); self.live.len()]);
        };
        let request = &self.request;
        let n_positions = self.generator.model.config().n_positions;
        let row = |&row: &usize| {
            let row = &self.rows[row];
            let wanted = request.max_new_tokens - row.new_tokens() - 1;
            DraftRow {
                prompt_index: row.prompt_index,
                sample: row.sample,
                stream: row.stream(request),
                tokens: &row.tokens,
                prompt_tokens: row.prompt_tokens,
                window_start: row.window_start,
                len: wanted.min(n_positions - row.window().len()),
            }
        };
        speculating.propose(self.live.iter().map(row).collect(), &mut self.contexts, report)
    }

    /// Lets the contexts of all rows that go on hold what stands before their newest tokens, and no more.
    fn cut_back(&mut self) -> Result<()> {
        let lens = self.live.iter().map(|&row| self.rows[row].window().len() - 1);
        for (at, len) in lens.enumerate() {
            self.contexts.truncate(at, len)?;
            self.speculating.as_mut().map_or(Ok(()), |speculating| speculating.truncate(at, len))?;
        }
        Ok(())
    }

    /// Chooses a row's next tokens, one for each position with logits, until it ends or a proposal was wrong.
    fn extend<'l>(
        &mut self,
        index: usize,
        positions: impl Iterator<Item = (Option<&'l Proposal>, &'l [f32])>,
    ) -> Result<()> {
        for (at, (proposal, logits)) in positions.enumerate() {
            let accepted = self.choose(index, at, proposal, logits)?;
            if !accepted || self.rows[index].finish.is_some() {
                break;
            }
        }
        Ok(())
    }

    /// Chooses a row's next token, which may be what was proposed, and tells of it; returns whether it is that.
    fn choose(&mut self, index: usize, at: usize, proposal: Option<&Proposal>, logits: &[f32]) -> Result<bool> {
        let request = &self.request;
        let row = &mut self.rows[index];
        let (prompt_index, sample, position) = (row.prompt_index, row.sample, row.tokens.len());
        // The parameters have been checked: only the logits can be at fault.
        let distribution = request.sampling.distribution(logits, &row.tokens);
        let distribution = distribution.map_err(|_| Error::NotFinite { prompt: prompt_index, sample, position })?;
        let stream = row.stream(request);
        let random = |purpose| uniform(request.seed, stream, position as u64, purpose);
        let judged = self.speculating.as_mut().zip(self.report.speculation.as_mut()).zip(proposal);
        let Judged { id, accepted } = match judged {
            Some(((speculating, report), proposal)) => speculating.judge(at, proposal, &distribution, random, report),
            None => Judged { id: distribution.sample(random(Purpose::Token)), accepted: false },
        };
        let logprobs = request.logprobs.map(|top| logprobs(logits, id, top));
        self.push(index, id, logprobs)?;
        Ok(accepted)
    }

    /// Adds a token to a row, and tells of it.
    fn push(&mut self, index: usize, id: u32, logprobs: Option<TokenLogprobs>) -> Result<()> {
        let request = &self.request;
        let row = &mut self.rows[index];
        let (prompt_index, sample) = (row.prompt_index, row.sample);
        row.tokens.push(id);
        self.report.new_tokens += 1;
        row.logprobs.extend(logprobs.clone());

        let config = self.generator.model.config();
        let ended = !request.stop.ignore_eos && config.eos_token_id.contains(&id);
        let (mut text, stopped) = match &mut row.tail {
            Some(tail) if !ended => tail.push(id)?,
            _ => (String::new(), false),
        };
        let full = row.window().len() > config.n_positions;
        row.finish = if ended || stopped {
            Some(FinishReason::Stop)
        } else if row.new_tokens() >= request.max_new_tokens {
            Some(FinishReason::Length)
        } else if full && !matches!(request.on_context_end, ContextEnd::Slide { .. }) {
            Some(FinishReason::Context)
        } else {
            None
        };
        if let (Some(tail), Some(_), false) = (&mut row.tail, row.finish, stopped) {
            let (rest, stopped) = tail.finish()?;
            text += &rest;
            if stopped {
                row.finish = Some(FinishReason::Stop);
            }
        }
        row.text += &text;
        self.events.push_back(TokenEvent { prompt_index, sample, id, text, logprobs, finish: row.finish });
        Ok(())
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<TokenEvent>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.events.is_empty() && self.state != State::Done {
            if let Err(error) = self.step() {
                self.state = State::Done;
                self.failed = Some(error);
            }
        }
        // What was made before an error is there nevertheless.
        self.events.pop_front().map(Ok).or_else(|| self.failed.take().map(Err))
    }
}

/// What of each prompt stands in the context.
fn prompt_windows<'r>(rows: &'r [Row<'_>], samples: usize) -> Vec<&'r [u32]> {
    rows.iter().step_by(samples).map(Row::window).collect()
}

fn logprobs(logits: &[f32], chosen: u32, count: usize) -> TokenLogprobs {
    let all = log_softmax(logits);
    let mut order: Vec<u32> = (0..all.len() as u32).collect();
    let likeliest_first =
        |left: &u32, right: &u32| all[*right as usize].total_cmp(&all[*left as usize]).then(left.cmp(right));
    let count = count.min(order.len());
    if (1..order.len()).contains(&count) {
        order.select_nth_unstable_by(count - 1, likeliest_first);
    }
    order.truncate(count);
    order.sort_unstable_by(likeliest_first);
    TokenLogprobs { chosen: all[chosen as usize], top: order.into_iter().map(|id| (id, all[id as usize])).collect() }
}
