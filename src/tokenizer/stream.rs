//! [`TextStream`]: text as ids come.

use super::Tokenizer;
use crate::Result;

/// Ids before a new one that are decoded with it. Decoders look at the token before theirs, and whether there is one; a character
/// that is not complete has at most three bytes, so three tokens and the one before them show where it ends.
const CONTEXT: usize = 4;

/// Text that grows with each id and never breaks inside a character: all pieces together are what [`Tokenizer::decode`] makes of
/// all ids.
///
/// That holds for decoders whose text only grows, and which look no further back than a few tokens: those of byte-level BPE,
/// WordPiece, SentencePiece (there, bytes are held until something else follows, since all of them are invalid if one is) and
/// `null`. A tokenizer.json can ask for others, such as a replacement in the whole text.
#[derive(Clone, Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The newest ids, without those that a decoder never sees.
    ids: Vec<u32>,
    /// Bytes of their text that are out.
    out: usize,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), out: 0 }
    }

    /// The text that this id completes; empty while a character is unfinished.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        let Some(token) = self.tokenizer.seen_by_decoder(id) else { return Ok(String::new()) };
        self.ids.push(id);
        if self.tokenizer.has_byte_fallback && is_byte(&token) {
            return Ok(String::new());
        }
        let text = self.tokenizer.decode(&self.ids)?;
        // Bytes that do not make a character yet are decoded as one of these, at the end. What really is one waits too.
        let complete = text.strip_suffix(char::REPLACEMENT_CHARACTER).unwrap_or(&text).len();
        let piece = self.release(&text, complete);
        self.forget(&text)?;
        Ok(piece)
    }

    /// What is left when no more ids come.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        if self.ids.is_empty() {
            return Ok(String::new());
        }
        let text = self.tokenizer.decode(&self.ids)?;
        let piece = self.release(&text, text.len());
        self.ids.clear();
        self.out = 0;
        Ok(piece)
    }

    /// What is not out yet of the text up to `end`.
    fn release(&mut self, text: &str, end: usize) -> String {
        let piece = text.get(self.out..end).unwrap_or_default().to_owned();
        self.out = self.out.max(end);
        piece
    }

    /// Lets go of old ids, where the text of the newest ends in what is not out yet, as `text` does.
    fn forget(&mut self, text: &str) -> Result<()> {
        if self.ids.len() < 2 * CONTEXT {
            return Ok(());
        }
        let newest = self.ids.len() - CONTEXT;
        let decoded = self.tokenizer.decode(&self.ids[newest..])?;
        let waiting = text.get(self.out..);
        if let Some(before) = waiting.and_then(|waiting| decoded.strip_suffix(waiting)) {
            self.out = before.len();
            self.ids.drain(..newest);
        }
        Ok(())
    }
}

/// Whether a token stands for a byte: `<0xE2>`.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::{bytes_tokenizer, with_fields};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
        let mut stream = tokenizer.stream();
        let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        pieces.concat() + &stream.finish().unwrap()
    }

    #[test]
    fn a_character_is_not_split() {
        let tokenizer = bytes_tokenizer();
        let mut stream = tokenizer.stream();
        let ids = tokenizer.encode("a🦀é").unwrap();
        let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(pieces, ["a", "", "", "", "🦀", "", "é"]);
        assert_eq!(stream.push(ids[1]).unwrap() + &stream.finish().unwrap(), "\u{fffd}");
    }

    #[test]
    fn a_token_that_decodes_to_nothing_takes_no_space_with_it() {
        let tokenizer = with_fields(json!({"decoder": null})).unwrap();
        let ids = [0, 50_300, 1];
        assert_eq!(tokenizer.decode(&ids).unwrap(), "a b");
        assert_eq!(streamed(&tokenizer, &ids), "a b");
    }

    #[test]
    fn few_ids_are_decoded_again() {
        let tokenizer = bytes_tokenizer();
        let byte = tokenizer.encode("é").unwrap()[1];
        let mut stream = tokenizer.stream();
        // A continuation byte, which is a character nowhere; an id that nobody knows; a letter.
        let mut text = String::new();
        for id in [byte, 50_300, 65].repeat(1000).into_iter().chain([byte; 1000]).chain([50_300; 1000]) {
            text += &stream.push(id).unwrap();
            assert!(stream.ids.len() < 2 * CONTEXT, "{} ids", stream.ids.len());
        }
        text += &stream.finish().unwrap();
        assert_eq!(text.chars().filter(|&c| c == char::REPLACEMENT_CHARACTER).count(), 2000);
    }

    /// The vocabulary of [`decoders`]; the last token is special. `âĤ¬` are the bytes of a sign in byte-level BPE.
    const TOKENS: [&str; 19] = [
        "a",
        "b",
        "\u{2581}a",
        "\u{2581}",
        "##b",
        "a</w>",
        "<pad>",
        "|",
        ".",
        "n't",
        "<0xE2>",
        "<0x82>",
        "<0xAC>",
        "â",
        "Ĥ",
        "¬",
        "\u{fffd}",
        "Ġ",
        "<s>",
    ];

    /// A tokenizer with each kind of decoder.
    fn decoders() -> Vec<Tokenizer> {
        let vocab: serde_json::Map<String, Value> =
            TOKENS.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id.into())).collect();
        let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "vocab": vocab, "merges": []});
        let special = json!([{"id": TOKENS.len() - 1, "content": "<s>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}]);
        let metaspace = |scheme: &str| {
            json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme,
            "split": true})
        };
        let decoders = [
            Value::Null,
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}),
            metaspace("always"),
            metaspace("never"),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": false}),
            json!({"type": "BPEDecoder", "suffix": "</w>"}),
            json!({"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true}),
            json!({"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
        ];
        let tokenizer = |decoder| with_fields(json!({"model": model, "added_tokens": special, "decoder": decoder}));
        decoders.into_iter().map(|decoder| tokenizer(decoder).unwrap()).collect()
    }

    proptest! {
        #[test]
        fn streamed_pieces_are_the_whole(ids in proptest::collection::vec(0_u32..260, 0..60)) {
            let tokenizer = bytes_tokenizer();
            prop_assert_eq!(streamed(&tokenizer, &ids), tokenizer.decode(&ids).unwrap());
        }

        /// Two ids are unknown, one is special. A visible one is among them, since `BPEDecoder` fails without any.
        #[test]
        fn streamed_pieces_are_the_whole_with_every_decoder(
            ids in proptest::collection::vec(0..TOKENS.len() as u32 + 2, 0..40),
            few in proptest::collection::vec(prop::sample::select(vec![3, 6, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]), 0..40),
        ) {
            for tokenizer in decoders() {
                for ids in [&ids, &few] {
                    let ids = [&ids[..], &[0]].concat();
                    prop_assert_eq!(streamed(&tokenizer, &ids), tokenizer.decode(&ids).unwrap(), "{:?}", tokenizer);
                }
            }
        }
    }
}
