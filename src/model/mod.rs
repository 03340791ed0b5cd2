//! The GPT-2 module: one layer a file, and one `forward` for training, prefill, decoding and verification.
//!
//! Radford et al., *Language Models are Unsupervised Multitask Learners* (2019). Fields are named as in the published
//! checkpoints (`wte`, `wpe`, `h`, `ln_f`, `c_attn`, ...), so that a path through the module is a tensor's name.

mod ahead;
mod apart;
pub(crate) mod attention;
mod block;
mod bytes;
mod cast;
mod exit;
mod gelu;
mod linear;
mod mlp;
mod norm;
mod prepare;
mod ragged;
pub(crate) mod room;
mod span;
#[cfg(test)]
mod tests;
mod tokens;

use std::borrow::Cow;

use burn::module::{Initializer, Module, Param};
use burn::nn::{Dropout, DropoutConfig, Embedding, EmbeddingConfig};
use burn::nn::{LayerNorm, LayerNormConfig};
use burn::tensor::{DType, Device, Int, Tensor};

use crate::backends::{describe, most_rows, runs_ahead};
use crate::cache::{CacheStorage, KvCache};
use crate::{Error, Gpt2Config, Result, Threads};
pub(crate) use ahead::RunAhead;
use apart::rows_apart;
pub use attention::CausalSelfAttention;
pub use block::Block;
pub use linear::Linear;
pub use mlp::Mlp;
use prepare::Packed;
pub(crate) use prepare::embedding_dtype;
use span::Span;
pub use tokens::TokenBatch;

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
/// assert_eq!(logits.dims(), [1, 1, 50]);
/// assert_eq!(cache.len(0), 3);
/// # Ok::<(), gpt2_burn::Error>(())
/// ```
#[derive(Module, Debug)]
pub struct Gpt2 {
    /// Token embedding, `[vocab_size, n_embd]`; without elements in a [prepared](Self::prepare) model that ties its head.
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
    /// The head of a prepared model, and its token embedding if they are tied.
    #[module(skip)]
    packed_head: Option<Packed>,
}

/// A head of its own, for models that do not tie it to the token embedding.
#[derive(Module, Debug)]
pub struct Head {
    /// `[vocab_size, n_embd]`, like the embedding that it stands for.
    pub weight: Param<Tensor<2>>,
}

/// For which of the new tokens logits are computed. The head is the largest matrix of a small GPT-2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Logits {
    /// Each row's last new token: `[batch, 1, vocab_size]`.
    Last,
    /// Each row's last k new tokens, in order: `[batch, k, vocab_size]`.
    LastK(usize),
    /// Every new token: `[batch, T_max, vocab_size]`. What stands behind the end of a shorter row means nothing.
    All,
}

/// Whether tensors of the one can be computed with those of the other: the same device, and gradients recorded on both or on
/// none, which burn's own comparison leaves out.
pub(crate) fn is_same_device(left: &Device, right: &Device) -> bool {
    left == right && left.is_autodiff() == right.is_autodiff()
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
        if self.is_prepared() { DType::F32 } else { self.wte.weight.val().dtype() }
    }

    /// The same model in its deterministic mode, or out of it.
    ///
    /// In that mode every sum has one order: on a CPU, the logits of a token are the same to the last bit on every run,
    /// with any number of threads, in any batch, however its prompt was cut into chunks, and from every decoder. What it
    /// costs is speed, since each token is computed by itself: a decode step of one row takes what it always takes, a
    /// prefill of n tokens as much as n such steps. The CPU's kernels of a [prepared](Self::prepare) model always compute
    /// so, at no cost; those of GPUs do not.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if the model does not compute in f32, or is prepared for a GPU; [`Error::Training`] if its device
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
        if deterministic && self.is_prepared() && runs_ahead(&self.device()) {
            let what = "device of a prepared model in the deterministic mode";
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
    /// As [`KvCache::new`].
    pub fn cache(&self, storage: CacheStorage, batch: usize, capacity: usize) -> Result<KvCache> {
        KvCache::new(&self.config, storage, batch, capacity, self.dtype(), &self.device())
    }

    /// Appends the new tokens of each row to its row of the cache, and returns logits.
    ///
    /// Row `b` of the cache holds P tokens and gets `new_lens[b]` more; its query `i` sees the keys `0..=P + i` of its
    /// own row and no others. With an empty cache this is prefill (and training, and naive decoding), with one new
    /// token a decode step, with several a verification or a chunk of a prompt.
    ///
    /// # Shapes
    ///
    /// - tokens: `[batch, T_max]`, of which row `b` counts `new_lens[b]`
    /// - result: as [`Logits`] says
    ///
    /// # Errors
    ///
    /// If the tokens do not fit the cache or the context, or a row is shorter than [`Logits::LastK`];
    /// [`Error::OutOfMemory`] if activations and logits take more than the cache's limit, [`Error::Mismatch`] if the device cannot
    /// read so many logits as one buffer. The cache is then as it was.
    pub fn forward(&self, tokens: &TokenBatch, cache: &mut KvCache, logits: Logits) -> Result<Tensor<3>> {
        logits.check(tokens)?;
        let hidden = self.states_for(tokens, cache, logits.count(tokens))?; // [B, T, d]
        self.make_logits(logits.select(hidden, tokens)) // [B, k, V]
    }

    /// As [`forward`](Self::forward), but returns what the head would read: the final norm's output,
    /// `[batch, T_max, n_embd]`.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub fn hidden_states(&self, tokens: &TokenBatch, cache: &mut KvCache) -> Result<Tensor<3>> {
        self.states_for(tokens, cache, 0)
    }

    /// The same, where logits are to be made of so many positions.
    fn states_for(&self, tokens: &TokenBatch, cache: &mut KvCache, logits: usize) -> Result<Tensor<3>> {
        self.check_in_place()?;
        tokens.check(self)?;
        cache.check_append(self, tokens.new_lens())?;
        self.check_room(tokens, cache, logits)?;
        Ok(self.on_kernel_threads(|| self.run_blocks(tokens, cache, self.h.len())))
    }

    /// Kernels wake other threads less often from a thread among them.
    fn on_kernel_threads<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        // A GPU takes what comes from one thread in order, and what comes from several not.
        if self.is_prepared() && !runs_ahead(&self.device()) { Threads::enter(work) } else { work() }
    }

    /// The first `layers` blocks and the final norm: of a long prompt part after part, since kernels lose more where what is
    /// between two layers outgrows the processor's caches than they gain from more rows.
    fn run_blocks(&self, tokens: &TokenBatch, cache: &mut KvCache, layers: usize) -> Tensor<3> {
        let [batch, time] = tokens.ids().dims();
        let most = match self.is_prepared() {
            true => most_rows(&self.device(), self.widest()).map_or(time, |rows| rows.div_ceil(batch)),
            false => time,
        };
        if time <= most {
            return self.run_blocks_at_once(tokens, cache, layers);
        }
        // Parts of the same length, as far as that goes.
        let parts = tokens.in_parts(time.div_ceil(time.div_ceil(most)));
        Tensor::cat(parts.iter().map(|part| self.run_blocks_at_once(part, cache, layers)).collect(), 1)
    }

    /// Numbers of a row where it is widest.
    fn widest(&self) -> usize {
        self.config.inner().max(3 * self.config.n_embd)
    }

    fn run_blocks_at_once(&self, tokens: &TokenBatch, cache: &mut KvCache, layers: usize) -> Tensor<3> {
        let span = Span::new(cache.lens(), tokens, self);
        let hidden = self.compute_blocks(tokens.ids(), &span, cache, layers);
        cache.advance(tokens.new_lens());
        hidden
    }

    /// The same for `ids`, `[B, T]`, before the cache counts them.
    fn compute_blocks(&self, ids: &Tensor<2, Int>, span: &Span, cache: &mut KvCache, layers: usize) -> Tensor<3> {
        let [batch, time] = ids.dims();
        let width = self.config.n_embd;
        let x = self.embed(ids, span.positions()); // [B, T, d]
        let mut x = x.reshape([batch * time, width]); // [B T, d]
        for (layer, block) in self.h.iter().take(layers).enumerate() {
            x = block.forward(x, span, cache, layer); // [B T, d]
        }
        let x = norm::norm(&self.ln_f, self.config.layer_norm_epsilon, x, self.is_prepared());
        x.reshape([batch, time, width])
    }

    /// The residual stream's start: `ids` is `[B, T]`, `positions` `[B or 1, T]`, the result `[B, T, d]`.
    fn embed(&self, ids: &Tensor<2, Int>, positions: &Tensor<2, Int>) -> Tensor<3> {
        let token = match (&self.packed_head, &self.lm_head) {
            (Some(head), None) => {
                let [batch, time] = ids.dims();
                let rows = head.matrix.columns(ids.clone().reshape([batch * time])); // [B T, d]
                rows.reshape([batch, time, self.config.n_embd])
            }
            (Some(_), Some(_)) => self.wte.forward(ids.clone()).cast(DType::F32), // [B, T, d]
            (None, _) => self.wte.forward(ids.clone()),                           // [B, T, d]
        };
        let position = self.wpe.forward(positions.clone()); // [B or 1, T, d]
        self.drop.forward(token + position)
    }

    /// Logits `[B, k, V]` of hidden states `[B, k, d]`.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] for states of another width or element type, or on another device, or more of them than the device
    /// reads logits of as one buffer; [`Error::OutOfMemory`] if their logits are more than [the
    /// system](crate::MemoryLimit::system) gives; [`Error::Prepared`] if the model was prepared and then moved.
    pub fn head(&self, hidden: Tensor<3>) -> Result<Tensor<3>> {
        let [batch, time, _] = hidden.dims();
        self.check_logits(batch * time)?;
        self.make_logits(hidden)
    }

    /// As [`head`](Self::head), of as many states as were checked before.
    fn make_logits(&self, hidden: Tensor<3>) -> Result<Tensor<3>> {
        self.check_in_place()?;
        let [batch, time, width] = hidden.dims();
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
        let hidden = hidden.reshape([batch * time, width]); // [B k, d]
        let logits = self.on_kernel_threads(|| self.compute_head(hidden)); // [B k, V]
        Ok(logits.reshape([batch, time, self.config.vocab_size]))
    }

    /// `[N, d]` to `[N, V]`.
    fn compute_head(&self, hidden: Tensor<2>) -> Tensor<2> {
        if let Some(Packed { matrix, bias }) = &self.packed_head {
            return matrix.linear(hidden, bias.clone(), None);
        }
        let weight = self.lm_head.as_ref().map_or(&self.wte.weight, |head| &head.weight); // [V, d]
        rows_apart(hidden, self.deterministic, |hidden| hidden.matmul(weight.val().transpose()))
    }
}

impl Logits {
    fn check(self, tokens: &TokenBatch) -> Result<()> {
        let Self::LastK(k) = self else { return Ok(()) };
        let shortest = tokens.new_lens().iter().copied().min().unwrap_or(0);
        if (1..=shortest).contains(&k) {
            return Ok(());
        }
        Err(Error::mismatch("positions with logits", format!("1 to {shortest} (the shortest row)"), k))
    }

    /// Positions of all rows that it chooses.
    fn count(self, tokens: &TokenBatch) -> usize {
        let [batch, time] = tokens.ids().dims();
        match self {
            Self::Last => batch,
            Self::LastK(k) => batch.saturating_mul(k),
            Self::All => batch.saturating_mul(time),
        }
    }

    /// The states `[B, k, d]` of the positions chosen, out of `[B, T, d]`.
    fn select(self, hidden: Tensor<3>, tokens: &TokenBatch) -> Tensor<3> {
        let [batch, time, width] = hidden.dims();
        let k = match self {
            Self::All => return hidden,
            Self::Last => 1,
            Self::LastK(k) => k,
        };
        if tokens.is_uniform() {
            return hidden.slice([0..batch, time - k..time]);
        }
        let last = |(row, &len): (usize, &usize)| (row * time + len - k) as i32..(row * time + len) as i32;
        let rows: Vec<i32> = tokens.new_lens().iter().enumerate().flat_map(last).collect();
        let rows = Tensor::from_data(rows.as_slice(), &hidden.device());
        hidden.reshape([batch * time, width]).select(0, rows).reshape([batch, k, width])
    }
}
