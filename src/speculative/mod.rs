//! Speculative decoding: a cheap source drafts some tokens, the target reads all of them in one forward, and those that it
//! would have written itself stand.
//!
//! Leviathan, Kalman and Matias, *Fast Inference from Transformers via Speculative Decoding* (2023); Chen et al.,
//! *Accelerating Large Language Model Decoding with Speculative Sampling* (2023). A round of a row whose last token is t:
//!
//! 1. A [`Draft`] proposes tokens `x1..xm`, drawn from its distributions `q1..qm`.
//! 2. The target computes t and `x1..xm` behind its cache in one forward, which gives its distributions `p1..p(m+1)`. With
//!    one token a decode step reads every weight once; with m + 1 it does no more than that.
//! 3. `x1`, `x2`... are verified in order, by the rule of [`Acceptance`], up to the first that is rejected; the target's own
//!    choice takes that one's place. If all stand, the target adds a token from `p(m+1)`.
//! 4. The caches are cut behind what stands. Each row by itself: others may have accepted more.
//!
//! What is written is what plain decoding would have written: greedy, the same ids; sampled, the same distribution, and with
//! [`Acceptance::Match`] the same ids too, as far as [decoders](crate::generate::Decoder) compute the same logits. How much
//! faster it is depends on how often drafts are right; [`DraftLen::Auto`] finds out, and drafts nothing where that would lose.

mod autoregressive;
mod ngram;
pub(crate) mod proposer;
mod report;
mod script;

use std::fmt;
use std::sync::Arc;

use gpt2_burn_core::speculative::Policy;
use web_time::Instant;

pub use gpt2_burn_core::speculative::{Acceptance, DraftLen, VerifiedToken, best_len, expected_tokens, speedup};
pub use ngram::Ngram;
pub use report::{PositionReport, SpeculationReport, SpeculativeStep};
pub use script::Scripted;

use crate::runner::{Runner, RunnerConfig};
use crate::sampling::{Distribution, Purpose};
use crate::{CacheStorage, Error, Gpt2, Result};
use autoregressive::{ExitProposer, ModelProposer};
use proposer::{DraftRow, Proposal, Proposer, RowDraft};
use script::ScriptProposer;

/// How speculation is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Speculation {
    /// How caches are stored, the target's and the draft's.
    pub storage: CacheStorage,
    /// How many tokens are drafted.
    pub draft_len: DraftLen,
    /// Which of them are accepted.
    pub acceptance: Acceptance,
}

/// Where drafts come from.
#[derive(Clone)]
#[non_exhaustive]
pub enum Draft {
    /// Another model with the same vocabulary, and a cache of its own.
    Model(Gpt2),
    /// The text itself.
    Ngram(Ngram),
    /// The target's own first layers and head, on the target's cache: no second model.
    EarlyExit {
        /// How many layers.
        layers: usize,
    },
    /// A text that is known, for tests and benchmarks.
    Scripted(Scripted),
    /// Any function of a row's tokens, prompt and all, and of the number of tokens wanted.
    Function(DraftFunction),
}

/// A function that makes drafts.
pub type DraftFunction = Arc<dyn Fn(&[u32], usize) -> Vec<u32> + Send + Sync>;

impl fmt::Display for Draft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Model(_) => f.write_str("model"),
            Self::Ngram(_) => f.write_str("ngram"),
            Self::EarlyExit { layers } => write!(f, "early-exit:{layers}"),
            Self::Scripted(script) => write!(f, "scripted:{}", script.agreement),
            Self::Function(_) => f.write_str("function"),
        }
    }
}

impl fmt::Debug for Draft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Draft({self})")
    }
}

impl Draft {
    /// Checks that this can make drafts for `target`.
    pub(crate) fn check(&self, target: &Gpt2) -> Result<()> {
        let vocab_size = target.config().vocab_size;
        let check_model = |model: &Gpt2| match model.config().vocab_size {
            found if found != vocab_size => Err(Error::mismatch("vocabulary of the draft", vocab_size, found)),
            _ => Ok(()),
        };
        match self {
            Self::Model(model) => check_model(model),
            Self::Ngram(ngram) if ngram.min_len == 0 || ngram.min_len > ngram.max_len => {
                let found = format!("{} to {}", ngram.min_len, ngram.max_len);
                Err(Error::mismatch(
                    "tokens that are looked up",
                    "at least 1, and `min_len` no more than `max_len`",
                    found,
                ))
            }
            Self::EarlyExit { layers } if !(1..=target.config().n_layer).contains(layers) => {
                let expected = format!("1 to {}", target.config().n_layer);
                Err(Error::mismatch("layers before the exit", expected, layers))
            }
            Self::Scripted(script) => {
                if !(0.0..=1.0).contains(&script.agreement) {
                    return Err(Error::mismatch("agreement of the script", "0 to 1", script.agreement));
                }
                let ids = script
                    .texts
                    .iter()
                    .enumerate()
                    .flat_map(|(row, text)| text.iter().enumerate().map(move |at| (row, at)));
                let unknown = ids.into_iter().find(|(_, (_, id))| **id as usize >= vocab_size);
                if let Some((row, (position, &id))) = unknown {
                    return Err(Error::TokenOutOfRange { id, row, position, vocab_size });
                }
                script.model.as_ref().map_or(Ok(()), check_model)
            }
            Self::Ngram(_) | Self::EarlyExit { .. } | Self::Function(_) => Ok(()),
        }
    }

    /// The same, with the model that it runs without dropout and gradients.
    pub(crate) fn for_inference(self) -> Self {
        match self {
            Self::Model(model) => Self::Model(model.for_inference().into_owned()),
            Self::Scripted(script) => {
                let model = script.model.map(|model| model.for_inference().into_owned());
                Self::Scripted(Scripted { model, ..script })
            }
            other => other,
        }
    }

    /// The model that it runs besides the target, if it does.
    pub(crate) fn model(&self) -> Option<&Gpt2> {
        match self {
            Self::Model(model) => Some(model),
            Self::Scripted(script) => script.model.as_ref(),
            Self::Ngram(_) | Self::EarlyExit { .. } | Self::Function(_) => None,
        }
    }

    /// This source at work beside `target`; a model of its own keeps what `config` says.
    fn proposer<'a>(&'a self, target: &Gpt2, config: RunnerConfig) -> Result<Box<dyn Proposer + 'a>> {
        let model = |model: &'a Gpt2| ModelProposer::new(model, config);
        let vocab_size = target.config().vocab_size;
        Ok(match self {
            Self::Model(draft) => Box::new(model(draft)?),
            Self::Ngram(ngram) => Box::new(*ngram),
            Self::EarlyExit { layers } => Box::new(ExitProposer { layers: *layers }),
            Self::Scripted(script) => {
                let model = script.model.as_ref().map(model).transpose()?;
                Box::new(ScriptProposer { script, model, vocab_size })
            }
            Self::Function(function) => Box::new(FunctionProposer { function, vocab_size }),
        })
    }
}

/// [`Draft::Function`] at work.
struct FunctionProposer<'a> {
    function: &'a DraftFunction,
    vocab_size: usize,
}

impl Proposer for FunctionProposer<'_> {
    fn propose(&mut self, rows: &[DraftRow<'_>], _: &mut Runner<'_>) -> Result<Vec<RowDraft>> {
        let vocab_size = self.vocab_size;
        let draft = |row: &DraftRow<'_>| {
            let ids = (self.function)(row.tokens, row.len);
            let position = |at: usize| row.tokens.len() + at;
            let check = |(at, id): (usize, u32)| match id as usize >= vocab_size {
                true => Err(Error::TokenOutOfRange { id, row: row.prompt_index, position: position(at), vocab_size }),
                false => Ok(Proposal::certain(id)),
            };
            ids.into_iter().take(row.len).enumerate().map(check).collect()
        };
        Ok(rows.iter().map(draft).collect())
    }
}

/// Speculation at work on a batch.
pub(crate) struct Speculating<'a> {
    proposer: Box<dyn Proposer + 'a>,
    policy: Policy,
    /// The step that is being done.
    step: SpeculativeStep,
    /// What drafts were worth so far.
    report: SpeculationReport,
}

impl<'a> Speculating<'a> {
    pub fn new(draft_len: DraftLen, draft: &'a Draft, target: &Gpt2, config: RunnerConfig) -> Result<Self> {
        Ok(Self {
            proposer: draft.proposer(target, config)?,
            policy: Policy::new(draft_len),
            step: SpeculativeStep::default(),
            report: SpeculationReport::new(draft),
        })
    }

    /// Drafts for these rows, of no more than `len` tokens each of theirs.
    pub fn propose(&mut self, mut rows: Vec<DraftRow<'_>>, target: &mut Runner<'_>) -> Result<Vec<RowDraft>> {
        let started = Instant::now();
        let wanted = self.policy.next_len();
        rows.iter_mut().for_each(|row| row.len = row.len.min(wanted));
        let drafting: Vec<DraftRow<'_>> = rows.iter().filter(|row| row.len > 0).copied().collect();
        self.proposer.prefill(&drafting)?;
        let prefilled = started.elapsed();
        let mut proposed = match drafting.is_empty() {
            true => Vec::new(),
            false => self.proposer.propose(&drafting, target)?,
        }
        .into_iter();
        let drafts = rows.iter().map(|row| if row.len > 0 { proposed.next() } else { None });
        let drafts: Vec<RowDraft> = drafts.map(|draft| draft.unwrap_or_else(|| Ok(Vec::new()))).collect();
        let lens = drafts.iter().map(|draft| draft.as_ref().map_or(0, Vec::len));
        let max_draft_len = lens.clone().max().unwrap_or(0);
        lens.for_each(|len| self.report.note_draft(len));
        let elapsed = started.elapsed();
        self.step =
            SpeculativeStep { max_draft_len, draft_seconds: elapsed.as_secs_f64(), ..SpeculativeStep::default() };
        self.policy.note_draft(max_draft_len, (elapsed - prefilled).as_secs_f64());
        self.report.draft_computed_tokens = self.proposer.computed_tokens();
        Ok(drafts)
    }

    /// Notes that a row computes its context anew, without a draft.
    pub fn note_slide(&mut self) {
        self.report.note_draft(0);
    }

    /// Notes what the target's forward over the drafts took, and whether there was nothing else in it.
    pub fn note_verified(&mut self, seconds: f64, only_drafts: bool) {
        self.step.verify_seconds = seconds;
        if only_drafts {
            self.policy.note_verified(self.step.max_draft_len, seconds);
        }
    }

    /// Verifies the token at a position of a row's draft.
    pub fn verify(
        &mut self,
        acceptance: Acceptance,
        position: usize,
        proposal: &Proposal,
        target: &Distribution,
        random: impl Fn(Purpose) -> f64,
    ) -> VerifiedToken {
        let verified = acceptance.verify(target, &proposal.distribution, proposal.id, random);
        self.policy.note_outcome(verified.accepted);
        self.report.note_outcome(position, verified.accepted);
        verified
    }

    pub fn push(&mut self) -> Result<()> {
        self.proposer.push()
    }

    pub fn wipe(&mut self, row: usize) {
        self.proposer.wipe(row);
    }

    pub fn retain(&mut self, is_kept: &[bool]) {
        self.proposer.retain(is_kept);
    }

    pub fn make_cache(&mut self) -> Result<()> {
        self.proposer.make_cache()
    }

    /// Puts what is known of a row into the cache of prefixes.
    pub fn insert(&self, row: usize, window: &[u32]) {
        self.proposer.insert(row, window);
    }

    pub fn kv_bytes(&self) -> usize {
        self.proposer.kv_bytes()
    }

    /// What drafts were worth so far.
    pub fn report(&self) -> &SpeculationReport {
        &self.report
    }

    /// Notes the step that was done, which took `seconds` and gave `tokens`.
    pub fn note_step(&mut self, seconds: f64, tokens: usize) {
        self.step.rest_seconds = (seconds - self.step.draft_seconds - self.step.verify_seconds).max(0.0);
        self.report.steps.push(self.step);
        self.report.tokens += tokens;
        self.report.drafting_loses = self.policy.lost();
    }
}
