//! Caches of prefixes in files: what comes back is what was there, and nothing else comes back.

mod common;

use std::path::Path;

use common::{greedy, ids_of, random_model, small_config};
use gpt2_burn::burn::tensor::DType;
use gpt2_burn::generate::Generator;
use gpt2_burn::prefix::{PrefixCache, Reuse};
use gpt2_burn::{Error, Gpt2Config, WeightFormat};

const ROOM: usize = 1 << 30;

fn generator(prefixes: &PrefixCache) -> Generator {
    let model = random_model(small_config()).prepare(WeightFormat::F32).unwrap();
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
        let model = random_model(config).prepare(WeightFormat::F32).unwrap();
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
