//! Generation: a request in, tokens as they are made, a report at the end.
//!
//! A [`Generation`] is a [`Batch`] of its own, whose rows come together. Decoders differ in how they obtain the logits of the next
//! position, and of positions behind it if something is drafted there.

mod decoder;
mod generation;
mod output;
mod reckon;
mod request;

pub use crate::batch::{ContextEnd, FinishReason, Prompt, Stop, TokenLogprobs};
pub use decoder::Decoder;
pub use generation::Generation;
pub use output::{Completion, Output, Report, TokenEvent};
pub use request::GenerateRequest;

use burn::tensor::DType;

use crate::batch::{Batch, BatchOptions};
use crate::cache::check_cache_dtype;
use crate::prefix::{Fingerprint, Plan, PrefixCache, Prefixes};
use crate::runner::RunnerConfig;
use crate::speculative::{Draft, Speculating};
use crate::tokenizer::Tokenizer;
use crate::{Error, Gpt2, KvCacheConfig, MemoryLimit, Result};

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
    prefixes: Option<Prefixes>,
    /// The same cache, as the draft's model uses it.
    draft_prefixes: Option<Prefixes>,
    limit: MemoryLimit,
}

impl Generator {
    /// A generator without a tokenizer that decodes with a cache in pages.
    ///
    /// Of a model that is being trained it takes [`valid`](burn::module::Module::valid), which computes without dropout and
    /// records no gradients.
    pub fn new(model: Gpt2) -> Self {
        Self {
            model: model.for_inference().into_owned(),
            tokenizer: None,
            decoder: Decoder::default(),
            cache_dtype: None,
            draft: None,
            prefixes: None,
            draft_prefixes: None,
            limit: MemoryLimit::system(),
        }
    }

    /// How many bytes a request may take beside the weights, by default [what the system gives](MemoryLimit::system). It is
    /// reckoned from the request, before anything is computed or kept: rows, tokens, caches, activations, logits and
    /// texts, each at its most. What a [`PrefixCache`] holds has a budget of its own.
    pub fn with_memory_limit(self, limit: MemoryLimit) -> Self {
        Self { limit, ..self }
    }

    /// With a tokenizer, prompts can be text, and text comes out.
    pub fn with_tokenizer(self, tokenizer: impl Into<Option<Tokenizer>>) -> Self {
        Self { tokenizer: tokenizer.into(), ..self }
    }

    /// How tokens are computed.
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
        let generator = Self { draft: Some(draft.for_inference()), ..self };
        Ok(Self { draft_prefixes: generator.prefixes_of_draft(generator.prefixes.as_ref())?, ..generator })
    }

    /// The element type in which a cache holds keys and values, by default the model's. A narrower one takes less memory
    /// and rounds them, so tokens can differ from naive decoding's; the deterministic mode refuses any but f32. Keys or values
    /// beyond 65,504, which f16 does not hold, end a request with [`Error::NotFinite`]. [`DType::I8`] is for CPUs with kernels: a byte
    /// for each number, and a scale for each head and position.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] if the device does not compute in it.
    pub fn with_cache_dtype(self, dtype: DType) -> Result<Self> {
        check_cache_dtype(&self.model.device(), dtype)?;
        let generator = Self { cache_dtype: Some(dtype), ..self };
        match generator.prefixes.clone() {
            Some(prefixes) => generator.with_prefix_cache(prefixes.cache()),
            None => Ok(generator),
        }
    }

    /// With a cache of prefixes, what several prompts begin with is computed once: in a batch, and from one request to the
    /// next, whichever generator they are for, as long as its model is the same. It changes tokens no more than
    /// a [decoder](Decoder) does: not at all on CPUs with kernels or in the deterministic mode, else by last digits.
    ///
    /// A draft model has its own prefixes in the same cache. The weights are read once, for a [`Fingerprint`] of each model.
    ///
    /// # Errors
    ///
    /// [`Error::Execution`] if the device does not hand the weights over. A request fails with [`Error::Mismatch`] if the
    /// decoder is [`Decoder::Naive`], which keeps nothing that could be used again.
    pub fn with_prefix_cache(self, prefixes: &PrefixCache) -> Result<Self> {
        let fingerprint = Fingerprint::new(&self.model, self.cache_dtype())?;
        let prefixes = Some(Prefixes::new(prefixes, fingerprint));
        Ok(Self { draft_prefixes: self.prefixes_of_draft(prefixes.as_ref())?, prefixes, ..self })
    }

    /// The same cache for the draft's model, if it has one.
    fn prefixes_of_draft(&self, prefixes: Option<&Prefixes>) -> Result<Option<Prefixes>> {
        let Some((prefixes, draft)) = prefixes.zip(self.draft.as_ref().and_then(Draft::model)) else { return Ok(None) };
        let fingerprint = Fingerprint::new(draft, self.cache_dtype.unwrap_or_else(|| draft.dtype()))?;
        Ok(Some(Prefixes::new(prefixes.cache(), fingerprint)))
    }

    /// Puts what a [saved](PrefixCache::save) cache holds for this generator's model, and its draft's, into its cache of prefixes; returns how
    /// many tokens that are new. Entries of other models are left out, and so is what the budget has no room for beside what is
    /// held, which stays: from the file's start on, with each entry that does not fit also all that go on from it.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] without a cache of prefixes; [`Error::Io`] if the file cannot be read; [`Error::Checkpoint`] for a
    /// file of another kind, one that is cut short or altered, one with sequences longer than the model's context, and one of
    /// other models only. The cache is then as it was, unless the file was altered while it was read.
    #[cfg(feature = "files")]
    pub fn restore_prefixes(&self, path: impl AsRef<std::path::Path>) -> Result<usize> {
        let Some(prefixes) = &self.prefixes else {
            return Err(Error::mismatch("cache of prefixes to restore into", "one", "none"));
        };
        let storage = self.decoder.storage();
        let mut readers = vec![prefixes.reader(&self.model, self.cache_dtype(), storage)];
        if let Some((prefixes, draft)) = self.draft_prefixes.as_ref().zip(self.draft.as_ref().and_then(Draft::model)) {
            readers.push(prefixes.reader(draft, self.cache_dtype.unwrap_or_else(|| draft.dtype()), storage));
        }
        prefixes.cache().restore(path.as_ref(), &readers)
    }

    /// Under which name this generator's model is known to its cache of prefixes; none if it has no such cache.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.prefixes.as_ref().map(Prefixes::fingerprint)
    }

    /// Which forwards would compute the prompts of a request now; none without a cache of prefixes.
    ///
    /// # Errors
    ///
    /// If the request is invalid; see [`GenerateRequest`].
    pub fn plan(&self, request: &GenerateRequest) -> Result<Option<Plan>> {
        let Some(prefixes) = &self.prefixes else { return Ok(None) };
        Ok(Some(Generation::new(self, request)?.plan(prefixes)))
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

    /// An empty batch, whose rows come and go while they are computed together, decoded as this generator decodes.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] for options of which nothing could come, or a decoder beside something that it cannot use;
    /// [`Error::OutOfMemory`] if the cache takes more than the generator's [limit](Self::with_memory_limit);
    /// [`Error::NoDraft`].
    pub fn batch(&self, options: BatchOptions) -> Result<Batch<'_>> {
        let n_positions = self.model.config().n_positions;
        let capacity = options.max_row_tokens.unwrap_or(n_positions);
        if !(1..=n_positions).contains(&capacity) {
            let expected = format!("1 to {n_positions} (n_positions)");
            return Err(Error::mismatch("tokens of a row", expected, capacity));
        }
        let mut batch = self.batch_of(options, capacity, self.limit)?;
        batch.make_cache()?;
        Ok(batch)
    }

    /// A batch whose rows have up to `capacity` tokens.
    fn batch_of(&self, options: BatchOptions, capacity: usize, limit: MemoryLimit) -> Result<Batch<'_>> {
        let storage = self.decoder.storage();
        if self.prefixes.is_some() && storage.is_none() {
            let what = "decoder beside a cache of prefixes";
            return Err(Error::mismatch(what, "one with keys and values", &self.decoder));
        }
        let dtype = self.cache_dtype();
        let cache = KvCacheConfig::new(options.max_rows, capacity).with_dtype(dtype).with_limit(limit);
        let cache = cache.with_storage(storage.unwrap_or_default());
        let config = RunnerConfig { cache, uses_cache: storage.is_some(), prefixes: self.prefixes.clone() };
        let speculating = match (&self.decoder, &self.draft) {
            (Decoder::Speculative(_), None) => return Err(Error::NoDraft),
            (Decoder::Speculative(speculation), Some(draft)) => {
                let own = draft.model().map_or(dtype, Gpt2::dtype);
                let cache = cache.with_dtype(self.cache_dtype.unwrap_or(own));
                let config = RunnerConfig { cache, prefixes: self.draft_prefixes.clone(), ..config };
                Some(Speculating::new(speculation.draft_len, draft, &self.model, config)?)
            }
            _ => None,
        };
        Batch::new(&self.model, self.tokenizer.as_ref(), config, speculating, options)
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
