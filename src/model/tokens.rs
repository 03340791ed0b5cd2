//! [`TokenBatch`]: checked token ids on a device.

use burn::tensor::{Int, Tensor, TensorData};

use super::{Gpt2, is_same_device};
use crate::memory::product;
use crate::{Error, MemoryLimit, Result};

/// The new tokens of a batch, rows of unequal length, checked once against the vocabulary.
#[derive(Clone, Debug)]
pub struct TokenBatch {
    /// `[batch, T_max]`; a shorter row is filled up with its last id, so that what is computed there is a copy of
    /// something real and no stranger's values come near a row.
    ids: Tensor<2, Int>,
    new_lens: Vec<usize>,
    vocab_size: usize,
}

impl TokenBatch {
    /// Puts rows of ids on the model's device.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyBatch`], [`Error::EmptyPrompt`] or [`Error::TokenOutOfRange`]; [`Error::OutOfMemory`] or
    /// [`Error::Mismatch`] if the rows, all as long as the longest, are more than [the system](MemoryLimit::system) gives or than
    /// 32 bits count.
    pub fn new<R: AsRef<[u32]>>(rows: &[R], model: &Gpt2) -> Result<Self> {
        let vocab_size = model.config().vocab_size;
        let new_lens: Vec<usize> = rows.iter().map(|row| row.as_ref().len()).collect();
        let time = new_lens.iter().copied().max().ok_or(Error::EmptyBatch)?;
        if let Some(index) = new_lens.iter().position(|&len| len == 0) {
            return Err(Error::EmptyPrompt { index });
        }

        let tokens = product([rows.len(), time]);
        MemoryLimit::system().check("ids of a batch, all rows as long as the longest", tokens.saturating_mul(24))?;
        if tokens > i32::MAX as usize {
            let what = "ids of a batch, all rows as long as the longest";
            return Err(Error::mismatch(what, format!("at most {}", i32::MAX), tokens));
        }
        let mut padded = Vec::with_capacity(tokens);
        for (row, ids) in rows.iter().enumerate() {
            for (position, &id) in ids.as_ref().iter().enumerate() {
                if id as usize >= vocab_size {
                    return Err(Error::TokenOutOfRange { id, row, position, vocab_size });
                }
                padded.push(id as i32); // a valid vocabulary fits an i32: see `Gpt2Config::validate`
            }
            let last = padded.last().copied();
            padded.extend(std::iter::repeat_n(last, time - new_lens[row]).flatten());
        }
        let data = TensorData::new(padded, [rows.len(), time]);
        Ok(Self { ids: Tensor::from_data(data, &model.device()), new_lens, vocab_size })
    }

    /// The ids, `[batch, T_max]`.
    pub fn ids(&self) -> &Tensor<2, Int> {
        &self.ids
    }

    /// New tokens of each row.
    pub fn new_lens(&self) -> &[usize] {
        &self.new_lens
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

    /// The same tokens, `time` of each row after the other; the last part has what is left, so that no row is without a token
    /// in any.
    pub(super) fn in_parts(&self, time: usize) -> Vec<Self> {
        let [_, longest] = self.ids.dims();
        let shortest = self.new_lens.iter().copied().min().unwrap_or(0);
        let starts: Vec<usize> = (0..shortest).step_by(time.max(1)).collect();
        let part = |(index, &start): (usize, &usize)| {
            let end = starts.get(index + 1).copied().unwrap_or(longest);
            let new_lens = self.new_lens.iter().map(|len| (*len).min(end) - start).collect();
            Self { ids: self.ids.clone().narrow(1, start, end - start), new_lens, vocab_size: self.vocab_size }
        };
        starts.iter().enumerate().map(part).collect()
    }

    /// Whether all rows are equally long.
    pub fn is_uniform(&self) -> bool {
        self.new_lens.iter().all(|len| *len == self.new_lens[0])
    }
}
