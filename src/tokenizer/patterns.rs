//! Where a text is cut before BPE, without a pattern that looks around where that can be helped.
//!
//! `tokenizers` in pure Rust matches look-around with a stack of a million branches, and when it is full, the rest of the text
//! is one piece: no error, and other ids than with Oniguruma, which Hugging Face's own build has.

use tokenizers::SplitDelimiterBehavior::Isolated;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{Error, Result, Tokenizer};

/// White space in a row that a pattern that looks around is given: a quarter of its stack's branches, since it may take several
/// a character.
pub(super) const MAX_WHITE_SPACE: usize = 250_000;

/// A run of white space without its last character, if a word follows, is a piece of its own: what GPT-2's `\s+(?!\S)` says.
/// These are the pieces between those that match here.
const WORDS: &str = r"\s?\S+";

/// GPT-2's pattern without its look-ahead, for those pieces.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";

/// Replaces GPT-2's pattern by two that look nowhere and give the same pieces. Returns whether a pattern that may look around is
/// left in the tokenizer.
pub(super) fn without_look_ahead(inner: &mut Tokenizer) -> Result<bool> {
    let mut looks_around = false;
    if let Some(part) = inner.get_pre_tokenizer().cloned() {
        inner.with_pre_tokenizer(Some(replace(part, &mut looks_around)?));
    }
    // The pattern of a normalizer is private: as the file spells it.
    let normalizer = serde_json::to_string(&inner.get_normalizer())?;
    Ok(looks_around || normalizer.contains("\"Regex\"") && may_look_around(&normalizer))
}

fn replace(part: PreTokenizerWrapper, looks_around: &mut bool) -> Result<PreTokenizerWrapper> {
    match part {
        PreTokenizerWrapper::ByteLevel(level) if level.use_regex && !level.add_prefix_space => gpt2(level),
        PreTokenizerWrapper::Sequence(parts) => {
            let parts = parts.into_iter().map(|part| replace(part, looks_around));
            Ok(Sequence::new(parts.collect::<Result<_>>()?).into())
        }
        part => {
            *looks_around |= match &part {
                PreTokenizerWrapper::ByteLevel(level) => level.use_regex,
                PreTokenizerWrapper::Split(Split { pattern: SplitPattern::Regex(regex), .. }) => may_look_around(regex),
                _ => false,
            };
            Ok(part)
        }
    }
}

/// All look-around is spelled with this, and some that looks nowhere too.
fn may_look_around(regex: &str) -> bool {
    regex.contains("(?")
}

fn gpt2(level: ByteLevel) -> Result<PreTokenizerWrapper> {
    let split = |regex: &str| Split::new(SplitPattern::Regex(regex.to_owned()), Isolated, false);
    Ok(Sequence::new(vec![split(WORDS)?.into(), split(GPT2)?.into(), level.use_regex(false).into()]).into())
}

/// Refuses a text that a pattern that looks around cannot be given.
pub(super) fn check(text: &str) -> Result<()> {
    if text.len() <= MAX_WHITE_SPACE {
        return Ok(());
    }
    let (mut max_run, mut run) = (0, 0);
    for character in text.chars() {
        run = if character.is_whitespace() { run + 1 } else { 0 };
        max_run = max_run.max(run);
    }
    if max_run <= MAX_WHITE_SPACE {
        return Ok(());
    }
    let reason = format!(
        "{max_run} white-space characters in a row: this tokenizer splits text with a pattern of its own that looks around, \
         which is reliable up to {MAX_WHITE_SPACE} of them"
    );
    Err(Error::from(reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    fn pieces(part: &impl PreTokenizer, text: &str) -> Vec<String> {
        let mut all = PreTokenizedString::from(text);
        part.pre_tokenize(&mut all).unwrap();
        let splits = all.get_splits(OffsetReferential::Normalized, OffsetType::Byte);
        splits.into_iter().map(|(piece, ..)| piece.to_owned()).collect()
    }

    proptest! {
        #[test]
        fn pieces_are_those_of_the_pattern_that_looks_ahead(
            text in "[ \n\t\u{b}\u{85}\u{a0}\u{2028}\u{3000}\u{200b}a'stredmvl1é!٣²中]{0,30}|[\\s\\S]{0,40}"
        ) {
            let level = ByteLevel::default().add_prefix_space(false);
            prop_assert_eq!(pieces(&gpt2(level).unwrap(), &text), pieces(&level, &text));
        }
    }

    #[test]
    fn runs_are_counted() {
        assert!(check(&"\u{a0}".repeat(MAX_WHITE_SPACE)).is_ok());
        assert!(check(&"a ".repeat(MAX_WHITE_SPACE)).is_ok());
        let error = check(&format!("a{}b", "\u{a0}".repeat(MAX_WHITE_SPACE + 1))).unwrap_err().to_string();
        assert!(error.contains("250001") && error.contains("250000"), "{error}");
    }
}
