//! Caches of prefixes in files: what comes back is what was there, and nothing else comes back.

use std::collections::HashMap;
use std::path::Path;

use crate::common::{self, greedy, ids_of, random_model, small_config};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::generate::Generator;
use gpt2_burn::prefix::{PrefixCache, Reuse};
use gpt2_burn::{Error, Gpt2Config, WeightFormat};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};
use serde_json::json;
use xxhash_rust::xxh3::Xxh3;

const ROOM: usize = 1 << 30;

fn generator(prefixes: &PrefixCache) -> Generator {
    let model = random_model(small_config()).pack(WeightFormat::F32).unwrap();
    Generator::new(model).with_prefix_cache(prefixes).unwrap()
}

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![1, 2, 3, 4, 5], vec![1, 2, 3, 9], vec![1, 2, 3, 4], vec![30, 31]]
}

fn reused(generator: &Generator) -> usize {
    generator.complete(&greedy(&prompts(), 4)).unwrap().report.reused_prompt_tokens
}

/// A folder with a cache in it that knows the prompts, and that cache.
fn saved() -> (tempfile::TempDir, PrefixCache) {
    let folder = tempfile::tempdir().unwrap();
    let prefixes = PrefixCache::new(ROOM);
    reused(&generator(&prefixes));
    prefixes.save(folder.path().join("prefixes")).unwrap();
    (folder, prefixes)
}

#[track_caller]
fn assert_refused(generator: &Generator, path: &Path, part: &str) {
    match generator.restore_prefixes(path) {
        Err(Error::Checkpoint { reason, .. }) => assert!(reason.contains(part), "{reason}"),
        other => panic!("{part}: {other:?}"),
    }
}

#[test]
fn a_restored_cache_hits_as_the_saved_one() {
    let (folder, before) = saved();
    let path = folder.path().join("prefixes");
    let prefixes = PrefixCache::new(ROOM);
    let restored = generator(&prefixes);
    assert_eq!(restored.restore_prefixes(&path).unwrap(), before.tokens());
    assert_eq!((prefixes.to_string(), prefixes.bytes()), (before.to_string(), before.bytes()));
    // All but the last token of each; the twin without the file has 3 + 3 within the batch, and a token twice.
    assert_eq!(reused(&restored), 4 + 3 + 3 + 1);
    assert_eq!(reused(&generator(&PrefixCache::new(ROOM))), 15 - 8 - 1);
    let plain = ids_of(&Generator::new(restored.model().clone()), &greedy(&prompts(), 4));
    assert_eq!(ids_of(&restored, &greedy(&prompts(), 4)), plain);
    assert_eq!(restored.restore_prefixes(&path).unwrap(), 0, "it is all there");

    // Which prompts were whole is known as well.
    let exact = PrefixCache::new(ROOM).with_reuse(Reuse::Exact);
    let restored = generator(&exact);
    restored.restore_prefixes(&path).unwrap();
    assert_eq!(reused(&restored), 4 + 3 + 3 + 1);
    let unseen = restored.complete(&greedy(&[vec![1, 2, 3]], 2)).unwrap();
    assert_eq!(unseen.report.reused_prompt_tokens, 0);

    // What a smaller budget has no room for is left out.
    let small = PrefixCache::new(before.bytes() / 2);
    let restored = generator(&small);
    restored.restore_prefixes(&path).unwrap();
    assert!(small.tokens() > 0 && small.bytes() <= small.budget());
    assert_eq!(ids_of(&restored, &greedy(&prompts(), 4)), plain);
}

#[test]
fn keys_and_values_in_halves_come_back_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prefixes");
    for dtype in [DType::F16, DType::BF16] {
        let prefixes = PrefixCache::new(ROOM);
        let half = generator(&prefixes).with_cache_dtype(dtype).unwrap();
        let expected = ids_of(&half, &greedy(&prompts(), 4));
        prefixes.save(&path).unwrap();
        let restored = generator(&PrefixCache::new(ROOM)).with_cache_dtype(dtype).unwrap();
        assert_eq!(restored.restore_prefixes(&path).unwrap(), prefixes.tokens());
        assert_eq!(reused(&restored), 11);
        assert_eq!(ids_of(&restored, &greedy(&prompts(), 4)), expected);
        assert_refused(&generator(&PrefixCache::new(ROOM)), &path, "another model, element type or device");
    }
}

#[test]
fn a_file_of_another_model_is_refused() {
    let (folder, before) = saved();
    let path = folder.path().join("prefixes");
    let others = [
        Gpt2Config { layer_norm_epsilon: 1e-4, ..small_config() },
        Gpt2Config { n_layer: 3, ..small_config() },
        Gpt2Config { vocab_size: 62, ..small_config() },
    ];
    for config in others {
        let prefixes = PrefixCache::new(ROOM);
        let model = random_model(config).pack(WeightFormat::F32).unwrap();
        let other = Generator::new(model).with_prefix_cache(&prefixes).unwrap();
        assert_refused(&other, &path, "another model");
        assert_eq!(prefixes.tokens(), 0);
    }
    // In a cache of several models each finds its own.
    let other = Generator::new(random_model(small_config())).with_prefix_cache(&before).unwrap();
    let tokens = before.tokens();
    reused(&other);
    before.save(&path).unwrap();
    let prefixes = PrefixCache::new(ROOM);
    assert_eq!(generator(&prefixes).restore_prefixes(&path).unwrap(), tokens);
    assert_eq!(prefixes.tokens(), tokens);
    let again = Generator::new(random_model(small_config())).with_prefix_cache(&prefixes).unwrap();
    assert_eq!(again.restore_prefixes(&path).unwrap(), before.tokens() - tokens);
}

#[test]
fn a_file_that_is_cut_short_or_altered_anywhere_is_refused() {
    let (folder, _) = saved();
    let path = folder.path().join("prefixes");
    let whole = std::fs::read(&path).unwrap();
    let prefixes = PrefixCache::new(ROOM);
    let restored = generator(&prefixes);
    for length in (0..whole.len()).step_by(37) {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(matches!(restored.restore_prefixes(&path), Err(Error::Checkpoint { .. })), "{length} bytes");
    }
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for place in (0..header).chain((header..whole.len()).step_by(7)).chain([whole.len() - 1]) {
        let mut altered = whole.clone();
        altered[place] ^= 1;
        std::fs::write(&path, &altered).unwrap();
        let result = restored.restore_prefixes(&path);
        assert!(matches!(result, Err(Error::Checkpoint { .. })), "byte {place} of {header}: {result:?}");
    }
    assert_eq!(prefixes.tokens(), 0);
    std::fs::write(&path, &whole).unwrap();
    assert_eq!(restored.restore_prefixes(&path).unwrap(), 8);
}

#[test]
fn other_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prefixes");
    let restored = generator(&PrefixCache::new(ROOM));
    assert!(matches!(restored.restore_prefixes(&path), Err(Error::Io { .. })));
    assert_refused(&restored, &common::fixture("hf-tiny").join("model.safetensors"), "its format is `pt`");
    // What was computed with another order of sums.
    craft(&path, &small_config(), &[]);
    assert_eq!(restored.restore_prefixes(&path).unwrap(), 0);
    let old = String::from_utf8(std::fs::read(&path).unwrap()).unwrap().replace(FORMAT, "gpt2-burn prefixes 1");
    std::fs::write(&path, old).unwrap();
    assert_refused(&restored, &path, "its format is `gpt2-burn prefixes 1`, not");
    std::fs::write(&path, "not a safetensors file").unwrap();
    assert!(matches!(restored.restore_prefixes(&path), Err(Error::Checkpoint { .. })));
}

#[test]
fn a_file_is_replaced_as_a_whole_or_not_at_all() {
    let (folder, before) = saved();
    let path = folder.path().join("prefixes");
    before.save(&path).unwrap();
    assert_eq!(generator(&PrefixCache::new(ROOM)).restore_prefixes(&path).unwrap(), before.tokens());
    PrefixCache::new(ROOM).save(&path).unwrap();
    assert_eq!(generator(&PrefixCache::new(ROOM)).restore_prefixes(&path).unwrap(), 0, "an empty one is one, too");
    // A folder stands where the file should be: writing fails at the very end.
    let full = folder.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("file"), "kept").unwrap();
    assert!(matches!(before.save(&full), Err(Error::Checkpoint { .. })));
    assert_eq!(std::fs::read_to_string(full.join("file")).unwrap(), "kept");
    assert!(before.save(folder.path().join("nowhere").join("file")).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left behind");
}

/// Of a file that `save` did not write: a node's model, the node before it, and its tokens.
type Node = (String, Option<usize>, Vec<u32>);

/// What a file says it is.
const FORMAT: &str = "gpt2-burn prefixes 2";

/// Writes a file as `save` does, with keys and values of zeros, for models of one shape.
fn craft(path: &Path, config: &Gpt2Config, nodes: &[Node]) {
    craft_with_ends(path, config, nodes, &[]);
}

/// The same, with prompts that end there in each node.
fn craft_with_ends(path: &Path, config: &Gpt2Config, nodes: &[Node], ends: &[usize]) {
    let shape = |ids: &[u32]| vec![config.n_layer, config.n_head, ids.len(), config.n_embd / config.n_head];
    let bytes = |ids: &[u32]| 4 * shape(ids).iter().product::<usize>();
    let zeros = vec![0; nodes.iter().map(|(.., ids)| bytes(ids)).max().unwrap_or(0)];
    let node = |(model, parent, ids): &Node| json!({"model": model, "parent": parent, "ids": ids, "ends": ends});
    let text = serde_json::to_string(&nodes.iter().map(node).collect::<Vec<_>>()).unwrap();
    let mut checksum = Xxh3::new();
    checksum.update(text.as_bytes());
    let mut tensors = Vec::new();
    for (index, (.., ids)) in nodes.iter().enumerate() {
        for part in ["keys", "values"] {
            let data = &zeros[..bytes(ids)];
            checksum.update(data);
            tensors.push((format!("{index}.{part}"), TensorView::new(Dtype::F32, shape(ids), data).unwrap()));
        }
    }
    let checksum = format!("{:032x}", checksum.digest128());
    let metadata = [("format", FORMAT.to_owned()), ("nodes", text), ("checksum", checksum)];
    let metadata: HashMap<String, String> = metadata.map(|(key, text)| (key.to_owned(), text)).into();
    serialize_to_file(tensors, Some(metadata), path).unwrap();
}

/// Nodes of one token each, one behind the other.
fn chain(model: &str, tokens: usize) -> Vec<Node> {
    (0..tokens).map(|at| (model.to_owned(), at.checked_sub(1), vec![at as u32 % 61])).collect()
}

#[cfg(unix)]
#[test]
fn saving_leaves_the_mode_of_a_file_as_it_was() {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let (folder, prefixes) = saved();
    let path = folder.path().join("prefixes");
    for shared in [0o644, 0o664, 0o600] {
        std::fs::set_permissions(&path, Permissions::from_mode(shared)).unwrap();
        prefixes.save(&path).unwrap();
        assert_eq!(mode(&path), shared);
    }
    // A new file is like any other, and so are those of a checkpoint.
    let (any, new, checkpoint) =
        (folder.path().join("any"), folder.path().join("new"), folder.path().join("checkpoint"));
    std::fs::write(&any, "").unwrap();
    prefixes.save(&new).unwrap();
    random_model(small_config()).save(&checkpoint, Default::default()).unwrap();
    assert_eq!([mode(&new), mode(&checkpoint.join("model.safetensors"))], [mode(&any); 2]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 4, "nothing is left behind");
}

#[test]
fn a_sequence_beyond_the_context_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prefixes");
    let prefixes = PrefixCache::new(ROOM);
    let restored = generator(&prefixes);
    let model = restored.fingerprint().unwrap().to_string();
    let whole = vec![(model.clone(), None, vec![1; 25])];
    for nodes in [whole, chain(&model, 25), chain(&model, 2_000)] {
        craft(&path, &small_config(), &nodes);
        assert_refused(&restored, &path, "a sequence of 25 tokens is beyond 24 positions");
        assert_eq!(prefixes.tokens(), 0);
    }
    craft(&path, &small_config(), &chain(&model, 24));
    assert_eq!((restored.restore_prefixes(&path).unwrap(), prefixes.tokens()), (24, 24));
}

#[test]
fn ends_of_prompts_that_are_repeated_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prefixes");
    let restored = generator(&PrefixCache::new(ROOM));
    let nodes = [(restored.fingerprint().unwrap().to_string(), None, vec![1, 2, 3])];
    for ends in [vec![2; 1_000_000], vec![3, 1], vec![1, 4]] {
        craft_with_ends(&path, &small_config(), &nodes, &ends);
        assert_refused(&restored, &path, "end");
    }
    craft_with_ends(&path, &small_config(), &nodes, &[1, 3]);
    assert_eq!(restored.restore_prefixes(&path).unwrap(), 3);
}

#[test]
fn chains_of_other_models_are_left_out_and_nothing_stands_behind_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prefixes");
    let prefixes = PrefixCache::new(ROOM);
    let restored = generator(&prefixes);
    let model = restored.fingerprint().unwrap().to_string();
    let mut nodes = chain("another", 1_000);
    nodes.push((model.clone(), None, vec![1, 2]));
    craft(&path, &small_config(), &nodes);
    assert_eq!((restored.restore_prefixes(&path).unwrap(), prefixes.to_string()), (2, "[1, 2]\n".to_owned()));
    nodes.push((model, Some(999), vec![3]));
    craft(&path, &small_config(), &nodes);
    assert_refused(&restored, &path, "node 1001 and its parent, 999, are of two models");
}

#[test]
fn the_count_is_of_what_stays_within_the_budget() {
    let (folder, before) = saved();
    let path = folder.path().join("prefixes");
    let counts = [0, 1, 2, 3, 4].map(|quarters| {
        let prefixes = PrefixCache::new(before.bytes() * quarters / 4);
        let count = generator(&prefixes).restore_prefixes(&path).unwrap();
        assert_eq!((count, prefixes.stats().evicted_tokens), (prefixes.tokens(), 0), "{prefixes}");
        assert!(prefixes.bytes() <= prefixes.budget());
        count
    });
    // A sixteenth is for what is around the data, so there is room for 0, 0, 1, 2 and 2 pages, of 16 positions each. First come
    // [1, 2, 3], and [4, 5] behind it in its page; [9] is in a copy of that; last [30, 31].
    assert_eq!(counts, [0, 0, 5, 6, 6]);

    // What is held does not go for what is in a file, and is not counted.
    let prefixes = PrefixCache::new(before.bytes());
    let restored = generator(&prefixes);
    restored.complete(&greedy(&[vec![50, 51, 52]], 2)).unwrap();
    assert_eq!((restored.restore_prefixes(&path).unwrap(), prefixes.tokens()), (5, 8));
    assert_eq!(prefixes.held(restored.fingerprint().unwrap(), &[50, 51, 52]), 3);
    let prefixes = PrefixCache::new(ROOM);
    let restored = generator(&prefixes);
    restored.complete(&greedy(&[vec![1, 2, 60]], 2)).unwrap();
    assert_eq!((restored.restore_prefixes(&path).unwrap(), prefixes.tokens()), (6, 9));
}

#[cfg(target_os = "linux")]
#[test]
fn restoring_holds_no_more_than_the_budget_while_it_reads() {
    use gpt2_burn::measure::{process_memory, reset_peak_memory};

    common::alone(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prefixes");
        let config = Gpt2Config { n_embd: 256, n_head: 4, ..small_config() };
        let prefixes = PrefixCache::new(1 << 20);
        let model = random_model(config.clone()).pack(WeightFormat::F32).unwrap();
        let restored = Generator::new(model).with_prefix_cache(&prefixes).unwrap();
        let model = restored.fingerprint().unwrap().to_string();
        let sequence = |n: u32| [n % 61, n / 61].into_iter().chain(2..24).collect::<Vec<u32>>();
        // 49 MB in many nodes, and as much in one of another model.
        let mut nodes: Vec<Node> = (0..500).map(|n| (model.clone(), None, sequence(n))).collect();
        nodes.push(("another".to_owned(), None, vec![0; 12_000]));
        craft(&path, &config, &nodes);
        drop(nodes);

        let before = process_memory().unwrap().resident;
        if !reset_peak_memory() {
            return common::skipped("the peak of memory does not begin anew");
        }
        assert_eq!(
            restored.restore_prefixes(&path).unwrap(),
            7 * 24,
            "two pages of 64 kB each, and 15/16 of the budget"
        );
        let taken = process_memory().unwrap().peak.saturating_sub(before);
        assert!(taken < 48 << 20, "{taken} bytes for a budget of {}", prefixes.budget());
    });
}
