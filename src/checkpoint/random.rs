//! [`RandomSource`]: weights of a shape without a file, the same on every device.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::{DType, TensorData};
use chacha20::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

use super::element::Stored;
use super::source::{TensorInfo, TensorSource};
use crate::model::LinearShape;
use crate::{Gpt2Config, Result};

/// GPT-2's initialisation, a pure function of seed, tensor, row and column: matrices have the deviation
/// `initializer_range`, those at the end of a residual branch that divided by `sqrt(2 n_layer)`; biases are 0 and norms 1.
///
/// Where GPT-2 draws from a normal distribution, this adds up four uniform numbers, which is close to one and cheap for billions.
pub struct RandomSource {
    seed: u64,
    tensors: BTreeMap<String, Tensor>,
}

struct Tensor {
    shape: Vec<usize>,
    values: Values,
}

#[derive(Clone, Copy)]
enum Values {
    All(f32),
    Random { deviation: f64, stream: u64 },
}

/// Uniform numbers that add up to a random one, of 16 bits each.
const TERMS: usize = 4;

impl RandomSource {
    pub fn new(config: &Gpt2Config, seed: u64) -> Self {
        let (d, std) = (config.n_embd, config.initializer_range);
        let residual = std / (2.0 * config.n_layer as f64).sqrt();
        let mut source = Self { seed, tensors: BTreeMap::new() };
        source.matrix("wte.weight", [config.vocab_size, d], std);
        source.matrix("wpe.weight", [config.n_positions, d], std);
        if !config.tie_word_embeddings {
            source.matrix(super::names::HEAD, [config.vocab_size, d], std);
        }
        for layer in 0..config.n_layer {
            for LinearShape { name, shape, is_residual } in config.linears() {
                source.matrix(&format!("h.{layer}.{name}.weight"), shape, if is_residual { residual } else { std });
                if config.bias {
                    source.vector(format!("h.{layer}.{name}.bias"), shape[1], 0.0);
                }
            }
            source.norm(&format!("h.{layer}.ln_1"), config);
            source.norm(&format!("h.{layer}.ln_2"), config);
        }
        source.norm("ln_f", config);
        source
    }

    fn matrix(&mut self, name: &str, shape: [usize; 2], deviation: f64) {
        let values = Values::Random { deviation, stream: self.tensors.len() as u64 };
        self.tensors.insert(name.to_owned(), Tensor { shape: shape.to_vec(), values });
    }

    fn vector(&mut self, name: String, len: usize, value: f32) {
        self.tensors.insert(name, Tensor { shape: vec![len], values: Values::All(value) });
    }

    fn norm(&mut self, name: &str, config: &Gpt2Config) {
        self.vector(format!("{name}.weight"), config.n_embd, 1.0);
        if config.bias {
            self.vector(format!("{name}.bias"), config.n_embd, 0.0);
        }
    }

    fn rows(&self, tensor: &Tensor, rows: Range<usize>) -> Vec<f32> {
        let width: usize = tensor.shape[1..].iter().product();
        match tensor.values {
            Values::All(value) => vec![value; rows.len() * width],
            Values::Random { deviation, stream } => rows
                .flat_map(|row| {
                    let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ (row as u64).rotate_left(32));
                    rng.set_stream(stream);
                    (0..width).map(move |_| (deviation * standard(rng.next_u64())) as f32)
                })
                .collect(),
        }
    }
}

/// A number of mean 0 and deviation 1.
fn standard(bits: u64) -> f64 {
    let sum: u64 = (0..TERMS).map(|term| bits >> (16 * term) & 0xffff).sum();
    let uniform = 65_536.0_f64;
    let (terms, sum) = (TERMS as f64, sum as f64 + TERMS as f64 / 2.0);
    (sum / uniform - terms / 2.0) * (12.0 / terms).sqrt()
}

impl TensorSource for RandomSource {
    fn tensors(&self) -> Vec<(String, TensorInfo)> {
        let info = |tensor: &Tensor| TensorInfo { stored: Stored::F32, shape: tensor.shape.clone() };
        self.tensors.iter().map(|(name, tensor)| (name.clone(), info(tensor))).collect()
    }

    fn read(&self, name: &str, dtype: DType) -> Result<TensorData> {
        let Some(tensor) = self.tensors.get(name) else {
            return Err(crate::Error::Tensors(vec![format!("`{name}` is missing")]));
        };
        let values = self.rows(tensor, 0..tensor.shape[0]);
        Ok(TensorData::new(values, tensor.shape.clone()).convert_dtype(dtype))
    }

    fn read_rows(&self, name: &str, dtype: DType, rows: Range<usize>) -> Result<Option<TensorData>> {
        let Some(tensor) = self.tensors.get(name).filter(|tensor| tensor.shape.len() == 2) else { return Ok(None) };
        let shape = [rows.len(), tensor.shape[1]];
        Ok(Some(TensorData::new(self.rows(tensor, rows), shape).convert_dtype(dtype)))
    }

    fn total_bytes(&self) -> u64 {
        let elements = |tensor: &Tensor| tensor.shape.iter().product::<usize>() as u64;
        4 * self.tensors.values().map(elements).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> RandomSource {
        let config =
            Gpt2Config { vocab_size: 300, n_positions: 64, n_embd: 64, n_layer: 2, n_head: 4, ..Default::default() };
        RandomSource::new(&config, 7)
    }

    #[test]
    fn rows_are_those_of_the_whole_and_no_two_tensors_are_equal() {
        let source = source();
        let whole = source.read("wte.weight", DType::F32).unwrap().try_into_vec::<f32>().unwrap();
        let rows = source.read_rows("wte.weight", DType::F32, 17..20).unwrap().unwrap().try_into_vec::<f32>().unwrap();
        assert_eq!(rows, whole[17 * 64..20 * 64]);
        let other = source.read("h.0.attn.c_proj.weight", DType::F32).unwrap().try_into_vec::<f32>().unwrap();
        assert_ne!(other[0] / whole[0], other[1] / whole[1]);
    }

    #[test]
    fn matrices_have_their_deviation_and_hardly_a_mean() {
        let source = source();
        for (name, expected) in
            [("wte.weight", 0.02), ("h.1.attn.c_attn.weight", 0.02), ("h.1.mlp.c_proj.weight", 0.01)]
        {
            let values = source.read(name, DType::F32).unwrap().try_into_vec::<f32>().unwrap();
            let count = values.len() as f64;
            let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
            let variance = values.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum::<f64>() / count;
            assert!((variance.sqrt() / expected - 1.0).abs() < 0.03, "{name}: {}", variance.sqrt());
            // Five deviations of a mean.
            assert!(mean.abs() < 5.0 * expected / count.sqrt(), "{name}: {mean}");
        }
    }
}
