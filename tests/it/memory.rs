//! What is resident: loading holds the weights once, decoding needs nothing more, and nothing stays behind.

use std::collections::BTreeSet;
use std::path::Path;

use crate::common::{self, alone, alone_with, device, greedy, is_alone, random_model, small_config};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::checkpoint::SaveOptions;
use gpt2_burn::generate::{Decoder, Generator};
use gpt2_burn::measure::{process_memory, reset_peak_memory};
use gpt2_burn::prefix::PrefixCache;
use gpt2_burn::{CacheStorage, Checkpoint, Gpt2, Gpt2Config, KvCache, KvCacheConfig, Logits, TokenBatch, WeightFormat};

const FORMATS: [WeightFormat; 3] = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Int8];

/// Which file a process of its own is to load, and in which of the formats.
const PATH: &str = "GPT2_BURN_TEST_PATH";
const FORMAT: &str = "GPT2_BURN_TEST_FORMAT";

/// Each thread has a stack and an arena that it touches when it likes.
const THREADS: (&str, &str) = ("RAYON_NUM_THREADS", "2");

fn resident() -> usize {
    process_memory().unwrap().resident
}

fn load_and_measure(path: &Path) {
    for dtype in [DType::F32, DType::F16] {
        let before = resident();
        assert!(reset_peak_memory());
        let model = Checkpoint::open(path).unwrap().load(&device(), dtype).unwrap();
        let taken = process_memory().unwrap().peak - before;
        let weights = model.config().num_params() * dtype.size();
        assert!(taken > weights / 2, "{taken} bytes cannot hold {weights} bytes of weights");
        let ratio = taken as f64 / weights as f64;
        assert!(ratio < 1.2, "{} as {dtype:?}: {taken} bytes for {weights}, {ratio:.2} x", path.display());
        println!("{} as {dtype:?}: {ratio:.3} x the weights", path.display());
        drop(model);
    }
}

fn pack_and_measure(path: &Path, format: WeightFormat) {
    let before = resident();
    assert!(reset_peak_memory());
    let model = Checkpoint::open(path).unwrap().load_packed(&device(), format).unwrap();
    let taken = (process_memory().unwrap().peak - before) as f64;
    let bytes = if format == WeightFormat::Int8 { 1.0 + 2.0 / 64.0 } else { format.float().size() as f64 };
    let weights = model.config().num_params() as f64 * bytes;
    assert!(taken > weights / 2.0, "{taken} bytes cannot hold {weights} bytes of weights");
    println!("{} packed as {format:?}: {:.3} x the weights", path.display(), taken / weights);
    // Eight bits are made of chunks of 4 MB in f32, much beside the 29 MB of this model.
    let max = if format == WeightFormat::Int8 { 1.5 } else { 1.2 };
    assert!(taken < max * weights, "{} as {format:?}: {taken} bytes for {weights}", path.display());
}

#[test]
fn loading_holds_the_weights_once() {
    let measure = || {
        let path = std::env::var(PATH).unwrap();
        match std::env::var(FORMAT) {
            Ok(format) => pack_and_measure(Path::new(&path), FORMATS[format.parse::<usize>().unwrap()]),
            Err(_) => load_and_measure(Path::new(&path)),
        }
    };
    if is_alone() {
        return alone(measure);
    }
    let config = Gpt2Config { vocab_size: 30_000, n_embd: 512, n_head: 8, n_layer: 4, ..small_config() };
    let model = config.init(&device()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (name, dtype, max_shard_bytes) in
        [("f32", DType::F32, None), ("f16", DType::F16, None), ("shards", DType::F32, Some(40_000_000))]
    {
        let path = folder.path().join(name);
        model.save(&path, SaveOptions { dtype, max_shard_bytes }).unwrap();
        let path = (PATH, path.to_str().unwrap());
        alone_with(&[THREADS, path], measure);
        for format in 0..FORMATS.len() {
            alone_with(&[THREADS, path, (FORMAT, &format.to_string())], measure);
        }
    }
}

fn step(model: &Gpt2, cache: &mut KvCache, id: u32) {
    let ids = vec![[id]; cache.batch()];
    let logits = model.forward(&TokenBatch::new(&ids, model).unwrap(), cache, Logits::Last).unwrap();
    assert!(!logits.try_into_vec_as::<f32>().unwrap().is_empty());
}

#[test]
fn resident_memory_is_flat_over_900_preallocated_steps() {
    alone_with(&[THREADS], || {
        // The cache takes 30 MB, more than the weights and the program together.
        let model = random_model(Gpt2Config { n_positions: 910, n_embd: 256, n_head: 4, n_layer: 4, ..small_config() });
        let mut cache = model.cache(CacheStorage::Preallocated, 4, 910).unwrap();
        assert_eq!(cache.bytes().reserved, common::kv_bytes(model.config(), 4, 910));
        (0..10).for_each(|id| step(&model, &mut cache, id));
        let (mut least, mut max) = (resident(), resident());
        for id in 10..910 {
            step(&model, &mut cache, id % 61);
            (least, max) = (least.min(resident()), max.max(resident()));
        }
        assert_eq!(cache.len(3), 910);
        let growth = max as f64 / least as f64 - 1.0;
        assert!(growth < 0.02, "from {least} to {max} bytes");
        println!("{:.1} MB resident, {:.2}% more or less", max as f64 / 1e6, growth * 100.0);
    });
}

#[test]
fn a_thousand_generations_leave_nothing_behind() {
    alone_with(&[THREADS], || {
        let model = random_model(small_config());
        let request = greedy(&[vec![1, 2, 3], vec![4]], 12);
        for storage in common::STORAGES {
            let generator = Generator::new(model.clone()).with_decoder(Decoder::Kv(storage));
            let generate = || assert_eq!(generator.complete(&request).unwrap().completions[1].ids.len(), 12);
            (0..10).for_each(|_| generate());
            let early = resident();
            (0..990).for_each(|_| generate());
            let late = resident();
            assert!((late as f64) < 1.05 * early as f64, "{storage:?}: {early} bytes after 10, {late} after 1,000");
            println!("{storage:?}: {early} bytes after 10 generations, {late} after 1,000");
        }
    });
}

/// Prompts of 40 to 100 tokens; of each three, two begin as some others do.
fn prefixed_prompt(n: usize) -> Vec<u32> {
    let shared = if n.is_multiple_of(3) { 0 } else { 30 + n % 7 * 4 };
    let prefix = (0..shared).map(|at| (n % 14 * 7 + at * at) % 61);
    let own = (0..40 + n * 37 % 40).map(|at| (n * n * 13 + n / 61 + at * (n % 59 + 1) + at * at * 5) % 61);
    prefix.chain(own).take(100).map(|id| id as u32).collect()
}

#[test]
fn a_cache_of_prefixes_takes_its_budget_and_no_more() {
    alone_with(&[THREADS], || {
        let model = random_model(Gpt2Config { n_positions: 128, n_embd: 128, n_head: 4, n_layer: 4, ..small_config() });
        let model = model.pack(WeightFormat::F32).unwrap();
        let prompts: Vec<Vec<u32>> = (0..2000).map(prefixed_prompt).collect();
        let prefixes: BTreeSet<&[u32]> = prompts.iter().flat_map(|ids| (1..=ids.len()).map(|n| &ids[..n])).collect();
        let needed = prefixes.len() * 2 * 4 * 128 * 4;
        drop(prefixes);
        let cache = PrefixCache::new(needed / 10);
        let plain = Generator::new(model.clone());
        let shared = Generator::new(model).with_prefix_cache(&cache).unwrap();
        let ids = |generator: &Generator, prompt: &[u32]| {
            generator.complete(&greedy(&[prompt.to_vec()], 2)).unwrap().completions.swap_remove(0).ids
        };
        // Requests of both kinds are part of what was there before, with nothing kept.
        let nothing = Generator::new(plain.model().clone()).with_prefix_cache(&PrefixCache::new(0)).unwrap();
        prompts[..200].iter().for_each(|prompt| assert_eq!(ids(&nothing, prompt), ids(&plain, prompt)));
        let before = resident();
        let mut max = before;
        for (n, prompt) in prompts.iter().enumerate() {
            let found = ids(&shared, prompt);
            assert!(cache.bytes() <= cache.budget(), "{} of {} bytes", cache.bytes(), cache.budget());
            max = max.max(resident());
            if n % 10 == 0 {
                assert_eq!(found, ids(&plain, prompt), "prompt {n}");
            }
        }
        let stats = cache.stats();
        assert!(stats.hit_rate() > 0.2 && stats.evicted_tokens > 0, "{stats:?}");
        assert!(cache.bytes() > cache.budget() * 8 / 10);
        // What one request may take besides: its cache, and the segments that it puts in before others go.
        let request = 2 * 101 * 2 * 4 * 128 * 4;
        let growth = (max - before - request) as f64 / cache.budget() as f64;
        let budget = cache.budget() as f64 / 1e6;
        println!(
            "{growth:.3} x the budget of {budget:.1} MB besides a request, hit rate {:.3}: {stats:?}",
            stats.hit_rate()
        );
        assert!(growth < 1.1, "resident memory grew by {growth:.3} x the budget of {budget:.1} MB");
    });
}

#[test]
fn pages_take_memory_when_they_are_written_and_not_before() {
    alone_with(&[THREADS], || {
        let model =
            random_model(Gpt2Config { n_positions: 1024, n_embd: 128, n_head: 4, n_layer: 4, ..small_config() });
        let model = model.pack(WeightFormat::F32).unwrap();
        let fill = |rows: usize| {
            let mut cache = KvCacheConfig::new(rows, 1024).init(model.config(), &model.device()).unwrap();
            let mut prompts = vec![vec![7]; rows];
            prompts[rows - 1] = vec![7; 30];
            for _ in 0..2 {
                model.hidden_states(&TokenBatch::new(&prompts[..], &model).unwrap(), &mut cache).unwrap();
            }
            cache
        };
        drop(fill(1));
        let before = resident();
        let cache = fill(20);
        let (taken, reserved, all) =
            (resident() - before, cache.bytes().reserved, common::kv_bytes(model.config(), 20, 1024));
        assert_eq!(reserved, common::kv_bytes(model.config(), 20, 64));
        assert!(
            taken < reserved + reserved / 5,
            "{taken} bytes are taken, {reserved} reserved, and {all} would be all"
        );
    });
}
