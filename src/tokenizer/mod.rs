//! [`Tokenizer`]: text to token ids and back, over the `tokenizers` crate.

mod patterns;
mod stream;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tokenizers::ModelWrapper;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::guard::guarded;
use crate::{Error, Result};

pub use stream::TextStream;

/// A tokenizer, usually GPT-2's byte-level BPE. A clone shares it.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// Text is split with a pattern that may look around, for which it must not have very long runs.
    looks_around: bool,
    /// Bytes stand for what has no token.
    has_byte_fallback: bool,
}

/// GPT-2's only special token.
const END_OF_TEXT: &str = "<|endoftext|>";

impl Tokenizer {
    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if they are none.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        run("tokenizer.json", || {
            let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
            // They were for training somebody's batches: a prompt is neither cut nor filled up, and has one encoding.
            inner.with_truncation(None)?.with_padding(None);
            if let ModelWrapper::BPE(bpe) = inner.get_model()
                && bpe.dropout.is_some()
            {
                let mut bpe = bpe.clone();
                bpe.dropout = None;
                inner.with_model(bpe);
            }
            Self::new(inner)
        })
    }

    /// GPT-2's byte-level BPE with the contents of its `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if the vocabulary is no JSON object of ids, or a merge has no entry in it.
    pub fn from_vocab_and_merges(vocab: &str, merges: &str) -> Result<Self> {
        run("vocab.json and merges.txt", || {
            let vocab: Vocab = serde_json::from_str(vocab)?;
            let merges = parse_merges(merges, &vocab)?;
            let has_end = vocab.contains_key(END_OF_TEXT);
            let mut inner = tokenizers::Tokenizer::new(BPE::builder().vocab_and_merges(vocab, merges).build()?);
            inner.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
            inner.with_decoder(Some(ByteLevelDecoder::default()));
            if has_end {
                inner.add_special_tokens([tokenizers::AddedToken::from(END_OF_TEXT, true)])?;
            }
            Self::new(inner)
        })
    }

    fn new(mut inner: tokenizers::Tokenizer) -> tokenizers::Result<Self> {
        let looks_around = patterns::without_look_ahead(&mut inner)?;
        let has_byte_fallback = serde_json::to_string(&inner.get_decoder())?.contains("\"ByteFallback\"");
        Ok(Self { inner: Arc::new(inner), looks_around, has_byte_fallback })
    }

    /// The tokenizer in a folder: its `tokenizer.json`, else its `vocab.json` with `merges.txt`; none if it has
    /// neither.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] or [`Error::Tokenizer`] if the files are there and unusable.
    #[cfg(feature = "files")]
    pub fn find(folder: impl AsRef<std::path::Path>) -> Result<Option<Self>> {
        let [json, vocab, merges] =
            ["tokenizer.json", "vocab.json", "merges.txt"].map(|file| folder.as_ref().join(file));
        let read =
            |path: &std::path::Path| std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source });
        if json.is_file() {
            return Self::from_bytes(&read(&json)?).map(Some);
        }
        if vocab.is_file() && merges.is_file() {
            let text = |path: &std::path::Path| {
                String::from_utf8(read(path)?).map_err(|error| failure(&path.display().to_string(), &error))
            };
            return Self::from_vocab_and_merges(&text(&vocab)?, &text(&merges)?).map(Some);
        }
        Ok(None)
    }

    /// The tokenizer at a path: a `tokenizer.json`, or a folder as for [`find`](Self::find).
    ///
    /// # Errors
    ///
    /// [`Error::Io`] or [`Error::Tokenizer`] if there is none or it is unusable.
    #[cfg(feature = "files")]
    pub fn open(path: impl AsRef<std::path::Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            let none =
                || failure(&path.display().to_string(), &"neither tokenizer.json nor vocab.json with merges.txt");
            return Self::find(path)?.ok_or_else(none);
        }
        Self::from_bytes(&std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?)
    }

    /// Number of ids, special tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The ids of a text.
    ///
    /// They are Hugging Face's, however long a run of white space is, if text is split with GPT-2's pattern. Another pattern
    /// that looks around, from a tokenizer.json, would silently stop splitting behind a very long one: there the limit is
    /// 250,000 characters.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if the tokenizer refuses it, or such a run is longer.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        run("encoding", || {
            if self.looks_around {
                patterns::check(text)?;
            }
            Ok(self.inner.encode_fast(text, false)?.get_ids().to_vec())
        })
    }

    /// The text of ids, special tokens left out. Bytes that are no UTF-8 become U+FFFD; ids that the tokenizer does
    /// not know (a padded vocabulary has such) become nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if the tokenizer refuses them.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        run("decoding", || self.inner.decode(ids, true))
    }

    /// Decodes ids as they come.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// The token of an id that a decoder is given; none for an unknown or a special one.
    fn seen_by_decoder(&self, id: u32) -> Option<String> {
        let token = self.inner.id_to_token(id)?;
        (!self.inner.get_added_vocabulary().is_special_token(&token)).then_some(token)
    }
}

/// The pairs of a `merges.txt`, of which both tokens and what they make are entries of the vocabulary.
fn parse_merges(text: &str, vocab: &Vocab) -> tokenizers::Result<Merges> {
    let mut merges = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.starts_with("#version") && !line.is_empty())
    {
        let (left, right) = line.split_once(' ').ok_or_else(|| format!("merge `{line}` is not a pair"))?;
        // `tokenizers` panics where the last of them is longer than every entry.
        for token in [left, right, &format!("{left}{right}")] {
            if !vocab.contains_key(token) {
                return Err(
                    format!("line {} merges `{line}`, and `{token}` is not in the vocabulary", number + 1).into()
                );
            }
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}

/// Runs a part of `tokenizers`, which panics on some damaged files, and on some of what files tell its parts to do.
fn run<T>(what: &str, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match guarded(work) {
        Some(result) => result.map_err(|error| failure(what, &error)),
        None => Err(failure(what, &"the tokenizer's own components failed")),
    }
}

fn failure(origin: &str, error: &dyn ToString) -> Error {
    Error::Tokenizer { origin: origin.to_owned(), reason: error.to_string() }
}
