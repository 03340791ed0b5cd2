//! [`TokenBatch`]: checked token ids on a device.

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData};

use super::Gpt2;
use crate::device::is_same_device;
use crate::memory::sum;
use crate::{Error, MemoryLimit, Result};

/// The new tokens of a batch, checked once against the vocabulary. Rows may be of unequal length; they are packed, those of a row
/// behind those of the row before, and nothing is between them.
#[derive(Clone, Debug)]
pub struct TokenBatch {
    /// `[N]`.
    ids: Tensor<1, Int>,
    query_lens: Vec<usize>,
    vocab_size: usize,
}

/// Some consecutive tokens of a batch.
pub(super) struct Chunk {
    /// `[n]`.
    pub ids: Tensor<1, Int>,
    /// The rows that have some of them, and which of each row's new tokens they are.
    pub rows: Vec<(usize, Range<usize>)>,
}

impl TokenBatch {
    /// Puts rows of ids on the model's device.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyBatch`], [`Error::EmptyPrompt`] or [`Error::TokenOutOfRange`]; [`Error::OutOfMemory`] or
    /// [`Error::Mismatch`] if all tokens together are more than [the system](MemoryLimit::system) gives memory for or than 32 bits
    /// count.
    pub fn new<R: AsRef<[u32]>>(rows: &[R], model: &Gpt2) -> Result<Self> {
        check_lens(rows.iter().map(|row| row.as_ref().len()))?;
        Self::packed(rows, model)
    }

    /// As [`new`](Self::new), of rows of which some may have no new token.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); [`Error::EmptyBatch`] if no row has one.
    pub(crate) fn packed<R: AsRef<[u32]>>(rows: &[R], model: &Gpt2) -> Result<Self> {
        let vocab_size = model.config().vocab_size;
        let query_lens: Vec<usize> = rows.iter().map(|row| row.as_ref().len()).collect();
        let tokens = check_tokens(&query_lens)?;
        let mut ids = Vec::with_capacity(tokens);
        for (row, of_row) in rows.iter().enumerate() {
            for (position, &id) in of_row.as_ref().iter().enumerate() {
                if id as usize >= vocab_size {
                    return Err(Error::TokenOutOfRange { id, row, position, vocab_size });
                }
                ids.push(id as i32); // a valid vocabulary fits an i32: see `Gpt2Config::validate`
            }
        }
        let ids = Tensor::from_data(TensorData::new(ids, [tokens]), &model.device());
        Ok(Self { ids, query_lens, vocab_size })
    }

    /// Ids as a data loader gives them, `[B, T]` on the model's device, of which row `b` counts the first `lens[b]`; without
    /// lengths, all of them. They are read back once to be checked.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); [`Error::Mismatch`] if there is not one length a row, one is more than T, or the ids are on another
    /// device; [`Error::Execution`] if the device does not hand them over.
    pub fn from_tensor(ids: Tensor<2, Int>, lens: Option<&[usize]>, model: &Gpt2) -> Result<Self> {
        let ([batch, time], device) = (ids.dims(), ids.device());
        let all = vec![time; batch];
        let lens = lens.unwrap_or(&all);
        if lens.len() != batch {
            return Err(Error::mismatch("lengths of rows of ids", batch, lens.len()));
        }
        if let Some(len) = lens.iter().find(|len| **len > time) {
            return Err(Error::mismatch("length of a row of ids", format!("at most {time}"), len));
        }
        check_lens(lens.iter().copied())?;
        check_tokens(lens)?;
        let here = model.device();
        if !is_same_device(&here, &device) {
            return Err(Error::mismatch("device of the tokens", format!("{here:?}"), format!("{device:?}")));
        }
        let vocab_size = model.config().vocab_size;
        let found = ids.clone().try_into_vec_as::<i64>().map_err(|error| Error::Execution(error.to_string()))?;
        for (row, (of_row, len)) in found.chunks(time).zip(lens).enumerate() {
            let is_unknown = |id: &i64| usize::try_from(*id).map_or(true, |id| id >= vocab_size);
            if let Some(position) = of_row[..*len].iter().position(is_unknown) {
                let id = of_row[position].clamp(0, i64::from(u32::MAX)) as u32;
                return Err(Error::TokenOutOfRange { id, row, position, vocab_size });
            }
        }
        let flat: Tensor<1, Int> = ids.reshape([batch * time]);
        let flat = match lens.iter().all(|len| *len == time) {
            true => flat,
            false => {
                let kept =
                    lens.iter().enumerate().flat_map(|(row, len)| (row * time) as i32..(row * time + len) as i32);
                let kept: Vec<i32> = kept.collect();
                flat.select(0, Tensor::from_data(kept.as_slice(), &device))
            }
        };
        Ok(Self { ids: flat, query_lens: lens.to_vec(), vocab_size })
    }

    /// The ids, `[N]`.
    pub fn ids(&self) -> &Tensor<1, Int> {
        &self.ids
    }

    /// New tokens of each row.
    pub fn query_lens(&self) -> &[usize] {
        &self.query_lens
    }

    /// New tokens of all rows, N.
    pub fn tokens(&self) -> usize {
        self.query_lens.iter().sum()
    }

    /// Checks that the ids were checked for a model like this one, and are where it is.
    pub(super) fn check(&self, model: &Gpt2) -> Result<()> {
        let vocab_size = model.config().vocab_size;
        if self.vocab_size > vocab_size {
            return Err(Error::mismatch("vocabulary of the tokens", format!("at most {vocab_size}"), self.vocab_size));
        }
        let (device, here) = (model.device(), self.ids.device());
        if !is_same_device(&device, &here) {
            return Err(Error::mismatch("device of the tokens", format!("{device:?}"), format!("{here:?}")));
        }
        Ok(())
    }

    /// The tokens cut into chunks of at most `max` each, as equal as that goes.
    pub(super) fn chunks(&self, max: usize) -> Vec<Chunk> {
        let tokens = self.tokens();
        let len = tokens.div_ceil(tokens.div_ceil(max.max(1)));
        let chunk = |start: usize| {
            let (all, mut rows, mut first) = (start..(start + len).min(tokens), Vec::new(), 0);
            for (row, query_len) in self.query_lens.iter().enumerate() {
                let (from, to) = (all.start.max(first), all.end.min(first + query_len));
                if from < to {
                    rows.push((row, from - first..to - first));
                }
                first += query_len;
            }
            let ids = if all.len() == tokens { self.ids.clone() } else { self.ids.clone().narrow(0, start, all.len()) };
            Chunk { ids, rows }
        };
        (0..tokens).step_by(len).map(chunk).collect()
    }
}

/// Checks that there are rows, and that each has a token.
fn check_lens(mut lens: impl ExactSizeIterator<Item = usize>) -> Result<()> {
    if lens.len() == 0 {
        return Err(Error::EmptyBatch);
    }
    lens.position(|len| len == 0).map_or(Ok(()), |index| Err(Error::EmptyPrompt { index }))
}

/// Checks that rows may have so many tokens together; returns how many.
fn check_tokens(lens: &[usize]) -> Result<usize> {
    let tokens = lens.iter().fold(0, |tokens: usize, len| sum([tokens, *len]));
    if tokens == 0 {
        return Err(Error::EmptyBatch);
    }
    MemoryLimit::system().check("ids of a batch", tokens.saturating_mul(24))?;
    if tokens > i32::MAX as usize {
        return Err(Error::mismatch("ids of a batch", format!("at most {}", i32::MAX), tokens));
    }
    Ok(tokens)
}
