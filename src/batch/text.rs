//! [`TextTail`]: the end of a text that is being made, watched for stop texts.

use crate::Result;
use crate::tokenizer::TextStream;

/// Text of one row: decoded as tokens come, and let go as soon as no stop text can begin in it.
pub struct TextTail<'a> {
    stream: TextStream<'a>,
    stops: Vec<String>,
    /// Decoded, but perhaps the beginning of a stop text.
    held: String,
}

impl<'a> TextTail<'a> {
    pub fn new(stream: TextStream<'a>, stops: Vec<String>) -> Self {
        Self { stream, stops, held: String::new() }
    }

    /// Takes a token; returns the text that is certain now, and whether a stop text has occurred behind it.
    pub fn push(&mut self, id: u32) -> Result<(String, bool)> {
        self.held += &self.stream.push(id)?;
        Ok(self.release())
    }

    /// The rest of the text, up to a stop text if one is in it, and whether that is so.
    pub fn finish(&mut self) -> Result<(String, bool)> {
        self.held += &self.stream.finish()?;
        let (mut text, stopped) = self.release();
        if !stopped {
            text += &std::mem::take(&mut self.held);
        }
        Ok((text, stopped))
    }

    fn release(&mut self) -> (String, bool) {
        if let Some(start) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            let text = self.held[..start].to_owned();
            self.held.clear();
            return (text, true);
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

/// Bytes of the longest end of `text` that `stop` begins with.
fn overlap(text: &str, stop: &str) -> usize {
    let starts = text.char_indices().map(|(start, _)| start);
    starts.map(|start| &text[start..]).find(|end| stop.starts_with(end)).map_or(0, str::len)
}

#[cfg(test)]
mod tests {
    use super::overlap;

    #[test]
    fn what_may_begin_a_stop_text_is_held() {
        assert_eq!(overlap("hello\n", "\n\n"), 1);
        assert_eq!(overlap("ababa", "abac"), 3);
        assert_eq!(overlap("hello", "x"), 0);
        assert_eq!(overlap("né", "éa"), 2);
        assert_eq!(overlap("", "a"), 0);
    }
}
