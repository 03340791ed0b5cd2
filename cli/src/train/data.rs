//! Text to tokens to batches.

use std::path::Path;

use gpt2_burn::sampling::{Purpose, uniform};
use gpt2_burn::tokenizer::Tokenizer;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, decoders::byte_level::ByteLevel as ByteLevelDecoder};

use crate::args::Failure;

/// Bytes of a text before those that are held out: nine tenths, cut at a character.
pub fn training_part(text: &str) -> &str {
    &text[..text.floor_char_boundary(text.len() / 10 * 9)]
}

/// Trains a byte-level BPE, as GPT-2's, and writes it to `path`.
pub fn train_tokenizer(text: &str, vocab_size: usize, path: &Path) -> Result<(), Failure> {
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from("<|endoftext|>", true)])
        .build();
    let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
    tokenizer.with_decoder(Some(ByteLevelDecoder::default()));
    tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), text.lines().map(|line| format!("{line}\n")))?;
    tokenizer.save(path, true)?;
    Ok(())
}

/// A text as token ids, the last tenth of its bytes apart.
pub struct Dataset {
    training: Vec<u32>,
    validation: Vec<u32>,
    validation_bytes: usize,
    seed: u64,
}

/// Inputs and the ids that follow them.
pub struct Batch {
    pub inputs: Vec<Vec<u32>>,
    pub targets: Vec<Vec<u32>>,
}

impl Dataset {
    /// Tokens of `text`, for sequences of up to `max_len`.
    pub fn new(text: &str, tokenizer: &Tokenizer, max_len: usize, seed: u64) -> Result<Self, Failure> {
        let (training, validation) = text.split_at(training_part(text).len());
        let dataset = Self {
            training: tokenizer.encode(training)?,
            validation: tokenizer.encode(validation)?,
            validation_bytes: validation.len(),
            seed,
        };
        if dataset.training.len() <= max_len || dataset.validation.len() < 2 {
            let tokens = dataset.training.len();
            return Err(format!("the text has {tokens} tokens to train on, more than {max_len} are needed").into());
        }
        Ok(dataset)
    }

    /// The batch of a step, `size` sequences of `time` tokens: a pure function of the seed and the step.
    pub fn batch(&self, step: usize, size: usize, time: usize) -> Batch {
        let starts = self.training.len() - time;
        let start = |row: usize| {
            let at = uniform(self.seed, row as u64, step as u64, Purpose::Token);
            (at * starts as f64) as usize
        };
        let rows = |shift: usize| {
            let starts = (0..size).map(|row| start(row) + shift);
            starts.map(|start| self.training[start..start + time].to_vec()).collect()
        };
        Batch { inputs: rows(0), targets: rows(1) }
    }

    /// The part that is held out.
    pub fn validation_ids(&self) -> &[u32] {
        &self.validation
    }

    /// Its bytes.
    pub fn validation_bytes(&self) -> usize {
        self.validation_bytes
    }
}
