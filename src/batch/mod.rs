//! [`Batch`]: rows that come and go while they are computed together.
//!
//! There are no phases. A row has tokens that are known and tokens that are computed; in each [step](Batch::step) rows catch up: a
//! prompt by a chunk, a row that decodes by a token, or by a draft and one more. All that goes through the model in one forward, and
//! what a row gets depends on no other row. Yu et al., *Orca: A Distributed Serving System for Transformer-Based Generative Models*
//! (2022), call it iteration-level scheduling.

mod event;
mod options;
mod report;
pub(crate) mod request;
mod row;
mod rows;
mod step;
mod text;

use std::collections::BTreeMap;
use std::fmt;

pub use event::{FinishReason, RowEvent, RowToken, TokenLogprobs};
pub use options::BatchOptions;
pub use report::{BatchReport, StepReport};
pub use request::{ContextEnd, Prompt, RowRequest, Stop};

use crate::runner::{Runner, RunnerConfig};
use crate::speculative::{Speculating, SpeculationReport};
use crate::tokenizer::Tokenizer;
use crate::{Error, Gpt2, Gpt2Config, Result};
use row::Row;
use text::TextTail;

/// Names a row of a batch; later rows have larger ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId(u64);

impl RowId {
    /// How many rows the batch had got before this one.
    pub fn index(self) -> u64 {
        self.0
    }
}

impl fmt::Display for RowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "row {}", self.0)
    }
}

/// Completions that are computed together, each with parameters of its own. It is made by
/// [`Generator::batch`](crate::generate::Generator::batch).
///
/// ```
/// use gpt2_burn::batch::{BatchOptions, RowEvent, RowRequest};
/// use gpt2_burn::generate::Generator;
/// use gpt2_burn::{Gpt2Config, sampling::Sampling};
///
/// let device = gpt2_burn::device("flex")?;
/// let config = Gpt2Config { vocab_size: 50, n_positions: 16, n_embd: 8, n_layer: 2, n_head: 2, ..Default::default() };
/// let generator = Generator::new(config.init(&device)?);
///
/// let mut batch = generator.batch(BatchOptions::default().with_max_rows(4))?;
/// let greedy = RowRequest { sampling: Sampling::greedy(), max_new_tokens: 5, ..RowRequest::new(vec![3, 1, 4]) };
/// let first = batch.add(&greedy)?;
/// batch.step()?;
/// let second = batch.add(&RowRequest { seed: 7, max_new_tokens: 2, ..RowRequest::new(vec![1, 5]) })?; // joins the first
/// while !batch.is_empty() {
///     for event in batch.step()? {
///         match event {
///             RowEvent::Token(token) => println!("{} goes on with {}", token.row, token.id),
///             other => println!("{other:?}"),
///         }
///     }
/// }
/// assert_eq!((batch.report().new_tokens, batch.report().joins), (7, 1));
/// # Ok::<(), gpt2_burn::Error>(())
/// ```
pub struct Batch<'a> {
    runner: Runner<'a>,
    tokenizer: Option<&'a Tokenizer>,
    /// None: no row ever has a draft.
    speculating: Option<Speculating<'a>>,
    options: BatchOptions,
    /// Most tokens of a row.
    capacity: usize,
    /// All rows that have not ended, in the order of their arrival.
    rows: BTreeMap<RowId, Row<'a>>,
    /// Whose the runner's rows are.
    row_ids: Vec<RowId>,
    next_id: u64,
    report: BatchReport,
    last_step: StepReport,
}

impl<'a> Batch<'a> {
    pub(crate) fn new(
        model: &'a Gpt2,
        tokenizer: Option<&'a Tokenizer>,
        config: RunnerConfig,
        speculating: Option<Speculating<'a>>,
        options: BatchOptions,
    ) -> Result<Self> {
        for (what, value) in [("rows of a batch", options.max_rows), ("tokens of a step", options.step_tokens)] {
            if value == 0 {
                return Err(Error::mismatch(what, "at least 1", value));
            }
        }
        let capacity = config.cache.capacity;
        Ok(Self {
            runner: Runner::new(model, config)?,
            tokenizer,
            speculating,
            options,
            capacity,
            rows: BTreeMap::new(),
            row_ids: Vec::new(),
            next_id: 0,
            report: BatchReport::default(),
            last_step: StepReport::default(),
        })
    }

    /// Takes on a row, which joins those that are computed as soon as there is room for it. Nothing is computed before the next
    /// [step](Self::step).
    ///
    /// # Errors
    ///
    /// If the request is invalid, see [`RowRequest`]; [`Error::BatchFull`] if [`max_waiting`](BatchOptions::max_waiting) rows
    /// wait already; [`Error::OutOfMemory`] if the row would not fit into memory, alone.
    pub fn add(&mut self, request: &RowRequest) -> Result<RowId> {
        let index = self.next_id as usize;
        request::check_options(
            &request.sampling,
            &request.stop,
            request.on_context_end,
            self.config(),
            self.tokenizer.is_some(),
        )?;
        // Those for which there is no room in the next step either.
        let (rows, max_rows, max_waiting) = (self.rows.len(), self.options.max_rows, self.options.max_waiting);
        if rows >= max_rows && rows - max_rows >= max_waiting {
            return Err(Error::BatchFull { waiting: rows - max_rows, max_waiting });
        }
        let ids = match (&request.prompt, self.tokenizer) {
            (Prompt::Ids(ids), _) => ids.clone(),
            (Prompt::Text(text), Some(tokenizer)) => tokenizer.encode(text)?,
            (Prompt::Text(_), None) => return Err(Error::NoTokenizer { what: "a text prompt" }),
        };
        request::check_prompt(index, &ids, request.max_new_tokens, request.on_context_end, self.config())?;
        let tokens = match request.on_context_end {
            ContextEnd::Slide { .. } => self.config().n_positions,
            _ => ids.len().saturating_add(request.max_new_tokens.saturating_sub(1)).min(self.config().n_positions),
        };
        if tokens > self.capacity {
            return Err(Error::mismatch("tokens of a row", format!("at most {}", self.capacity), tokens));
        }
        self.runner.check_row(tokens)?;
        let request = RowRequest { prompt: Prompt::Ids(Vec::new()), ..request.clone() };
        Ok(self.insert(request, ids, [index, 0]))
    }

    /// The same for a request that has been checked.
    pub(crate) fn insert(&mut self, request: RowRequest, ids: Vec<u32>, label: [usize; 2]) -> RowId {
        let id = RowId(self.next_id);
        self.next_id += 1;
        let tail = self.tokenizer.map(|tokenizer| TextTail::new(tokenizer.stream(), request.stop.texts.clone()));
        let config = self.runner.model().config();
        self.rows.insert(id, Row::new(id, request, ids, label, tail, config));
        id
    }

    /// Rows that have not ended.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether all rows have ended.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Rows for which there is no room yet.
    pub fn waiting(&self) -> usize {
        self.rows.values().filter(|row| row.runner_row.is_none() && row.leader.is_none()).count()
    }

    /// What has been done so far.
    pub fn report(&self) -> &BatchReport {
        &self.report
    }

    /// What the last step did.
    pub fn last_step(&self) -> &StepReport {
        &self.last_step
    }

    /// What drafts were worth so far; none without speculation.
    pub fn speculation(&self) -> Option<&SpeculationReport> {
        self.speculating.as_ref().map(Speculating::report)
    }

    /// Asks for the memory of the cache now, and not with the first step.
    pub(crate) fn make_cache(&mut self) -> Result<()> {
        self.runner.make_cache()?;
        self.speculating.as_mut().map_or(Ok(()), Speculating::make_cache)
    }

    fn config(&self) -> &'a Gpt2Config {
        self.runner.model().config()
    }
}
