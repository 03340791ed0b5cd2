//! What a request takes of memory beside the weights, reckoned before any of it is asked for.

use burn::tensor::DType;

use super::{ContextEnd, Decoder, GenerateRequest, Generator, TokenEvent};
use crate::backends::has_page_kernels;
use crate::cache::{head_bytes, page_len};
use crate::memory::{product, sum};
use crate::model::room::ForwardSize;
use crate::speculative::{Draft, Speculation};
use crate::{CacheStorage, Gpt2, Result};

/// Bytes of a row by itself: its strings, lists and entries in those of others.
const ROW: usize = 2048;

/// Bytes of a token in the lists that grow with a text, which hold up to three times what is in them while they grow.
const TOKEN: usize = 24;

/// Bytes of a token's text, the same way; GPT-2's longest token has 128 bytes, nearly all less than 10.
const TEXT: usize = 96;

/// Bytes that a tokenizer takes for a byte of text: pieces, and where they come from.
const ENCODING: usize = 128;

/// Bytes that stay the same whatever is asked for: what threads keep for the next product, and one row's logits while a token
/// is chosen, as numbers, probabilities and ids.
const FIXED: usize = 4 << 20;

/// Events of a row that wait to be asked for, beside those of a draft: multi-step decoding gives several at once.
const EVENTS: usize = 9;

/// The numbers of a request that decide on its memory.
struct Sizes {
    prompts: usize,
    samples: usize,
    /// Of all prompts, what stands in the context.
    prompt_tokens: usize,
    /// Of the longest prompt, the same.
    max_len: usize,
    /// Tokens that a row can hold.
    capacity: usize,
    /// Most tokens of a draft.
    drafted: usize,
    /// Whether rows may be computed again, all at once, at the end of the context.
    slides: bool,
}

/// Checks that a request for these prompts keeps to the generator's limit.
pub(super) fn check(generator: &Generator, request: &GenerateRequest, prompts: &[Vec<u32>]) -> Result<()> {
    let (host, device) = needs(generator, request, prompts);
    generator.limit.check_on(&generator.model.device(), "a request", host, device)
}

/// Checks that the prompts can be copied and made ids of, before they are: `bytes` of ids and of text.
pub(super) fn check_prompts(generator: &Generator, ids: usize, text: usize) -> Result<()> {
    generator.limit.check("the prompts of a request", sum([product([2, ids]), product([ENCODING, text])]))
}

/// Bytes on the host, and on the device, at most.
fn needs(generator: &Generator, request: &GenerateRequest, prompts: &[Vec<u32>]) -> (usize, usize) {
    let config = generator.model.config();
    let (n_positions, vocab_size) = (config.n_positions, config.vocab_size);
    let slides = matches!(request.on_context_end, ContextEnd::Slide { .. });
    let max_len = max_len(request, prompts, n_positions);
    let drafted = match &generator.decoder {
        // The last token of a text is not drafted.
        Decoder::Speculative(speculation) => {
            speculation.draft_len.max().min(n_positions).min(request.max_new_tokens.saturating_sub(1))
        }
        _ => 0,
    };
    let sizes = Sizes {
        prompts: prompts.len(),
        samples: request.num_samples,
        prompt_tokens: windows(request, prompts, n_positions).fold(0, usize::saturating_add),
        max_len,
        capacity: capacity(request, prompts, n_positions),
        drafted,
        slides: slides && max_len.saturating_add(request.max_new_tokens) > n_positions,
    };
    let rows = sizes.rows();
    let top = request.logprobs.map(|top| top.min(vocab_size));

    // Tokens of prompts, and of what follows them: as many as fit, unless the context slides.
    let prompt_tokens = prompts.iter().map(Vec::len).fold(0, usize::saturating_add);
    let new_tokens = prompts.iter().fold(0, |tokens: usize, ids| {
        let room = if slides { usize::MAX } else { (n_positions + 1).saturating_sub(ids.len()) };
        tokens.saturating_add(product([request.num_samples, request.max_new_tokens.min(room)]))
    });
    let tokens = sum([product([request.num_samples.saturating_add(2), prompt_tokens]), new_tokens]);
    let stops = request.stop.texts.iter().fold(0, |bytes: usize, text| bytes.saturating_add(text.len() + 32));
    let text = if generator.tokenizer.is_some() { TEXT } else { 0 };
    let logprobs = top.map_or(0, |top| product([new_tokens, sum([128, product([16, top])])]));
    let event = sum([4 * size_of::<TokenEvent>(), product([32, top.unwrap_or(0)])]);
    let host = [
        FIXED,
        product([64, vocab_size]),
        product([rows, sum([ROW, stops])]),
        product([tokens, TOKEN]),
        product([new_tokens, text]),
        logprobs,
        product([rows, sum([sizes.drafted, EVENTS]), event]),
        // One entry a step.
        product([request.max_new_tokens.min(new_tokens), 256]),
        // Logits, of which a GPU's were not counted where they are held.
        product([rows, sum([sizes.drafted, 1]), vocab_size, size_of::<f32>()]),
        product([rows, sizes.drafted, proposal(generator, request)]),
    ];
    let device = sizes.of_model(generator).saturating_add(sizes.of_draft(generator));
    (sum(host), device)
}

/// What stands in the context of the longest prompt.
fn max_len(request: &GenerateRequest, prompts: &[Vec<u32>], n_positions: usize) -> usize {
    windows(request, prompts, n_positions).max().unwrap_or(0)
}

/// What stands in the context of each prompt.
fn windows(request: &GenerateRequest, prompts: &[Vec<u32>], n_positions: usize) -> impl Iterator<Item = usize> {
    prompts.iter().map(move |ids| request.on_context_end.window(ids.len(), n_positions))
}

/// Tokens that a row's cache has room for.
pub(super) fn capacity(request: &GenerateRequest, prompts: &[Vec<u32>], n_positions: usize) -> usize {
    max_len(request, prompts, n_positions).saturating_add(request.max_new_tokens.saturating_sub(1)).min(n_positions)
}

/// Bytes of a token that is proposed: the distribution that it was drawn from has what the filters left.
fn proposal(generator: &Generator, request: &GenerateRequest) -> usize {
    let vocab_size = generator.model.config().vocab_size;
    let is_drawn = matches!(generator.draft, Some(Draft::Model(_) | Draft::EarlyExit { .. }));
    let kept = match request.sampling.temperature > 0.0 && is_drawn {
        true => request.sampling.top_k.unwrap_or(vocab_size).min(vocab_size),
        false => 1,
    };
    sum([256, product([kept, 16])])
}

impl Sizes {
    fn rows(&self) -> usize {
        product([self.prompts, self.samples])
    }

    /// Of the model's cache, and of the forward that takes most.
    fn of_model(&self, generator: &Generator) -> usize {
        let model = &generator.model;
        let (rows, logits) = (self.rows(), product([self.rows(), sum([self.drafted, 1])]));
        let Some(storage) = generator.decoder.storage() else {
            let all = ForwardSize { tokens: product([rows, self.capacity]), keys: self.capacity, logits };
            let cache = self.cache(model, CacheStorage::Growing, model.dtype(), self.capacity);
            return cache.saturating_add(model.forward_bytes(all));
        };
        let prefill = match self.slides {
            true => ForwardSize { tokens: product([rows, self.capacity]), keys: self.capacity, logits },
            false => ForwardSize { tokens: self.prompt_tokens, keys: self.max_len, logits: self.prompts },
        };
        let step = ForwardSize { tokens: logits, keys: self.capacity, logits };
        let dtype = generator.cache_dtype();
        let segments = self.segments(generator, model, storage, product([self.max_len, bytes_per_token(model, dtype)]));
        let forward = model.forward_bytes(prefill).max(model.forward_bytes(step));
        sum([self.cache(model, storage, dtype, self.capacity), segments, forward])
    }

    /// Of a draft's model.
    fn of_draft(&self, generator: &Generator) -> usize {
        let (Decoder::Speculative(Speculation { storage, .. }), Some(model)) =
            (&generator.decoder, generator.draft.as_ref().and_then(Draft::model))
        else {
            return 0;
        };
        let (rows, capacity) = (self.rows(), self.capacity.min(model.config().n_positions));
        let dtype = generator.cache_dtype.unwrap_or_else(|| model.dtype());
        let segments = self.segments(generator, model, *storage, product([capacity, bytes_per_token(model, dtype)]));
        // It may see all rows at once for the first time.
        let all = ForwardSize { tokens: product([rows, capacity]), keys: capacity, logits: rows };
        sum([
            self.cache(model, *storage, dtype, capacity),
            segments,
            model.forward_bytes(all),
            product([rows, capacity, 8]),
        ])
    }

    /// Of what a cache of prefixes holds of the prompts, of which each takes so many bytes at most.
    fn segments(&self, generator: &Generator, model: &Gpt2, storage: CacheStorage, prompt: usize) -> usize {
        // Pages are the rows'.
        let is_shared = storage == CacheStorage::Paged && has_page_kernels(&model.device());
        // Else it is held apart from them, and what is new twice, until it is in the tree.
        if generator.prefixes.is_none() || is_shared { 0 } else { product([3, self.prompts, prompt]) }
    }

    /// Of a cache in an element type, with what is held beside it while rows are copied, come or go.
    fn cache(&self, model: &Gpt2, storage: CacheStorage, dtype: DType, capacity: usize) -> usize {
        let (token, is_growing) = (bytes_per_token(model, dtype), storage == CacheStorage::Growing);
        if has_page_kernels(&model.device()) {
            let page_len = page_len(model.config().n_positions);
            // A step of a growing cache has the pages that it copies from, too.
            let pages = product([self.rows(), capacity.div_ceil(page_len), if is_growing { 2 } else { 1 }]);
            // The first page is nobody's.
            return product([sum([pages, 1]), page_len, token]);
        }
        let all = product([self.rows(), capacity, token]);
        // A row that another one takes over.
        let others = product([capacity, token]);
        // Layers at a time: a new one beside the old one, or longer ones; and what burn's operations copy to compute with it.
        let layers = if is_growing { 4 } else { 1 } + if model.is_packed() { 0 } else { 2 };
        let layer = product([self.rows(), capacity, 2, model.config().n_embd, dtype.size().max(model.dtype().size())]);
        sum([all, others, product([layers, layer])])
    }
}

/// Bytes of a token's keys and values in all layers.
fn bytes_per_token(model: &Gpt2, dtype: DType) -> usize {
    let config = model.config();
    product([2, config.n_layer, config.n_head, head_bytes(config.head_dim(), dtype)])
}
