//! What every process needs that measures: the model, its draft, prompts, and generators.

use gpt2_burn::Gpt2;
use gpt2_burn::burn::tensor::Device;
use gpt2_burn::generate::Generator;
use gpt2_burn::speculative::Draft;
use gpt2_burn::tokenizer::Tokenizer;

use super::options::{Args, DecoderName, Plan};
use crate::args::Failure;
use crate::args::shape::random;
use crate::sample_prompts;

/// What the model is called.
pub fn model_name(args: &Args, plan: &Plan) -> String {
    match (&args.shape.config, &plan.config) {
        (Some(name), _) => name.clone(),
        (None, Some(_)) => "gpt2".to_owned(),
        (None, None) => args.model.name().to_owned(),
    }
}

/// The model, and its tokenizer if it has one.
pub fn load(args: &Args, plan: &Plan, device: &Device) -> Result<(Gpt2, Option<Tokenizer>), Failure> {
    let Some(config) = &plan.config else { return args.model.load_on(device) };
    Ok((random(config, &args.model, args.seed, args.model.dtype.into(), device)?, None))
}

/// Rows as long as the longest point; shorter ones take what they need from their start.
pub fn rows(args: &Args, plan: &Plan, model: &Gpt2, tokenizer: Option<Tokenizer>) -> Result<Vec<Vec<u32>>, Failure> {
    let max_len = plan.points.iter().flatten().map(|lengths| lengths.tokens()).max().unwrap_or(1);
    match tokenizer {
        Some(tokenizer) => sample_prompts::held_out(&tokenizer, args.batch_size, max_len),
        None => Ok(sample_prompts::random(model.config().vocab_size, args.batch_size, max_len, args.seed)),
    }
}

/// What makes drafts, if a decoder needs them.
pub fn draft(args: &Args, plan: &Plan, device: &Device, decoders: &[DecoderName]) -> Result<Option<Draft>, Failure> {
    let is_needed = decoders.contains(&DecoderName::Speculative);
    is_needed.then(|| plan.draft.load_on(&args.model, device, false)).transpose()
}

/// The model with a decoder.
pub fn generator(
    args: &Args,
    plan: &Plan,
    model: &Gpt2,
    name: DecoderName,
    draft: Option<&Draft>,
) -> Result<Generator, Failure> {
    let generator = Generator::new(model.clone()).with_decoder(name.decoder(&plan.draft));
    let generator = match draft.filter(|_| name == DecoderName::Speculative) {
        Some(draft) => generator.with_draft(draft.clone())?,
        None => generator,
    };
    match args.cache_dtype {
        Some(dtype) => Ok(generator.with_cache_dtype(dtype.into())?),
        None => Ok(generator),
    }
}
