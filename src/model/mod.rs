//! The GPT-2 module: one layer a file, and one `forward` for training, prefill, decoding and verification.
//!
//! Radford et al., *Language Models are Unsupervised Multitask Learners* (2019). Fields are named as in the published
//! checkpoints (`wte`, `wpe`, `h`, `ln_f`, `c_attn`, ...), so that a path through the module is a tensor's name.

mod attention;
mod batch_invariant;
mod block;
mod bytes;
mod cast;
mod exit;
mod gelu;
mod linear;
mod linears;
mod logits;
mod mlp;
mod multi_step;
mod norm;
mod pack;
mod plan;
pub(crate) mod room;
#[cfg(test)]
mod tests;
mod tokens;
mod wanted;

use std::borrow::Cow;

use burn::module::{Initializer, Module, Param};
use burn::nn::{Dropout, DropoutConfig, Embedding, EmbeddingConfig};
use burn::nn::{LayerNorm, LayerNormConfig};
use burn::tensor::{DType, Device, Int, Tensor};

use crate::backends::{describe, is_asynchronous, max_rows};
use crate::cache::{CacheStorage, KvCache, KvCacheConfig};
use crate::device::is_same_device;
use crate::{Error, Gpt2Config, Result, Threads};
pub use attention::CausalSelfAttention;
use batch_invariant::batch_invariant_rows;
pub use block::Block;
pub use linear::Linear;
pub(crate) use linears::{LINEARS, LinearShape};
pub use logits::Logits;
pub use mlp::Mlp;
pub(crate) use multi_step::MultiStep;
use pack::Packed;
pub(crate) use pack::embedding_dtype;
use plan::Plan;
pub use tokens::TokenBatch;
use wanted::Wanted;

/// GPT-2: token and position embeddings, pre-norm transformer blocks, a final norm and a head.
///
/// A burn [`Module`] like any other: it trains on an autodiff device, moves, and can be recorded. Dropout is active
/// only on an autodiff device, so training and inference share [`forward`](Self::forward).
///
/// ```
/// use gpt2_burn::{CacheStorage, Gpt2Config, Logits, TokenBatch};
///
/// let device = gpt2_burn::device("flex")?;
/// let config = Gpt2Config { vocab_size: 50, n_positions: 16, n_embd: 8, n_layer: 2, n_head: 2, ..Default::default() };
/// let model = config.init(&device)?;
///
/// let tokens = TokenBatch::new(&[[3, 1, 4]], &model)?;
/// let mut cache = model.cache(CacheStorage::Growing, 1, 16)?;
/// let logits = model.forward(&tokens, &mut cache, Logits::Last)?;
/// assert_eq!(logits.dims(), [1, 50]);
/// assert_eq!(cache.len(0), 3);
/// # Ok::<(), gpt2_burn::Error>(())
/// ```
#[derive(Module, Debug)]
pub struct Gpt2 {
    /// Token embedding, `[vocab_size, n_embd]`; without elements in a [packed](Self::pack) model that ties its head.
    pub wte: Embedding,
    /// The head; none: it is the token embedding. It stands here because checkpoints are read in the order of the
    /// fields: what is largest comes first, while there is room.
    pub lm_head: Option<Head>,
    /// Position embedding, `[n_positions, n_embd]`.
    pub wpe: Embedding,
    /// The transformer blocks.
    pub h: Vec<Block>,
    /// Final layer norm.
    pub ln_f: LayerNorm,
    drop: Dropout,
    #[module(skip)]
    config: Gpt2Config,
    #[module(skip)]
    deterministic: bool,
    /// The head of a packed model, and its token embedding if they are tied.
    #[module(skip)]
    packed_head: Option<Packed>,
}

/// A head of its own, for models that do not tie it to the token embedding.
#[derive(Module, Debug)]
pub struct Head {
    /// `[vocab_size, n_embd]`, like the embedding that it stands for.
    pub weight: Param<Tensor<2>>,
}

impl Gpt2Config {
    /// A model of this shape with GPT-2's random initialisation, in f32.
    ///
    /// Matrices are normal with deviation `initializer_range`, those at the end of a residual branch divided by
    /// `sqrt(2 n_layer)`; biases are 0 and norms 1. Weights are drawn from the device's own generator
    /// (`device.seed(..)` makes them repeat) at their first use, so that loading a checkpoint draws none.
    ///
    /// # Errors
    ///
    /// As [`validate`](Self::validate); [`Error::OutOfMemory`] for more layers than [the system](crate::MemoryLimit::system) gives
    /// memory for, their weights aside.
    pub fn init(&self, device: &Device) -> Result<Gpt2> {
        self.validate()?;
        // A block without its weights, and what burn keeps for drawing them.
        crate::MemoryLimit::system()
            .check("the blocks of a model", self.n_layer.saturating_mul(size_of::<Block>() + (8 << 10)))?;
        let embedding =
            |entries| EmbeddingConfig::new(entries, self.n_embd).with_initializer(self.normal()).init(device);
        let lm_head = (!self.tie_word_embeddings)
            .then(|| Head { weight: self.normal().init([self.vocab_size, self.n_embd], device) });
        Ok(Gpt2 {
            wte: embedding(self.vocab_size),
            lm_head,
            wpe: embedding(self.n_positions),
            h: (0..self.n_layer).map(|_| Block::new(self, device)).collect(),
            ln_f: self.layer_norm(device),
            drop: DropoutConfig::new(self.embd_pdrop).init(),
            config: self.clone(),
            deterministic: false,
            packed_head: None,
        })
    }

    fn normal(&self) -> Initializer {
        Initializer::Normal { mean: 0.0, std: self.initializer_range }
    }

    /// For the projection at the end of a residual branch: 2 `n_layer` of them add up.
    fn normal_residual(&self) -> Initializer {
        let std = self.initializer_range / (2.0 * self.n_layer as f64).sqrt();
        Initializer::Normal { mean: 0.0, std }
    }

    fn layer_norm(&self, device: &Device) -> LayerNorm {
        LayerNormConfig::new(self.n_embd).with_epsilon(self.layer_norm_epsilon).with_bias(self.bias).init(device)
    }
}

impl Gpt2 {
    /// The model's shape.
    pub fn config(&self) -> &Gpt2Config {
        &self.config
    }

    /// The device that the weights live on.
    pub fn device(&self) -> Device {
        self.wte.weight.device()
    }

    /// The element type of what is computed: that of the weights, and f32 if kernels compute it.
    pub fn dtype(&self) -> DType {
        if self.is_packed() { DType::F32 } else { self.wte.weight.val().dtype() }
    }

    /// The same model in its deterministic mode, or out of it.
    ///
    /// In that mode every sum has one order: on a CPU, the logits of a token are the same to the last bit on every run,
    /// with any number of threads, in any batch, however its prompt was cut into chunks, and from every decoder. What it
    /// costs is speed, since each token is computed by itself: a decode step of one row takes what it always takes, a
    /// prefill of n tokens as much as n such steps. The CPU's kernels of a [packed](Self::pack) model always compute
    /// so, at no cost; those of GPUs do not.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if the model does not compute in f32, or is packed for a GPU; [`Error::Training`] if its device
    /// records gradients, where dropout is at work.
    pub fn with_determinism(self, deterministic: bool) -> Result<Self> {
        if deterministic {
            self.check_inference("the deterministic mode")?;
        }
        if deterministic && self.dtype() != DType::F32 {
            return Err(Error::mismatch(
                "element type for the deterministic mode",
                "F32",
                format!("{:?}", self.dtype()),
            ));
        }
        if deterministic && self.is_packed() && is_asynchronous(&self.device()) {
            let what = "device of a packed model in the deterministic mode";
            return Err(Error::mismatch(what, "a CPU", describe(&self.device())));
        }
        Ok(Self { deterministic, ..self })
    }

    /// The same model, without dropout and gradients if it is being trained.
    pub(crate) fn for_inference(&self) -> Cow<'_, Self> {
        if self.device().is_autodiff() { Cow::Owned(self.valid()) } else { Cow::Borrowed(self) }
    }

    /// Checks that no dropout is at work, and no gradient recorded.
    pub(crate) fn check_inference(&self, what: &'static str) -> Result<()> {
        if self.device().is_autodiff() { Err(Error::Training { what }) } else { Ok(()) }
    }

    /// Whether this is the deterministic mode.
    pub fn is_deterministic(&self) -> bool {
        self.deterministic
    }

    /// An empty cache for `batch` sequences of this model, of up to `capacity` tokens each.
    ///
    /// # Errors
    ///
    /// As [`KvCacheConfig::init`](KvCacheConfig::init).
    pub fn cache(&self, storage: CacheStorage, batch: usize, capacity: usize) -> Result<KvCache> {
        let config = KvCacheConfig::new(batch, capacity).with_storage(storage).with_dtype(self.dtype());
        config.init(&self.config, &self.device())
    }

    /// Appends the new tokens of each row to its row of the cache, and returns logits.
    ///
    /// Row `b` of the cache holds P tokens and gets `query_lens[b]` more; its query `i` sees the keys `0..=P + i` of its own row
    /// and no others. With an empty cache this is prefill, with one new token a decode step, with several a verification or a
    /// chunk of a prompt; rows of all kinds can be in one batch. Without a cache, rows begin with their new tokens, and nothing
    /// is kept of them: that is for training, and for whoever reads a text once.
    ///
    /// # Shapes
    ///
    /// - tokens: `[N]`, packed
    /// - result: `[M, vocab_size]`, as [`Logits`] says
    ///
    /// # Errors
    ///
    /// If the tokens do not fit the cache or the context, or a row has fewer than [`Logits`] asks for; [`Error::OutOfMemory`] if
    /// activations and logits take more than the cache's limit, [`Error::Mismatch`] if the device cannot read so many logits as
    /// one buffer. The cache is then as it was.
    pub fn forward<'c>(
        &self,
        tokens: &TokenBatch,
        cache: impl Into<Option<&'c mut KvCache>>,
        logits: Logits<'_>,
    ) -> Result<Tensor<2>> {
        let counts = logits.counts(tokens)?;
        let wanted = counts.iter().sum();
        let hidden = self.states_of(tokens, cache.into(), &counts, wanted)?; // [M, d]
        self.make_logits(hidden.ok_or(Error::EmptyBatch)?) // [M, V]
    }

    /// As [`forward`](Self::forward), but returns what the head would read of every new token: the final norm's output,
    /// `[N, n_embd]`.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub fn hidden_states<'c>(
        &self,
        tokens: &TokenBatch,
        cache: impl Into<Option<&'c mut KvCache>>,
    ) -> Result<Tensor<2>> {
        self.states_of(tokens, cache.into(), tokens.query_lens(), 0)?.ok_or(Error::EmptyBatch)
    }

    /// The same without a cache, of the last `counts[b]` tokens of each row alone: `[M, n_embd]`.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub(crate) fn last_hidden_states(&self, tokens: &TokenBatch, counts: &[usize]) -> Result<Tensor<2>> {
        self.states_of(tokens, None, counts, 0)?.ok_or(Error::EmptyBatch)
    }

    /// As [`forward`](Self::forward), when nobody reads what comes out: the tokens are in the cache then.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub(crate) fn prefill(&self, tokens: &TokenBatch, cache: &mut KvCache) -> Result<()> {
        self.states_of(tokens, Some(cache), &vec![0; tokens.query_lens().len()], 0).map(|_| ())
    }

    /// Hidden states, `[M, d]`, of the last `counts[b]` new tokens of each row, where logits are to be made of so many.
    fn states_of(
        &self,
        tokens: &TokenBatch,
        cache: Option<&mut KvCache>,
        counts: &[usize],
        logits: usize,
    ) -> Result<Option<Tensor<2>>> {
        // What computes a token by itself, and kernels, read keys out of a cache.
        let mut fresh = None;
        let cache = match cache {
            None if self.is_packed() || self.deterministic => {
                let (rows, max_len) =
                    (tokens.query_lens().len(), tokens.query_lens().iter().copied().max().unwrap_or(1));
                check_context(tokens.query_lens(), self.config.n_positions)?;
                Some(
                    fresh.insert(
                        KvCacheConfig::for_one_forward(rows, max_len)
                            .with_dtype(self.dtype())
                            .init(&self.config, &self.device())?,
                    ),
                )
            }
            cache => cache,
        };
        self.check_in_place()?;
        tokens.check(self)?;
        match &cache {
            Some(cache) => cache.check_append(&self.config, &self.device(), tokens.query_lens())?,
            None => check_context(tokens.query_lens(), self.config.n_positions)?,
        }
        self.check_room(tokens, cache.as_deref(), logits)?;
        match cache {
            Some(cache) => self.run_in_turn(tokens, cache, self.h.len(), counts),
            None => Ok(self.run_blocks(tokens, None, self.h.len(), counts)),
        }
    }

    /// As [`run_blocks`](Self::run_blocks), with the memory that the cache needs for it.
    fn run_in_turn(
        &self,
        tokens: &TokenBatch,
        cache: &mut KvCache,
        layers: usize,
        counts: &[usize],
    ) -> Result<Option<Tensor<2>>> {
        cache.in_turn(|cache| {
            cache.prepare(tokens.query_lens())?;
            Ok(self.on_kernel_threads(|| self.run_blocks(tokens, Some(cache), layers, counts)))
        })
    }

    /// Kernels wake other threads less often from a thread among them.
    fn on_kernel_threads<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        // A GPU takes what comes from one thread in order, and what comes from several not.
        if self.is_packed() && !is_asynchronous(&self.device()) { Threads::enter(work) } else { work() }
    }

    /// The first `layers` blocks and the final norm, of the last `counts[b]` new tokens of each row: `[M, d]`, or nothing if those
    /// are none.
    ///
    /// Many tokens go through all layers a chunk at a time, since kernels lose more where what is between two layers outgrows the
    /// processor's caches than they gain from more rows.
    fn run_blocks(
        &self,
        tokens: &TokenBatch,
        mut cache: Option<&mut KvCache>,
        layers: usize,
        counts: &[usize],
    ) -> Option<Tensor<2>> {
        let max = if self.is_packed() { max_rows(&self.device(), self.widest()) } else { None };
        let chunks = tokens.chunks(max.unwrap_or(usize::MAX));
        let mut hidden: Vec<Tensor<2>> = Vec::new();
        for chunk in &chunks {
            let plan = Plan::new(cache.as_deref(), chunk, self);
            let wanted = Wanted::new(chunk, tokens.query_lens(), counts);
            hidden.extend(self.compute_blocks(&chunk.ids, &plan, cache.as_deref_mut(), layers, &wanted));
            if let Some(cache) = cache.as_deref_mut() {
                cache.advance(chunk.rows.iter().map(|(row, tokens)| (*row, tokens.len())));
            }
        }
        match hidden.len() {
            0 => None,
            1 => hidden.pop(),
            _ => Some(Tensor::cat(hidden, 0)),
        }
    }

    /// Numbers of a row where it is widest.
    fn widest(&self) -> usize {
        self.config.inner().max(3 * self.config.n_embd)
    }

    /// The same of `ids`, `[N]`, before the cache counts them.
    fn compute_blocks(
        &self,
        ids: &Tensor<1, Int>,
        plan: &Plan,
        mut cache: Option<&mut KvCache>,
        layers: usize,
        wanted: &Wanted,
    ) -> Option<Tensor<2>> {
        let layers = &self.h[..layers];
        // Rows of kernels' products do not depend on each other: those that nobody reads are left out of the last layer.
        if let (true, false, Some(cache), Some((last, others))) =
            (plan.is_packed(), wanted.is_all, cache.as_deref_mut(), layers.split_last())
        {
            let x = self.residual_stream(ids, plan, Some(&mut *cache), others); // [N, d]
            return last.forward_last(x, plan, cache, others.len(), wanted).map(|x| self.final_norm(x));
        }
        let x = self.residual_stream(ids, plan, cache, layers); // [N, d]
        wanted.select(x).map(|x| self.final_norm(x))
    }

    /// What the head would read of all `ids`, `[N]`: `[N, d]`.
    fn compute_all(&self, ids: &Tensor<1, Int>, plan: &Plan, cache: Option<&mut KvCache>) -> Tensor<2> {
        self.final_norm(self.residual_stream(ids, plan, cache, &self.h))
    }

    /// Of `ids`, `[N]`, what some of the first blocks leave in the residual stream, `[N, d]`.
    fn residual_stream(
        &self,
        ids: &Tensor<1, Int>,
        plan: &Plan,
        mut cache: Option<&mut KvCache>,
        blocks: &[Block],
    ) -> Tensor<2> {
        let x = self.embed(ids, plan.positions());
        blocks.iter().enumerate().fold(x, |x, (layer, block)| block.forward(x, plan, cache.as_deref_mut(), layer))
    }

    fn final_norm(&self, x: Tensor<2>) -> Tensor<2> {
        norm::norm(&self.ln_f, self.config.layer_norm_epsilon, x, self.is_packed())
    }

    /// The residual stream's start, `[N, d]`: `ids` and `positions` are `[N]`.
    fn embed(&self, ids: &Tensor<1, Int>, positions: &Tensor<1, Int>) -> Tensor<2> {
        let rows = |embedding: &Embedding, ids: &Tensor<1, Int>| {
            let [tokens] = ids.dims();
            embedding.forward(ids.clone().reshape([1, tokens])).reshape([tokens, self.config.n_embd])
        };
        let token = match (&self.packed_head, &self.lm_head) {
            (Some(head), None) => head.matrix.columns(ids.clone()),
            (Some(_), Some(_)) => rows(&self.wte, ids).cast(DType::F32),
            (None, _) => rows(&self.wte, ids),
        };
        self.drop.forward(token + rows(&self.wpe, positions))
    }

    /// Logits `[M, V]` of hidden states `[M, d]`.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] for states of another width or element type, or on another device, or more of them than the device
    /// reads logits of as one buffer; [`Error::OutOfMemory`] if their logits are more than [the
    /// system](crate::MemoryLimit::system) gives; [`Error::Packed`] if the model was packed and then moved.
    pub fn head(&self, hidden: Tensor<2>) -> Result<Tensor<2>> {
        let [tokens, _] = hidden.dims();
        self.check_logits(tokens)?;
        self.make_logits(hidden)
    }

    /// As [`head`](Self::head), of as many states as were checked before.
    fn make_logits(&self, hidden: Tensor<2>) -> Result<Tensor<2>> {
        self.check_in_place()?;
        let [_, width] = hidden.dims();
        if hidden.dtype() != self.dtype() {
            let (wanted, found) = (format!("{:?}", self.dtype()), format!("{:?}", hidden.dtype()));
            return Err(Error::mismatch("element type of the hidden states", wanted, found));
        }
        if !is_same_device(&hidden.device(), &self.device()) {
            let (wanted, found) = (format!("{:?}", self.device()), format!("{:?}", hidden.device()));
            return Err(Error::mismatch("device of the hidden states", wanted, found));
        }
        if width != self.config.n_embd {
            return Err(Error::mismatch("width of the hidden states", self.config.n_embd, width));
        }
        Ok(self.on_kernel_threads(|| self.compute_head(hidden))) // [M, V]
    }

    /// `[N, d]` to `[N, V]`.
    fn compute_head(&self, hidden: Tensor<2>) -> Tensor<2> {
        if let Some(Packed { matrix, bias }) = &self.packed_head {
            return matrix.linear(hidden, bias.clone(), None);
        }
        let weight = self.lm_head.as_ref().map_or(&self.wte.weight, |head| &head.weight); // [V, d]
        batch_invariant_rows(hidden, self.deterministic, |hidden| hidden.matmul(weight.val().transpose()))
    }
}

/// Checks that rows of new tokens alone fit the context.
fn check_context(query_lens: &[usize], n_positions: usize) -> Result<()> {
    match query_lens.iter().position(|len| *len > n_positions) {
        Some(row) => Err(Error::ContextOverflow { row, tokens: query_lens[row], n_positions }),
        None => Ok(()),
    }
}
