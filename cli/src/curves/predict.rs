//! What `gpt2_burn::cost` says of a point.

use gpt2_burn::burn::tensor::DType;
use gpt2_burn::cost::{Cost, Counted, Hardware, Pass, Precision, SpeculationCost};
use gpt2_burn::generate::Generator;
use gpt2_burn::speculative::{Draft, DraftLen, SpeculationReport};
use gpt2_burn::{Gpt2, Gpt2Config};

use super::options::{DecoderName, Lengths};
use crate::args::Failure;

/// Seconds and bytes of a point, on paper.
#[derive(Clone, Copy, Debug)]
pub struct Predicted {
    /// From the prompt to the last token, one term after the other.
    pub total: f64,
    /// Per token after the first.
    pub per_token: f64,
    /// The least total: everything at the machine's rates, reading and computing at the same time.
    pub roofline: f64,
    /// Weights, keys and values, activations.
    pub memory: f64,
}

/// What no arithmetic can say of drafts: how often they were right. By default there were none.
#[derive(Clone, Debug, Default)]
pub struct Drafting {
    /// The probability that a token stands if all before it in its draft do.
    pub acceptance: f64,
    /// How many rounds had drafts of 0, 1, 2... tokens.
    pub rounds_by_len: Vec<usize>,
}

impl Drafting {
    /// That of some runs; none if they made no drafts.
    pub fn of<'a>(reports: impl Iterator<Item = &'a SpeculationReport>) -> Option<Self> {
        let (mut accepted, mut verified, mut rounds_by_len) = (0, 0, Vec::new());
        for report in reports {
            accepted += report.accepted;
            verified += report.accepted + report.rejected;
            rounds_by_len.resize(report.rounds_by_len.len().max(rounds_by_len.len()), 0);
            rounds_by_len.iter_mut().zip(&report.rounds_by_len).for_each(|(sum, rounds)| *sum += rounds);
        }
        (verified > 0).then(|| Self { acceptance: accepted as f64 / verified as f64, rounds_by_len })
    }

    /// Mean length of a draft, rounds without one included.
    pub fn mean_len(&self) -> f64 {
        self.shares().map(|(len, share)| len as f64 * share).sum()
    }

    /// Before anything is measured.
    pub fn guess(draft_len: DraftLen) -> Self {
        let len = match draft_len {
            DraftLen::Fixed(len) => len.min(16),
            _ => 4,
        };
        Self { acceptance: 0.7, rounds_by_len: (0..=len).map(|of| usize::from(of == len)).collect() }
    }

    /// Lengths of drafts, and the share of the rounds that had them.
    fn shares(&self) -> impl Iterator<Item = (usize, f64)> {
        let rounds: usize = self.rounds_by_len.iter().sum();
        let plain = (rounds == 0).then_some((0, 1.0));
        let of_lens = self.rounds_by_len.iter().enumerate().filter(|(_, count)| **count > 0);
        of_lens.map(move |(len, count)| (len, *count as f64 / rounds as f64)).chain(plain)
    }
}

/// The costs of the model at hand, and of its draft.
pub struct Predictor {
    cost: Cost,
    /// None where proposing costs next to nothing.
    draft: Option<Cost>,
    /// Whether the draft has weights and a cache of its own.
    is_model: bool,
    batch: usize,
}

impl Predictor {
    pub fn new(generator: &Generator, draft: Option<&Draft>, batch: usize) -> Result<Self, Failure> {
        let (model, cache) = (generator.model(), generator.cache_dtype());
        let of_draft = match draft {
            Some(Draft::Model(draft)) => Some(cost(draft, draft.config(), cache)?),
            Some(Draft::EarlyExit { layers }) => {
                Some(cost(model, &Gpt2Config { n_layer: *layers, ..model.config().clone() }, cache)?)
            }
            _ => None,
        };
        let is_model = matches!(draft, Some(Draft::Model(_)));
        Ok(Self { cost: cost(model, model.config(), cache)?, draft: of_draft, is_model, batch })
    }

    /// Everything about a point; only of speculation it matters how drafting went.
    pub fn predict(
        &self,
        machine: &Hardware,
        decoder: DecoderName,
        lengths: Lengths,
        drafting: &Drafting,
    ) -> Result<Predicted, Failure> {
        let step = |cost: &Cost, pass: Pass| cost.seconds(machine, pass);
        let least = |cost: &Cost, pass: Pass| Ok::<_, gpt2_burn::Error>(machine.roofline(cost.work(pass)?).seconds());
        let (total, first) = self.sum(decoder, lengths, drafting, step)?;
        let (roofline, _) = self.sum(decoder, lengths, drafting, least)?;
        let tokens = lengths.tokens();
        let draft = self.draft.as_ref().filter(|_| self.is_model && decoder == DecoderName::Speculative);
        let [kv, kv_of_draft] =
            [Some(&self.cost), draft].map(|cost| cost.map_or(0.0, |cost| kv(cost, self.batch, tokens)));
        let (buffers, max_len) = match decoder {
            // The library's naive decoding keeps the keys and values of all layers until its forward ends.
            DecoderName::Naive => (0.0, tokens),
            // A preallocated cache is written once before it is used.
            DecoderName::Kv | DecoderName::Speculative => {
                ((kv + kv_of_draft) / machine.reached.results, lengths.prompt)
            }
        };
        let memory = self.cost.memory(Pass::prefill(self.batch, max_len))?;
        let weights_of_draft = draft.map_or(0.0, Cost::parameter_bytes);
        Ok(Predicted {
            total: total + buffers,
            per_token: (total - first) / (lengths.new - 1).max(1) as f64,
            roofline,
            memory: memory.parameters + weights_of_draft + kv + kv_of_draft + memory.activations,
        })
    }

    /// Of all steps, and of the first.
    fn sum(
        &self,
        decoder: DecoderName,
        lengths: Lengths,
        drafting: &Drafting,
        seconds: impl Fn(&Cost, Pass) -> gpt2_burn::Result<f64>,
    ) -> Result<(f64, f64), Failure> {
        let (batch, prompt) = (self.batch, lengths.prompt);
        let first = seconds(&self.cost, Pass::prefill(batch, prompt))?;
        let mut total = first;
        if let (DecoderName::Speculative, Some(draft), true, 2..) = (decoder, &self.draft, self.is_model, lengths.new) {
            // A draft model reads the prompt when it is first asked.
            total += seconds(draft, Pass::prefill(batch, prompt.min(draft.config().n_positions)))?;
        }
        for length in prompt + 1..prompt + lengths.new {
            total += match decoder {
                DecoderName::Naive => seconds(&self.cost, Pass::naive(batch, length))?,
                DecoderName::Kv => seconds(&self.cost, Pass::decode(batch, length))?,
                DecoderName::Speculative => self.token_of_round(length, drafting, &seconds)?,
            };
        }
        Ok((total, first))
    }

    /// A token's share of a round whose first new token is the `length`-th: m steps of the draft and a pass of the target over
    /// m + 1 tokens yield `(1 - a^(m+1)) / (1 - a)` tokens (Leviathan et al., 2023, equation 1), averaged over the rounds' m.
    fn token_of_round(
        &self,
        length: usize,
        drafting: &Drafting,
        seconds: impl Fn(&Cost, Pass) -> gpt2_burn::Result<f64>,
    ) -> Result<f64, Failure> {
        let pair = SpeculationCost::new(drafting.acceptance, 0.0)?;
        let step_of_draft = match &self.draft {
            Some(draft) => seconds(draft, Pass::decode(self.batch, length.min(draft.config().n_positions)))?,
            None => 0.0,
        };
        let room = self.cost.config().n_positions - length;
        let (mut of_rounds, mut tokens) = (0.0, 0.0);
        for (len, share) in drafting.shares() {
            let len = len.min(room);
            let verification = seconds(&self.cost, Pass::verify(self.batch, length - 1, len))?;
            of_rounds += share * (len as f64 * step_of_draft + verification);
            tokens += share * pair.expected_tokens(len);
        }
        Ok(of_rounds / tokens)
    }
}

/// Bytes of a cache for rows of `tokens` tokens, or of as many as the model has positions for.
fn kv(cost: &Cost, batch: usize, tokens: usize) -> f64 {
    cost.kv_bytes(batch, tokens.min(cost.config().n_positions))
}

fn cost(model: &Gpt2, config: &Gpt2Config, cache: DType) -> Result<Cost, Failure> {
    // What is read for a weight, whatever it is computed in.
    let weights = match model.bytes() as f64 / model.config().num_params() as f64 {
        bytes if bytes < 1.5 => DType::I8,
        bytes if bytes < 3.0 => DType::F16,
        _ => DType::F32,
    };
    let precision = Precision { weights, activations: model.dtype(), cache };
    let counted = match model.is_packed() {
        true => Counted::kernels(),
        // Burn's operations compute the last layer of all tokens.
        false => Counted::all(),
    };
    Ok(Cost::new(config, precision)?.counting(counted))
}
