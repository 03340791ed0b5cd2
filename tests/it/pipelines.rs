//! What a GPU compiles, and what it does again. Each test in a process of its own, since launches are counted whoever makes them,
//! and a device may refuse to capture beside other work.

use crate::common::{alone, devices, greedy, skipped};
use gpt2_burn::backends::{CapturedStep, DecodeState, advance};
use gpt2_burn::burn::tensor::{DType, Device, Int, Tensor, TensorData};
use gpt2_burn::generate::Generator;
use gpt2_burn::{CacheStorage, Checkpoint, Logits, TokenBatch, WeightFormat, backends};

/// What a GPU compiles for a step it has compiled once: no kernel depends on how long a text is.
#[test]
fn a_growing_sequence_compiles_nothing_new() {
    alone(|| {
        let target = gpt2_burn_pair::TARGET;
        for (name, device) in devices() {
            let checkpoint = Checkpoint::from_bytes(target.config, target.weights).unwrap();
            let model = checkpoint.load_packed(&device, WeightFormat::F32).unwrap();
            let mut cache = model.cache(CacheStorage::Preallocated, 2, 420).unwrap();
            let mut step = || {
                let tokens = TokenBatch::new(&[[3], [4]], &model).unwrap();
                let logits = model.forward(&tokens, &mut cache, Logits::Last).unwrap();
                backends::argmax(logits).into_data().num_elements()
            };
            let ((), first) = backends::kernels_launched(|| (0..20).for_each(|_| assert_eq!(step(), 2)));
            let ((), others) = backends::kernels_launched(|| (20..400).for_each(|_| assert_eq!(step(), 2)));
            assert!(others.is_subset(&first), "{name}: {} kernels and then {} others", first.len(), others.len());

            // A cache that nothing else refers to is written in place: one that somebody holds has to be copied, by a kernel that
            // was not among those.
            let somebody = cache.buffers(0);
            let tokens = TokenBatch::new(&[[3], [4]], &model).unwrap();
            let (_, copying) = backends::kernels_launched(|| model.forward(&tokens, &mut cache, Logits::Last).unwrap());
            drop(somebody);
            assert_eq!(copying.difference(&others).count() > 0, backends::is_asynchronous(&device), "{name}");

            // The same for what generation makes of it, which decodes several steps at once.
            let generator = Generator::new(model);
            let prompts = [vec![3_u32; 12], vec![4; 12]];
            let run = |new: usize| {
                backends::kernels_launched(|| generator.complete(&greedy(&prompts, new)).unwrap().report.multi_steps)
            };
            let ((few, some), (many, all)) = (run(24), run(400));
            assert!(all.is_subset(&some), "{name}: {} kernels for 24 tokens, {} for 400", some.len(), all.len());
            assert_eq!(
                (few > 16, many > 390),
                (backends::is_asynchronous(&device), backends::is_asynchronous(&device)),
                "{name}"
            );
            if backends::is_asynchronous(&device) {
                assert!((5..30).contains(&first.len()), "{name}: {} kernels", first.len());
            } else {
                assert!(first.is_empty());
            }
        }
    });
}

/// What steps are taken with: logits, and a layer of a cache.
struct Cache {
    logits: Tensor<2>,
    layer: (Tensor<4>, Tensor<4>),
}

impl Cache {
    /// Of two rows, whose most likely tokens are 3 and 1.
    fn new(device: &Device) -> Self {
        let logits = TensorData::new(vec![0.0_f32, 1.0, 2.0, 3.0, 0.0, 3.0, 2.0, 1.0], [2, 4]);
        let part = || Tensor::ones([2, 1, 4, 8], (device, DType::F32));
        Self { logits: Tensor::from_data(logits, (device, DType::F32)), layer: (part(), part()) }
    }

    fn buffers(&self) -> Vec<(Tensor<4>, Tensor<4>)> {
        vec![self.layer.clone()]
    }
}

/// Before anything was chosen, behind 5 and 8 tokens.
fn start(device: &Device) -> DecodeState {
    let ints = |values: [i32; 2]| Tensor::<1, Int>::from_data(values, (device, DType::I32));
    let chosen = TensorData::new(vec![0_i32; 6], [2, 3]);
    DecodeState {
        ids: ints([0, 0]),
        context_lens: ints([5, 8]),
        chosen: Tensor::from_data(chosen, (device, DType::I32)),
    }
}

/// In place.
fn step(_: &(), cache: &mut Cache, state: DecodeState) -> DecodeState {
    advance(cache.logits.clone(), state)
}

/// With keys that go somewhere else.
fn moving_step(model: &(), cache: &mut Cache, state: DecodeState) -> DecodeState {
    cache.layer.0 = cache.layer.0.clone() + 1.0;
    step(model, cache, state)
}

/// A captured step, and none if this device does not capture, which is said.
fn captured(name: &str, device: &Device) -> Option<CapturedStep<()>> {
    if !backends::is_asynchronous(device) {
        return None;
    }
    let mut cache = Cache::new(device);
    let prepared = CapturedStep::<()>::prepare(device);
    // Twice, since the first time there is more to be compiled and allocated.
    let state = (0..2).fold(start(device), |state, _| step(&(), &mut cache, state));
    let captured = prepared.and_then(|()| CapturedStep::new(device, (), &mut cache, state, step, Cache::buffers));
    // A process that ends while a driver is at work can crash in it.
    device.sync().unwrap();
    captured.map_err(|error| skipped(&format!("{name} does not capture: {error}"))).ok()
}

#[test]
fn a_captured_step_is_replayed_where_it_was_captured_and_nowhere_else() {
    alone(|| {
        for (name, device) in devices() {
            let Some(captured) = captured(&name, &device) else { continue };
            for _ in 0..3 {
                captured.replay().unwrap();
            }
            let DecodeState { ids, context_lens, chosen } = captured.state().clone();
            assert_eq!(ids.try_into_vec_as::<i32>().unwrap(), [3, 1], "{name}");
            assert_eq!(context_lens.try_into_vec_as::<i32>().unwrap(), [5 + 2 + 3, 8 + 2 + 3], "{name}");
            assert_eq!(chosen.try_into_vec_as::<i32>().unwrap(), [3, 3, 3, 1, 1, 1], "{name}");
            // Another thread has a stream of its own, which would not be in order with this one's.
            let elsewhere = std::thread::spawn(move || (captured.replay(), captured));
            let (refused, captured) = elsewhere.join().unwrap();
            assert!(refused.is_err_and(|error| error.to_string().contains("thread")), "{name}");
            captured.replay().unwrap();
            let context_lens: Vec<i32> = captured.state().context_lens.clone().try_into_vec_as().unwrap();
            assert_eq!(context_lens, [11, 14], "{name}");
        }
    });
}

/// A replay of it would begin with the same tokens again and again.
#[test]
fn a_step_that_did_not_write_in_place_is_not_captured() {
    alone(|| {
        for (name, device) in devices() {
            if captured(&name, &device).is_none() {
                continue;
            }
            type Step = fn(&(), &mut Cache, DecodeState) -> DecodeState;
            let cases: [(&str, Step, bool); 2] = [("held", step, true), ("moved", moving_step, false)];
            for (what, step, is_held) in cases {
                let mut cache = Cache::new(&device);
                let mut state = start(&device);
                CapturedStep::<()>::prepare(&device).unwrap();
                for _ in 0..2 {
                    // Somebody holds the lengths, so that they are copied.
                    let held = is_held.then(|| state.context_lens.clone());
                    state = step(&(), &mut cache, state);
                    drop(held);
                }
                let held = is_held.then(|| state.context_lens.clone());
                let found = CapturedStep::new(&device, (), &mut cache, state, step, Cache::buffers);
                drop(held);
                // Or the device itself refuses to allocate in the midst of it.
                let error = found.err().unwrap_or_else(|| panic!("{what} on {name}"));
                if !error.to_string().contains("in place") {
                    skipped(&format!("{what}: {name} refuses by itself: {error}"));
                }
            }
            // A process that ends while a driver is at work can crash in it.
            device.sync().unwrap();
        }
    });
}
