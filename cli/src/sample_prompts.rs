//! Prompts to measure with.

use gpt2_burn::sampling::{Purpose, uniform};
use gpt2_burn::tokenizer::Tokenizer;

use crate::args::Failure;

/// Prompts of `length` tokens each, from text that the embedded models have not seen, evenly spread over it.
pub fn held_out(tokenizer: &Tokenizer, batch: usize, length: usize) -> Result<Vec<Vec<u32>>, Failure> {
    let ids = tokenizer.encode(gpt2_burn_pair::HELD_OUT)?;
    let Some(last) = ids.len().checked_sub(length) else {
        return Err(format!("the held-out text has {} tokens, a prompt is to have {length}", ids.len()).into());
    };
    Ok((0..batch).map(|row| row * last / batch).map(|start| ids[start..start + length].to_vec()).collect())
}

/// Prompts of random ids, a pure function of the seed.
pub fn random(vocab_size: usize, batch: usize, length: usize, seed: u64) -> Vec<Vec<u32>> {
    let id = |row: usize, position: usize| {
        (uniform(seed, row as u64, position as u64, Purpose::Token) * vocab_size as f64) as u32
    };
    (0..batch).map(|row| (0..length).map(|position| id(row, position)).collect()).collect()
}
