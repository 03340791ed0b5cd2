//! `--config`: random weights in the shape of a published size, where only speed is asked for.

use clap::Args;
use gpt2_burn::burn::tensor::Device;
use gpt2_burn::tokenizer::Tokenizer;
use gpt2_burn::{Checkpoint, Gpt2, Gpt2Config, WeightFormat};

use super::Failure;
use super::model::ModelArgs;

/// Which shape, if the weights are to be random.
#[derive(Args, Clone, Debug)]
pub struct ShapeArgs {
    /// Random weights in the shape of gpt2, gpt2-medium, gpt2-large or gpt2-xl, instead of a model
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "init_from", "out_dir", "tokenizer"])]
    pub config: Option<String>,
}

impl ShapeArgs {
    /// What the model is called.
    pub fn name<'a>(&'a self, model: &'a ModelArgs) -> &'a str {
        self.config.as_deref().unwrap_or(model.name())
    }

    /// The model named, with its tokenizer, or one of random weights.
    pub fn load(&self, model: &ModelArgs, seed: u64, device: &Device) -> Result<(Gpt2, Option<Tokenizer>), Failure> {
        self.load_as(model, seed, model.dtype.into(), device)
    }

    /// The same with weights in another format than the one asked for.
    pub fn load_as(
        &self,
        model: &ModelArgs,
        seed: u64,
        format: WeightFormat,
        device: &Device,
    ) -> Result<(Gpt2, Option<Tokenizer>), Failure> {
        match &self.config {
            Some(name) => Ok((random(&published(name)?, model, seed, format, device)?, None)),
            None => model.load_as(format, device),
        }
    }
}

/// A model with random weights.
pub fn random(
    config: &Gpt2Config,
    model: &ModelArgs,
    seed: u64,
    format: WeightFormat,
    device: &Device,
) -> Result<Gpt2, Failure> {
    model.load_checkpoint(&Checkpoint::random(config, seed)?, format, device)
}

/// The shape of a published size.
pub fn published(name: &str) -> Result<Gpt2Config, Failure> {
    Gpt2Config::published(name).ok_or_else(|| {
        let known: Vec<&str> = Gpt2Config::published_names().collect();
        format!("`{name}` is none of the published sizes: {}", known.join(", ")).into()
    })
}
