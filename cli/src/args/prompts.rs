//! Prompts from the command line, from files, and from standard input.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use gpt2_burn::generate::Prompt;
use serde::Deserialize;

use super::Failure;

/// Where texts begin.
#[derive(Args, Clone, Debug)]
pub struct PromptArgs {
    /// Texts to continue; none: standard input if it is piped, else a line break
    #[arg(value_name = "PROMPT")]
    prompts: Vec<String>,
    /// A prompt as token ids, instead of text; can be repeated
    #[arg(long, value_name = "1,2,3")]
    prompt_ids: Vec<Ids>,
    /// A file with a prompt; `.jsonl`: a prompt in the field `prompt` of each line; can be repeated
    #[arg(long, value_name = "FILE")]
    prompt_file: Vec<PathBuf>,
    /// nanoGPT's spelling: a text, or FILE:path
    #[arg(long, hide = true, value_name = "TEXT|FILE:path")]
    start: Option<String>,
}

/// A list of token ids on the command line.
#[derive(Clone, Debug)]
pub struct Ids(pub Vec<u32>);

impl std::str::FromStr for Ids {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self(Vec::new()));
        }
        let id = |part: &str| part.trim().parse().map_err(|error| format!("`{part}`: {error}"));
        text.split(',').map(id).collect::<Result<_, _>>().map(Self)
    }
}

#[derive(Deserialize)]
struct Line {
    prompt: String,
}

impl PromptArgs {
    /// All prompts: texts first, then ids, then files.
    pub fn read(&self) -> Result<Vec<Prompt>, Failure> {
        let mut prompts: Vec<Prompt> = self.prompts.iter().map(|text| text.as_str().into()).collect();
        match self.start.as_deref().map(|start| (start, start.strip_prefix("FILE:"))) {
            Some((_, Some(path))) => prompts.push(read_text(Path::new(path))?.into()),
            Some((text, None)) => prompts.push(text.into()),
            None => {}
        }
        prompts.extend(self.prompt_ids.iter().map(|ids| Prompt::Ids(ids.0.clone())));
        for path in &self.prompt_file {
            let text = read_text(path)?;
            if path.extension().is_none_or(|extension| extension != "jsonl") {
                prompts.push(text.into());
                continue;
            }
            for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                let line: Line = serde_json::from_str(line)
                    .map_err(|error| format!("{}, line {}: {error}", path.display(), number + 1))?;
                prompts.push(line.prompt.into());
            }
        }
        let given = self.start.is_some()
            || [self.prompts.len(), self.prompt_ids.len(), self.prompt_file.len()].iter().any(|count| *count > 0);
        if !given {
            prompts.push(standard_input()?.into());
        }
        Ok(prompts)
    }
}

/// What is piped in; a line break if nothing is.
fn standard_input() -> Result<String, Failure> {
    let mut bytes = Vec::new();
    let mut input = std::io::stdin();
    if !input.is_terminal() {
        input.read_to_end(&mut bytes).map_err(|error| format!("standard input: {error}"))?;
    }
    if bytes.is_empty() {
        return Ok("\n".to_owned());
    }
    String::from_utf8(bytes).map_err(|error| format!("standard input is not UTF-8: {}", error.utf8_error()).into())
}

/// A text file.
pub fn read_text(path: &Path) -> Result<String, Failure> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    String::from_utf8(bytes).map_err(|error| format!("{} is not UTF-8: {}", path.display(), error.utf8_error()).into())
}
