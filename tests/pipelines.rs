//! What a GPU compiles. A file of its own, since launches are counted whoever makes them.

mod common;

use common::{devices, greedy};
use gpt2_burn::generate::Generator;
use gpt2_burn::{CacheStorage, Checkpoint, Logits, TokenBatch, WeightFormat, backends};

/// What a GPU compiles for a step it has compiled once: no kernel depends on how long a text is.
#[test]
fn a_growing_sequence_compiles_nothing_new() {
    let target = gpt2_burn_pair::TARGET;
    for (name, device) in devices() {
        let checkpoint = Checkpoint::from_bytes(target.config, target.weights).unwrap();
        let model = checkpoint.load_prepared(&device, WeightFormat::F32).unwrap();
        let mut cache = model.cache(CacheStorage::Preallocated, 2, 420).unwrap();
        let mut step = || {
            let tokens = TokenBatch::new(&[[3], [4]], &model).unwrap();
            let logits = model.forward(&tokens, &mut cache, Logits::Last).unwrap();
            let [batch, _, vocab_size] = logits.dims();
            backends::argmax(logits.reshape([batch, vocab_size])).into_data().num_elements()
        };
        let ((), first) = backends::kernels_launched(|| (0..20).for_each(|_| assert_eq!(step(), 2)));
        let ((), others) = backends::kernels_launched(|| (20..400).for_each(|_| assert_eq!(step(), 2)));
        assert!(others.is_subset(&first), "{name}: {} kernels and then {} others", first.len(), others.len());

        // The same for what generation makes of it, which runs ahead.
        let generator = Generator::new(model);
        let prompts = [vec![3_u32; 12], vec![4; 12]];
        let run = |new: usize| {
            backends::kernels_launched(|| generator.complete(&greedy(&prompts, new)).unwrap().report.steps_ahead)
        };
        let ((few, some), (many, all)) = (run(24), run(400));
        assert!(all.is_subset(&some), "{name}: {} kernels for 24 tokens, {} for 400", some.len(), all.len());
        assert_eq!((few > 16, many > 390), (backends::runs_ahead(&device), backends::runs_ahead(&device)), "{name}");
        if backends::runs_ahead(&device) {
            assert!((5..30).contains(&first.len()), "{name}: {} kernels", first.len());
        } else {
            assert!(first.is_empty());
        }
    }
}
