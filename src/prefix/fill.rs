//! [`Prefixes::fill`]: a batch of prompts into a cache, with what is known of them from before.

use burn::tensor::{DType, Tensor};
use web_time::Instant;

use super::store::Lease;
use super::{Fingerprint, Piece, Plan, PrefixCache};
use crate::{CacheStorage, Error, Gpt2, KvCache, KvSegment, Logits, MemoryLimit, Result, TokenBatch};

/// A prefix cache as one model uses it.
#[derive(Clone, Debug)]
pub(crate) struct Prefixes {
    cache: PrefixCache,
    fingerprint: Fingerprint,
}

/// What is filled.
pub(crate) struct NewCache {
    pub storage: CacheStorage,
    /// Tokens that each row can hold.
    pub capacity: usize,
    pub dtype: DType,
    /// What a cache, and a forward, may take.
    pub limit: MemoryLimit,
}

/// A batch of prompts, computed.
pub(crate) struct Filled {
    /// A row a prompt.
    pub cache: KvCache,
    /// Logits behind each distinct prompt, one after the other.
    pub logits: Vec<f32>,
    pub plan: Plan,
    pub sharing: Sharing,
}

/// What it took to compute the prompts of a request that shared their beginnings with each other and with those before.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Sharing {
    /// Tokens of all prompts.
    pub requested_tokens: usize,
    /// Tokens that were computed.
    pub computed_tokens: usize,
    /// Tokens that did not have to be.
    pub saved_tokens: usize,
    /// Forwards that computed them.
    pub forwards: usize,
    /// Floating-point operations of what was computed.
    pub flops: f64,
    /// Floating-point operations if each prompt had been computed by itself.
    pub flops_without: f64,
    /// Seconds that this was expected to take, at the rate of the last prompts; none for the first.
    pub estimated_seconds: Option<f64>,
    /// Seconds that it took.
    pub seconds: f64,
}

impl Prefixes {
    pub fn new(cache: &PrefixCache, fingerprint: Fingerprint) -> Self {
        Self { cache: cache.clone(), fingerprint }
    }

    pub fn cache(&self) -> &PrefixCache {
        &self.cache
    }

    /// As the model computes now: whether fast f32 is allowed may have changed since.
    pub fn now(&self) -> Self {
        Self { fingerprint: self.fingerprint(), ..self.clone() }
    }

    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint.now()
    }

    /// What [`fill`](Self::fill) would do now.
    pub fn plan(&self, prompts: &[&[u32]]) -> Plan {
        Plan::new(prompts, self.cache.reuse(), |ids| self.cache.usable(self.fingerprint(), ids, ids.len() - 1))
    }

    /// Computes prompts that fit the cache, and keeps what was computed.
    pub fn fill(&self, model: &Gpt2, prompts: &[&[u32]], new: &NewCache) -> Result<Filled> {
        let started = Instant::now();
        let mut leases = Vec::new();
        let plan = Plan::new(prompts, self.cache.reuse(), |ids| {
            let lease = self.cache.take(self.fingerprint, ids, ids.len() - 1);
            let tokens = lease.tokens();
            leases.push(lease);
            tokens
        });
        let (flops, flops_without) = (plan.flops(model.config()), plan.flops_without(model.config()));
        let mut sharing = Sharing {
            requested_tokens: plan.requested_tokens(),
            computed_tokens: plan.computed_tokens(),
            saved_tokens: plan.saved_tokens(),
            forwards: plan.forwards().count(),
            flops,
            flops_without,
            estimated_seconds: self.cache.rate(self.fingerprint).map(|rate| flops / rate),
            seconds: 0.0,
        };
        let work =
            Work { model, prompts, new, plan: &plan, leases: &leases, segments: vec![None; plan.pieces().len()] };
        let (mut cache, logits, segments) = work.run()?;
        for (piece, segment) in plan.pieces().iter().zip(segments) {
            let ids = &prompts[piece.prompt][..piece.end];
            self.cache.put(self.fingerprint, ids, piece.start, segment)?;
        }
        plan.distinct().iter().for_each(|&prompt| self.cache.mark(self.fingerprint, prompts[prompt]));
        cache.gather(plan.of_prompt())?;
        sharing.seconds = started.elapsed().as_secs_f64();
        self.cache.set_rate(self.fingerprint, flops / sharing.seconds);
        Ok(Filled { cache, logits, plan, sharing })
    }

    /// Keeps what row `row` of a cache holds of a window, but for its last token: where drafts are verified, what the cache
    /// holds there can be that of another one.
    pub fn keep(&self, cache: &KvCache, row: usize, window: &[u32]) -> Result<()> {
        let ids = &window[..cache.len(row).min(window.len().saturating_sub(1))];
        let held = self.cache.held(self.fingerprint, ids);
        if held == ids.len() {
            return Ok(());
        }
        self.cache.put(self.fingerprint, ids, held, cache.segment(row, held..ids.len())?)?;
        Ok(())
    }

    /// What a file must hold for this model.
    #[cfg(feature = "files")]
    pub fn reader(&self, model: &Gpt2, dtype: DType) -> super::Reader {
        let config = model.config();
        super::Reader {
            fingerprint: self.fingerprint(),
            shape: [config.n_layer, config.n_head, config.head_dim()],
            n_positions: config.n_positions,
            vocab_size: config.vocab_size,
            dtype,
            device: model.device(),
        }
    }
}

/// Segments one behind the other, and how many tokens of each belong to a sequence.
type Path = Vec<(KvSegment, usize)>;

/// A plan being carried out.
struct Work<'a> {
    model: &'a Gpt2,
    prompts: &'a [&'a [u32]],
    new: &'a NewCache,
    plan: &'a Plan,
    /// Of each distinct prompt.
    leases: &'a [Lease],
    /// Of each piece, once it is computed.
    segments: Vec<Option<KvSegment>>,
}

impl Work<'_> {
    /// The cache with a row for each distinct prompt, the logits behind each, and the segments of the pieces.
    fn run(mut self) -> Result<(KvCache, Vec<f32>, Vec<KvSegment>)> {
        for places in self.plan.shared_forwards() {
            let longest = self.pieces(places).map(|piece| piece.end).max().unwrap_or(1);
            let mut cache = self.cache(CacheStorage::Growing, longest, &self.before(places))?;
            self.model.prefill(&self.tokens(places)?, &mut cache)?;
            self.take_segments(places, &cache)?;
        }
        // The ends of all prompts in one forward, which writes where they are to be.
        let places = self.plan.ends();
        let mut cache = self.cache(self.new.storage, self.new.capacity, &self.before(places))?;
        let logits = on_host(self.model.forward(&self.tokens(places)?, &mut cache, Logits::Last)?)?;
        self.take_segments(places, &cache)?;
        Ok((cache, logits, self.segments.into_iter().flatten().collect()))
    }

    fn cache(&self, storage: CacheStorage, capacity: usize, rows: &[Path]) -> Result<KvCache> {
        let NewCache { dtype, limit, .. } = *self.new;
        KvCache::with_segments(self.model.config(), storage, capacity, dtype, &self.model.device(), rows, limit)
    }

    fn pieces(&self, places: &[usize]) -> impl Iterator<Item = Piece> {
        places.iter().map(|&place| self.plan.pieces()[place])
    }

    /// What is before each piece.
    fn before(&self, places: &[usize]) -> Vec<Path> {
        self.pieces(places).map(|piece| self.path(piece.prompt, piece.start, piece.before)).collect()
    }

    /// The tokens of each piece.
    fn tokens(&self, places: &[usize]) -> Result<TokenBatch> {
        let ids = self.pieces(places).map(|piece| &self.prompts[piece.prompt][piece.start..piece.end]);
        TokenBatch::new(&ids.collect::<Vec<_>>(), self.model)
    }

    /// Segments of the first `tokens` tokens of a prompt, of which piece `last` has the last ones; none: they are held.
    fn path(&self, prompt: usize, tokens: usize, last: Option<usize>) -> Path {
        let (mut path, mut end, mut next) = (Vec::new(), tokens, last);
        while let Some(place) = next {
            let piece = self.plan.pieces()[place];
            let segment = self.segments[place].clone().expect("a piece is computed before those that need it");
            path.push((segment, end - piece.start));
            (end, next) = (piece.start, piece.before);
        }
        let held = &self.leases[self.plan.of_prompt()[prompt]].parts;
        held.iter().cloned().chain(path.into_iter().rev()).collect()
    }

    fn take_segments(&mut self, places: &[usize], cache: &KvCache) -> Result<()> {
        for (row, &place) in places.iter().enumerate() {
            let Piece { start, end, .. } = self.plan.pieces()[place];
            self.segments[place] = Some(cache.segment(row, start..end)?);
        }
        Ok(())
    }
}

fn on_host(logits: Tensor<2>) -> Result<Vec<f32>> {
    logits.try_into_vec_as().map_err(|error| Error::Execution(error.to_string()))
}
