//! Generation: a request in, tokens as they are made, a report at the end.
//!
//! There is one loop, in [`Generation`]. Decoders differ in how they obtain the logits of the next position.

mod decoder;
mod generation;
mod output;
mod request;
mod text;

pub use decoder::Decoder;
pub use generation::Generation;
pub use output::{Completion, FinishReason, Output, Report, TokenEvent, TokenLogprobs};
pub use request::{ContextEnd, GenerateRequest, Prompt, Stop};

use burn::tensor::DType;

use crate::speculative::Draft;
use crate::tokenizer::Tokenizer;
use crate::{Error, Gpt2, Result};

/// A model with what it needs to turn requests into text.
///
/// ```
/// use gpt2_burn::generate::{GenerateRequest, Generator};
/// use gpt2_burn::{Gpt2Config, sampling::Sampling};
///
/// let device = gpt2_burn::device("flex")?;
/// let config = Gpt2Config { vocab_size: 50, n_positions: 16, n_embd: 8, n_layer: 2, n_head: 2, ..Default::default() };
/// let generator = Generator::new(config.init(&device)?);
///
/// let mut request = GenerateRequest::new([vec![3, 1, 4], vec![1, 5]]);
/// request.max_new_tokens = 4;
/// request.sampling = Sampling::greedy();
/// for event in generator.generate(&request)? {
///     let event = event?;
///     println!("prompt {} goes on with {}", event.prompt_index, event.id);
/// }
/// let output = generator.complete(&request)?; // or all at once
/// assert_eq!(output.completions[1].ids.len(), 4);
/// # Ok::<(), gpt2_burn::Error>(())
/// ```
pub struct Generator {
    model: Gpt2,
    tokenizer: Option<Tokenizer>,
    decoder: Decoder,
    cache_dtype: Option<DType>,
    draft: Option<Draft>,
}

impl Generator {
    /// A generator without a tokenizer that decodes with a preallocated cache.
    pub fn new(model: Gpt2) -> Self {
        Self { model, tokenizer: None, decoder: Decoder::default(), cache_dtype: None, draft: None }
    }

    /// With a tokenizer, prompts can be text, and text comes out.
    pub fn with_tokenizer(self, tokenizer: impl Into<Option<Tokenizer>>) -> Self {
        Self { tokenizer: tokenizer.into(), ..self }
    }

    /// How tokens are computed; none of the decoders changes which.
    pub fn with_decoder(self, decoder: Decoder) -> Self {
        Self { decoder, ..self }
    }

    /// What makes drafts for [`Decoder::Speculative`]; the other decoders need none.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if a draft model has another vocabulary, or an exit is behind the last layer;
    /// [`Error::TokenOutOfRange`] if a script has tokens that the model does not know.
    pub fn with_draft(self, draft: Draft) -> Result<Self> {
        draft.check(&self.model)?;
        Ok(Self { draft: Some(draft), ..self })
    }

    /// The element type in which a cache holds keys and values, by default the model's. A narrower one takes less memory
    /// and rounds them, so tokens can differ from naive decoding's; the deterministic mode refuses any but f32.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] if the device does not compute in it.
    pub fn with_cache_dtype(self, dtype: DType) -> Result<Self> {
        crate::backends::check_dtype(&self.model.device(), dtype)?;
        Ok(Self { cache_dtype: Some(dtype), ..self })
    }

    /// The element type in which a cache holds keys and values.
    pub fn cache_dtype(&self) -> DType {
        self.cache_dtype.unwrap_or_else(|| self.model.dtype())
    }

    /// The model.
    pub fn model(&self) -> &Gpt2 {
        &self.model
    }

    /// What makes drafts, if there is something.
    pub fn draft(&self) -> Option<&Draft> {
        self.draft.as_ref()
    }

    /// The tokenizer, if there is one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The token ids of a prompt.
    ///
    /// # Errors
    ///
    /// [`Error::NoTokenizer`] for text without a tokenizer, [`Error::Tokenizer`] if the tokenizer refuses it.
    pub fn prompt_ids(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        match (prompt, &self.tokenizer) {
            (Prompt::Ids(ids), _) => Ok(ids.clone()),
            (Prompt::Text(text), Some(tokenizer)) => tokenizer.encode(text),
            (Prompt::Text(_), None) => Err(Error::NoTokenizer { what: "a text prompt" }),
        }
    }

    /// How tokens are computed.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Starts on a request. Nothing is computed before the first event is asked for; dropping the iterator cancels.
    ///
    /// # Errors
    ///
    /// If the request is invalid; see [`GenerateRequest`].
    pub fn generate(&self, request: &GenerateRequest) -> Result<Generation<'_>> {
        Generation::new(self, request)
    }

    /// Works a request off to its end.
    ///
    /// # Errors
    ///
    /// If the request is invalid, or the device or the model fails.
    pub fn complete(&self, request: &GenerateRequest) -> Result<Output> {
        self.generate(request)?.finish()
    }
}
