//! [`ModelShape`]: how large a model is.

use crate::{Error, Result};

/// The sizes of a GPT-2, with the names of `config.json`.
///
/// ```
/// use gpt2_burn_core::ModelShape;
///
/// let xl = ModelShape { n_layer: 48, n_head: 25, n_embd: 1600, ..ModelShape::default() };
/// assert_eq!(xl.num_params(), 1_557_611_200);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Positions of the context: the most tokens that one sequence can hold.
    pub n_positions: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Transformer blocks.
    pub n_layer: usize,
    /// Attention heads of a block.
    pub n_head: usize,
    /// Hidden width of the MLP; none: 4 x `n_embd`.
    pub n_inner: Option<usize>,
    /// Whether the head is the token embedding.
    pub tie_word_embeddings: bool,
    /// Whether linear layers and norms have biases.
    pub bias: bool,
}

impl Default for ModelShape {
    /// The 124M model's.
    fn default() -> Self {
        Self {
            vocab_size: 50_257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            n_inner: None,
            tie_word_embeddings: true,
            bias: true,
        }
    }
}

impl ModelShape {
    /// Checks that a model of this shape exists and fits the address space.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] that names the first field that is zero, does not divide, or overflows.
    pub fn validate(&self) -> Result<()> {
        for (field, size) in [
            ("vocab_size", self.vocab_size),
            ("n_positions", self.n_positions),
            ("n_embd", self.n_embd),
            ("n_layer", self.n_layer),
            ("n_head", self.n_head),
            ("n_inner", self.inner()),
        ] {
            if size == 0 {
                return Err(Error::config(field, "must be at least 1"));
            }
            // Ids and positions travel as 32-bit integers on some devices.
            if size > i32::MAX as usize {
                return Err(Error::config(field, format!("{size} is more than {}", i32::MAX)));
            }
        }
        if !self.n_embd.is_multiple_of(self.n_head) {
            let reason = format!("n_embd {} is not a multiple of n_head {}", self.n_embd, self.n_head);
            return Err(Error::config("n_head", reason));
        }
        self.check_size()
    }

    /// Names the first size with which the weights alone would exceed the address space.
    fn check_size(&self) -> Result<()> {
        let bytes = |rows: usize, columns: usize, times: usize| {
            let elements = rows.checked_mul(columns)?.checked_mul(times)?;
            elements.checked_mul(size_of::<f32>()).filter(|&bytes| bytes <= isize::MAX as usize)
        };
        let heads = if self.tie_word_embeddings { 1 } else { 2 };
        let square = 4; // c_attn has three of [n_embd, n_embd], c_proj one
        let mut total = 0_usize;
        for (field, part) in [
            ("vocab_size", bytes(self.vocab_size, self.n_embd, heads)),
            ("n_positions", bytes(self.n_positions, self.n_embd, 1)),
            ("n_embd", bytes(self.n_embd, self.n_embd, square).and_then(|b| b.checked_mul(self.n_layer))),
            ("n_inner", bytes(self.n_embd, self.inner(), 2).and_then(|b| b.checked_mul(self.n_layer))),
        ] {
            total = part
                .and_then(|part| total.checked_add(part))
                .filter(|&total| total <= isize::MAX as usize)
                .ok_or_else(|| Error::config(field, "the weights would exceed the address space"))?;
        }
        Ok(())
    }

    /// Hidden width of the MLP.
    pub fn inner(&self) -> usize {
        self.n_inner.unwrap_or(self.n_embd.saturating_mul(4))
    }

    /// Number of parameters, for a [valid](Self::validate) shape; a tied head counts once.
    pub fn num_params(&self) -> usize {
        let product = |left: usize, right: usize| left.saturating_mul(right);
        let sum = |parts: &[usize]| parts.iter().fold(0_usize, |total, part| total.saturating_add(*part));
        let (d, inner, bias) = (self.n_embd, self.inner(), usize::from(self.bias));
        let linear = |from: usize, to: usize| sum(&[product(from, to), bias * to]);
        let norm = sum(&[d, bias * d]);
        let attention = sum(&[linear(d, product(3, d)), linear(d, d)]);
        let mlp = sum(&[linear(d, inner), linear(inner, d)]);
        let block = sum(&[norm, attention, norm, mlp]);
        let heads = if self.tie_word_embeddings { 1 } else { 2 };
        let embeddings = sum(&[product(product(heads, self.vocab_size), d), product(self.n_positions, d)]);
        sum(&[embeddings, product(self.n_layer, block), norm])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field_of(shape: ModelShape) -> &'static str {
        match shape.validate() {
            Err(Error::Config { field, .. }) => field,
            other => panic!("expected a config error for {shape:?}, got {other:?}"),
        }
    }

    #[test]
    fn published_sizes_have_their_parameter_counts() {
        for (n_layer, n_head, n_embd, params) in [
            (12, 12, 768, 124_439_808),
            (24, 16, 1024, 354_823_168),
            (36, 20, 1280, 774_030_080),
            (48, 25, 1600, 1_557_611_200),
        ] {
            let shape = ModelShape { n_layer, n_head, n_embd, ..ModelShape::default() };
            shape.validate().unwrap();
            assert_eq!(shape.num_params(), params);
        }
    }

    #[test]
    fn sizes_that_no_model_has_are_named() {
        let good = ModelShape::default();
        for (bad, field) in [
            (ModelShape { vocab_size: 0, ..good }, "vocab_size"),
            (ModelShape { n_positions: 0, ..good }, "n_positions"),
            (ModelShape { n_embd: 0, ..good }, "n_embd"),
            (ModelShape { n_layer: 0, ..good }, "n_layer"),
            (ModelShape { n_head: 0, ..good }, "n_head"),
            (ModelShape { n_inner: Some(0), ..good }, "n_inner"),
            (ModelShape { n_head: 5, ..good }, "n_head"),
        ] {
            assert_eq!(field_of(bad), field);
        }
    }

    #[test]
    fn sizes_that_overflow_are_named() {
        let one = ModelShape { n_head: 1, n_inner: Some(1), vocab_size: 1, n_positions: 1, ..ModelShape::default() };
        let max = i32::MAX as usize;
        assert_eq!(field_of(ModelShape { vocab_size: 99_999_999_999, ..one }), "vocab_size");
        assert_eq!(field_of(ModelShape { vocab_size: max, n_embd: max, ..one }), "vocab_size");
        assert_eq!(field_of(ModelShape { n_embd: 1 << 30, ..one }), "n_embd");
        assert_eq!(field_of(ModelShape { n_layer: 2_000_000_000, n_embd: 1 << 16, ..one }), "n_embd");
    }
}
