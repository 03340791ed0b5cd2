//! [`Gpt2::decode_steps`]: greedy decoding that the host does not wait for.
//!
//! A GPU does what it is told while the host already tells it what comes next, as long as the host need not see what came out.
//! Here each step takes its tokens and its positions from buffers on the device and leaves the next ones there; only after
//! some steps are the tokens read. So every step is launched in the same words, and a device that can capture them (CUDA's
//! graphs) is told them only once.

use std::thread::{self, ThreadId};

use burn::tensor::{DType, Int, Tensor, TensorData};

use super::Gpt2;
use super::plan::Plan;
use crate::backends::{self, AttentionMetadata, CapturedStep, PackedRow};
use crate::cache::KvCache;
use crate::{Error, Result};

/// Rows that are decoded several steps at a time.
#[derive(Debug)]
pub(crate) struct MultiStep {
    /// None while a step is being taken, or captured and not replayed.
    state: Option<backends::DecodeState>,
    /// Whose the tokens of a step are: one of each row. Its lengths on the host are those of the first step; kernels go by those on
    /// the device.
    metadata: AttentionMetadata,
    captured: Captured,
    /// Tokens of each row in the cache.
    lens: Vec<usize>,
    /// The newest token of each row.
    last: Vec<u32>,
    /// Work of one thread is in order.
    thread: ThreadId,
}

#[derive(Debug)]
enum Captured {
    /// The device does not capture, or refused to.
    Never,
    NotYet,
    Done(Box<CapturedStep<Step>>),
}

/// What every step takes beside its state and the cache.
#[derive(Clone, Debug)]
struct Step {
    model: Gpt2,
    metadata: AttentionMetadata,
}

/// One that is done, so that the device has all the memory that it takes, and one that is captured.
const STEPS_TO_CAPTURE: usize = 2;

impl Gpt2 {
    /// Whether [`decode_steps`](Self::decode_steps) saves waiting.
    pub(crate) fn can_multi_step(&self) -> bool {
        self.is_packed() && self.check_in_place().is_ok() && backends::is_asynchronous(&self.device())
    }

    /// Rows whose newest tokens are `last`, and of which the cache holds what stands before those; of up to `max` steps at
    /// a time. A step is captured if the device can and it `may` be.
    pub(crate) fn start_multi_step(&self, last: &[u32], cache: &KvCache, max: usize, may_capture: bool) -> MultiStep {
        let (device, batch) = (self.device(), last.len());
        let ints = |values: Vec<i32>| Tensor::<1, Int>::from_data(values.as_slice(), (&device, DType::I32));
        let chosen = TensorData::new(vec![0_i32; batch * max], [batch, max]);
        let state = backends::DecodeState {
            ids: ints(last.iter().map(|id| *id as i32).collect()),
            context_lens: ints(cache.lens().iter().map(|len| *len as i32).collect()),
            chosen: Tensor::from_data(chosen, (&device, DType::I32)),
        };
        let captured = match may_capture && CapturedStep::<Step>::is_possible(&device) {
            true => Captured::NotYet,
            false => Captured::Never,
        };
        let (lens, last) = (cache.lens().to_vec(), last.to_vec());
        let row = |(row, len): (usize, &usize)| PackedRow { slot: cache.slot(row), context_len: *len, query_len: 1 };
        let metadata = AttentionMetadata::new(lens.iter().enumerate().map(row).collect(), &device);
        MultiStep { state: Some(state), metadata, captured, lens, last, thread: thread::current().id() }
    }

    /// The `steps` most likely next tokens of each row, `[steps][rows]`; a number outside the vocabulary stands for logits that
    /// are not numbers. The cache then holds all of them but the last.
    ///
    /// None: the device would not capture after all, or the step was not written in place, and what the cache holds is lost.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub(crate) fn decode_steps(
        &self,
        multi_step: &mut MultiStep,
        cache: &mut KvCache,
        steps: usize,
    ) -> Result<Option<Vec<Vec<i32>>>> {
        let rows = multi_step.lens.len();
        let mut taken = 0;
        while taken < steps {
            cache.check_append(&self.config, &self.device(), &vec![STEPS_TO_CAPTURE.min(steps - taken); rows])?;
            taken += match &multi_step.captured {
                Captured::Done(step) => {
                    step.replay().map_err(failed)?;
                    cache.advance((0..multi_step.lens.len()).map(|row| (row, 1)));
                    1
                }
                // It pays from the next step on.
                Captured::NotYet if steps - taken > STEPS_TO_CAPTURE => match self.capture(multi_step, cache)? {
                    Some(steps) => steps,
                    None => return Ok(None),
                },
                _ => self.launch_step(multi_step, cache)?,
            };
        }
        let state = multi_step.state.as_ref().ok_or_else(|| Error::Execution("an earlier step failed".to_owned()))?;
        let [_, columns] = state.chosen.dims();
        let chosen = state.chosen.clone().try_into_vec_as::<i32>();
        let chosen = chosen.map_err(|error| Error::Execution(error.to_string()))?;
        let of_step = |step: usize| {
            let column = |(row, len): (usize, &usize)| chosen[row * columns + (len + step) % columns];
            multi_step.lens.iter().enumerate().map(column).collect::<Vec<i32>>()
        };
        let chosen: Vec<Vec<i32>> = (0..steps).map(of_step).collect();
        multi_step.lens = cache.lens().to_vec();
        if let Some(last) = chosen.last() {
            multi_step.last = last.iter().map(|id| (*id).max(0) as u32).collect();
        }
        Ok(Some(chosen))
    }

    /// One step; returns how many it was.
    fn launch_step(&self, multi_step: &mut MultiStep, cache: &mut KvCache) -> Result<usize> {
        let state = multi_step.state.take().ok_or_else(|| Error::Execution("an earlier step failed".to_owned()))?;
        multi_step.state = Some(self.compute_step(state, multi_step.metadata.clone(), cache));
        cache.advance((0..multi_step.lens.len()).map(|row| (row, 1)));
        Ok(1)
    }

    /// Two steps, of which the second is captured and then replayed; or one, if the device refuses. Returns how many; none if it
    /// began to capture and failed: then it takes all that the step was to write for invalid.
    fn capture(&self, multi_step: &mut MultiStep, cache: &mut KvCache) -> Result<Option<usize>> {
        let device = self.device();
        if CapturedStep::<Step>::prepare(&device).is_err() {
            multi_step.captured = Captured::Never;
            return Ok(Some(self.launch_step(multi_step, cache)?));
        }
        self.launch_step(multi_step, cache)?;
        let state = multi_step.state.take().ok_or_else(|| Error::Execution("an earlier step failed".to_owned()))?;
        let step = Step { model: self.clone(), metadata: multi_step.metadata.clone() };
        let take =
            |step: &Step, cache: &mut KvCache, state| step.model.compute_step(state, step.metadata.clone(), cache);
        let Ok(captured) = CapturedStep::new(&device, step, cache, state, take, KvCache::all_buffers) else {
            return Ok(None);
        };
        captured.replay().map_err(failed)?;
        multi_step.state = Some(captured.state().clone());
        cache.advance((0..multi_step.lens.len()).map(|row| (row, 1)));
        multi_step.captured = Captured::Done(Box::new(captured));
        Ok(Some(STEPS_TO_CAPTURE))
    }

    /// A step, told to the device and no further.
    fn compute_step(
        &self,
        state: backends::DecodeState,
        metadata: AttentionMetadata,
        cache: &mut KvCache,
    ) -> backends::DecodeState {
        let plan = Plan::on_device(metadata, state.context_lens.clone());
        let hidden = self.compute_all(&state.ids, &plan, Some(cache)); // [B, d]
        let logits = self.compute_head(hidden); // [B, V]
        drop(plan);
        backends::advance(logits, state)
    }
}

fn failed(error: burn::backend::ExecutionError) -> Error {
    Error::Execution(error.to_string())
}

impl MultiStep {
    /// Whether this is where these rows are now.
    pub(crate) fn is_at(&self, last: &[u32], lens: &[usize]) -> bool {
        self.state.is_some() && self.last == last && self.lens == lens && self.thread == thread::current().id()
    }
}
