//! Flags, and what they make of a preset.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;
use clap::builder::RangedU64ValueParser;
use gpt2_burn::generate::Decoder;
use gpt2_burn::{CacheStorage, Gpt2Config};

use crate::args::draft::DraftArgs;
use crate::args::model::{CacheType, ModelArgs};
use crate::args::shape::{ShapeArgs, published};
use crate::args::{Failure, Given, at_least_one};

/// Curves of time and memory against the length of the prompt and of the output, with what the arithmetic predicts.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// How much is measured: `small` takes the embedded model and a minute or two, `medium` and `full` the shape of gpt2,
    /// if no other model is asked for, and about 2 and 10 minutes
    #[arg(long, value_enum, default_value = "small")]
    pub preset: Preset,
    /// What is compared; default: naive and kv, and speculative too for the embedded model, which has a draft, or if a draft is
    /// named
    #[arg(long, value_enum, value_delimiter = ',')]
    pub decoders: Vec<DecoderName>,
    #[command(flatten)]
    pub draft: DraftArgs,
    /// Tokens of the prompt, along its curves
    #[arg(long, value_name = "N,N,..", value_delimiter = ',', value_parser = at_least_one())]
    pub prompt_lengths: Vec<usize>,
    /// New tokens, along their curves
    #[arg(long, value_name = "N,N,..", value_delimiter = ',', value_parser = at_least_one())]
    pub output_lengths: Vec<usize>,
    /// New tokens on the curves of the prompt's length
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub output_length: Option<usize>,
    /// Tokens of the prompt on the curves of the output's length
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub prompt_length: Option<usize>,
    /// Rows
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = at_least_one())]
    pub batch_size: usize,
    /// Element type of cached keys and values; default: that of what is computed
    #[arg(long, value_enum)]
    pub cache_dtype: Option<CacheType>,
    /// Rounds through all points, of which the medians are reported
    #[arg(long, value_name = "N", value_parser = at_least_one())]
    pub num_samples: Option<usize>,
    /// Most steps of naive decoding that are timed at a point: of more, some are, evenly spread, and the rest interpolated
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(2..))]
    pub naive_steps: Option<usize>,
    /// Seed of random weights and random prompts
    #[arg(long, default_value_t = 1337)]
    pub seed: u64,
    /// The folder that the files go to
    #[arg(long, default_value = "runs/curves", value_name = "DIR")]
    pub out: PathBuf,
    /// Print the points as JSON instead of text
    #[arg(long)]
    pub json: bool,
    /// Only print what each point of one curve takes in memory: the program runs itself with this
    #[arg(long, hide = true, value_name = "DECODER,AXIS,DEVICE")]
    pub memory_of: Option<MemoryOf>,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    Small,
    Medium,
    Full,
}

impl Preset {
    /// The shape that it takes random weights of; none: the embedded model.
    fn config(self) -> Option<&'static str> {
        match self {
            Self::Small => None,
            Self::Medium | Self::Full => Some("gpt2"),
        }
    }
}

/// A curve's decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DecoderName {
    Naive,
    Kv,
    Speculative,
}

impl DecoderName {
    /// Its name on a chart.
    pub fn label(self) -> &'static str {
        match self {
            Self::Naive => "naive",
            Self::Kv => "KV cache",
            Self::Speculative => "speculative",
        }
    }

    pub fn decoder(self, draft: &DraftArgs) -> Decoder {
        match self {
            Self::Naive => Decoder::Naive,
            Self::Kv => Decoder::Kv(CacheStorage::Preallocated),
            Self::Speculative => draft.decoder(CacheStorage::Preallocated),
        }
    }
}

/// What grows along a curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    Prompt,
    Output,
}

impl Axis {
    pub const ALL: [Self; 2] = [Self::Prompt, Self::Output];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prompt => "prompt",
            Self::Output => "output",
        }
    }
}

/// A decoder along an axis.
#[derive(Clone, Copy, Debug)]
pub struct Curve {
    pub decoder: DecoderName,
    pub axis: Axis,
}

impl fmt::Display for Curve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.decoder.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
        write!(f, "{name},{}", self.axis.name())
    }
}

/// A curve on a device.
#[derive(Clone, Debug)]
pub struct MemoryOf {
    pub curve: Curve,
    pub device: String,
}

impl FromStr for MemoryOf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not DECODER,AXIS,DEVICE");
        let parts: Vec<&str> = text.split(',').collect();
        let [decoder, axis, device] = parts[..] else { return Err(wrong()) };
        let axis = Axis::ALL.into_iter().find(|known| known.name() == axis).ok_or_else(wrong)?;
        Ok(Self { curve: Curve { decoder: DecoderName::from_str(decoder, false)?, axis }, device: device.to_owned() })
    }
}

/// Lengths of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    pub prompt: usize,
    pub new: usize,
}

impl Lengths {
    /// Tokens that go through the model: the last one is never fed back.
    pub fn tokens(self) -> usize {
        self.prompt.saturating_add(self.new - 1)
    }

    pub fn along(self, axis: Axis) -> usize {
        match axis {
            Axis::Prompt => self.prompt,
            Axis::Output => self.new,
        }
    }
}

/// All points, and how often each is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Points whose prompt grows, and points whose output does.
    pub points: [Vec<Lengths>; 2],
    pub rounds: usize,
    pub naive_steps: usize,
    /// Shape of random weights.
    pub config: Option<Gpt2Config>,
    pub decoders: Vec<DecoderName>,
    /// With its default for that model.
    pub draft: DraftArgs,
}

impl Plan {
    /// Fails for flags that would be ignored.
    pub fn new(args: &Args, given: &Given) -> Result<Self, Failure> {
        args.model.check(given)?;
        let (prompts, outputs, prompt, new, rounds, naive_steps): (&[usize], &[usize], _, _, _, _) = match args.preset {
            Preset::Small => (&[16, 64, 128, 192, 256, 320, 384, 448], &[8, 64, 128, 192, 256, 384], 64, 32, 3, 64),
            Preset::Medium => (&[64, 128, 256, 512], &[8, 64, 128, 256], 64, 24, 3, 4),
            Preset::Full => (
                &[64, 128, 256, 384, 512, 640, 768, 896, 960],
                &[16, 64, 128, 256, 384, 512, 640, 768, 896],
                64,
                32,
                3,
                5,
            ),
        };
        let or = |given: &[usize], preset: &[usize]| if given.is_empty() { preset.to_vec() } else { given.to_vec() };
        let (new, prompt) = (args.output_length.unwrap_or(new), args.prompt_length.unwrap_or(prompt));
        let mut prompts = or(&args.prompt_lengths, prompts);
        let mut outputs = or(&args.output_lengths, outputs);
        for lengths in [&mut prompts, &mut outputs] {
            lengths.sort_unstable();
            lengths.dedup();
        }
        let named = args.shape.config.as_deref().or_else(|| {
            let is_model_named = given.has("model") || given.has("init_from");
            args.preset.config().filter(|_| !is_model_named)
        });
        let config = named.map(published).transpose()?;
        let has_embedded_draft = config.is_none() && args.model.is_embedded();
        let mut draft = args.draft.clone();
        // No draft was trained for random weights.
        draft.draft.get_or_insert(if has_embedded_draft { "embedded" } else { "ngram" }.to_owned());
        let mut decoders = args.decoders.clone();
        if decoders.is_empty() {
            decoders = vec![DecoderName::Naive, DecoderName::Kv];
            if has_embedded_draft || args.draft.draft.is_some() {
                decoders.push(DecoderName::Speculative);
            }
        }
        let decoders = unique(decoders);
        if config.is_some() {
            given.refuse(&["tokenizer"], "has no effect on random weights: name a model too")?;
        }
        if !decoders.contains(&DecoderName::Speculative) {
            DraftArgs::refuse(given)?;
        }
        if !decoders.contains(&DecoderName::Naive) {
            given.refuse(&["naive_steps"], "has no effect: naive decoding is not compared")?;
        }
        if decoders == [DecoderName::Naive] {
            given.refuse(&["cache_dtype"], "has no effect: naive decoding has no cache")?;
        }
        Ok(Self {
            points: [
                prompts.into_iter().map(|prompt| Lengths { prompt, new }).collect(),
                outputs.into_iter().map(|new| Lengths { prompt, new }).collect(),
            ],
            rounds: args.num_samples.unwrap_or(rounds),
            naive_steps: args.naive_steps.unwrap_or(naive_steps),
            config,
            decoders,
            draft,
        })
    }

    /// The points along an axis.
    pub fn curve(&self, axis: Axis) -> &[Lengths] {
        match axis {
            Axis::Prompt => &self.points[0],
            Axis::Output => &self.points[1],
        }
    }

    /// Fails if a point is longer than the model's context, before anything is computed.
    pub fn check(&self, config: &Gpt2Config) -> Result<(), Failure> {
        let longest = self.points.iter().flatten().max_by_key(|lengths| lengths.tokens());
        match longest {
            Some(longest) if longest.tokens() > config.n_positions => Err(format!(
                "a prompt of {} tokens and {} new ones need {} positions, the model has {}: see --prompt-lengths, \
                 --output-lengths, --prompt-length and --output-length",
                longest.prompt,
                longest.new,
                longest.tokens(),
                config.n_positions
            )
            .into()),
            _ => Ok(()),
        }
    }
}

/// Each value where it occurs first.
pub fn unique<T: PartialEq>(values: impl IntoIterator<Item = T>) -> Vec<T> {
    values.into_iter().fold(Vec::new(), |mut seen, value| {
        if !seen.contains(&value) {
            seen.push(value);
        }
        seen
    })
}
