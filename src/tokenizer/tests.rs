//! Tokenizers of several kinds, and their streams, against recorded texts.

use super::*;
use proptest::prelude::*;
use serde_json::json;

/// All 256 bytes, two merges and the special token.
pub(super) fn bytes_tokenizer() -> Tokenizer {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut vocab: Vec<String> = alphabet.iter().map(char::to_string).collect();
    vocab.extend(["he".to_owned(), END_OF_TEXT.to_owned(), "ĊĊ".to_owned()]);
    let vocab: serde_json::Map<_, _> = vocab.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
    let vocab = serde_json::Value::from(vocab).to_string();
    Tokenizer::from_vocab_and_merges(&vocab, "#version: 0.2\nh e\nĊ Ċ\n").unwrap()
}

#[test]
fn merges_and_the_special_token_are_used() {
    let tokenizer = bytes_tokenizer();
    assert_eq!(tokenizer.vocab_size(), 259);
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
fn unusable_files_are_errors() {
    for (vocab, merges) in [("", ""), ("[]", ""), (r#"{"a": -1}"#, ""), (r#"{"a": 0}"#, "a"), (r#"{"a": 0}"#, "a b")] {
        let result = Tokenizer::from_vocab_and_merges(vocab, merges);
        assert!(matches!(result, Err(Error::Tokenizer { .. })), "{vocab} {merges}");
    }
    assert!(matches!(Tokenizer::from_bytes(b"{}"), Err(Error::Tokenizer { .. })));
}

/// `tokenizers` panics where what a merge makes is longer than every entry.
#[test]
fn a_merge_that_makes_no_entry_is_an_error() {
    let (vocab, merges) = (r#"{"a": 0, "b": 1}"#, "#version: 0.2\na b\n");
    let error = Tokenizer::from_vocab_and_merges(vocab, merges).unwrap_err().to_string();
    assert!(error.contains("line 2 merges `a b`, and `ab` is not in the vocabulary"), "{error}");
    let shorter = Tokenizer::from_vocab_and_merges(r#"{"a": 0, "b": 1, "abc": 2}"#, "a b");
    assert!(matches!(shorter, Err(Error::Tokenizer { .. })));
}

#[cfg(feature = "files")]
#[test]
fn a_merge_in_a_folder_that_makes_no_entry_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("vocab.json"), r#"{"a":0,"b":1}"#).unwrap();
    std::fs::write(folder.path().join("merges.txt"), "a b").unwrap();
    assert!(matches!(Tokenizer::find(folder.path()), Err(Error::Tokenizer { .. })));
    assert!(matches!(Tokenizer::open(folder.path()), Err(Error::Tokenizer { .. })));
}

/// With GPT-2's vocabulary and 1,000,001 blanks, Hugging Face's `tokenizers` 0.23.3, which has Oniguruma, ends in 198, 198, 1169,
/// as it does with 20 of them. Without a look-ahead that works, the line breaks are one piece and merge: 628, 1169.
#[test]
fn a_million_blanks_do_not_switch_splitting_off() {
    let tokenizer = bytes_tokenizer();
    let tail = |blanks: usize| {
        let ids = tokenizer.encode(&(" ".repeat(blanks) + "\n\nthe \n\n")).unwrap();
        assert_eq!(ids.len(), blanks + 6);
        ids[blanks - 3..].to_vec()
    };
    let short = tail(20);
    assert_eq!(short[6..], [256, short[2], 258], "he, a blank, two line breaks at the end");
    assert_eq!(tail(1_000_001), short);
    let mut ids = tokenizer.encode(&("\n".repeat(2_000_000) + "<|endoftext|>the")).unwrap();
    assert_eq!(ids.split_off(1_000_000).len(), 3);
    assert_eq!(ids, [258].repeat(1_000_000));
}

#[test]
fn a_pattern_that_looks_around_is_given_no_million_blanks() {
    let split = json!({"type": "Split", "pattern": {"Regex": r"\s+(?!\S)|\s+|\S+"}, "behavior": "Isolated",
        "invert": false});
    let level =
        |prefix| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true});
    let blanks = " ".repeat(1_000_001) + "ab";
    for (part, is_exact) in [(split, false), (level(true), false), (level(false), true)] {
        let nested = json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true},
            part]});
        for part in [part, nested] {
            let tokenizer = with_fields(json!({"pre_tokenizer": part})).unwrap();
            assert!(tokenizer.encode(&blanks[1_000_000..]).is_ok());
            match tokenizer.encode(&blanks) {
                Ok(ids) => assert!(is_exact && ids == [2], "{part}"),
                Err(Error::Tokenizer { reason, .. }) => {
                    assert!(!is_exact && reason.contains("1000001") && reason.contains("250000"), "{part}: {reason}");
                }
                Err(other) => panic!("{part}: {other}"),
            }
        }
    }
}

/// A `tokenizer.json` over two tokens, with these fields besides.
pub(super) fn with_fields(fields: serde_json::Value) -> Result<Tokenizer> {
    let mut file = json!({
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
    let truncation = json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0});
    let padding = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "a"});
    let plain = with_fields(json!({})).unwrap();
    assert_eq!(plain.encode("abba").unwrap(), [2, 1, 0]);
    let mut model = json!({"type": "BPE", "dropout": 0.99, "unk_token": null,
        "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
        "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]});
    model["ignore_merges"] = false.into();
    let fields = json!({"truncation": truncation, "padding": padding, "model": model});
    let tokenizer = with_fields(fields).unwrap();
    for _ in 0..20 {
        assert_eq!(tokenizer.encode("abba").unwrap(), [2, 1, 0]);
    }
}

#[test]
fn a_component_that_panics_is_an_error() {
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        {"type": "Strip", "content": "a", "start": 1, "stop": 1}]});
    let tokenizer = with_fields(json!({"decoder": decoder})).unwrap();
    assert!(matches!(tokenizer.decode(&[0]), Err(Error::Tokenizer { .. })));
    let unknown = json!({"decoder": {"type": 3}, "pre_tokenizer": {"type": "FixedLength", "length": 0}});
    assert!(with_fields(unknown).is_err());
}

proptest! {
    #[test]
    fn text_survives(text in "\\PC*|[\\s\\S]{0,40}") {
        let tokenizer = bytes_tokenizer();
        prop_assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap()).unwrap(), text);
    }
}
