//! [`TokenBatch`]: checked token ids on a device.

use burn::tensor::{Int, Tensor, TensorData};

use super::Gpt2;
use crate::{Error, Result};

/// The new tokens of a batch, rows of unequal length, checked once against the vocabulary.
#[derive(Clone, Debug)]
pub struct TokenBatch {
    /// `[batch, T_max]`; what stands behind the end of a shorter row is never read.
    ids: Tensor<2, Int>,
    new_lens: Vec<usize>,
}

impl TokenBatch {
    /// Puts rows of ids on the model's device.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyBatch`], [`Error::EmptyPrompt`] or [`Error::TokenOutOfRange`].
    pub fn new<R: AsRef<[u32]>>(rows: &[R], model: &Gpt2) -> Result<Self> {
        let vocab_size = model.config().vocab_size;
        let new_lens: Vec<usize> = rows.iter().map(|row| row.as_ref().len()).collect();
        let time = new_lens.iter().copied().max().ok_or(Error::EmptyBatch)?;
        if let Some(index) = new_lens.iter().position(|&len| len == 0) {
            return Err(Error::EmptyPrompt { index });
        }

        let mut padded = vec![0_i32; rows.len() * time];
        for (row, (ids, padded)) in rows.iter().zip(padded.chunks_exact_mut(time)).enumerate() {
            for (position, (&id, slot)) in ids.as_ref().iter().zip(padded).enumerate() {
                // A valid vocabulary fits an i32: see `Gpt2Config::validate`.
                *slot = i32::try_from(id)
                    .ok()
                    .filter(|_| (id as usize) < vocab_size)
                    .ok_or(Error::TokenOutOfRange { id, row, position, vocab_size })?;
            }
        }
        let data = TensorData::new(padded, [rows.len(), time]);
        Ok(Self { ids: Tensor::from_data(data, &model.device()), new_lens })
    }

    /// The ids, `[batch, T_max]`.
    pub fn ids(&self) -> &Tensor<2, Int> {
        &self.ids
    }

    /// New tokens of each row.
    pub fn new_lens(&self) -> &[usize] {
        &self.new_lens
    }

    /// Whether all rows are equally long.
    pub fn is_uniform(&self) -> bool {
        self.new_lens.iter().all(|len| *len == self.new_lens[0])
    }
}
