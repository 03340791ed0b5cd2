//! What the tests share.

mod alone;

use std::io::Write;
use std::path::{Path, PathBuf};

use gpt2_burn::burn::module::{Module, ModuleMapper, Param};
use gpt2_burn::burn::tensor::{DType, Device, Tensor, TensorData};
use gpt2_burn::generate::{Decoder, GenerateRequest, Generator, Stop};
use gpt2_burn::sampling::{Purpose, Sampling, uniform};
use gpt2_burn::{Activation, CacheStorage, Checkpoint, Gpt2, Gpt2Config, Logits, TokenBatch, backends};
use serde::Deserialize;

pub use alone::{alone, alone_with, is_alone, name_of};

/// All decoders, the reference first.
pub const DECODERS: [Decoder; 4] = [
    Decoder::Naive,
    Decoder::Kv(CacheStorage::Growing),
    Decoder::Kv(CacheStorage::Preallocated),
    Decoder::Kv(CacheStorage::Paged),
];

pub const STORAGES: [CacheStorage; 3] = [CacheStorage::Growing, CacheStorage::Preallocated, CacheStorage::Paged];

/// Bytes of a cache of f32 of so many rows of up to `tokens` tokens that holds each of them once: in whole pages, where there are some.
pub fn kv_bytes(config: &Gpt2Config, rows: usize, tokens: usize) -> usize {
    let page_len = if config.n_positions > 64 { 64 } else { 16 };
    let tokens = if backends::has_page_kernels(&device()) { tokens.next_multiple_of(page_len) } else { tokens };
    2 * config.n_layer * rows * tokens * config.n_embd * 4
}

/// The CPU, or the first device that is named in `GPT2_BURN_TEST_DEVICE`.
pub fn device() -> Device {
    let named = std::env::var("GPT2_BURN_TEST_DEVICE").unwrap_or_else(|_| "flex".to_owned());
    gpt2_burn::device(named.split(',').next().unwrap_or("flex")).unwrap()
}

/// Name and device of those named in `GPT2_BURN_TEST_DEVICE`, with commas between them, or of all that this build has and the
/// machine too. A device that is named has to be there.
pub fn devices() -> Vec<(String, Device)> {
    let named = std::env::var("GPT2_BURN_TEST_DEVICE").ok();
    let names: Vec<String> = match &named {
        Some(names) => names.split(',').map(str::to_owned).collect(),
        None => backends::available().into_iter().map(str::to_owned).collect(),
    };
    let device = |name: String| match gpt2_burn::device(&name) {
        Ok(device) => Some((name, device)),
        Err(error) if named.is_some() => panic!("{error}"),
        Err(error) => {
            skipped(&error.to_string());
            None
        }
    };
    names.into_iter().filter_map(device).collect()
}

/// A file or folder in `tests/fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join("fixtures").join(name)
}

/// A folder of the data that is checked against where there is any, in the folder that `GPT2_BURN_SHARED_DATA` names. If it is
/// not there, that is said, captured or not; but what that variable names has to be there.
pub fn shared_data(name: &str) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("GPT2_BURN_SHARED_DATA").map(PathBuf::from) else {
        skipped(&format!("{name}: GPT2_BURN_SHARED_DATA is not set"));
        return None;
    };
    assert!(folder.is_dir(), "GPT2_BURN_SHARED_DATA: {} is no folder", folder.display());
    let path = folder.join(name);
    if !path.exists() {
        skipped(&format!("{name} is not in {}", folder.display()));
        return None;
    }
    Some(path)
}

/// Says that a test did nothing. Not with eprintln, which the test harness captures.
pub fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// What PyTorch computed.
#[derive(Deserialize)]
pub struct Expected {
    pub prompts: Vec<Vec<u32>>,
    /// Of every position of every prompt.
    pub logits: Vec<Vec<Vec<f32>>>,
    pub loss: Vec<f64>,
    pub greedy: Vec<Vec<u32>>,
}

impl Expected {
    pub fn read(file: &str) -> Self {
        serde_json::from_str(&std::fs::read_to_string(fixture(file)).unwrap()).unwrap()
    }

    /// The largest difference of any logit, and of any prompt's loss.
    pub fn differences(&self, model: &Gpt2) -> (f32, f64) {
        let (mut logit, mut loss) = (0.0_f32, 0.0_f64);
        for (index, prompt) in self.prompts.iter().enumerate() {
            let expected = &self.logits[index];
            let rows = logits_of(model, prompt);
            assert_eq!((rows.len(), rows[0].len()), (expected.len(), expected[0].len()));
            let pairs = rows.iter().flatten().zip(expected.iter().flatten());
            logit = largest(pairs.map(|(actual, expected)| (actual - expected).abs()).chain([logit]));
            let stride = model.config().n_positions;
            loss = loss.max((model.perplexity(prompt, stride, |_| {}).unwrap().loss - self.loss[index]).abs());
        }
        (logit, loss)
    }
}

/// The largest of some numbers; NaN if one of them is, which `f32::max` would drop.
pub fn largest(numbers: impl Iterator<Item = f32>) -> f32 {
    numbers.fold(0.0, |max: f32, number| if max.is_nan() || max >= number { max } else { number })
}

/// Logits of every position of one sequence.
pub fn logits_of(model: &Gpt2, ids: &[u32]) -> Vec<Vec<f32>> {
    rows(model.forward(&TokenBatch::new(&[ids], model).unwrap(), None, Logits::All).unwrap())
}

/// The rows of a tensor, all dimensions but the last taken together.
pub fn rows<const D: usize>(tensor: Tensor<D>) -> Vec<Vec<f32>> {
    let width = tensor.dims()[D - 1];
    let values: Vec<f32> = tensor.try_into_vec_as().unwrap();
    values.chunks_exact(width).map(<[f32]>::to_vec).collect()
}

pub fn load(checkpoint: impl AsRef<Path>) -> Gpt2 {
    Checkpoint::open(checkpoint).unwrap().load(&device(), DType::F32).unwrap()
}

/// A random model, the same at each call: burn's own initialisation draws from a generator that all tests share.
pub fn random_model(config: Gpt2Config) -> Gpt2 {
    config.init(&device()).unwrap().map(&mut Seeded { parameter: 0 })
}

struct Seeded {
    parameter: u64,
}

impl ModuleMapper for Seeded {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.parameter += 1;
        let shape = param.lazy_shape();
        let between = |low: f64, high: f64, index: usize| {
            low + (high - low) * uniform(42, self.parameter, index as u64, Purpose::Token)
        };
        let value = |index| if D == 1 { between(0.5, 1.5, index) } else { between(-0.4, 0.4, index) } as f32;
        let values: Vec<f32> = (0..shape.num_elements()).map(value).collect();
        param.map(|tensor| Tensor::from_data(TensorData::new(values, shape), &tensor.device()))
    }
}

/// A shape that is quickly computed.
pub fn small_config() -> Gpt2Config {
    Gpt2Config {
        vocab_size: 61,
        n_positions: 24,
        n_embd: 24,
        n_layer: 2,
        n_head: 3,
        activation_function: Activation::GeluTanh,
        ..Gpt2Config::default()
    }
}

/// Greedy decoding that only its length ends.
pub fn greedy(prompts: &[Vec<u32>], max_new_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        max_new_tokens,
        sampling: Sampling::greedy(),
        stop: Stop { ignore_eos: true, ..Stop::default() },
        ..GenerateRequest::new(prompts.to_vec())
    }
}

/// The new ids of each completion.
pub fn ids_of(generator: &Generator, request: &GenerateRequest) -> Vec<Vec<u32>> {
    let output = generator.complete(request).unwrap();
    output.completions.into_iter().map(|completion| completion.ids).collect()
}
