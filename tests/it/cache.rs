//! The cache: the same function as without one, whatever is appended, cut, forked and gathered.

use crate::common::{STORAGES, device, greedy, kv_bytes, logits_of, random_model, rows, small_config};
use gpt2_burn::backends::has_page_kernels;
use gpt2_burn::burn::backend::Flex;
use gpt2_burn::burn::module::{Module, ModuleMapper, Param};
use gpt2_burn::burn::tensor::{DType, Tensor};
use gpt2_burn::generate::{Decoder, Generator};
use gpt2_burn::{
    CacheStorage, Error, Gpt2, Gpt2Config, KvCache, KvCacheConfig, KvSegment, Logits, MemoryLimit, TokenBatch,
    WeightFormat,
};
use proptest::prelude::*;

fn append(model: &Gpt2, cache: &mut KvCache, new: &[Vec<u32>], logits: Logits<'_>) -> Vec<Vec<f32>> {
    rows(model.forward(&TokenBatch::new(new, model).unwrap(), cache, logits).unwrap())
}

#[track_caller]
fn assert_close(actual: &[f32], expected: &[f32]) {
    assert_within(actual, expected, 1e-4);
}

#[track_caller]
fn assert_within(actual: &[f32], expected: &[f32], within: f32) {
    let difference = actual.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(actual.len() == expected.len() && difference < within, "logits differ by {difference}");
}

/// The most likely id, and by how much it is likelier than any other.
fn argmax(logits: &[f32]) -> (usize, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    (order[0], logits[order[0]] - logits[order[1]])
}

/// The same logits, and the same greedy choice unless the two most likely are nearly equal.
#[track_caller]
fn assert_same(actual: &[f32], expected: &[f32]) {
    assert_close(actual, expected);
    let (id, margin) = argmax(expected);
    assert!(margin < 1e-4 || argmax(actual).0 == id, "another greedy choice");
}

fn config() -> impl Strategy<Value = Gpt2Config> {
    (1_usize..4, 1_usize..5, 1_usize..10, 20_usize..90, any::<bool>(), any::<bool>()).prop_map(
        |(n_layer, n_head, head_dim, n_positions, bias, tie_word_embeddings)| Gpt2Config {
            n_layer,
            n_head,
            n_embd: n_head * head_dim,
            n_positions,
            bias,
            tie_word_embeddings,
            // Norms of two numbers that are nearly equal make a last digit's difference, of which attention has some in another order of
            // sums, hundreds of times larger, and each layer does so again.
            layer_norm_epsilon: 1e-2,
            ..small_config()
        },
    )
}

/// One change to a cache; rows and lengths are taken modulo what there is.
#[derive(Clone, Debug)]
enum Step {
    Append(Vec<Vec<u32>>),
    Reserve(usize),
    CopyRow(usize, Vec<u32>),
    /// Each row goes on with such a text, of which another cache made keys and values, in two segments cut there.
    AppendSegments(Vec<Vec<u32>>, usize),
    Truncate(usize, usize),
    Fork(usize),
    Gather(Vec<usize>),
    Remove(usize),
    Clear,
}

fn step() -> impl Strategy<Value = Step> {
    let ids = proptest::collection::vec(0_u32..61, 1..9);
    let text = proptest::collection::vec(0_u32..61, 0..12);
    let more = proptest::collection::vec(0_u32..61, 0..6);
    prop_oneof![
        1 => any::<usize>().prop_map(Step::Reserve),
        1 => (any::<usize>(), text).prop_map(|(row, text)| Step::CopyRow(row, text)),
        2 => (proptest::collection::vec(more, 1..4), any::<usize>()).prop_map(|(more, cut)| Step::AppendSegments(more, cut)),
        6 => proptest::collection::vec(ids, 1..4).prop_map(Step::Append),
        2 => (any::<usize>(), any::<usize>()).prop_map(|(row, len)| Step::Truncate(row, len)),
        1 => any::<usize>().prop_map(Step::Fork),
        1 => proptest::collection::vec(any::<usize>(), 1..4).prop_map(Step::Gather),
        1 => any::<usize>().prop_map(Step::Remove),
        1 => Just(Step::Clear),
    ]
}

/// Applies the steps to a cache and to plain lists, and compares after each; a row must be what it is by itself, without
/// a cache.
fn follow(model: &Gpt2, storage: CacheStorage, dtype: DType, batch: usize, steps: &[Step]) {
    let n_positions = model.config().n_positions;
    let new_cache = |storage, batch, capacity, dtype| {
        let config = KvCacheConfig::new(batch, capacity).with_storage(storage).with_dtype(dtype);
        config.init(model.config(), &device()).unwrap()
    };
    let mut cache = new_cache(storage, batch, 9, dtype);
    let mut texts: Vec<Vec<u32>> = vec![Vec::new(); batch];
    for step in steps {
        match step {
            Step::Append(new) => {
                let new: Vec<Vec<u32>> = (0..texts.len()).map(|row| new[row % new.len()].clone()).collect();
                let max_len = texts.iter().zip(&new).map(|(text, new)| text.len() + new.len()).max().unwrap();
                if max_len > n_positions {
                    continue;
                }
                cache.reserve(max_len).unwrap();
                let k = new.iter().map(Vec::len).min().unwrap();
                let logits = append(model, &mut cache, &new, Logits::LastK(k));
                for (row, new) in new.iter().enumerate() {
                    texts[row].extend(new);
                    let naive = logits_of(model, &texts[row]);
                    for (actual, expected) in logits[row * k..].iter().zip(&naive[naive.len() - k..]) {
                        match dtype {
                            DType::F32 => assert_same(actual, expected),
                            _ => assert_within(actual, expected, 0.5),
                        }
                    }
                }
            }
            Step::Reserve(capacity) => {
                let before = cache.capacity();
                cache.reserve(capacity % (n_positions + 1)).unwrap();
                let blocks = (cache.capacity() - before) % KvCache::BLOCK == 0;
                assert!(blocks || cache.capacity() == n_positions);
            }
            Step::CopyRow(row, text) => {
                let row = row % texts.len();
                let other = if dtype == DType::F32 { DType::F32 } else { [DType::F32, dtype][row % 2] };
                let mut other = new_cache(STORAGES[text.len() % 3], 2, n_positions, other);
                if !text.is_empty() {
                    append(model, &mut other, &[vec![1], text.clone()], Logits::Last);
                }
                cache.reserve(text.len()).unwrap();
                cache.copy_row(row, &other, 1).unwrap();
                texts[row].clone_from(text);
            }
            Step::AppendSegments(more, cut) => {
                let more: Vec<Vec<u32>> = (0..texts.len()).map(|row| more[row % more.len()].clone()).collect();
                let max_len = texts.iter().zip(&more).map(|(text, more)| text.len() + more.len()).max().unwrap();
                if max_len > n_positions {
                    continue;
                }
                cache.reserve(max_len).unwrap();
                let segments = |(text, more): (&Vec<u32>, &Vec<u32>)| {
                    if more.is_empty() {
                        return vec![];
                    }
                    let whole = [&text[..], more].concat();
                    let mut other = new_cache(STORAGES[cut % 3], 2, n_positions, dtype);
                    append(model, &mut other, &[vec![1], whole.clone()], Logits::Last);
                    let (start, cut) = (text.len(), text.len() + cut % more.len());
                    let last = other.segment(1, cut..whole.len()).unwrap();
                    assert_eq!((last.tokens(), last.dtype()), (whole.len() - cut, dtype));
                    // A longer one, of which a part is used.
                    let first = other.segment(1, start..whole.len()).unwrap();
                    vec![(first, cut - start), (last, whole.len() - cut)]
                };
                cache.append_segments(&texts.iter().zip(&more).map(segments).collect::<Vec<_>>()).unwrap();
                texts.iter_mut().zip(more).for_each(|(text, more)| text.extend(more));
            }
            Step::Truncate(row, len) => {
                let row = row % texts.len();
                let len = len % (texts[row].len() + 1);
                cache.truncate(row, len).unwrap();
                texts[row].truncate(len);
            }
            Step::Fork(row) if texts.len() < 5 => {
                let row = row % texts.len();
                cache.fork(row, 2).unwrap();
                texts.extend([texts[row].clone(), texts[row].clone()]);
            }
            Step::Fork(_) => {}
            Step::Gather(rows) => {
                let rows: Vec<usize> = rows.iter().map(|row| row % texts.len()).collect();
                cache.gather(&rows).unwrap();
                texts = rows.iter().map(|&row| texts[row].clone()).collect();
            }
            Step::Remove(row) if texts.len() > 1 => {
                let row = row % texts.len();
                cache.remove(row).unwrap();
                texts.remove(row);
            }
            Step::Remove(_) => {}
            Step::Clear => {
                cache.clear();
                texts.iter_mut().for_each(Vec::clear);
            }
        }
        assert_eq!(cache.lens(), texts.iter().map(Vec::len).collect::<Vec<_>>());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn cached_logits_are_naive_logits(
        config in config(),
        batch in 1_usize..5,
        steps in proptest::collection::vec(step(), 1..16),
    ) {
        let model = random_model(config);
        for storage in STORAGES {
            for dtype in [DType::F32, DType::F16] {
                follow(&model, storage, dtype, batch, &steps);
            }
        }
    }
}

/// Where a tensor's elements lie.
fn address(tensor: Tensor<4>) -> usize {
    tensor.try_into_primitive::<Flex>().unwrap().bytes().as_ptr() as usize
}

#[test]
fn caches_that_do_not_grow_are_written_in_place_for_900_steps() {
    let model = random_model(Gpt2Config { n_positions: 910, ..small_config() });
    for (storage, batch) in STORAGES[1..].iter().flat_map(|storage| [(*storage, 1), (*storage, 2)]) {
        let mut cache = model.cache(storage, batch, 910).unwrap();
        // Rows of unequal length take another path than equal ones.
        let prompts = [vec![1, 2, 3], vec![4, 5]];
        append(&model, &mut cache, &prompts[..batch], Logits::Last);
        let addresses = |cache: &KvCache| {
            let buffers = (0..2).map(|layer| cache.buffers(layer).unwrap());
            buffers.flat_map(|(keys, values)| [address(keys), address(values)]).collect::<Vec<_>>()
        };
        let before = addresses(&cache);
        for step in 0..900 {
            append(&model, &mut cache, &vec![vec![step % 61]; batch], Logits::Last);
            assert_eq!(addresses(&cache), before, "moved at step {step}");
        }
        assert_eq!(cache.len(0), 903);
    }
}

/// A row that comes takes the first free slot, and may begin with what another one holds; the others stay where they are.
#[test]
fn rows_that_come_begin_with_what_others_hold_and_move_nothing() {
    let plain = random_model(small_config());
    for model in [plain.clone(), plain.pack(WeightFormat::F32).unwrap()] {
        for storage in STORAGES {
            let mut cache = model.cache(storage, 3, 20).unwrap();
            append(&model, &mut cache, &[vec![1, 2, 3, 4], vec![5], vec![6, 7]], Logits::Last);
            cache.remove(1).unwrap();
            let place = |cache: &KvCache| (address(cache.buffers(1).unwrap().1), cache.bytes().reserved);
            let before = place(&cache);
            cache.push().unwrap();
            assert_eq!(cache.lens(), [4, 2, 0]);
            cache.copy_prefix(0, &[2], 3).unwrap();
            assert!(storage == CacheStorage::Growing || place(&cache) == before, "there was a slot");
            // There is no slot left: the buffers become longer.
            cache.push().unwrap();
            cache.push().unwrap();
            cache.copy_prefix(1, &[3, 4], 2).unwrap();
            assert_eq!(cache.lens(), [4, 2, 3, 2, 2]);
            let new = [vec![8], vec![9], vec![10, 11], vec![12], vec![13]];
            let logits = append(&model, &mut cache, &new, Logits::Last);
            let texts = [&[1, 2, 3, 4, 8][..], &[6, 7, 9], &[1, 2, 3, 10, 11], &[6, 7, 12], &[6, 7, 13]];
            for (logits, text) in logits.iter().zip(texts) {
                assert_same(logits, &logits_of(&model, text).pop().unwrap());
            }
            for (from, to, len) in [(0, 0, 1), (0, 5, 1), (5, 0, 1), (1, 0, 4)] {
                assert!(
                    matches!(cache.copy_prefix(from, &[to], len), Err(Error::Mismatch { .. })),
                    "{from} {to} {len}"
                );
            }
            assert_eq!(cache.lens(), [5, 3, 5, 3, 3]);
        }
    }
}

/// What the others hold stays where it is, and goes on beside an empty slot.
#[test]
fn a_row_that_is_removed_copies_nothing() {
    let plain = random_model(small_config());
    let models = [plain.clone(), plain.pack(WeightFormat::F32).unwrap()];
    for (model, storage) in models.iter().flat_map(|model| [(model, STORAGES[1]), (model, STORAGES[2])]) {
        let mut cache = model.cache(storage, 4, 20).unwrap();
        append(model, &mut cache, &[vec![1, 2, 3], vec![4], vec![5, 6], vec![7, 8, 9, 10]], Logits::Last);
        let place = |cache: &KvCache| (address(cache.buffers(1).unwrap().1), cache.bytes().reserved);
        let before = place(&cache);
        cache.remove(1).unwrap();
        cache.remove(2).unwrap();
        assert_eq!(cache.lens(), [3, 2]);
        let logits = append(model, &mut cache, &[vec![11], vec![12, 13]], Logits::Last);
        for (logits, text) in logits.iter().zip([&[1, 2, 3, 11][..], &[5, 6, 12, 13]]) {
            assert_same(logits, &logits_of(model, text).pop().unwrap());
        }
        assert_eq!(place(&cache), before);
        // What is copied has no empty slots.
        let segment = cache.segment(1, 0..4).unwrap();
        cache.append_segments(&[vec![], vec![(segment, 1)]]).unwrap();
        cache.gather(&[1, 0]).unwrap();
        let logits = append(model, &mut cache, &[vec![14], vec![15]], Logits::Last);
        assert_eq!(cache.lens(), [6, 5]);
        assert_same(&logits[1], &logits_of(model, &[1, 2, 3, 11, 15]).pop().unwrap());
        cache.remove(0).unwrap();
        cache.remove(0).unwrap();
        assert!(cache.batch() == 0 && matches!(cache.remove(0), Err(Error::Mismatch { .. })));
    }
}

#[test]
fn bytes_are_the_closed_form() {
    let config = small_config();
    let (layers, width) = (config.n_layer, config.n_embd);
    let model = random_model(config.clone());
    let mut cache = model.cache(CacheStorage::Preallocated, 3, 20).unwrap();
    assert_eq!(cache.bytes().reserved, kv_bytes(&config, 3, 20));
    assert_eq!(cache.bytes().live, 0);
    append(&model, &mut cache, &[vec![1, 2], vec![3], vec![4, 5, 6]], Logits::Last);
    assert_eq!(cache.bytes().live, 2 * layers * 6 * width * 4);
    cache.truncate(2, 1).unwrap();
    assert_eq!(cache.bytes().live, 2 * layers * 4 * width * 4);
    assert_eq!(cache.bytes().reserved, kv_bytes(&config, 3, 20));

    let half = KvCacheConfig::new(3, 20).with_storage(CacheStorage::Preallocated).with_dtype(DType::F16);
    assert_eq!(half.init(&config, &device()).unwrap().bytes().reserved, kv_bytes(&config, 3, 20) / 2);

    let mut growing = model.cache(CacheStorage::Growing, 1, 20).unwrap();
    assert_eq!(growing.bytes().reserved, 0);
    append(&model, &mut growing, &[vec![1, 2, 3]], Logits::Last);
    assert_eq!(growing.bytes().reserved, kv_bytes(&config, 1, 3));
    append(&model, &mut growing, &[vec![1]], Logits::Last);
    // Pages hold the old row and the new one.
    let times = if has_page_kernels(&device()) { 2 } else { 1 };
    assert_eq!(growing.bytes().reserved, times * kv_bytes(&config, 1, 4));
}

/// Pages come with tokens, are shared by rows that are forked, and one is copied where both go on.
#[test]
fn pages_are_taken_as_tokens_come_and_shared() {
    if !has_page_kernels(&device()) {
        return;
    }
    let config = Gpt2Config { n_positions: 200, ..small_config() };
    let model = random_model(config.clone()).pack(WeightFormat::F32).unwrap();
    let mut cache = model.cache(CacheStorage::Paged, 1, 200).unwrap();
    let pages = |cache: &KvCache| cache.bytes().reserved / kv_bytes(&config, 1, 1);
    assert_eq!(pages(&cache), 0);
    let text: Vec<u32> = (0..150).map(|at| at * at % 61).collect();
    append(&model, &mut cache, std::slice::from_ref(&text), Logits::Last);
    assert_eq!(pages(&cache), 3);
    cache.fork(0, 9).unwrap();
    assert_eq!((pages(&cache), cache.lens()), (3, &[150; 10][..]), "nothing is copied");
    let new: Vec<Vec<u32>> = (0..10).map(|id| vec![id]).collect();
    let logits = append(&model, &mut cache, &new, Logits::Last);
    assert_eq!(pages(&cache), 2 + 10, "the last page of each row is its own");
    for (logits, new) in logits.iter().zip(&new) {
        let alone = logits_of(&model, &[&text[..], new].concat()).pop().unwrap();
        assert!(logits.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits()), "{new:?}");
    }
    // What left gives its pages to what comes.
    (0..9).for_each(|_| cache.remove(1).unwrap());
    cache.push().unwrap();
    append(&model, &mut cache, &[vec![1], text], Logits::Last);
    assert_eq!(pages(&cache), 2 + 10);
}

#[test]
fn each_row_has_its_own_number_of_logits() {
    let model = random_model(small_config());
    let texts = [vec![1, 2, 3, 4, 5, 6], vec![7, 8, 9], vec![9, 10, 11, 12]];
    let all: Vec<_> = texts.iter().map(|text| logits_of(&model, text)).collect();
    for storage in STORAGES {
        for counts in [[4, 1, 2], [1, 2, 3], [2, 2, 2], [1, 1, 1], [0, 2, 1]] {
            let mut cache = model.cache(storage, 3, 10).unwrap();
            append(&model, &mut cache, &texts.clone().map(|text| text[..1].to_vec()), Logits::Last);
            let new = texts.clone().map(|text| text[1..].to_vec());
            let tokens = TokenBatch::new(&new, &model).unwrap();
            let logits = rows(model.forward(&tokens, &mut cache, Logits::Counts(&counts)).unwrap());
            let expected = (0..3).flat_map(|row| &all[row][texts[row].len() - counts[row]..]);
            assert_eq!(logits.len(), counts.iter().sum::<usize>());
            logits.iter().zip(expected).for_each(|(logits, expected)| assert_same(logits, expected));
        }
        let mut cache = model.cache(storage, 2, 10).unwrap();
        let tokens = TokenBatch::new(&[vec![1_u32, 2], vec![3]], &model).unwrap();
        for counts in [&[1][..], &[1, 2], &[0, 0], &[3, 1], &[]] {
            let error = model.forward(&tokens, &mut cache, Logits::Counts(counts)).unwrap_err();
            assert!(matches!(error, Error::Mismatch { .. }) && cache.is_empty(), "{error}");
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error_and_changes_nothing() {
    let model = random_model(small_config());
    for storage in STORAGES {
        let mut cache = model.cache(storage, 2, 10).unwrap();
        append(&model, &mut cache, &[vec![1, 2, 3], vec![4]], Logits::Last);
        let mut forward = |rows: &[Vec<u32>], logits| {
            let error = model.forward(&TokenBatch::new(rows, &model).unwrap(), &mut cache, logits).unwrap_err();
            assert_eq!(cache.lens(), [3, 1]);
            error
        };
        let error = forward(&[vec![5; 8], vec![6]], Logits::Last);
        assert!(matches!(error, Error::CacheFull { row: 0, tokens: 11, capacity: 10 }), "{error}");
        let error = forward(&[vec![5], vec![6; 24]], Logits::Last);
        assert!(matches!(error, Error::ContextOverflow { row: 1, tokens: 25, n_positions: 24 }), "{error}");
        assert!(matches!(forward(&[vec![5]], Logits::Last), Error::Mismatch { .. }));
        assert!(matches!(forward(&[vec![5, 6], vec![7]], Logits::LastK(2)), Error::Mismatch { .. }));
        assert!(matches!(forward(&[vec![5], vec![7]], Logits::LastK(0)), Error::Mismatch { .. }));

        assert!(matches!(cache.truncate(2, 0), Err(Error::Mismatch { .. })));
        assert!(matches!(cache.truncate(1, 2), Err(Error::Mismatch { .. })));
        assert!(matches!(cache.gather(&[0, 2]), Err(Error::Mismatch { .. })));
        assert!(matches!(cache.gather(&[]), Err(Error::EmptyBatch)));
        assert!(matches!(cache.fork(7, 1), Err(Error::Mismatch { .. })));
        assert!(matches!(cache.fork(2, 0), Err(Error::Mismatch { .. })));
        assert!(matches!(cache.reserve(25), Err(Error::Mismatch { .. })));
        let mut long = model.cache(storage, 1, 24).unwrap();
        append(&model, &mut long, &[vec![7; 11]], Logits::Last);
        assert!(matches!(cache.copy_row(0, &long, 0), Err(Error::CacheFull { row: 0, tokens: 11, capacity: 10 })));
        assert!(matches!(cache.copy_row(2, &long, 0), Err(Error::Mismatch { .. })));
        assert!(matches!(cache.copy_row(0, &long, 1), Err(Error::Mismatch { .. })));
        let stranger = random_model(Gpt2Config { n_layer: 3, ..small_config() }).cache(storage, 1, 10).unwrap();
        assert!(matches!(cache.copy_row(0, &stranger, 0), Err(Error::Mismatch { .. })));
        assert!(matches!(cache.fork(0, usize::MAX), Err(Error::OutOfMemory { .. })));
        assert_eq!((cache.lens(), cache.len(9)), ([3, 1].as_slice(), 0));
    }
    assert!(matches!(model.cache(CacheStorage::Growing, 0, 10), Err(Error::EmptyBatch)));
    assert!(matches!(model.cache(CacheStorage::Growing, 1, 0), Err(Error::Mismatch { .. })));
    assert!(matches!(model.cache(CacheStorage::Preallocated, 1, 25), Err(Error::Mismatch { .. })));
    let error = model.cache(CacheStorage::Preallocated, usize::MAX / 8, 24).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }));
}

/// What a row was when it began with a segment: its next logits say so.
fn next_of(model: &Gpt2, segment: KvSegment) -> Vec<Vec<f32>> {
    let mut cache = model.cache(CacheStorage::Paged, 1, model.config().n_positions).unwrap();
    let tokens = segment.tokens();
    cache.append_segments(&[vec![(segment, tokens)]]).unwrap();
    append(model, &mut cache, &[vec![9]], Logits::Last)
}

/// What was preallocated is not asked for again, however full it is.
#[test]
fn preallocated_rows_come_and_go_in_exactly_their_memory() {
    if !has_page_kernels(&device()) {
        return;
    }
    let model = random_model(small_config());
    let mut long = model.cache(CacheStorage::Paged, 1, 24).unwrap();
    append(&model, &mut long, &[(1..24).collect()], Logits::Last);
    let long_row = vec![(long.segment(0, 0..23).unwrap(), 23)];
    let limit = MemoryLimit::bytes(kv_bytes(model.config(), 2, 24) + 1000);
    let config = KvCacheConfig::new(2, 24).with_storage(CacheStorage::Preallocated).with_limit(limit);
    let mut cache = config.init(model.config(), &device()).unwrap();
    let place = |cache: &KvCache| (address(cache.buffers(1).unwrap().1), cache.bytes().reserved);
    let before = place(&cache);
    cache.append_segments(&[long_row.clone(), long_row.clone()]).unwrap();
    cache.remove(1).unwrap();
    cache.push().unwrap();
    cache.append_segments(&[vec![], long_row]).unwrap();
    cache.gather(&[1, 0]).unwrap();
    cache.fork(0, 0).unwrap();
    cache.copy_row(0, &long, 0).unwrap();
    assert_eq!((cache.lens(), place(&cache)), (&[23, 23][..], before));
    let expected = next_of(&model, long.segment(0, 0..23).unwrap());
    for row in 0..2 {
        assert_eq!(next_of(&model, cache.segment(row, 0..23).unwrap()), expected);
    }
    assert!(matches!(cache.push(), Err(Error::OutOfMemory { .. })));
    // Room for a longer row is made for those that may come again, too.
    let config = KvCacheConfig::new(2, 10).with_storage(CacheStorage::Preallocated);
    let mut cache = config.init(model.config(), &device()).unwrap();
    cache.remove(1).unwrap();
    cache.reserve(24).unwrap();
    let before = place(&cache);
    cache.push().unwrap();
    assert_eq!((place(&cache), before.1), (before, kv_bytes(model.config(), 2, 24)));
}

/// A row that is to become a copy of another cache's is what it was if there is no room for that.
#[test]
fn a_copy_of_a_row_that_finds_no_room_leaves_the_row() {
    let model = random_model(small_config());
    let mut long = model.cache(CacheStorage::Paged, 1, 24).unwrap();
    append(&model, &mut long, &[vec![7; 20]], Logits::Last);
    for storage in STORAGES {
        // Two rows of up to 16 tokens, and no more.
        let limit = MemoryLimit::bytes(2 * kv_bytes(model.config(), 1, 16) + 10_000);
        let config = KvCacheConfig::new(2, 24).with_storage(storage).with_limit(limit);
        let Ok(mut cache) = config.init(model.config(), &device()) else { continue };
        let texts = [vec![1, 2, 3], vec![4]];
        let segments = texts.clone().map(|text| {
            let mut other = model.cache(CacheStorage::Paged, 1, 24).unwrap();
            append(&model, &mut other, std::slice::from_ref(&text), Logits::Last);
            vec![(other.segment(0, 0..text.len()).unwrap(), text.len())]
        });
        if cache.append_segments(&segments).is_err() {
            continue;
        }
        let before = cache.segment(0, 0..3).unwrap();
        let copied = cache.copy_row(0, &long, 0);
        if has_page_kernels(&device()) {
            assert!(matches!(copied, Err(Error::OutOfMemory { .. })), "{storage:?}: {copied:?}");
        }
        if copied.is_err() {
            assert_eq!(cache.lens(), [3, 1]);
            assert_eq!(next_of(&model, cache.segment(0, 0..3).unwrap()), next_of(&model, before));
        }
    }
}

#[test]
fn segments_that_do_not_fit_are_errors_and_change_nothing() {
    let model = random_model(small_config());
    for storage in STORAGES {
        let mut cache = model.cache(storage, 2, 10).unwrap();
        append(&model, &mut cache, &[vec![1, 2, 3], vec![4]], Logits::Last);
        assert!(matches!(cache.segment(2, 0..1), Err(Error::Mismatch { .. })));
        for positions in [0..0, 2..4, 1..1, 5..9] {
            assert!(matches!(cache.segment(0, positions), Err(Error::Mismatch { .. })));
        }
        let segment = cache.segment(0, 0..3).unwrap();
        assert_eq!((segment.tokens(), segment.bytes()), (3, 2 * 2 * 3 * 24 * 4));
        let mut refuse = |rows: &[Vec<_>]| {
            let error = cache.append_segments(rows).unwrap_err();
            assert_eq!(cache.lens(), [3, 1]);
            error
        };
        assert!(matches!(refuse(&[vec![]]), Error::Mismatch { .. }));
        assert!(matches!(refuse(&[vec![], vec![(segment.clone(), 4)]]), Error::Mismatch { .. }));
        let full = vec![(segment.clone(), 3); 3];
        assert!(matches!(refuse(&[full, vec![]]), Error::CacheFull { row: 0, tokens: 12, capacity: 10 }));
        let deep = random_model(Gpt2Config { n_layer: 3, ..small_config() });
        let mut other = deep.cache(storage, 1, 10).unwrap();
        append(&deep, &mut other, &[vec![1]], Logits::Last);
        assert!(matches!(refuse(&[vec![], vec![(other.segment(0, 0..1).unwrap(), 1)]]), Error::Mismatch { .. }));
    }
}

#[test]
fn a_cache_begun_with_segments_is_in_place_and_as_large_as_another() {
    let model = random_model(small_config());
    for storage in STORAGES {
        let mut first = model.cache(storage, 1, 20).unwrap();
        append(&model, &mut first, &[vec![1, 2, 3, 4]], Logits::Last);
        let rows = vec![vec![(first.segment(0, 0..4).unwrap(), 4)], vec![(first.segment(0, 0..2).unwrap(), 2)], vec![]];
        let new = |rows: &[Vec<_>]| {
            let config = KvCacheConfig::new(rows.len(), 20).with_storage(storage);
            config.init_with_segments(model.config(), &device(), rows)
        };
        let mut cache = new(&rows).unwrap();
        assert_eq!((cache.lens(), cache.storage(), cache.capacity()), ([4, 2, 0].as_slice(), storage, 20));
        match (storage, has_page_kernels(&device())) {
            // The row without tokens takes no page yet.
            (CacheStorage::Growing | CacheStorage::Paged, true) => {
                assert_eq!(cache.bytes().reserved, kv_bytes(model.config(), 2, 4));
            }
            (CacheStorage::Growing, false) => assert_eq!(cache.bytes().reserved, kv_bytes(model.config(), 3, 4)),
            _ => assert_eq!(cache.bytes().reserved, kv_bytes(model.config(), 3, 20)),
        }
        let before = address(cache.buffers(0).unwrap().0);
        let logits = append(&model, &mut cache, &[vec![5], vec![3], vec![1]], Logits::Last);
        for (logits, text) in logits.iter().zip([&[1, 2, 3, 4, 5][..], &[1, 2, 3], &[1]]) {
            assert_same(logits, &logits_of(&model, text).pop().unwrap());
        }
        let is_in_place = address(cache.buffers(0).unwrap().0) == before;
        assert!(is_in_place || storage == CacheStorage::Growing);
        assert!(matches!(new(&[]), Err(Error::EmptyBatch)));
    }
}

#[test]
fn a_cache_of_another_model_is_refused() {
    let model = random_model(small_config());
    let other = random_model(Gpt2Config { n_layer: 3, ..small_config() });
    let mut cache = other.cache(CacheStorage::Growing, 1, 10).unwrap();
    let tokens = TokenBatch::new(&[[1_u32]], &model).unwrap();
    assert!(matches!(model.forward(&tokens, &mut cache, Logits::Last), Err(Error::Mismatch { .. })));
}

#[test]
fn tokens_of_a_larger_vocabulary_are_refused() {
    let (model, larger) = (random_model(small_config()), random_model(Gpt2Config { vocab_size: 70, ..small_config() }));
    let tokens = TokenBatch::new(&[[65_u32]], &larger).unwrap();
    let mut cache = model.cache(CacheStorage::Growing, 1, 10).unwrap();
    assert!(matches!(model.forward(&tokens, &mut cache, Logits::Last), Err(Error::Mismatch { .. })));
    let tokens = TokenBatch::new(&[[60_u32]], &model).unwrap();
    let mut cache = larger.cache(CacheStorage::Growing, 1, 10).unwrap();
    assert!(larger.forward(&tokens, &mut cache, Logits::Last).is_ok());
}

#[test]
fn a_cache_of_integers_is_refused() {
    for dtype in [DType::I32, DType::F64, DType::U8] {
        let cache = KvCacheConfig::new(1, 10).with_dtype(dtype).init(&small_config(), &device());
        assert!(matches!(cache, Err(Error::Device(_))), "{dtype:?}");
    }
}

/// Biases of queries and keys that f32 holds and f16 does not.
struct LargeKeys;

impl ModuleMapper for LargeKeys {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let is_attention_bias = param.lazy_shape().to_vec() == [3 * 24];
        param.map(|tensor| if is_attention_bias { tensor * 1e6 } else { tensor })
    }
}

#[test]
fn keys_beyond_f16_end_a_request_with_an_error() {
    let model = random_model(small_config()).map(&mut LargeKeys);
    for storage in STORAGES {
        for is_packed in [false, true] {
            let model = if is_packed { model.clone().pack(WeightFormat::F32).unwrap() } else { model.clone() };
            let generator = |dtype| {
                let generator = Generator::new(model.clone()).with_decoder(Decoder::Kv(storage));
                generator.with_cache_dtype(dtype).unwrap().complete(&greedy(&[vec![1, 2, 3]], 4))
            };
            assert!(generator(DType::F32).is_ok() && generator(DType::BF16).is_ok());
            let half = generator(DType::F16);
            assert!(matches!(half, Err(Error::NotFinite { position: 3, .. })), "{storage:?}: {half:?}");
        }
    }
}

#[test]
fn a_half_precision_cache_holds_nearly_the_same() {
    let model = random_model(small_config());
    let mut cache = KvCacheConfig::new(1, 20).with_dtype(DType::F16).init(model.config(), &device()).unwrap();
    let ids = [3_u32, 14, 15, 9, 26];
    let mut last = Vec::new();
    for id in ids {
        last = append(&model, &mut cache, &[vec![id]], Logits::Last);
    }
    let exact = logits_of(&model, &ids).pop().unwrap();
    let difference = last[0].iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(difference > 0.0 && difference < 2e-2, "{difference}");
}
