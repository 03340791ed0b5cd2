//! What `gpt2_burn::cost` says of a point.

use gpt2_burn::cost::{Cost, Counted, Hardware, Pass, Precision};
use gpt2_burn::generate::Generator;

use crate::common::Failure;
use crate::options::{DecoderName, Lengths};

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

/// The costs of the model at hand.
pub struct Predictor {
    cost: Cost,
    batch: usize,
}

impl Predictor {
    pub fn new(generator: &Generator, batch: usize) -> Result<Self, Failure> {
        let model = generator.model();
        // What is read for the weights, whatever they are computed in.
        let weights = match model.bytes() as f64 / model.config().num_params() as f64 {
            bytes if bytes < 1.5 => gpt2_burn::burn::tensor::DType::I8,
            bytes if bytes < 3.0 => gpt2_burn::burn::tensor::DType::F16,
            _ => gpt2_burn::burn::tensor::DType::F32,
        };
        let precision = Precision { weights, activations: model.dtype(), cache: generator.cache_dtype() };
        let counted = if model.is_prepared() { Counted::kernels() } else { Counted::all() };
        Ok(Self { cost: Cost::new(model.config(), precision)?.counting(counted), batch })
    }

    /// Everything about a point.
    pub fn predict(&self, machine: &Hardware, decoder: DecoderName, lengths: Lengths) -> Result<Predicted, Failure> {
        let step = |pass: Pass| self.cost.seconds(machine, pass);
        let least = |pass: Pass| Ok::<_, gpt2_burn::Error>(machine.roofline(self.cost.work(pass)?).seconds());
        let (total, first) = self.sum(decoder, lengths, step)?;
        let (roofline, _) = self.sum(decoder, lengths, least)?;
        // A preallocated cache is written once before it is used.
        let buffers = match decoder {
            DecoderName::Naive => 0.0,
            DecoderName::Kv => self.cost.kv_bytes(self.batch, lengths.tokens()) / machine.bandwidth,
        };
        let longest = match decoder {
            // The library's naive decoding keeps the keys and values of all layers until its forward ends.
            DecoderName::Naive => Pass::prefill(self.batch, lengths.tokens()),
            DecoderName::Kv => Pass::prefill(self.batch, lengths.prompt),
        };
        let memory = self.cost.memory(longest)?;
        let kv = self.cost.kv_bytes(self.batch, lengths.tokens());
        Ok(Predicted {
            total: total + buffers,
            per_token: (total - first) / (lengths.new - 1).max(1) as f64,
            roofline,
            memory: memory.parameters + kv + memory.activations,
        })
    }

    /// Roughly the seconds that a point takes, for a bar.
    pub fn estimate(&self, machine: &Hardware, decoder: DecoderName, lengths: Lengths) -> Result<f64, Failure> {
        Ok(self.predict(machine, decoder, lengths)?.total)
    }

    /// Of all steps, and of the first.
    fn sum(
        &self,
        decoder: DecoderName,
        lengths: Lengths,
        seconds: impl Fn(Pass) -> gpt2_burn::Result<f64>,
    ) -> Result<(f64, f64), Failure> {
        let (batch, prompt) = (self.batch, lengths.prompt);
        let first = seconds(Pass::prefill(batch, prompt))?;
        let later = (prompt + 1..prompt + lengths.new).map(|length| match decoder {
            DecoderName::Naive => seconds(Pass::naive(batch, length)),
            DecoderName::Kv => seconds(Pass::decode(batch, length)),
        });
        Ok((first + later.sum::<gpt2_burn::Result<f64>>()?, first))
    }
}
