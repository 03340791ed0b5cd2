//! [`Tokenizer`]: text to token ids and back, over the `tokenizers` crate.

use tokenizers::ModelWrapper;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use crate::guard::guarded;
use crate::{Error, Result};

/// A tokenizer, usually GPT-2's byte-level BPE.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
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
        let mut inner = run("tokenizer.json", || tokenizers::Tokenizer::from_bytes(bytes))?;
        // They were for training somebody's batches: a prompt is neither cut nor filled up, and has one encoding.
        let without = inner.with_truncation(None).map_err(|error| failure("tokenizer.json", &error))?;
        without.with_padding(None);
        if let ModelWrapper::BPE(bpe) = inner.get_model()
            && bpe.dropout.is_some()
        {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            inner.with_model(bpe);
        }
        Ok(Self { inner })
    }

    /// GPT-2's byte-level BPE with the contents of its `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if the vocabulary is no JSON object of ids, or a merge has no entry in it.
    pub fn from_vocab_and_merges(vocab: &str, merges: &str) -> Result<Self> {
        let failed = |error: tokenizers::Error| failure("vocab.json and merges.txt", &error);
        let vocab: Vocab = serde_json::from_str(vocab).map_err(|error| failed(error.into()))?;
        let merges = merges
            .lines()
            .filter(|line| !line.starts_with("#version") && !line.is_empty())
            .map(|line| line.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned())))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| failed("a merge is not a pair".into()))?;
        let has_end = vocab.contains_key(END_OF_TEXT);
        let bpe = BPE::builder().vocab_and_merges(vocab, merges);
        let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(failed)?);
        inner.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(false)));
        inner.with_decoder(Some(ByteLevelDecoder::default()));
        if has_end {
            let special = tokenizers::AddedToken::from(END_OF_TEXT, true);
            inner.add_special_tokens([special]).map_err(failed)?;
        }
        Ok(Self { inner })
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
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if the tokenizer refuses it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = run("encoding", || self.inner.encode_fast(text, false))?;
        Ok(encoding.get_ids().to_vec())
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
        TextStream { tokenizer: self, ids: Vec::new(), out: 0 }
    }
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

/// Text that grows with each id and never breaks inside a character: all pieces together are what
/// [`Tokenizer::decode`] makes of all ids.
#[derive(Clone, Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The ids of the last piece, which some decoders need to see to put a space where it belongs, and then those whose
    /// text is not out yet, since it ends inside a character.
    ids: Vec<u32>,
    /// How many of the ids are out.
    out: usize,
}

impl TextStream<'_> {
    /// The text that this id completes; empty while a character is unfinished.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let piece = self.piece()?;
        // Bytes that do not make a character yet are decoded as this, at the end. What really is one, or never becomes
        // one, waits until a text ends otherwise.
        if piece.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.out);
        self.out = self.ids.len();
        Ok(piece)
    }

    /// What is left when no more ids come.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let piece = self.piece()?;
        self.ids.clear();
        self.out = 0;
        Ok(piece)
    }

    /// The text of the ids that are not out.
    fn piece(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.out])?;
        let mut text = self.tokenizer.decode(&self.ids)?;
        let common = before.bytes().zip(text.bytes()).take_while(|(left, right)| left == right).count();
        Ok(text.split_off(text.floor_char_boundary(common)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// All 256 bytes, one merge and the special token.
    fn bytes_tokenizer() -> Tokenizer {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let mut vocab: Vec<String> = alphabet.iter().map(char::to_string).collect();
        vocab.extend(["he".to_owned(), END_OF_TEXT.to_owned()]);
        let vocab: serde_json::Map<_, _> =
            vocab.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
        let vocab = serde_json::Value::from(vocab).to_string();
        Tokenizer::from_vocab_and_merges(&vocab, "#version: 0.2\nh e\n").unwrap()
    }

    #[test]
    fn merges_and_the_special_token_are_used() {
        let tokenizer = bytes_tokenizer();
        assert_eq!(tokenizer.vocab_size(), 258);
        let ids = tokenizer.encode("the<|endoftext|>").unwrap();
        assert_eq!(ids.len(), 3);
        assert_eq!(ids[1..], [256, 257]);
        assert_eq!(tokenizer.decode(&ids).unwrap(), "the");
    }

    #[test]
    fn ids_beyond_the_vocabulary_decode_to_nothing() {
        let tokenizer = bytes_tokenizer();
        let mut ids = tokenizer.encode("a").unwrap();
        ids.push(50_300);
        assert_eq!(tokenizer.decode(&ids).unwrap(), "a");
    }

    #[test]
    fn a_character_is_not_split() {
        let tokenizer = bytes_tokenizer();
        let mut stream = tokenizer.stream();
        let ids = tokenizer.encode("a🦀é").unwrap();
        let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(pieces, ["a", "", "", "", "🦀", "", "é"]);
    }

    #[test]
    fn unusable_files_are_errors() {
        for (vocab, merges) in
            [("", ""), ("[]", ""), (r#"{"a": -1}"#, ""), (r#"{"a": 0}"#, "a"), (r#"{"a": 0}"#, "a b")]
        {
            let result = Tokenizer::from_vocab_and_merges(vocab, merges);
            assert!(matches!(result, Err(Error::Tokenizer { .. })), "{vocab} {merges}");
        }
        assert!(matches!(Tokenizer::from_bytes(b"{}"), Err(Error::Tokenizer { .. })));
    }

    /// A `tokenizer.json` over two tokens, with these fields besides.
    fn with_fields(fields: serde_json::Value) -> Result<Tokenizer> {
        let mut file = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
        });
        for (name, value) in fields.as_object().unwrap() {
            file[name] = value.clone();
        }
        Tokenizer::from_bytes(file.to_string().as_bytes())
    }

    #[test]
    fn prompts_are_neither_cut_nor_filled_up_nor_random() {
        let truncation =
            serde_json::json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0});
        let padding = serde_json::json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "a"});
        let plain = with_fields(serde_json::json!({})).unwrap();
        assert_eq!(plain.encode("abba").unwrap(), [2, 1, 0]);
        let mut model = serde_json::json!({"type": "BPE", "dropout": 0.99, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]});
        model["ignore_merges"] = false.into();
        let fields = serde_json::json!({"truncation": truncation, "padding": padding, "model": model});
        let tokenizer = with_fields(fields).unwrap();
        for _ in 0..20 {
            assert_eq!(tokenizer.encode("abba").unwrap(), [2, 1, 0]);
        }
    }

    #[test]
    fn a_component_that_panics_is_an_error() {
        let decoder = serde_json::json!({"type": "Sequence", "decoders": [
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            {"type": "Strip", "content": "a", "start": 1, "stop": 1}]});
        let tokenizer = with_fields(serde_json::json!({"decoder": decoder})).unwrap();
        assert!(matches!(tokenizer.decode(&[0]), Err(Error::Tokenizer { .. })));
        let unknown =
            serde_json::json!({"decoder": {"type": 3}, "pre_tokenizer": {"type": "FixedLength", "length": 0}});
        assert!(with_fields(unknown).is_err());
    }

    proptest! {
        #[test]
        fn text_survives(text in "\\PC*|[\\s\\S]{0,40}") {
            let tokenizer = bytes_tokenizer();
            prop_assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap()).unwrap(), text);
        }

        #[test]
        fn streamed_pieces_are_the_whole(ids in proptest::collection::vec(0_u32..258, 0..60)) {
            let tokenizer = bytes_tokenizer();
            let mut stream = tokenizer.stream();
            let mut text = String::new();
            for id in &ids {
                text += &stream.push(*id).unwrap();
            }
            text += &stream.finish().unwrap();
            prop_assert_eq!(text, tokenizer.decode(&ids).unwrap());
        }
    }
}
