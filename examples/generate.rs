//! Continues texts with a GPT-2, on the CPU: the library on a page.
//!
//!     cargo run --release --example generate -- "ROMEO:"
//!     cargo run --release --example generate -- --model path/to/folder "Once upon a time" "Hello"
//!     cargo run --release --features hub --example generate -- --model gpt2 "Hello, I'm a language model,"
//!
//! Seeds, drafts, other devices, files of prompts, JSON and all else that one can ask for: `gpt2 generate`, which
//! `cargo run --release -p gpt2-burn-cli -- generate --help` lists.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use gpt2_burn::generate::{GenerateRequest, Generator};
use gpt2_burn::sampling::Sampling;
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{Checkpoint, WeightFormat};
use gpt2_burn_pair::TARGET;

const HELP: &str = "\
Continues texts with a GPT-2.

Usage: generate [--model NAME|FOLDER] [PROMPT]...

  --model  a folder in Hugging Face's layout, or a name on the Hugging Face hub (gpt2, gpt2-xl, owner/name), which is downloaded
           with the feature `hub`; without it: the small model that is embedded in this program

The rest is in `gpt2 generate`: cargo run --release -p gpt2-burn-cli -- generate --help";

fn main() -> ExitCode {
    match Asked::read() {
        Ok(asked) if asked.help => println!("{HELP}"),
        Ok(asked) => match generate(&asked) {
            Ok(()) => {}
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::FAILURE;
            }
        },
        Err(error) => {
            eprintln!("error: {error}\n\n{HELP}");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn generate(asked: &Asked) -> Result<(), Box<dyn Error>> {
    // The weights go to the device as they are read, in the layout of its kernels.
    let device = gpt2_burn::device("flex")?;
    let (checkpoint, tokenizer) = match &asked.model {
        None => {
            (Checkpoint::from_bytes(TARGET.config, TARGET.weights)?, Some(Tokenizer::from_bytes(TARGET.tokenizer)?))
        }
        Some(name) => {
            let checkpoint = Checkpoint::find(name, |progress| eprintln!("{progress:?}"))?;
            let tokenizer = checkpoint.tokenizer()?;
            (checkpoint, tokenizer)
        }
    };
    let model = checkpoint.load_packed(&device, WeightFormat::F32)?;
    let generator = Generator::new(model).with_tokenizer(tokenizer);

    // All prompts are one batch; a prompt's text does not depend on what it is in a batch with.
    let mut request = GenerateRequest::new(asked.prompts.iter().map(String::as_str));
    request.sampling = Sampling { temperature: 0.8, top_k: Some(200), ..Sampling::default() };

    // An event is a token, as soon as it is there. The first text is shown as it grows, the others when all are done.
    let mut texts = asked.prompts.clone();
    let mut out = std::io::stdout().lock();
    write!(out, "{}", texts[0])?;
    for event in generator.generate(&request)? {
        let event = event?;
        match event.prompt_index {
            0 => write!(out, "{}", event.text)?,
            other => texts[other] += &event.text,
        }
        out.flush()?;
    }
    writeln!(out)?;
    for text in &texts[1..] {
        writeln!(out, "---------------\n{text}")?;
    }
    Ok(())
}

/// What the command line says.
#[derive(Default)]
struct Asked {
    help: bool,
    model: Option<String>,
    prompts: Vec<String>,
}

impl Asked {
    fn read() -> Result<Self, String> {
        let mut asked = Self::default();
        let mut words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
        while let Some(word) = words.next() {
            match word.as_str() {
                "--help" | "-h" => asked.help = true,
                "--model" => asked.model = Some(words.next().ok_or("--model needs a name or a folder")?),
                "--" => asked.prompts.extend(words.by_ref()),
                option if option.starts_with("--") => return Err(format!("there is no option {option} here")),
                _ => asked.prompts.push(word),
            }
        }
        if asked.prompts.is_empty() {
            asked.prompts.push("\n".to_owned());
        }
        Ok(asked)
    }
}
