//! What has to be held in memory, and whether it fits.

use std::fmt;

use super::format::format_bytes;
use super::{Cost, Hardware, Pass};
use crate::Result;

/// Bytes that a pass needs at once.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Memory {
    /// All parameters, a tied head once.
    pub parameters: f64,
    /// Keys and values that are kept.
    pub kv: f64,
    /// Activations of the step that needs most.
    pub activations: f64,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.parameters + self.kv + self.activations
    }

    /// Whether it fits into `memory` bytes.
    pub fn fits(&self, memory: f64) -> Fit {
        Fit { needed: *self, memory }
    }
}

/// What is needed beside what there is; displayed, it says whether that is enough, with the numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Fit {
    /// What is needed.
    pub needed: Memory,
    /// Bytes that there are.
    pub memory: f64,
}

impl Fit {
    /// Whether it is enough.
    pub fn is_enough(&self) -> bool {
        self.needed.total() <= self.memory
    }
}

impl fmt::Display for Fit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Memory { parameters, kv, activations } = self.needed;
        let of = |bytes: f64, what: &str| (bytes > 0.0).then(|| format!("{} of {what}", format_bytes(bytes)));
        let parts = [of(parameters, "parameters"), of(kv, "keys and values"), of(activations, "activations")];
        let verb = if self.is_enough() { "fits" } else { "does not fit" };
        let (total, memory) = (format_bytes(self.needed.total()), format_bytes(self.memory));
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        write!(f, "{verb}: {} are {total}, of {memory}", parts.join(" + "))
    }
}

impl Cost {
    /// Bytes of all parameters, a tied head once.
    pub fn parameter_bytes(&self) -> f64 {
        self.shape.num_params() as f64 * self.element_bytes.weights as f64
    }

    /// Bytes of the keys and values of one layer, for `batch` rows of `length` tokens: 2 B N d elements.
    pub fn kv_bytes_per_layer(&self, batch: usize, length: usize) -> f64 {
        2.0 * batch as f64 * length as f64 * self.shape.n_embd as f64 * self.element_bytes.cache as f64
    }

    /// The same of all layers.
    pub fn kv_bytes(&self, batch: usize, length: usize) -> f64 {
        self.shape.n_layer as f64 * self.kv_bytes_per_layer(batch, length)
    }

    /// What a pass holds in memory.
    ///
    /// Activations are those of the step that holds most: the residual stream and the norm's output, and beside them either
    /// queries, keys and values with the attention's result, or the MLP's hidden layer, or the logits. Where they are passes of
    /// their own, [scores](super::Counted::scores) are held before and after the softmax, and
    /// [GELU](super::Counted::elementwise)'s operand beside its result.
    ///
    /// # Errors
    ///
    /// As [`terms`](Self::terms).
    pub fn memory(&self, pass: Pass) -> Result<Memory> {
        pass.check(&self.shape)?;
        let [d, inner, heads, vocab] =
            [self.shape.n_embd, self.shape.inner(), self.shape.n_head, self.shape.vocab_size].map(|size| size as f64);
        let [batch, new, keys, logits] = [pass.batch, pass.new, pass.keys(), pass.logits].map(|count| count as f64);
        let unfused = |yes: bool, elements: f64| if yes { elements } else { 0.0 };
        let counted = self.counted;
        let scores = unfused(counted.scores, 2.0 * batch * heads * new * keys);
        let gelu = unfused(counted.elementwise, batch * new * inner);
        let attention = batch * new * 4.0 * d + scores;
        let mlp = batch * new * inner + gelu;
        let stream = batch * new * 2.0 * d;
        let head = unfused(counted.head, batch * logits * vocab);
        let elements = stream + attention.max(mlp).max(head);
        Ok(Memory {
            parameters: self.parameter_bytes(),
            kv: if pass.cached { self.kv_bytes(pass.batch, pass.keys()) } else { 0.0 },
            activations: elements * self.element_bytes.activations as f64,
        })
    }

    /// Whether a pass fits the hardware's memory.
    ///
    /// # Errors
    ///
    /// As [`terms`](Self::terms).
    pub fn fits(&self, hardware: &Hardware, pass: Pass) -> Result<Fit> {
        Ok(self.memory(pass)?.fits(hardware.memory))
    }
}
